#!/usr/bin/env python3
"""Puts measured results into README.md and other pages, between their markers, so that no number there is typed by hand.

tools/readme.py               every table anew, from the records in results/
tools/readme.py --check       ends with 1, and names the pages, where a table isn't what the records say
./dev demo | tee build/demo.txt && tools/readme.py --demo build/demo.txt
                              keeps what the demo printed, at the commit that is checked out, as results/demo.txt
"""

import argparse
import datetime
import json
import math
import pathlib
import re
import statistics
import subprocess

from common import Failure, run_main, write_whole
from vllm_table import vllm_table

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "results"
DEMO = RESULTS / "demo.txt"


def replace_between(page, text, marker, content):
    """The text of a page with other content between the marks of that name."""
    pattern = re.compile(rf"<!-- {marker} -->.*?<!-- /{marker} -->", re.DOTALL)
    if not pattern.search(text):
        raise Failure(f"{page.name}: no marker <!-- {marker} -->; put it and <!-- /{marker} --> where the text goes")
    return pattern.sub(lambda _: f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->", text)


def words(params):
    flat = {key: value for key, value in params.items() if not isinstance(value, dict) and value is not None}
    return ", ".join(f"{key} {value}" for key, value in flat.items())


def shown(value, form):
    return "" if value is None else form.format(value)


def number(value):
    return shown(value, "{:.4g}")


def table(records):
    """A row for each measurement, with the command, machine, commit and date that they come from."""
    first = records[0]
    lines = [
        f"`./dev bench {first['suite']}` on {first['device']}, commit {first['commit']}, {first['date']}; medians of "
        f"{max(row['runs'] for row in records)} run(s), largest spread {max(r['spread'] for r in records):.0%}:\n",
        "| case | parameters | metric | value | against | its value | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in records:
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
        lines.append(
            f"| {row['case']} | {words(row['params'])} | {row['metric']} | {number(row['value'])} {row['unit']} | "
            f"{row['peer'] or ''} | {number(row['peer_value'])} | {ratio} |"
        )
    return "\n".join(lines)


MODEL = {"suite": "prefill", "metric": "time to first token", "device": "NVIDIA H200, torch 2.11.0+cu130"}
CALL = {"suite": "gpu", "case": "pbs", "metric": "time", "n": 131072, "peer": "FlashAttention-3"}
DENSE = {
    "suite": "gpu",
    "case": "dense",
    "metric": "rate",
    "n": 131072,
    "head_dim": 128,
    "peer": "FlashAttention-3",
    "commit": "d008252",
}
CORE = {
    "suite": "cpu-torch",
    "case": "dense",
    "metric": "rate",
    "n": 8192,
    "head_dim": 128,
    "path": "amx_bf16",
    "threads": 1,
}

# The rows of the first page: what was done, on what, by what else, and the records of ours and, where it isn't our record's
# own peer, of the other (values of a record or of its params).
SUMMARY = [
    (
        "first token of a 131,072-token prompt, 1.5B model",
        "H200, transformers",
        "FlashAttention-3",
        {**MODEL, "case": "two-step", "n": 131072},
        {**MODEL, "case": "fa3", "n": 131072},
    ),
    (
        "first token of a 32,768-token prompt, the same model",
        "H200, transformers",
        "FlashAttention-3",
        {**MODEL, "case": "two-step", "n": 32768},
        {**MODEL, "case": "fa3", "n": 32768},
    ),
    ("one attention call, 131,072 tokens, 32 heads", "H200", "FlashAttention-3", CALL, None),
    ("dense attention of 131,072 tokens, nothing left out", "H200", "FlashAttention-3", DENSE, None),
    ("exact attention of 8,192 tokens, nothing left out", "one Xeon core with AMX", "PyTorch", CORE, None),
]


def find(records, wanted):
    """The one record that has these values; Failure where there is none, or more."""
    found = [
        record
        for record in records
        if all({**record, **record["params"]}.get(name) == value for name, value in wanted.items())
    ]
    if len(found) != 1:
        raise Failure(f"{wanted}: {len(found)} records in results; the first page's row needs one")
    return found[0]


def amount(value, unit):
    """A time or rate in three digits, times below a second in milliseconds."""
    if unit == "s" and value < 1:
        value, unit = value * 1e3, "ms"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"


def summary_table():
    """What a reader asks first: a row for each entry of SUMMARY, and the demo's, with its method."""
    records = [record for path in sorted(RESULTS.glob("*.json")) for record in json.loads(path.read_text())]
    lines = ["| | where | before | with pbsattn | faster |", "| --- | --- | --- | --- | --- |"]
    for what, where, other, ours, peer in SUMMARY:
        record = find([record for record in records if record["suite"] == ours["suite"]], ours)
        before = find(records, peer)["value"] if peer else record["peer_value"]
        method = "full" if record["case"] == "dense" else record["case"]
        faster = record["value"] / before if record["unit"].endswith("/s") else before / record["value"]
        lines.append(
            f"| {what} | {where} | {other}: {amount(before, record['unit'])} | "
            f"{amount(record['value'], record['unit'])}, `{method}` | **{faster:.{1 if faster >= 1.2 else 2}f}x** |"
        )
    times = re.findall(r"^(ggml|auto|pbs) +([\d.]+) s", DEMO.read_text(), re.MULTILINE)
    seconds = {kind: float(time) for kind, time in times}
    before = seconds.pop("ggml")
    ((method, after),) = seconds.items()
    lines.append(
        "| first token of an 8,160-token prompt, 135M model | two CPU threads, llama.cpp | llama.cpp's attention: "
        f"{amount(before, 's')} | {amount(after, 's')}, `{method}` | **{before / after:.1f}x** |"
    )
    return "\n".join(lines)


def models_table(records):
    """One Markdown table for each model and text that `python -m pbsattn_eval bench prefill` measured."""
    parts = []
    for source in dict.fromkeys((r["params"]["model"], r["params"]["text"], r["commit"]) for r in records):
        rows = [r for r in records if (r["params"]["model"], r["params"]["text"], r["commit"]) == source]
        value = {(r["params"]["n"], r["case"], r["metric"]): r["value"] for r in rows}
        cases = list(dict.fromkeys((r["params"]["n"], r["case"]) for r in rows))
        baselines = [b for b in ("flash", "cudnn", "fa3") if any(case == b for _, case in cases)]
        first = rows[0]
        timed = [r for r in rows if r["metric"] == "time to first token"]
        chunks = any(metric == "chunks/whole" for _, _, metric in value)
        runs, spread = ({r["runs"] for r in timed}, [r["spread"] for r in timed])
        counted = f"{min(runs)} to {max(runs)}" if len(runs) > 1 else f"{min(runs)}"
        parts.append(
            f"{first['params']['model']}; {first['params']['text']}. {first['device']}, commit {first['commit']}, "
            f"{first['date']}; medians of {counted} runs, spread {statistics.median(spread):.1%} in "
            f"the median, {max(spread):.0%} at most:\n\n"
            "| tokens | attention | first token | in attention | "
            + "".join(f"against {b} | " for b in baselines)
            + ("chunks/whole | " if chunks else "")
            + "density | peak memory | perplexity | other tokens |\n"
            + "| --- " * (8 + len(baselines) + chunks)
            + "|"
        )
        for n, case in cases:
            own = {metric: found for (length, of, metric), found in value.items() if (length, of) == (n, case)}
            base = next(of for length, of in cases if length == n)
            ttft, inside = own["time to first token"], own.get("time in attention")
            dense = value.get((n, base, "perplexity"))
            change = f" ({own['perplexity'] / dense - 1:+.2%})" if dense and case != base else ""
            peers = [value.get((n, b, "time to first token")) for b in baselines]
            parts[-1] += (
                f"\n| {n} | `{case}` | {ttft * 1e3:.{0 if ttft >= 0.1 else 1}f} ms | "
                + ("| " if inside is None else f"{inside * 1e3:.0f} ms, {inside / ttft:.0%} | ")
                + "".join("| " if peer is None else f"{peer / ttft:.2f}x | " for peer in peers)
                + (f"{shown(own.get('chunks/whole'), '{:.2f}')} | " if chunks else "")
                + f"{shown(own.get('density'), '{:.3f}')} | {own['peak memory'] / 2**30:.2f} GiB | "
                + f"{shown(own.get('perplexity'), '{:.3f}')}{change} | "
                + f"{shown(own.get('differing tokens'), '{:.2%}')} |"
            )
    return "\n\n".join(parts)


def fidelity_table(records):
    """A row for each text and attention, from the metrics that the suite "fidelity" measures of it."""
    rows = {}
    for record in records:
        params = record["params"]
        rows.setdefault((params["model"], params["text"], record["case"]), {})[record["metric"]] = record
    lines = [
        "| model, text | attention | density | perplexity against full | mean KL | same top-1 token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def place(row):  # full first, then the densest
        return row[0][:2], -row[1]["density"]["value"] if "density" in row[1] else -2.0

    for (model, source, case), found in sorted(rows.items(), key=place):
        if case == "full":
            lines.append(f"| {model}, {source} | full | 1 | {found['perplexity']['value']:.2f} | | |")
            continue
        change = found["perplexity_change"]
        lines.append(
            f"| | `{case}` | {found['density']['value']:.3f} | {change['value']:+.2f} ± {change['spread']:.2f} % | "
            f"{found['kl_mean']['value']:.4f} | {found['top1_agreement']['value']:.1f} % |"
        )
    stamps = sorted({f"{record['device']}, commit {record['commit']}, {record['date']}" for record in records})
    return (
        f"`./dev bench fidelity` on {'; '.join(stamps)}; {records[0]['params']['n']} tokens, "
        f"{records[0]['params']['positions']} positions:\n\n" + "\n".join(lines)
    )


def learned_table(records):
    """A row for each order that `./dev learn` judged, a column for each of its texts."""
    groups = list(dict.fromkeys(r["params"]["group"] for r in records))
    if len(groups) == 2:  # one text, and all of it
        groups = groups[:1]
    value = {(r["case"], r["params"]["group"]): r for r in records}
    lines = [f"| order | {' | '.join(groups)} |", "| --- " * (1 + len(groups)) + "|"]
    for case in dict.fromkeys(r["case"] for r in records):
        cells = [f"{value[case, group]['value']:+.4f} ± {value[case, group]['spread']:.4f}" for group in groups]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    first = records[0]
    return (
        f"{first['params']['model']} on {stamp(first)}; nats a token against no order, at densities about "
        f"{first['params']['density']:.3f}:\n\n" + "\n".join(lines)
    )


def stamp(record):
    return f"{record['device']}, commit {record['commit']}, {record['date']}"


def op_table(records):
    """What `python -m pbsattn_eval bench op` and `overhead` measured: a table for each, and each machine."""
    parts = []
    times = [r for r in records if r["suite"] == "op"]
    for where in dict.fromkeys(map(stamp, times)):
        rows = [r for r in times if stamp(r) == where]
        base = rows[0]["case"]
        parts.append(
            f"`python -m pbsattn_eval bench op` on {where}; medians of {rows[0]['runs']} runs, "
            f"{rows[0]['params']['heads']} heads, {rows[0]['params']['dtype']}:\n\n"
            f"| tokens | head_dim | attention | time | against `{base}` | density | error of the last rows |\n"
            "| --- | --- | --- | --- | --- | --- | --- |"
        )
        for row in rows:
            params = row["params"]
            parts[-1] += (
                f"\n| {params['n']} | {params['head_dim']} | `{row['case']}` | {row['value'] * 1e3:.1f} ms | "
                f"{shown(row['ratio'], '{:.2f}x')} | {shown(params['density'], '{:.3f}')} | "
                f"{shown(params['error'], '{:.1e}')} |"
            )
    calls = [r for r in records if r["suite"] == "overhead"]
    for where in dict.fromkeys(map(stamp, calls)):
        rows = [r for r in calls if stamp(r) == where]
        value = {(r["case"], r["metric"]): r["value"] for r in rows}
        micros = {key: f"{seconds * 1e6:.1f} us" for key, seconds in value.items()}
        runs = max(r["runs"] for r in rows)
        parts.append(
            f"`python -m pbsattn_eval bench overhead` on {where}; medians of {runs} runs of 50 calls:\n\n"
            "| attention | first call | a call on the host | of it the library | path through Python | a new plan |\n"
            "| --- | --- | --- | --- | --- | --- |"
        )
        for case in dict.fromkeys(r["case"] for r in rows):
            parts_of = ("of a call", "in the library", "of the Python path", "of a new plan")
            own = [micros.get((case, f"host time {of}"), "") for of in parts_of]
            parts[-1] += f"\n| `{case}` | {value[case, 'first call'] * 1e3:.1f} ms | {' | '.join(own)} |"
    return "\n\n".join(parts)


def lists_table(records):
    """What `./dev bench lists` counted: a row for each method and input."""
    lines = [
        "| method | public code | input | decisions | float32: reference, CPU | bf16 | its float32 on bf16's numbers | "
        "bf16, ties aside |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {}
    for record in records:
        rows.setdefault((record["case"], record["params"]["input"]), {})[record["params"]["what"]] = record
    for (method, source), by_what in rows.items():

        def found(start, end="", by_what=by_what):
            return next((record for what, record in by_what.items() if what.startswith(start) and what.endswith(end)), None)

        def percent(start, end=""):
            record = found(start, end)
            return "" if record is None else f"{math.floor(record['value'] * 1e5) / 1e3:.3f} %"

        float32, bf16, aside = found("float32", "CPU"), found("bf", "CPU"), found("bf", "ties")
        params = float32["params"]
        count = bf16["params"]["decisions"] - aside["params"]["decisions"] if aside else 0
        ties = f"{percent('bf', 'ties')}, {count} ties" if count else ""  # none are known of code that gives no scores
        what = (
            f"{params['head_dim']} wide, {' and '.join(map(str, params['tokens']))} tokens, {params['inputs']} times "
            f"{params['heads']} heads"
        )
        both = ", ".join(filter(None, (percent("float32", "reference"), percent("float32", "CPU"))))
        lines.append(
            f"| `{method}` | {float32['peer']} `{params['public_commit'].rstrip('+')}`, {params['function']} | "
            f"{source}: {what} | {params['decisions']} | {both} | {percent('bf', 'CPU')} | "
            f"{percent('bf', 'numbers')} | {ties} |"
        )
    return f"`./dev bench lists` on {stamp(records[0])}:\n\n" + "\n".join(lines)


def keep_demo(path):
    """Keeps what the demo printed, and where: its second line names the machine."""
    text = path.read_text().strip()
    lines = text.splitlines()
    if len(lines) < 4 or not any(line.startswith("auto ") for line in lines):
        raise Failure(f"{path}: not what ./dev demo prints; write it with ./dev demo > {path}")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    write_whole(
        DEMO,
        f"{text}\n\n`./dev demo` on {lines[1].strip()}, commit {commit.stdout.strip() or 'unknown'}, "
        f"{datetime.date.today()}.\n",
    )


def demo_block():
    text, _, stamp = DEMO.read_text().strip().rpartition("\n\n")
    return f"```text\n{text}\n```\n\n{stamp}"


# What stands between which marks of which page: a function of the records of these files.
TABLES = [
    ("README.md", "summary", summary_table, []),
    ("docs/start.md", "demo", demo_block, []),
    ("results/fidelity.md", "fidelity", fidelity_table, ["fidelity.json"]),
    ("results/fidelity.md", "two-step", fidelity_table, ["fidelity-two-step.json"]),
    ("results/gpu.md", "results", table, ["gpu.json"]),
    ("results/gpu.md", "h200", table, ["gpu-h200.json"]),
    ("results/gpu.md", "h200-peers", table, ["gpu-h200-peers.json"]),
    ("results/gpu.md", "h200-chunks", table, ["gpu-h200-chunks.json"]),
    ("results/learned.md", "smollm2", learned_table, ["learned.json"]),
    ("results/learned.md", "qwen-32k", learned_table, ["learned-qwen-32k.json"]),
    ("results/learned.md", "qwen-8k", learned_table, ["learned-qwen-8k.json"]),
    ("results/learned.md", "smollm2-8k", learned_table, ["learned-smollm2-8k.json"]),
    ("results/learned.md", "qwen-manual", learned_table, ["learned-qwen-manual.json"]),
    ("results/lists.md", "lists", lists_table, ["lists.json"]),
    ("results/python.md", "op", op_table, ["python-op-cpu.json", "python-overhead.json"]),
    (
        "results/transformers.md",
        "models",
        models_table,
        ["prefill-h100.json", "prefill-h100-prose.json", "prefill-h100-shape.json"],
    ),
    ("results/transformers.md", "h200", models_table, ["prefill-h200.json"]),
    ("results/transformers.md", "h200-chunks", models_table, ["prefill-h200-chunks.json"]),
    ("results/vllm.md", "vllm", vllm_table, ["vllm.json"]),
]


def page_with(text, page, marker, make, files):
    records = [record for name in files for record in json.loads((RESULTS / name).read_text())]
    return replace_between(page, text, marker, make(records) if files else make())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=pathlib.Path, help="what ./dev demo printed, at the commit that is checked out")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; end with 1 where a page isn't what the records say"
    )
    arguments = parser.parse_args()
    if arguments.demo:
        keep_demo(arguments.demo)
    stale = []
    for name, *what in TABLES:
        page = ROOT / name
        text = page.read_text()
        made = page_with(text, page, *what)
        if made != text:
            stale.append(name)
        if made != text and not arguments.check:
            write_whole(page, made)
    if arguments.check and stale:
        raise Failure(f"{', '.join(stale)}: not what the records in results say; run tools/readme.py")
    return 0


if __name__ == "__main__":
    run_main(main)
