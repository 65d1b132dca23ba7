#!/usr/bin/env python3
"""Prints the path of a cuobjdump with nvdisasm beside it, after fetching both into the user's cache folder if need be.

nvcc can be installed without them, and the test of the kernels' machine code reads it through them.
"""

import os
import zipfile

from common import cache_dir, locked, pip_download, run_main

VERSION = "13.2.86"  # reads what nvcc 12.8 to 13.2 writes
PACKAGES = {
    "cuobjdump": "d332c2ffe78e703ca0a3894be927f83124244e2acf0d792b8c12b4362d44d837",
    "nvdisasm": "53606e719ecae07a2335f95902d5a1393a0cc1c317499ee7ffcf628a44385f2c",
}


def fetch(program, sha256, target):
    wheel = target.with_suffix(".whl")
    pip_download(f"nvidia-cuda-{program}=={VERSION}", wheel, sha256=sha256)
    with zipfile.ZipFile(wheel) as package:
        name = next(name for name in package.namelist() if name.endswith(f"/bin/{program}"))
        partial = target.with_suffix(".partial")
        partial.write_bytes(package.read(name))
    partial.chmod(0o755)
    os.replace(partial, target)
    wheel.unlink()


def main():
    with locked("cuobjdump"):
        folder = cache_dir() / f"cuda-tools-{VERSION}"
        folder.mkdir(parents=True, exist_ok=True)
        for program, sha256 in PACKAGES.items():
            if not (folder / program).exists():
                fetch(program, sha256, folder / program)
    print(folder / "cuobjdump")
    return 0


if __name__ == "__main__":
    run_main(main)
