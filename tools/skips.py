#!/usr/bin/env python3
"""Prints which tests were skipped and why, and fails if one of them isn't on the list of tests that may be.

    tools/skips.py [--allowed FILE] RESULT...

A RESULT is JUnit's XML (of pytest --junitxml or ctest --output-junit), or else a log of GoogleTest's or unittest's words, as
CTest keeps in Testing/Temporary/LastTest.log. A line of the list: what may be skipped, as "NAME: REASON" in which * stands
for anything; a bar; and why that is all right.
"""

import argparse
import pathlib
import re
import sys
import xml.etree.ElementTree

from common import Failure, run_main

ALLOWED = pathlib.Path(__file__).parent.parent / "tests/allowed_skips.txt"
GOOGLE = re.compile(r"^\[ RUN      \] (\S+)\n((?:(?!\[ RUN ).*\n)*?)\[  SKIPPED \] \1 \(", re.MULTILINE)
UNITTEST = re.compile(r"^(\w+) \([\w.]+\)\n?.* \.\.\. skipped (['\"])(.*)\2$", re.MULTILINE)
TESTS = re.compile(r"^\[ RUN      \]|^Ran \d+ tests?|^\d+/\d+ Testing:", re.MULTILINE)


def read_xml(path):
    cases = list(xml.etree.ElementTree.parse(path).iter("testcase"))
    if not cases:
        raise Failure(f"{path}: holds no test; a run that tested nothing is no success")
    for case in cases:
        for kind in ("skipped", "disabled"):
            for found in case.iter(kind):
                name = "::".join(dict.fromkeys(filter(None, (case.get("classname"), case.get("name")))))
                yield name, found.get("message") or found.text or kind


def read_log(path):
    text = path.read_text(encoding="utf-8", errors="replace")
    if not TESTS.search(text):
        raise Failure(f"{path}: holds no test; a run that tested nothing is no success")
    for name, said in GOOGLE.findall(text):
        yield name, said.partition(": Skipped\n")[2] or said or "no reason"
    for name, _, reason in UNITTEST.findall(text):
        yield name, reason


def read_allowed(path):
    """[(pattern, why)]"""
    allowed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            pattern, _, why = map(str.strip, line.partition(" | "))
            if not pattern or not why:
                raise Failure(f"{path}, line {number}: no reason; write NAME: REASON | WHY THAT IS ALL RIGHT")
            allowed.append((re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL), why))
    return allowed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allowed", type=pathlib.Path, default=ALLOWED)
    parser.add_argument("results", nargs="+", type=pathlib.Path, metavar="RESULT")
    arguments = parser.parse_args()
    allowed = read_allowed(arguments.allowed)
    skipped = []
    for path in arguments.results:
        skipped += [
            f"{name}: {' '.join(reason.split())}" for name, reason in (read_xml if path.suffix == ".xml" else read_log)(path)
        ]
    unknown = 0
    for skip in sorted(set(skipped)):
        why = next((why for pattern, why in allowed if pattern.fullmatch(skip)), None)
        unknown += why is None
        print(f"skipped: {skip} ({why or 'NOT ALLOWED'})")
    if unknown:
        raise Failure(
            f"{unknown} test(s) skipped that are not in {arguments.allowed}; make them run, or write there why they needn't"
        )
    print(f"{len(set(skipped))} test(s) skipped, each for a reason that is allowed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
