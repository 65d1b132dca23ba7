#!/usr/bin/env python3
"""Prints the path of a cuobjdump with nvdisasm beside it, after fetching both into the user's cache folder if need be.

nvcc can be installed without them, and the test of the kernels' machine code reads it through them.
"""

import os
import zipfile

from common import cache_dir, locked, pip_download, run_main, say, sha256_of

VERSION = "13.2.86"  # reads what nvcc 12.8 to 13.2 writes
PACKAGES = {  # SHA-256 of the wheel, and of the program in it, which is run from the cache ever after
    "cuobjdump": (
        "d332c2ffe78e703ca0a3894be927f83124244e2acf0d792b8c12b4362d44d837",
        "5057de4afc073b1d9eed457234cd7c27bcae8c0fdfd63314dc760a74b225edf7",
    ),
    "nvdisasm": (
        "53606e719ecae07a2335f95902d5a1393a0cc1c317499ee7ffcf628a44385f2c",
        "6df0054fac801e7ab7d251506cfe52a1171c207de0923d8a3d57fdd5a1f6d982",
    ),
}


def fetch(program, sha256, target):
    wheel = target.with_suffix(".whl")
    pip_download(f"nvidia-cuda-{program}=={VERSION}", wheel, sha256)
    with zipfile.ZipFile(wheel) as package:
        name = next(name for name in package.namelist() if name.endswith(f"/bin/{program}"))
        partial = target.with_suffix(".partial")
        partial.write_bytes(package.read(name))
    partial.chmod(0o755)
    os.replace(partial, target)
    wheel.unlink()


def get():
    with locked("cuobjdump"):
        folder = cache_dir() / f"cuda-tools-{VERSION}"
        folder.mkdir(parents=True, exist_ok=True)
        for program, (of_wheel, of_program) in PACKAGES.items():
            target = folder / program
            if target.exists() and sha256_of(target) != of_program:
                say(f"{target} is damaged; fetching it anew")
                target.unlink()
            if not target.exists():
                fetch(program, of_wheel, target)
    return folder / "cuobjdump"


def main():
    print(get())
    return 0


if __name__ == "__main__":
    run_main(main)
