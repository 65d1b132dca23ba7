"""Downloads one file of a package index and, unlike pip, goes on where a broken download stopped.

    pip_resume.py REQUIREMENT TARGET SHA256 [--source]      common.py runs it, in a Python that has pip

The finder and the session are pip's own, so the index, proxy, certificates and credentials of the user's configuration
apply. What has come so far stands beside TARGET in a file named by the SHA256 that the whole must have; TARGET appears
only with that content. Ends with 0, or with a line on stdout and
    3   the connection broke: the part is kept, run it again
    4   the content has another SHA-256: the part is removed
    5   the disk is full: the part is removed
Any other status, where pip has no such insides or the index no such file, leaves the work to `pip download`.
"""

import argparse
import errno
import hashlib
import logging
import os
import pathlib
import sys

BROKEN, DAMAGED, FULL, UNABLE = 3, 4, 5, 6
CHUNK = 1 << 16


def link_and_session(command, options, name, version):
    """The file that `pip download` would take, and the session it would take it with."""
    from pip._vendor.packaging.specifiers import SpecifierSet

    session = command.get_default_session(options)
    finder = command._build_package_finder(options=options, session=session)
    best = finder.find_best_candidate(name, SpecifierSet(f"=={version}")).best_candidate
    return (best.link if best else None), session


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def fetch_rest(session, url, part, progress):
    """Appends what is missing to `part`. Says whether the answer came to its end."""
    from pip._vendor.requests.exceptions import RequestException
    from pip._vendor.urllib3.exceptions import HTTPError

    have = size_of(part)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = session.get(url, headers=headers, stream=True)
    except RequestException:
        return False
    if have and response.status_code == 416:  # nothing lies behind what is here: it is whole, or it is not that file
        return True
    response.raise_for_status()
    goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    length = int(response.headers.get("Content-Length", 0))
    came = 0
    with open(part, "ab" if goes_on else "wb") as file:
        total = length + file.tell()
        while True:
            try:
                chunk = response.raw.read(CHUNK)
            except (HTTPError, OSError):
                return False
            if not chunk:
                return came >= length
            file.write(chunk)
            came += len(chunk)
            progress(file.tell(), total)


def sha256_of(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def show_progress(have, total):
    """For people: one line that is written over."""
    if sys.stderr.isatty() and (have == total or have // CHUNK % 16 == 0):
        print(f"\r  {have / 1e6:.1f} of {total / 1e6:.1f} MB", end="\n" if have == total else "", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("requirement")
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("sha256")
    parser.add_argument("--source", action="store_true")
    arguments = parser.parse_args()
    logging.disable()

    from pip._internal.commands import create_command

    command = create_command("download")
    name, version = arguments.requirement.split("==")
    kind = ["--no-binary", name] if arguments.source else ["--only-binary", ":all:"]
    options, _ = command.parse_args([*kind, "--no-deps", "--disable-pip-version-check", arguments.requirement])
    with command.main_context():
        link, session = link_and_session(command, options, name, version)
        sha256 = arguments.sha256
        if not link:
            return UNABLE
        part = arguments.target.with_name(f"{arguments.target.name}.{sha256[:12]}.part")
        url = link.url.partition("#")[0]
        tries = options.retries + 1
        have = size_of(part)
        try:
            while not fetch_rest(session, url, part, show_progress):
                tries -= 1
                before, have = have, size_of(part)
                if tries == 0 or have == before:  # the session has tried already whether anybody answers
                    print(f"the connection broke, {have} bytes are kept")
                    return BROKEN
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            part.unlink()
            return FULL
    if sha256_of(part) != sha256:
        part.unlink()
        print(f"its SHA-256 is not {sha256[:12]}...")
        return DAMAGED
    os.replace(part, arguments.target)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # common.py tells of it
        sys.exit(130)
