"""recall: what of a model's true attention a method's blocks hold, on real queries, keys and values."""

import base64
import time

import numpy as np

import pbsattn

from .. import curves, kind
from ..tables import aligned, show
from . import ppl


class Kind(kind.KindBase):
    engines = ("transformers",)
    metrics = (kind.Metric("recall", "", "{:.4f}", change=False), kind.Metric("error", "", "{:.4f}", change=False))

    def __init__(self):
        self._captured: tuple = (None, {})  # a document and what its layers' attention got

    def add_arguments(self, parser):
        ppl.add_documents(parser, "8192")
        parser.add_argument(
            "--layers",
            default="6",
            metavar="N",
            help="how many layers, evenly spaced, or all, or their indices with commas, as 0,9 or 9, (default 6)",
        )
        parser.add_argument(
            "--picture",
            default="0",
            metavar="HEAD",
            help="the head whose blocks are kept as a picture, of each layer (default 0), or none",
        )

    def check(self, given):
        for _, path, _ in ppl.documents(given):
            ppl.read_text(path)
        for name, words in (("layers", ("all",)), ("picture", ("none",))):
            value = getattr(given, name)
            if value not in words and not all(part.isdigit() for part in value.rstrip(",").split(",")):
                raise ValueError(f"--{name} {value}: neither numbers nor {words[0]}")

    def identity(self, name, value):
        return [ppl.text_identity(path) for path in value] if name == "text" else value

    def items(self, given, engine):
        layers = _layers(given.layers, engine.layers)
        self._picture = None if given.picture == "none" else int(given.picture)
        made = []
        for label, path, tokens in ppl.documents(given):
            ids = ppl.document(engine, path, tokens)
            for layer in layers:
                params = dict(text=path.stem, tokens=tokens, layer=layer)
                made.append(kind.Item(f"{path.stem}-{tokens}-L{layer}", f"{label} {tokens}", params, (ids, layers)))
        return made

    def prepare(self, engine, item, attentions):
        from . import masses

        document = (item.params["text"], item.params["tokens"])
        if self._captured[0] != document:
            self._captured = (None, {})  # frees the last document's before the next one's come
            self._captured = (document, engine.capture(*item.data))
        q, k, v, scale = self._captured[1][item.params["layer"]]
        mass, out = masses.true_attention(q[0], k[0], v[0], scale)
        return {"q": q, "k": k, "v": v, "scale": scale, "mass": mass, "out": out}

    def measure(self, engine, item, attention, state):
        import torch

        from .. import engines
        from . import masses

        if attention.method is None:
            raise kind.Unsupported(f"{attention.name} chooses no blocks")
        if "settings" in attention.settings:
            raise kind.Unsupported(f"{attention.name} has settings by layer and head; recall takes one set of options")
        options = engines.options_of(attention)
        start = time.perf_counter()
        out, kept, order = self._oracle(options, state) if options["score"] == "exact" else self._library(attention, state)
        engine.wait()
        seconds = time.perf_counter() - start
        by_block = masses.block_masses(state["mass"], order, options["segment"])
        recall = (by_block * kept).sum(-1).mean(-1)
        norm = state["out"].square().sum((1, 2)).sqrt()
        error = (out.float() - state["out"]).square().sum((1, 2)).sqrt() / norm
        causal = torch.ones_like(kept[0]).tril().sum()
        heads = {"recall": recall, "error": error, "density": kept.sum((1, 2)) / causal}
        heads = {name: [round(float(x), 6) for x in values] for name, values in heads.items()}
        record = {
            "metrics": {"recall": sum(heads["recall"]) / len(recall), "error": sum(heads["error"]) / len(error)},
            "units": {"recall": heads["recall"], "error": heads["error"]},
            "heads": heads,
            "density": sum(heads["density"]) / len(recall),
            "seconds": seconds,
        }
        if self._picture is not None and self._picture < len(recall):
            record["picture"] = _picture(self._picture, kept, by_block)
        return record

    @staticmethod
    def _library(attention, state):
        """Output, kept blocks and order of the keys, [heads, ...], by the library."""
        out, trace = pbsattn.trace(state["q"], state["k"], state["v"], method=attention.method, scale=state["scale"])
        device = state["q"].device
        return out[0], trace.kept[0].to(device), trace.order[0].to(device)

    @staticmethod
    def _oracle(options, state):
        """The same by the true masses that recall is counted in, in PyTorch: the devices would compute them again."""
        from . import masses

        order = (
            pbsattn.trace(
                state["q"],
                state["k"],
                state["v"],
                method="pbs",
                permutation=options["permutation"],
                order_scope=options["order_scope"],
                segment=options["segment"],
                scale=state["scale"],
                top_p=1e-6,
            )[1]
            .order[0]
            .to(state["q"].device)
        )
        by_block = masses.block_masses(state["mass"], order, options["segment"])
        kept = masses.oracle_choice(by_block, order, options)
        out = masses.attend(state["q"][0], state["k"][0], state["v"][0], state["scale"], kept, order, options["segment"])
        return out, kept, order

    def report(self, records, methods):
        """Each family at equal density, and the density that it needs for equal error and recall."""
        groups = {}
        for record in records:
            if "error" not in record:
                groups.setdefault(record["group"], {}).setdefault(record["method"], []).append(record)
        lines = []
        for group, by_method in groups.items():
            for name, specs in curves.families(methods).items():
                specs = [spec for spec in specs if spec in by_method]
                if len(specs) > 1:
                    lines.append([group, name, *_family_row([by_method[spec] for spec in specs])])
        if not lines:
            return ""
        wanted = [f"{d:g}" for d in curves.DENSITIES]
        header = [
            "group",
            "method",
            *(f"error at {d}" for d in wanted),
            *(f"recall at {d}" for d in wanted),
            "density for error 5%",
            "10%",
            "for recall 95%",
        ]
        return "\nat equal density, and the density needed:\n" + aligned([header, *lines], left=header[:2]) + "\n"


