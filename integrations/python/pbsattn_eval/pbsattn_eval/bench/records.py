"""Tables, JSON and plots of results."""

import datetime
import json
import pathlib
import statistics
import subprocess

import torch

import pbsattn
from pbsattn.program import write_whole

from ..tables import aligned, show


def table(results):
    """One line for each attention and length; ratios are against the first attention of the length, those of chunks against
    the same attention over the whole prompt."""
    against_whole = [_against_whole(result, results) for result in results]
    in_chunks = any(each is not None for each in against_whole)
    rows = [
        (
            "tokens",
            "attention",
            "first token",
            "speed-up",
            "in attention",
            "density",
            "peak memory",
            "perplexity",
            "other tokens",
            *["chunks/whole"] * in_chunks,
        )
    ]
    for (base, result), ratio in zip(_with_baseline(results), against_whole):
        change = "" if result is base or result.perplexity is None else f" ({result.perplexity / base.perplexity - 1:+.2%})"
        memory = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f} GiB"
        rows.append(
            (
                str(result.tokens),
                result.attention,
                f"{result.ttft * 1e3:.1f} ms",
                f"{result.speed_up(base):.2f}x",
                f"{result.attention_seconds * 1e3:.1f} ms {result.attention_seconds / result.ttft:.0%}",
                show(result.density, "{:.3f}"),
                memory,
                show(result.perplexity, "{:.4f}") + change,
                show(result.differing, "{:.2%}"),
                *[show(ratio, "{:.3f}")] * in_chunks,
            )
        )
    return aligned(rows, left=("attention",))


def _with_baseline(results):
    bases = {}
    for result in results:
        yield bases.setdefault(result.tokens, result), result


def _against_whole(result, results):
    """The time of a prompt in chunks, as a share of the same attention's over the whole; None where that isn't there."""
    whole = next((each for each in results if (each.tokens, each.attention) == (result.tokens, result.whole)), None)
    return None if whole is None else 1 / result.speed_up(whole)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def device_name(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{pbsattn.describe_cpu().processor}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def commit():
    """Of the tree that this file lies in; the version where it is installed."""
    here = pathlib.Path(__file__).parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() if git.returncode == 0 else pbsattn.__version__


def record(suite, case, params, metric, value, unit, peer=None, peer_value=None, ratio=None, runs=1, spread=0.0):
    """A measurement in the form of every benchmark of this project (docs/dev/measuring.md), but for `origin`."""
    measured = dict(suite=suite, case=case, params=params, metric=metric, value=value, unit=unit)
    against = dict(peer=peer, peer_value=peer_value, ratio=ratio) if peer else dict(peer=None, peer_value=None, ratio=None)
    return measured | against | dict(runs=runs, spread=spread)


def origin(device, name):
    """What every record also has: where and when it was measured."""
    return dict(device=device_name(device), commit=name or commit(), date=datetime.date.today().isoformat())


def records(results, model, text):
    """The records of a prefill."""
    made = []
    for base, result in _with_baseline(results):
        ttft = result.ttft
        spread = (max(result.seconds) - min(result.seconds)) / ttft
        params = dict(model=model, text=text, n=result.tokens, layers_taken=result.layers)
        if result.chunk is not None:
            params["chunk"] = result.chunk
        # metric, value, unit, its own and the baseline's value for the ratio (above 1 is better for the attention)
        rows = [
            ("time to first token", ttft, "s", ttft, base.ttft),
            ("chunks/whole", _against_whole(result, results), "of the whole prompt's", None, None),
            ("time in attention", result.attention_seconds, "s", result.attention_seconds, base.attention_seconds),
            ("density", result.density, "of causal blocks", None, None),
            ("peak memory", result.peak_bytes, "B", result.peak_bytes, base.peak_bytes),
            ("perplexity", result.perplexity, "", result.perplexity, base.perplexity),
            ("differing tokens", result.differing, "of positions", None, None),
        ]
        for metric, value, unit, own, other in rows:
            if value is None:
                continue
            against = result is not base and own is not None and other is not None
            ratio = result.speed_up(base) if metric == "time to first token" else other / own if against else None
            made.append(
                record(
                    "prefill",
                    result.attention,
                    params,
                    metric,
                    value,
                    unit,
                    base.attention if against else None,
                    other,
                    ratio,
                    len(result.seconds),
                    spread if metric == "time to first token" else 0.0,
                )
            )
    return made


def write_json(path, made):
    write_whole(path, json.dumps(made, indent=1) + "\n")


def plot(made, base, title):
    """Time to first token by length, as BASE.png and BASE.svg; from records, so from a JSON file too."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pbsattn"
    from matplotlib import pyplot

    rows = [each for each in made if each["metric"] in ("time to first token", "time in attention")]
    lengths = sorted({each["params"]["n"] for each in rows})
    names = list(dict.fromkeys(each["case"] for each in rows))
    value = {(each["params"]["n"], each["case"], each["metric"]): each["value"] for each in rows}
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(2.6 * len(lengths) + 0.8, 3.4), squeeze=False)
    colors = pyplot.get_cmap("tab10").colors
    for panel, length in zip(panels[0], lengths):
        here = [name for name in names if (length, name, "time to first token") in value]
        for i, name in enumerate(here):
            whole = value[(length, name, "time to first token")]
            inside = min(value.get((length, name, "time in attention"), 0.0), whole)
            panel.bar(i, whole - inside, color="0.8")
            panel.bar(i, inside, bottom=whole - inside, color=colors[names.index(name) % 10])
            panel.text(i, whole, f"{whole:.3g} s", ha="center", va="bottom", fontsize=8)
        panel.set_title(f"{length:,} tokens", fontsize=9)
        panel.set_xticks(range(len(here)), here, rotation=30, ha="right", fontsize=8)
        panel.margins(y=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("time to first token (s)\ncolour: in attention")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        figure.savefig(f"{base}{suffix}", dpi=150, metadata=metadata)
    pyplot.close(figure)


def spread_of(results):
    return max((max(r.seconds) - min(r.seconds)) / statistics.median(r.seconds) for r in results)
