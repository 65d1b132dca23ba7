#!/usr/bin/env python3
"""Compares the kernels of two builds: machine code, registers, stack and shared memory.

    tools/kernel_code.py [--resources] [--rename OLD=NEW]... BEFORE AFTER
        two programs or libraries that hold the CUDA backend, such as cuda_test

Kernels are paired by their demangled names, in which an anonymous namespace has no hash of its file's path. Prints each
that differs, is new or is gone, and the counts; ends with 1 unless all are equal. To show that moving files changed
nothing: ./dev build cuda before and after.

--rename: what BEFORE calls OLD is called NEW in AFTER, in kernels' names and the types in them; one after the other. Where
two files have kernels of one name, a ' ends the second's.
--resources: prints what every kernel takes, before and after; ends with 1 where one takes more registers as the chip gives
them out, in eights, or any local memory, whatever its code.
"""

import argparse
import hashlib
import os
import re
import subprocess
from collections import Counter, namedtuple

from common import Failure, run_main
from cuobjdump import get

# `code`: hashes of the machine code, and of its instructions without the places of the launch's parameters.
Kernel = namedtuple("Kernel", "code placeless registers stack local shared")
SAME, MOVED, OTHER = "equal", "equal but for where their parameters lie", "of other instructions"


def output_of(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Failure(f'{" ".join(command[:3])}: failed, it said "{done.stderr.strip()[-200:]}"')
    return done.stdout


def demangle(names):
    return output_of(["c++filt"], input="\n".join(names)).splitlines()


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def kernels_of(program, cuobjdump, renames=()):
    """{demangled name: Kernel}"""
    environment = {**os.environ, "PATH": f"{os.path.dirname(cuobjdump)}:{os.environ['PATH']}"}  # cuobjdump runs nvdisasm
    sass = output_of([cuobjdump, "--dump-sass", program], env=environment)
    usage = output_of([cuobjdump, "--dump-resource-usage", program], env=environment)
    functions = re.split(r"\n[ \t]*Function : ", sass)[1:]
    if not functions:
        raise Failure(f"{program}: holds no kernels; name a program or library with the CUDA backend")
    bodies = {}
    for function in functions:
        name, _, body = function.partition("\n")
        body = body.partition("..........")[0]  # what follows is another function's header
        bodies[name.strip()] = re.sub(r"\s+", " ", body)  # columns are as wide as a module's longest line
    resources = dict(re.findall(r"Function ([^\s:]+):\n\s*([^\n]+)", usage))
    kernels, named = {}, {}
    for name, readable in zip(bodies, demangle(list(bodies))):
        while readable in named.values():  # two of one name, in files of their own
            readable += "'"
        named[name] = readable
    for name, readable in named.items():
        for old, new in renames:
            readable = readable.replace(old, new)
        instructions = re.sub(r"/\* 0x[0-9a-f]+ \*/", "", bodies[name])
        placeless = re.sub(r"c\[0x0\]\[0x[0-9a-f]+\]", "c[parameter]", instructions)
        used = Counter({key: int(count) for key, count in re.findall(r"(\w+):(\d+)", resources.get(name, ""))})
        kernels[readable] = Kernel(
            hash_of(bodies[name]), hash_of(placeless), *(used[key] for key in ("REG", "STACK", "LOCAL", "SHARED"))
        )
    return kernels


def compare(before, after):
    if before == after:
        return SAME
    return MOVED if before[1:] == after[1:] else OTHER


def shown(name):
    """A kernel's name without its namespaces and the parameters it is launched with."""
    name = re.sub(r"\(anonymous namespace\)::|pbsattn::(test|cuda)::(attention::|mass::|sm90::)?|^void ", "", name)
    return name.partition("(")[0]


def print_resources(before, after):
    """Prints a table and returns whether some kernel takes more than before."""
    print(f"{'kernel':<54} {'registers':>14} {'local bytes':>14} {'shared bytes':>16}")
    grew = False
    for name in sorted(before.keys() & after.keys(), key=shown):
        old, new = before[name], after[name]
        more = -(-new.registers // 8) > -(-old.registers // 8) or new.local + new.stack > 0
        grew |= more
        columns = (
            (old.registers, new.registers, 14),
            (old.local + old.stack, new.local + new.stack, 14),
            (old.shared, new.shared, 16),
        )
        print(
            f"{shown(name):<54}"
            + "".join(f" {f'{a} -> {b}' if a != b else a:>{width}}" for a, b, width in columns)
            + ("  more than before" if more else "")
        )
    return grew


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resources", action="store_true")
    parser.add_argument("--rename", metavar="OLD=NEW", action="append", default=[])
    parser.add_argument("before")
    parser.add_argument("after")
    arguments = parser.parse_args()
    renames = [rename.split("=", 1) for rename in arguments.rename]
    for rename in renames:
        if len(rename) != 2:
            raise Failure(f"--rename {rename[0]}: needs OLD=NEW, such as cuda::Tile=cuda::SwizzledTile")
    cuobjdump = str(get())
    before = kernels_of(arguments.before, cuobjdump, renames)
    after = kernels_of(arguments.after, cuobjdump)
    counts = Counter()
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            counts["gone"] += 1
            print(f"gone:    {name}")
        elif name not in before:
            counts["new"] += 1
            print(f"new:     {name}")
        else:
            how = compare(before[name], after[name])
            counts[how] += 1
            if how == OTHER and not arguments.resources:
                print(f"differs: {name}\n  before: {before[name][2:]}\n  after:  {after[name][2:]}")
    grew = arguments.resources and print_resources(before, after)
    print(f"{len(before)} kernels before, {len(after)} after: " + ", ".join(f"{n} {how}" for how, n in counts.items()))
    if arguments.resources:
        return 1 if grew or counts["gone"] or counts["new"] else 0
    return 0 if counts[SAME] == len(before.keys() | after.keys()) else 1


if __name__ == "__main__":
    run_main(main)
