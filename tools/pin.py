#!/usr/bin/env python3
"""Writes the hashes of a file of pinned requirements anew, after a version in it has been changed.

    tools/pin.py FILE...

Each requirement gets the SHA-256 of every wheel that its version has for Linux (glibc, x86-64 and AArch64) and the Pythons
that tools/venv.py takes. Index, proxy and certificates are those of pip's configuration.
"""

import argparse
import pathlib
import re
import sys
import typing

from common import Failure, run_main

PIN = re.compile(r"^([\w.-]+)==([\w.!+]+)", re.MULTILINE)
OLD = re.compile(r" \\\n    --hash=sha256:[0-9a-f]{64}")
PYTHONS = {"py3", "py2.py3", "cp3", *(f"{kind}{version}" for kind in ("cp", "py") for version in ("311", "312", "313"))}
PLATFORM = re.compile(r"any|(many)?linux\w*_(x86_64|aarch64)")


def fits(tag):
    """Whether a wheel's tag is for one of those Pythons and platforms."""
    later = tag.abi == "abi3" and re.fullmatch(r"cp3([2-9]|1[0-3])", tag.interpreter)
    return (tag.interpreter in PYTHONS or later) and PLATFORM.fullmatch(tag.platform)


def hashes(session, index, name, version):
    from pip._vendor.packaging.utils import InvalidWheelFilename, parse_wheel_filename

    answer = session.get(
        f"{index.rstrip('/')}/{re.sub('[-_.]+', '-', name).lower()}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    answer.raise_for_status()
    found = set()
    for file in answer.json()["files"]:
        try:
            _, of, _, tags = parse_wheel_filename(file["filename"])
        except InvalidWheelFilename:  # a source package
            continue
        if str(of) == version and any(map(fits, tags)):
            found.add(file["hashes"]["sha256"])
    if not found:
        raise Failure(f"{name}=={version}: the index has no wheel of it for Linux; pin another version")
    return sorted(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    files = parser.parse_args().files

    from pip._internal.commands import create_command

    command: typing.Any = create_command("download")
    options, _ = command.parse_args(["--disable-pip-version-check", "pip"])
    with command.main_context():
        session = command.get_default_session(options)
        for file in files:
            plain = OLD.sub("", file.read_text())

            def pinned(pin):
                return pin[0] + "".join(
                    f" \\\n    --hash=sha256:{each}" for each in hashes(session, options.index_url, pin[1], pin[2])
                )

            file.write_text(PIN.sub(pinned, plain))
            print(f"{file}: {len(PIN.findall(plain))} requirements pinned", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
