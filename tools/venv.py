#!/usr/bin/env python3
"""Makes the virtual environment of the Python tests, once, in the user's cache folder.

    tools/venv.py       prints the path of its Python

It holds what tests/python/requirements.txt names; other requirements, or another Python, make another one.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys

from common import Failure, cache_dir, locked, require_space, run_main, say

REQUIREMENTS = pathlib.Path(__file__).parent.parent / "tests/python/requirements.txt"
SIZE = 6_000_000_000  # bytes: 3.7 GB installed, and the downloads while pip unpacks them


def make(folder):
    require_space(SIZE)
    say(f"{folder}: getting PyTorch and transformers (2.3 GB, once; a few minutes)")
    shutil.rmtree(folder, ignore_errors=True)
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir",
         "--no-compile", "--no-deps", "--only-binary=:all:", "-r", str(REQUIREMENTS)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise Failure(f"{' '.join(command[:4])} ...: failed, it said \"{said[-1][:200] if said else 'nothing'}\"; "
                          "check the network and the Python (3.11 to 3.13), and run it again")
    (folder / "complete").touch()


def main():
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise Failure(f"python3 is {sys.version.split()[0]}: the pinned packages are for 3.11 to 3.13; "
                      "put such a python3 first in PATH")
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:10]
    folder = cache_dir() / f"venv-{digest}"
    with locked("venv"):
        if not (folder / "complete").exists():
            make(folder)
    print(folder / "bin/python")
    return 0


if __name__ == "__main__":
    run_main(main)
