#!/usr/bin/env python3
"""The benchmark suite "prefill": time to first token of a real model on a real text, by attention.

    tools/bench_prefill.py PROGRAM [--model NAME] [--tokens N ...] [--runs N] [--json FILE] [OPTIONS]

Verifies that our dense attention gives ggml's next-token distributions, then prints medians over runs of the whole
comparison, in which the attentions follow one another. Any other options go to `pbsattn prefill`.
"""

import argparse
import datetime
import json
import statistics
import subprocess

import models
import text
from common import Failure, run_child, run_main, say, write_whole

TEXT_OF = {"smollm2-135m": "prose", "qwen2.5-coder-1.5b": "code"}
# metric: unit, and the run it is compared with; for all of them less is better.
METRICS = {
    "first_token_seconds": ("s", "ggml"),
    "attention_seconds": ("s", "ggml"),
    "perplexity": ("", "full"),
    "density": ("", None),
}


def report_of(program, model, prompt, tokens, compared, options):
    """What `pbsattn prefill` finds, its own method next to the attentions `compared`."""
    command = [
        program,
        "prefill",
        "--model",
        str(model),
        "--prompt-file",
        str(prompt),
        "--tokens",
        str(tokens),
        "--generate",
        "0",
        "--compare",
        ",".join(compared),
        "--json",
        *options,
    ]
    run = run_child(command, stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise Failure(f"pbsattn prefill of {tokens} tokens ended with status {run.returncode}; its message is above")
    return json.loads(run.stdout)


def verify(report):
    """Rounding alone moves a quantised model's distributions by some thousandths of a nat; an error by far more."""
    divergence = next(run["kl_mean"] for run in report["runs"] if run["name"] == "ggml")
    if divergence > 0.02:
        raise Failure(
            f"KL divergence {divergence:.4f} of ggml's attention from our dense one: over 0.02, so nothing is "
            "measured; look for the layer at fault with PBSATTN_CHECK=1 (docs/llama.cpp.md)"
        )


def value_of(run, metric):
    return run["density"]["mean"] if metric == "density" else run[metric]


def stamp():
    """When and of which source a measurement is."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "date": datetime.date.today().isoformat()}


def record(suite, case, params, metric, value, unit, report, peer=None, ratio=None, runs=1, spread=None):
    """One measurement in the form of docs/dev/measuring.md; `peer` is a name and its value."""
    name, peer_value = peer or (None, None)
    return {
        "suite": suite,
        "case": case,
        "params": params,
        "metric": metric,
        "value": value,
        "unit": unit,
        "peer": name,
        "peer_value": peer_value,
        "ratio": ratio,
        "runs": runs,
        "spread": spread,
        "device": report["device"]["processor"],
    }


def records_of(reports, model):
    """One record for each attention and metric."""
    first = reports[0]
    by_name = [{run["name"]: run for run in report["runs"]} for report in reports]
    for case in by_name[0]:
        params = {
            "model": model,
            "n": first["prompt"]["tokens"],
            "threads": first["threads"],
            "options": by_name[0][case].get("options"),
        }
        for metric, (unit, peer) in METRICS.items():
            values = [value_of(runs[case], metric) for runs in by_name]
            value, spread = statistics.median(values), (max(values) - min(values)) / statistics.median(values)
            if peer is None or peer == case:
                yield record("prefill", case, params, metric, value, unit, first, runs=len(values), spread=spread)
            else:
                peer_value = statistics.median(value_of(runs[peer], metric) for runs in by_name)
                yield record(
                    "prefill",
                    case,
                    params,
                    metric,
                    value,
                    unit,
                    first,
                    (peer, peer_value),
                    peer_value / value,
                    len(values),
                    spread,
                )


def print_records(records):
    print(f"{'case':10} {'n':>6} {'metric':20} {'value':>10}    {'against':>8} {'ratio':>6} {'runs':>4} {'spread':>7}")
    for r in records:
        ratio = f"{r['ratio']:.2f}x" if r["peer"] else ""
        print(
            f"{r['case']:10} {r['params']['n']:6} {r['metric']:20} {r['value']:10.4g} {r['unit']:2} "
            f"{r['peer'] or '':>8} {ratio:>6} {r['runs']:4} {r['spread']:6.1%}"
        )


def write_records(records, path):
    """Writes them to the file, which appears whole or not at all; without a path does nothing."""
    if path:
        write_whole(path, json.dumps(records, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--model", default="smollm2-135m", choices=list(models.MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8160])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json")
    arguments, options = parser.parse_known_args()
    model, prompt = models.get(arguments.model), text.write(TEXT_OF[arguments.model])
    when = stamp()
    records = []
    for tokens in arguments.tokens:
        reports = []
        for run in range(arguments.runs):
            say(f"{tokens} tokens, run {run + 1} of {arguments.runs}")
            reports.append(report_of(arguments.program, model, prompt, tokens, ["ggml", "full"], options))
            verify(reports[-1])
        records += [{**each, **when} for each in records_of(reports, arguments.model)]
    write_records(records, arguments.json)
    print_records(records)
    return 0


if __name__ == "__main__":
    run_main(main)
