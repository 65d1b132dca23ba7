"""ppl: what an attention costs in likelihood on long texts."""

import hashlib
import pathlib

from .. import curves, kind
from ..tables import aligned

BLOCK = 256  # tokens whose mean is one unit of the intervals: neighbouring tokens' losses hang together


def _named(text):
    """Label and path of LABEL=FILE or FILE."""
    label, equals, path = text.partition("=")
    path = pathlib.Path(path if equals else label)
    return (label if equals else path.stem), path


def text_identity(text):
    """A text as run.json holds it."""
    label, path = _named(text)
    return {"label": label, "name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def read_text(path):
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"text {path}: no such file; name one in UTF-8")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path}: not UTF-8 at byte {error.start}; convert it") from None


def document(engine, path, tokens, option="--lengths"):
    """The first tokens of a text. ValueError if it has fewer, which names the option that says how many."""
    text = read_text(path)
    ids = engine.encode(text[: 8 * tokens])  # characters: more than any text needs, and tokenizing a long one takes its time
    if len(ids) < tokens:
        ids = engine.encode(text)
    if len(ids) < tokens:
        raise ValueError(f"text {path}: {len(ids)} tokens, {tokens} needed; pass a longer text or smaller {option}")
    return ids[:tokens]


def add_documents(parser, lengths):
    """The options that name the documents of a run."""
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="[LABEL=]FILE",
        help="a text in UTF-8; may be repeated. Texts of one label are one group of the table",
    )
    parser.add_argument(
        "--lengths", default=lengths, metavar="N,N,...", help=f"tokens of each text from its beginning (default {lengths})"
    )


def documents(given):
    """(label, path, tokens) of every document."""
    try:
        lengths = [int(each) for each in given.lengths.split(",")]
    except ValueError:
        raise ValueError(f"--lengths {given.lengths}: not numbers with commas between") from None
    if min(lengths) < 2 * BLOCK:
        raise ValueError(f"--lengths {given.lengths}: {min(lengths)} is under {2 * BLOCK} tokens")
    texts = [_named(text) for text in given.text]
    if len({path.stem for _, path in texts}) != len(texts):
        raise ValueError(f"--text {' '.join(given.text)}: two files of one name; rename one")
    return [(label, path, n) for label, path in texts for n in lengths]


def _means(at, values):
    """The mean over each block of tokens; `at` says which token a value is of."""
    blocks = {}
    for token, value in zip(at, values):
        blocks.setdefault(token // BLOCK, []).append(value)
    return [round(sum(block) / len(block), 6) for block in blocks.values()]


class Kind(kind.KindBase):
    metrics: tuple[kind.Metric, ...] = (
        kind.Metric("nll", "nats"),
        kind.Metric("kl", "nats", change=False),
        kind.Metric("top1", "", "{:.3f}", change=False),
    )

    def add_arguments(self, parser):
        add_documents(parser, "8192")
        parser.add_argument(
            "--judge",
            default="half",
            metavar="N",
            help="tokens at the end of each document whose likelihood counts: a number, half (default) or all; "
            "early ones see few blocks, so that nothing can be left out",
        )

    def check(self, given):
        for _, path, tokens in documents(given):
            read_text(path)
            if self._judged(given, tokens) < BLOCK:
                raise ValueError(f"--judge {given.judge}: under {BLOCK} tokens, the least that a mean is taken over")

    def identity(self, name, value):
        return [text_identity(path) for path in value] if name == "text" else value

    def items(self, given, engine):
        made = []
        for label, path, tokens in documents(given):
            params = dict(text=path.stem, tokens=tokens, judged=self._judged(given, tokens))
            made.append(kind.Item(f"{path.stem}-{tokens}", f"{label} {tokens}", params, document(engine, path, tokens)))
        return made

    @staticmethod
    def _judged(given, tokens):
        """How many tokens count: whole blocks, and never the first token, which nothing predicts."""
        if given.judge in ("half", "all"):
            count = tokens // 2 if given.judge == "half" else tokens - 1
        else:
            try:
                count = int(given.judge)
            except ValueError:
                raise ValueError(f"--judge {given.judge}: neither a number nor half nor all") from None
        return min(count, tokens - 1) // BLOCK * BLOCK

    def prepare(self, engine, item, attentions):
        return engine.scorer(item.data, item.params["judged"], attentions)

    def measure(self, engine, item, attention, state):
        return self.record(state(attention))

    @staticmethod
    def record(score):
        parts = {"nll": score.nll, "kl": score.kl, "top1": score.same}
        blocks = {name: _means(score.at, values) for name, values in parts.items() if values is not None}
        return {
            "metrics": {name: sum(means) / len(means) for name, means in blocks.items()},
            "units": blocks,
            "density": score.density,
            "layers": score.layers,
            "seconds": score.seconds,
        }

    def report(self, records, methods):
        """Change of the mean loss at equal density."""
        lines = [
            [group, name, *(f"{c[0]:+.4f} ±{c[1]:.4f}" if c else "" for c in cells)]
            for group, name, cells in curves.by_density(records, methods, "nll")
        ]
        if not lines:
            return ""
        header = ["group", "method", *(f"at density {d:g}" for d in curves.DENSITIES)]
        return "\nchange of nll (± standard error) at equal density:\n" + aligned([header, *lines], left=header[:2]) + "\n"
