#!/usr/bin/env python3
"""Writes a long real text that this machine already has, for the demo, the benchmarks and the tests.

    tools/text.py prose  [--skip N] [--bytes N]    the distribution's licence texts
    tools/text.py manual [--skip N] [--bytes N]    Python's language reference, as its help() has it
    tools/text.py code   [--skip N] [--bytes N]    the source of Python's standard library

Prints the path of the text, in the user's cache folder. Parts that don't overlap are texts of their own.
"""

import argparse
import os
import pathlib
import sysconfig

from common import Failure, cache_dir, run_main

KINDS = ["prose", "manual", "code"]
LICENSES = pathlib.Path("/usr/share/common-licenses")


def passages(kind):
    """The passages of a text, in an order that doesn't change from run to run."""
    if kind == "manual":
        from pydoc_data import topics  # half a megabyte, so only when it is asked for

        return [topics.topics[name] for name in sorted(topics.topics)]
    if kind == "prose":
        first = ["GPL-3", "MPL-2.0", "LGPL-2.1", "Apache-2.0", "Artistic", "GPL-2"]
        first += ["GFDL-1.3", "MPL-1.1", "CC0-1.0", "LGPL-3", "GPL-1"]
        found = [LICENSES / name for name in first if (LICENSES / name).is_file()]
        if not found:
            raise Failure(f"{LICENSES}: holds no licence texts; run `pbsattn prefill` on a text of your own")
        return [path.read_text(encoding="utf-8", errors="replace") for path in found]
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    # Long modules that any Python has and that change little from version to version.
    first = [
        "argparse.py",
        "typing.py",
        "tarfile.py",
        "subprocess.py",
        "inspect.py",
        "zipfile.py",
        "datetime.py",
        "pathlib.py",
        "ast.py",
        "logging/__init__.py",
        "smtplib.py",
        "socket.py",
        "tempfile.py",
        "threading.py",
    ]
    return [(library / name).read_text(encoding="utf-8", errors="replace") for name in first if (library / name).is_file()]


def write(kind, size=250_000, skip=0):
    """Writes about `size` bytes of a text, from about byte `skip` on, into the cache; returns the path."""
    whole = "\n".join(passages(kind)).encode()
    if skip >= len(whole):
        raise Failure(f"--skip {skip}: the text {kind} has {len(whole)} bytes here; skip fewer")
    target = cache_dir() / "texts" / (f"{kind}-{size}.txt" if skip == 0 else f"{kind}-{skip}-{size}.txt")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    partial.write_text(whole[skip : skip + size].decode(errors="ignore"), encoding="utf-8")
    os.replace(partial, target)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--bytes", type=int, default=250_000, help="cut the text at about this length (default 250000)")
    parser.add_argument("--skip", type=int, default=0, help="leave out about so many bytes at its beginning (default 0)")
    arguments = parser.parse_args()
    print(write(arguments.kind, arguments.bytes, arguments.skip))
    return 0


if __name__ == "__main__":
    run_main(main)
