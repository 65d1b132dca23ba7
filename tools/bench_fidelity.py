#!/usr/bin/env python3
"""The benchmark suite "fidelity": what attentions cost a real model in likelihood, on real texts, against dense.

    tools/bench_fidelity.py PROGRAM [--model NAME] [--text KIND_OR_FILE ...] [--tokens N] [--positions N]
                            [--attention SPEC ...] [--json FILE] [OPTIONS]

Changes of perplexity are paired, token by token, and come with their standard errors. Any other options go to
`pbsattn prefill`.
"""

import argparse
import math
import pathlib

import models
import text
from bench_prefill import record, report_of, stamp, verify, write_records
from common import run_main, say

ATTENTIONS = ["pbs", "pbs:top_p=0.95", "pbs:top_p=0.98", "pbs-threshold"]


def metrics_of(run):
    """(metric, value, unit, standard error) of a run against the dense one."""
    change = run["nll_change"]
    ratio = math.exp(change["mean"])
    yield "density", run["density"]["mean"], "", None
    yield "perplexity_change", 100 * (ratio - 1), "%", 100 * ratio * change["standard_error"]
    yield "kl_mean", run["kl_mean"], "nats", None
    yield "top1_agreement", 100 * run["top1_mean"], "%", None


def records_of(report, model, source):
    params = {"model": model, "text": source, "n": report["prompt"]["tokens"], "positions": report["positions"] - 1}
    runs = {run["name"]: run for run in report["runs"]}
    full = runs.pop("full")
    yield record("fidelity", "full", params, "perplexity", full["perplexity"], "", report)
    for name, run in runs.items():
        for metric, value, unit, error in metrics_of(run):
            peer = ("full", full["perplexity"]) if metric == "perplexity_change" else None
            yield record(
                "fidelity",
                name,
                {**params, "options": run.get("options")},
                metric,
                value,
                unit,
                report,
                peer=peer,
                spread=error,
            )


def print_report(report, source):
    runs = report["runs"]
    full = next(run for run in runs if run["name"] == "full")
    print(f"{source}: {report['prompt']['tokens']} tokens, perplexity {full['perplexity']:.4f} under full attention")
    print(f"  {'attention':32} {'density':>8} {'perplexity':>18} {'mean KL':>9} {'same top-1':>10}")
    for run in runs:
        if run is not full:
            (_, density, *_), (_, change, _, error), (_, divergence, *_), (_, agreement, *_) = metrics_of(run)
            print(f"  {run['name']:32} {density:8.3f} {change:+9.2f} ±{error:5.2f} % {divergence:9.4f} {agreement:8.1f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--model", default="smollm2-135m", choices=list(models.MODELS))
    parser.add_argument("--text", nargs="+", default=["prose", "manual"], help=f"{', '.join(text.KINDS)}, or files")
    parser.add_argument("--tokens", type=int, default=8160)
    parser.add_argument("--positions", default="2048")
    parser.add_argument("--attention", nargs="+", default=ATTENTIONS)
    parser.add_argument("--json")
    arguments, options = parser.parse_known_args()
    model = models.get(arguments.model)
    when = stamp()
    records = []
    say("verifying our dense attention against ggml's")
    verify(report_of(arguments.program, model, text.write("prose"), 2048, ["full", "ggml"], ["--method", "ggml"]))
    for source in arguments.text:
        prompt = text.write(source) if source in text.KINDS else source
        say(f"{source}: {arguments.tokens} tokens under full, {', '.join(arguments.attention)}")
        report = report_of(
            arguments.program,
            model,
            prompt,
            arguments.tokens,
            ["full", *arguments.attention[:-1]],
            ["--method", arguments.attention[-1], "--positions", arguments.positions, *options],
        )
        records += [{**each, **when} for each in records_of(report, arguments.model, pathlib.Path(source).name)]
        write_records(records, arguments.json)
        print_report(report, pathlib.Path(source).name)
    return 0


if __name__ == "__main__":
    run_main(main)