def _mean(records, name):
    return float(np.mean([np.mean(record["heads"][name]) for record in records]))


def _family_row(settings):
    """Cells of one family in one group; `settings` are the records of each setting."""
    density = [_mean(records, "density") for records in settings]
    error = [_mean(records, "error") for records in settings]
    recall = [_mean(records, "recall") for records in settings]
    for values in (error, recall):
        for wanted in curves.DENSITIES:
            place = curves.at(density, wanted)
            yield show(place and float(place.of(values)), "{:.3f}")
    yield show(curves.crossing(density, error, 0.05), "{:.3f}")
    yield show(curves.crossing(density, error, 0.10), "{:.3f}")
    yield show(curves.crossing(density, [1 - value for value in recall], 0.05), "{:.3f}")


def _layers(text, count):
    if text == "all":
        return list(range(count))
    numbers = [int(part) for part in text.rstrip(",").split(",")]
    if "," not in text:
        wanted = min(numbers[0], count)
        if wanted < 1:
            raise ValueError(f"--layers {text}: at least one")
        return sorted({round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)})
    if max(numbers) >= count:
        raise ValueError(f"--layers {text}: the model has layers 0 .. {count - 1}")
    return sorted(set(numbers))


def _picture(head, kept, by_block):
    """Rows x blocks of a head, as base64: `kept`, bits of rows one after the other; `mass`, a byte each, 255 for all of a
    row's attention and 0 for less than 1e-5 of it, logarithmic between."""
    level = 255 * (1 + by_block[head].clamp(1e-5, 1).log10() / 5)

    def encode(array):
        return base64.b64encode(array.tobytes()).decode("ascii")

    return {
        "head": head,
        "rows": kept.shape[1],
        "blocks": kept.shape[2],
        "kept": encode(np.packbits(kept[head].cpu().numpy())),
        "mass": encode(level.round().byte().cpu().numpy()),
    }
