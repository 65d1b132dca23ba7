#!/usr/bin/env python3
"""Puts measured results into README.md or another page, between its markers, so that no number there is typed by hand.

    ./dev demo | tee build/demo.txt && tools/readme.py --demo build/demo.txt
    tools/readme.py --page docs/dev/cuda.md --all --results results/gpu.json
    tools/readme.py --page docs/transformers.md --models results/prefill-h100*.json
    tools/readme.py --page docs/python.md --op results/python-*.json
    tools/readme.py --page docs/methods.md --lists results/lists.json
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

README = pathlib.Path(__file__).parent.parent / "README.md"
RESULTS = README.parent / "results"


def replace_between(page, text, marker, content):
    pattern = re.compile(rf"<!-- {marker} -->.*?<!-- /{marker} -->", re.DOTALL)
    if not pattern.search(text):
        raise Failure(f"{page.name}: no marker <!-- {marker} -->; put it and <!-- /{marker} --> where the text goes")
    return pattern.sub(lambda _: f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->", text)


def words(params):
    flat = {key: value for key, value in params.items() if not isinstance(value, dict) and value is not None}
    return ", ".join(f"{key} {value}" for key, value in flat.items())


def number(value):
    return "" if value is None else f"{value:.4g}"


def headline(rows):
    """The rows a reader looks for: the path this machine takes, at the largest length. The file has all."""
    best = rows[0]["params"].get("path")
    longest = max(row["params"]["n"] for row in rows)
    return [row for row in rows if row["params"].get("path") == best and row["params"]["n"] == longest]


def table(records, choose=headline):
    """One Markdown table a suite, with the command, machine, commit and date that it comes from."""
    parts = []
    for suite in dict.fromkeys(record["suite"] for record in records):
        rows = choose([record for record in records if record["suite"] == suite])
        first = rows[0]
        parts.append(f"`./dev bench {suite}` on {first['device']}, commit {first['commit']}, {first['date']}; medians of "
                     f"{max(row['runs'] for row in rows)} run(s), largest spread {max(r['spread'] for r in rows):.0%}:\n\n"
                     "| case | parameters | metric | value | against | its value | ratio |\n"
                     "| --- | --- | --- | --- | --- | --- | --- |")
        for row in rows:
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
            parts[-1] += (f"\n| {row['case']} | {words(row['params'])} | {row['metric']} | "
                          f"{number(row['value'])} {row['unit']} | {row['peer'] or ''} | {number(row['peer_value'])} | {ratio} |")
    return "\n\n".join(parts)


# The rows of the first page: what a row says, which measurements it takes (values of a record or of its params; a tuple
# names several), and the case that it stands against where that isn't the record's own peer. What no file holds has no
# row; of a case measured on several code paths only the first, the machine's own, has one.
SUMMARY = [
    ("dense attention, {n} tokens, head_dim {head_dim}",
     {"suite": "gpu", "case": "dense", "metric": "rate", "n": (8192, 131072), "peer": "cuDNN"}, None),
    ("`pbs`, {n} tokens, density {density:.2f}", {"suite": "gpu", "case": "pbs", "metric": "time", "n": (32768, 131072), "peer": ("cuDNN", "reference PBS-Attn")},
     None),
    ("{model}, {n} tokens of {text}, `pbs`: first token",
     {"suite": "prefill", "metric": "time to first token", "case": "pbs", "n": (32768, 65536, 131072)}, "cudnn"),
    ("dense attention, {n} tokens, head_dim {head_dim}, {threads} thread(s)",
     {"suite": ("cpu", "cpu-torch"), "case": "dense", "metric": "rate", "n": 8192}, None),
    ("`pbs`, {n} tokens, head_dim {head_dim}, density {density:.2f}: time beyond the density's share of dense",
     {"suite": "cpu", "case": "sparse", "n": 8192, "head_dim": 128}, None),
]


def rival_of(record, case, records):
    """The same measurement of another case: the name, its value and what it is to ours; None where there is none."""
    same = lambda other: all(record["params"].get(key) == other["params"].get(key) for key in ("model", "text", "n"))
    for other in records:
        if other["case"] == case and other["metric"] == record["metric"] and same(other):
            return case, other["value"], other["value"] / record["value"]
    return None


def summary_table(records):
    """What a reader asks first, a row a measurement, from every file of results."""
    lines = ["| | measured | against | ratio | machine | commit |", "| --- | --- | --- | --- | --- | --- |"]
    for label, wanted, case in SUMMARY:
        seen = set()
        for record in records:
            fields = {**record, **record["params"]}
            holds = lambda name, value: fields.get(name) in (value if isinstance(value, tuple) else (value,))
            if not all(holds(name, value) for name, value in wanted.items()):
                continue
            peer = rival_of(record, case, records) if case else (record["peer"], record["peer_value"], record["ratio"])
            text = label.format(**{**fields, "model": str(fields.get("model")).split(" (")[0]})
            if not peer or not peer[0] or (text, peer[0], record["device"]) in seen:
                continue
            seen.add((text, peer[0], record["device"]))
            path = f" ({fields['path']})" if "path" in fields else ""
            against = peer[0] if record["unit"].startswith("of ") else f"{peer[0]}: {number(peer[1])} {record['unit']}"
            lines.append(f"| {text}{path} | {number(record['value'])} {record['unit']} | {against} | **{peer[2]:.2f}x** | "
                         f"{record['device'].split(', ')[0]} | {record['commit']} |")
    return "\n".join(lines)


def models_table(records):
    """One Markdown table for each model and text that `python -m pbsattn_eval bench prefill` measured."""
    parts = []
    for source in dict.fromkeys((r["params"]["model"], r["params"]["text"], r["commit"]) for r in records):
        rows = [r for r in records if (r["params"]["model"], r["params"]["text"], r["commit"]) == source]
        value = {(r["params"]["n"], r["case"], r["metric"]): r["value"] for r in rows}
        cases = list(dict.fromkeys((r["params"]["n"], r["case"]) for r in rows))
        baselines = [b for b in ("flash", "cudnn") if any(case == b for _, case in cases)]
        first = rows[0]
        timed = [r for r in rows if r["metric"] == "time to first token"]
        runs, spread = ({r["runs"] for r in timed}, [r["spread"] for r in timed])
        parts.append(f"{first['params']['model']}; {first['params']['text']}. {first['device']}, commit {first['commit']}, "
                     f"{first['date']}; medians of {min(runs)} to {max(runs)} runs, spread {statistics.median(spread):.1%} in "
                     f"the median, {max(spread):.0%} at most:\n\n"
                     "| tokens | attention | first token | in attention | "
                     + "".join(f"against {b} | " for b in baselines)
                     + "density | peak memory | perplexity | other tokens |\n"
                     + "| --- " * (8 + len(baselines)) + "|")
        for n, case in cases:
            get = lambda metric, of=case: value.get((n, of, metric))
            base = next(of for length, of in cases if length == n)
            ttft, dense = get("time to first token"), get("perplexity", base)
            inside = get("time in attention")
            show = lambda metric, form: "" if get(metric) is None else form.format(get(metric))
            change = f" ({get('perplexity') / dense - 1:+.2%})" if dense and case != base else ""
            peers = [get("time to first token", b) for b in baselines]
            parts[-1] += (f"\n| {n} | `{case}` | {ttft * 1e3:.{0 if ttft >= 0.1 else 1}f} ms | "
                          + ("| " if inside is None else f"{inside * 1e3:.0f} ms, {inside / ttft:.0%} | ")
                          + "".join("| " if peer is None else f"{peer / ttft:.2f}x | " for peer in peers)
                          + f"{show('density', '{:.3f}')} | {get('peak memory') / 2**30:.2f} GiB | "
                          + f"{show('perplexity', '{:.3f}')}{change} | {show('differing tokens', '{:.2%}')} |")
    return "\n\n".join(parts)


def fidelity_table(records):
    """A row for each text and attention, from the metrics that the suite "fidelity" measures of it."""
    rows = {}
    for record in records:
        params = record["params"]
        rows.setdefault((params["model"], params["text"], record["case"]), {})[record["metric"]] = record
    lines = ["| model, text | attention | density | perplexity against full | mean KL | same top-1 token |",
             "| --- | --- | --- | --- | --- | --- |"]
    density = lambda row: row[1]["density"]["value"] if "density" in row[1] else 2.0  # full first, then the densest
    for (model, source, case), found in sorted(rows.items(), key=lambda row: (row[0][:2], -density(row))):
        if case == "full":
            lines.append(f"| {model}, {source} | full | 1 | {found['perplexity']['value']:.2f} | | |")
            continue
        change = found["perplexity_change"]
        lines.append(f"| | `{case}` | {found['density']['value']:.3f} | {change['value']:+.2f} ± {change['spread']:.2f} % | "
                     f"{found['kl_mean']['value']:.4f} | {found['top1_agreement']['value']:.1f} % |")
    stamps = sorted({f"{record['device']}, commit {record['commit']}, {record['date']}" for record in records})
    return (f"`./dev bench fidelity` on {'; '.join(stamps)}; {records[0]['params']['n']} tokens, "
            f"{records[0]['params']['positions']} positions:\n\n" + "\n".join(lines))


def stamp(record):
    return f"{record['device']}, commit {record['commit']}, {record['date']}"


def op_table(records):
    """What `python -m pbsattn_eval bench op` and `overhead` measured: a table for each, and each machine."""
    parts = []
    times = [r for r in records if r["suite"] == "op"]
    for where in dict.fromkeys(map(stamp, times)):
        rows = [r for r in times if stamp(r) == where]
        base = rows[0]["case"]
        parts.append(f"`python -m pbsattn_eval bench op` on {where}; medians of {rows[0]['runs']} runs, "
                     f"{rows[0]['params']['heads']} heads, {rows[0]['params']['dtype']}:\n\n"
                     f"| tokens | head_dim | attention | time | against `{base}` | density | error of the last rows |\n"
                     "| --- | --- | --- | --- | --- | --- | --- |")
        for row in rows:
            params, show = row["params"], lambda value, form: "" if value is None else form.format(value)
            parts[-1] += (f"\n| {params['n']} | {params['head_dim']} | `{row['case']}` | {row['value'] * 1e3:.1f} ms | "
                          f"{show(row['ratio'], '{:.2f}x')} | {show(params['density'], '{:.3f}')} | "
                          f"{show(params['error'], '{:.1e}')} |")
    calls = [r for r in records if r["suite"] == "overhead"]
    for where in dict.fromkeys(map(stamp, calls)):
        rows = [r for r in calls if stamp(r) == where]
        value = {(r["case"], r["metric"]): r["value"] for r in rows}
        micro = lambda *key: f"{value[key] * 1e6:.1f} us" if key in value else ""
        parts.append(f"`python -m pbsattn_eval bench overhead` on {where}; medians of {max(r['runs'] for r in rows)} runs of 50 calls:\n\n"
                     "| attention | first call | a call on the host | of it the library | path through Python |\n"
                     "| --- | --- | --- | --- | --- |")
        for case in dict.fromkeys(r["case"] for r in rows):
            parts[-1] += (f"\n| `{case}` | {value[case, 'first call'] * 1e3:.1f} ms | {micro(case, 'host time of a call')} | "
                          f"{micro(case, 'host time in the library')} | {micro(case, 'host time of the Python path')} |")
    return "\n\n".join(parts)


def lists_table(records):
    """What `./dev bench lists` counted: a row for each method and input."""
    lines = ["| method | public code | input | decisions | float32: reference, CPU | bf16 | its float32 on bf16's numbers | bf16, ties aside |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    rows = {}
    for record in records:
        rows.setdefault((record["case"], record["params"]["input"]), {})[record["params"]["what"]] = record
    for (method, source), by_what in rows.items():
        found = lambda start, end="": next((r for what, r in by_what.items() if what.startswith(start) and what.endswith(end)), None)
        show = lambda record: "" if record is None else f"{math.floor(record['value'] * 1e5) / 1e3:.3f} %"
        float32, reference, bf16, aside = found("float32", "CPU"), found("float32", "reference"), found("bf", "CPU"), found("bf", "ties")
        params = float32["params"]
        count = bf16["params"]["decisions"] - aside["params"]["decisions"] if aside else 0
        ties = f"{show(aside)}, {count} ties" if count else ""  # none are known of code that gives no scores
        what = f"{params['head_dim']} wide, {' and '.join(map(str, params['tokens']))} tokens, {params['inputs']} times {params['heads']} heads"
        lines.append(f"| `{method}` | {float32['peer']} `{params['public_commit'].rstrip('+')}`, {params['function']} | {source}: {what} | "
                     f"{params['decisions']} | {', '.join(filter(None, (show(reference), show(float32))))} | {show(bf16)} | "
                     f"{show(found('bf', 'numbers'))} | {ties} |")
    return f"`./dev bench lists` on {stamp(records[0])}:\n\n" + "\n".join(lines)


def demo_block(path):
    """What the demo printed, and where: its second line names the machine."""
    text = path.read_text().strip()
    lines = text.splitlines()
    if len(lines) < 4 or not any(line.startswith("pbs ") for line in lines):
        raise Failure(f"{path}: not what ./dev demo prints; write it with ./dev demo > {path}")
    commit = subprocess.run(["git", "-C", README.parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    stamp = f"`./dev demo` on {lines[1].strip()}, commit {commit.stdout.strip() or 'unknown'}, {datetime.date.today()}"
    return f"```text\n{text}\n```\n\n{stamp}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=pathlib.Path, help="what ./dev demo printed, at the commit that is checked out")
    parser.add_argument("--fidelity", type=pathlib.Path, nargs="+",
                        help="files that ./dev bench fidelity wrote with --json (README.md: results/fidelity.json)")
    parser.add_argument("--results", type=pathlib.Path, nargs="+", help="files that ./dev bench wrote with --json")
    parser.add_argument("--summary", type=pathlib.Path, nargs="+", help="every file of results, for the first page's table (README.md: all of results)")
    parser.add_argument("--models", type=pathlib.Path, nargs="+",
                        help="files that python -m pbsattn_eval bench prefill wrote with --json, on a GPU")
    parser.add_argument("--op", type=pathlib.Path, nargs="+",
                        help="files that python -m pbsattn_eval bench op and overhead wrote with --json")
    parser.add_argument("--lists", type=pathlib.Path, nargs="+", help="files that ./dev bench lists wrote with --json")
    parser.add_argument("--page", type=pathlib.Path, default=README, help="the page to change, README.md if not given")
    parser.add_argument("--all", action="store_true", help="every measurement, not only the largest length's")
    arguments = parser.parse_args()
    text = arguments.page.read_text()
    if arguments.demo:
        text = replace_between(arguments.page, text, "demo", demo_block(arguments.demo))
    if arguments.page == README:  # whose other tables always follow what is in results
        arguments.fidelity = arguments.fidelity or [RESULTS / "fidelity.json"]
        arguments.summary = arguments.summary or sorted(RESULTS.glob("*.json"))
    tables = (("results", arguments.results, lambda records: table(records, list if arguments.all else headline)),
              ("summary", arguments.summary, summary_table),
              ("models", arguments.models, models_table),
              ("op", arguments.op, op_table),
              ("lists", arguments.lists, lists_table),
              ("fidelity", arguments.fidelity, fidelity_table))
    for marker, paths, make in tables:
        if paths:
            records = [record for path in paths for record in json.loads(path.read_text())]
            text = replace_between(arguments.page, text, marker, make(records))
    write_whole(arguments.page, text)
    return 0


if __name__ == "__main__":
    run_main(main)
