#!/usr/bin/env python3
"""Prints a header with its comments as Doxygen takes them.

A comment that stands before a declaration, or at the end of its line, is the declaration's; the first of a file is the
file's. Banners, and comments that a blank line or a preprocessor's line follows, stay what they are.
"""

import pathlib
import re
import sys

BANNER = re.compile(r"\s*(//|/\*) -{8,}")
LINE = re.compile(r"(\s*)//(?!/)( ?.*)")
TRAILING = re.compile(r"(.*[^\s:].*?)//(?!/)( .*)")


def cplusplus(lines):
    """// becomes ///, and after code ///<, to the end of a comment that goes on below in the same column."""
    column = None  # of the comment at the end of the line above
    for i, line in enumerate(lines):
        if found := LINE.match(line):
            after = next(after for after in [*lines[i:], ""] if not LINE.match(after)).strip()
            if column == len(found[1]):
                yield f"{found[1]}///<{found[2]}"
                continue
            column = None
            plain = BANNER.match(line) or not after or after.startswith("#")
            yield line if plain else f"{found[1]}///{found[2]}"
        elif found := TRAILING.match(line):
            column = len(found[1])
            yield f"{found[1]}///<{found[2]}"
        else:
            column = None
            yield line


def plain_c(lines):
    """/* becomes /**, and after code /**<; a struct or enum is declared once, without its typedef of the same name."""
    for line in lines:
        if BANNER.match(line):
            yield ""
        else:
            line = re.sub(r"^typedef (struct|enum) (\w+) \{", r"\1 \2 {", re.sub(r"^(.*\}) pbsattn_\w+;$", r"\1;", line))
            yield re.sub(r"^(\s*)/\* ", r"\1/** ", re.sub(r"(\S\s+)/\* ", r"\1/**< ", line))


def main():
    path = pathlib.Path(sys.argv[1])
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".h":
        made = list(plain_c(lines))
        made[0] = made[0].replace("/** ", "/** @file\n * ")
    else:
        head = next(i for i, line in enumerate(lines) if not LINE.match(line))
        made = ["/// @file", *(line.replace("//", "///", 1) for line in lines[:head]), *cplusplus(lines[head:])]
    print("\n".join(made))


if __name__ == "__main__":
    main()
