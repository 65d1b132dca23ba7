#!/usr/bin/env python3
"""Compares the kernels of two builds: machine code, registers, stack and shared memory.

    tools/kernel_code.py BEFORE AFTER      two programs or libraries that hold the CUDA backend, such as cuda_test

Kernels are paired by their demangled names, in which an anonymous namespace has no hash of its file's path. Prints each
that differs, is new or is gone, and the counts; ends with 1 unless all are equal. To show that moving files changed
nothing: ./dev build cuda before and after.
"""

import argparse
import hashlib
import os
import re
import subprocess

from common import Failure, run_main
from cuobjdump import get


def output_of(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Failure(f"{' '.join(command[:3])}: failed, it said \"{done.stderr.strip()[-200:]}\"")
    return done.stdout


def demangle(names):
    return output_of(["c++filt"], input="\n".join(names)).splitlines()


def kernels_of(program, cuobjdump):
    """{demangled name: (hash of the machine code, resource usage)}"""
    environment = {**os.environ, "PATH": f"{os.path.dirname(cuobjdump)}:{os.environ['PATH']}"}  # cuobjdump runs nvdisasm
    sass = output_of([cuobjdump, "--dump-sass", program], env=environment)
    usage = output_of([cuobjdump, "--dump-resource-usage", program], env=environment)
    functions = re.split(r"\n[ \t]*Function : ", sass)[1:]
    if not functions:
        raise Failure(f"{program}: holds no kernels; name a program or library with the CUDA backend")
    code = {}
    for function in functions:
        name, _, body = function.partition("\n")
        body = body.partition("..........")[0]  # what follows is another function's header
        code[name.strip()] = hashlib.sha256(body.encode()).hexdigest()
    resources = dict(re.findall(r"Function ([^\s:]+):\n\s*([^\n]+)", usage))
    names = list(code)
    return {readable: (code[name], resources.get(name, "")) for readable, name in zip(demangle(names), names)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    arguments = parser.parse_args()
    cuobjdump = str(get())
    before, after = (kernels_of(each, cuobjdump) for each in (arguments.before, arguments.after))
    different = 0
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        different += 1
        if name not in after:
            print(f"gone:    {name}")
        elif name not in before:
            print(f"new:     {name}")
        else:
            print(f"differs: {name}\n  before: {before[name][1]}\n  after:  {after[name][1]}")
    print(f"{len(before)} kernels before, {len(after)} after, {len(before.keys() | after.keys()) - different} equal")
    return 1 if different else 0


if __name__ == "__main__":
    run_main(main)
