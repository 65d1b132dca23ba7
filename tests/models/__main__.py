#!/usr/bin/env python3
"""Sweeps transformers' classes: tiny random models of each, with pbsattn against their own attention.

    python tests/models --all [--table results/models.md] [--json FILE]
    python tests/models --one-per-family
    python tests/models CLASS...
    python tests/models --list

With top_p=1 every block is kept, so logits must be the model's own but for rounding, whoever computed them; or
pbsattn.transformers.enable() refuses the model. Exit status: 0 if no class is wrong, 1 if one is.
"""

import argparse
import json
import logging
import os
import pathlib
import signal
import sys

import cases
import forks
import table
import trial


def main():
    parser = argparse.ArgumentParser(
        prog="tests/models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="only these")
    parser.add_argument("--all", action="store_true", help="every class there is")
    parser.add_argument("--one-per-family", action="store_true", help="a class for each way to attend (cases.FAMILIES)")
    parser.add_argument("--list", action="store_true", help="print the names, run nothing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes side by side")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="write the table, as Markdown")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write every answer ('-': one a line, as they come)"
    )
    options = parser.parse_args()
    known = cases.all_cases()
    names = list(known) if options.all or options.list else list(cases.FAMILIES) if options.one_per_family else []
    names += [name for name in options.classes if name not in names]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{', '.join(unknown)}: no such class; --list prints them")
    if not names:
        parser.error("nothing to do: --all, --one-per-family or names of classes")
    if options.list:
        print("\n".join(names))
        return 0
    logging.disable(logging.WARNING)
    stream = str(options.json) == "-"
    answers = {}
    for case, answer in forks.run_each([known[name] for name in names], trial.trial, options.jobs):
        answer = {"name": case.name, "family": "", "kind": case.kind or ""} | answer
        answers[case.name] = answer
        print(json.dumps(answer) if stream else f"{len(answers)}/{len(names)} {table.line(answer)}", flush=True)
    answers = [answers[name] for name in names]
    if options.json and not stream:
        options.json.write_text(json.dumps(answers, indent=1) + "\n")
    if options.table:
        options.table.write_text(table.page(answers))
    if not stream:
        print(table.summary(answers))
    return 1 if any(table.wrong(answer) for answer in answers) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either ends the cases too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
