#!/usr/bin/env python3
"""Makes a virtual environment, once, in the user's cache folder.

    tools/venv.py tests     prints the path of its Python: what the tests of the package and evaluations run with
    tools/venv.py lint      the same, with clang-tidy, ruff and mypy beside it
    tools/venv.py docs      the same, with Sphinx
    tools/venv.py wheels    the same, with auditwheel and Zig
    tools/venv.py vllm      the same, with vLLM for the CPU, over the environment `tests`
    tools/venv.py sglang    the same, with SGLang and without its CUDA kernels, over the environment `tests`

It holds what a file of requirements names, down to the SHA-256 of what is downloaded (tools/pin.py writes these); other
requirements, or another Python, make another one.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys

from common import Failure, cache_dir, changed_package, error_line, locked, require_space, run_child, run_main, say

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass
class Environment:
    requirements: pathlib.Path
    size: int  # bytes needed: what is installed, and the downloads while pip unpacks them
    what: str  # for people
    pythons: tuple  # the first and last version that all the packages are for
    over: str = ""  # another environment, whose packages are seen in this one


ENVIRONMENTS = {
    "tests": Environment(
        ROOT / "tests/python/requirements.txt",
        6_000_000_000,
        "PyTorch and transformers (2.3 GB, once; a few minutes)",
        ((3, 11), (3, 13)),
    ),
    "docs": Environment(ROOT / "tools/docs_requirements.txt", 300_000_000, "Sphinx (20 MB, once)", ((3, 11), (3, 13))),
    "wheels": Environment(
        ROOT / "tools/wheels_requirements.txt", 600_000_000, "auditwheel and Zig (100 MB, once)", ((3, 11), (3, 13))
    ),
    "lint": Environment(
        ROOT / "tools/lint_requirements.txt", 500_000_000, "clang-tidy, ruff and mypy (75 MB, once)", ((3, 11), (3, 13))
    ),
    "vllm": Environment(
        ROOT / "tests/vllm/requirements.txt", 1_500_000_000, "vLLM for the CPU (250 MB, once)", ((3, 11), (3, 13)), "tests"
    ),
    "sglang": Environment(
        ROOT / "tests/sglang/requirements.txt", 2_000_000_000, "SGLang (350 MB, once)", ((3, 11), (3, 13)), "tests"
    ),
}


def make(folder, environment, below=None):
    require_space(environment.size)
    say(f"{folder}: getting {environment.what}")
    shutil.rmtree(folder, ignore_errors=True)
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [
            str(folder / "bin/python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-cache-dir",
            "--no-compile",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "-r",
            str(environment.requirements),
        ],
    ]
    for command in commands:
        done = run_child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            if changed := changed_package(done.stderr):
                raise Failure(
                    f"{changed}: its SHA-256 is none of those in {environment.requirements}; the index or something on "
                    "the way changed it, or its version was changed without tools/pin.py"
                )
            raise Failure(
                f'{" ".join(command[:4])} ...: failed, it said "{error_line(done.stderr or done.stdout)}"; '
                f"check the network and the Python ({versions(environment)}), and run it again"
            )
    if below:
        site = pathlib.Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
        (folder / site / "below.pth").write_text(f"{below / site}\n")
    (folder / "complete").touch()


def versions(environment):
    first, last = (".".join(map(str, version)) for version in environment.pythons)
    return f"{first} to {last}"


def made(name):
    """The folder of an environment, made where it isn't there yet."""
    environment = ENVIRONMENTS[name]
    if not environment.pythons[0] <= sys.version_info[:2] <= environment.pythons[1]:
        raise Failure(
            f"python3 is {sys.version.split()[0]}: the pinned packages are for {versions(environment)}; "
            "put such a python3 first in PATH"
        )
    below = made(environment.over) if environment.over else None
    decides = environment.requirements.read_bytes() + sys.version.encode() + str(below or "").encode()
    folder = cache_dir() / f"venv-{hashlib.sha256(decides).hexdigest()[:10]}"
    with locked("venv"):
        if not (folder / "complete").exists():
            make(folder, environment, below)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", choices=list(ENVIRONMENTS))
    print(made(parser.parse_args().environment) / "bin/python")
    return 0


if __name__ == "__main__":
    run_main(main)
