#!/usr/bin/env python3
"""Fetches llama.cpp's source, pinned, and builds it once into the user's cache folder.

    tools/llama.py libraries        libllama and ggml: what the pbsattn program needs
    tools/llama.py tools            llama-perplexity and llama-bench as well: what the tests need

Prints two lines, the source folder and the build folder. A llama.cpp of your own serves as well: set
PBSATTN_LLAMA_SOURCE and PBSATTN_LLAMA_BUILD (shared libraries), and nothing is fetched or built.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import tarfile

from common import Failure, cache_dir, locked, pip_download, require_space, run_child, run_main, say

# The Python binding's source package carries llama.cpp's whole source, at ggml 0.25.3.
PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = "vendor/llama.cpp/"

TARGETS = {
    "libraries": ["llama", "ggml", "ggml-cpu"],
    "tools": ["llama", "ggml", "ggml-cpu", "llama-perplexity", "llama-bench"],
}

# ggml's options and the processor features that they need. AMX is never turned on: with GCC 12 ggml's
# own AMX code dies of an illegal instruction (its tile configuration is optimised away).
X86_FEATURES = {
    "GGML_SSE42": ["sse4_2"],
    "GGML_AVX": ["avx"],
    "GGML_AVX2": ["avx2"],
    "GGML_FMA": ["fma"],
    "GGML_F16C": ["f16c"],
    "GGML_BMI2": ["bmi2"],
    "GGML_AVX512": ["avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"],
    "GGML_AVX512_VBMI": ["avx512vbmi"],
    "GGML_AVX512_VNNI": ["avx512_vnni"],
    "GGML_AVX512_BF16": ["avx512_bf16"],
}

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_BACKEND_DL": "ON",  # as the official releases: backends load at run time, ours too
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_MTMD": "OFF",
    "LLAMA_BUILD_UI": "OFF",
}


def processor_options():
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"GGML_NATIVE": "ON"}
    with open("/proc/cpuinfo") as file:
        flags = next((line.split(":", 1)[1].split() for line in file if line.startswith("flags")), [])
    options = {name: "ON" if all(f in flags for f in needs) else "OFF" for name, needs in X86_FEATURES.items()}
    return {"GGML_NATIVE": "OFF", **options}


def extract(archive, target):
    """Takes llama.cpp out of the source package; the folder appears whole or not at all."""
    partial = target.with_name("src.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        members = []
        for member in tar.getmembers():
            inside = member.name.split("/", 1)[-1]
            if inside.startswith(INSIDE) and (member.isfile() or member.isdir()) and ".." not in member.name:
                member.name = inside[len(INSIDE) :]
                members.append(member)
        tar.extractall(partial, members)
    os.replace(partial, target)


def run(command, log, step):
    with open(log, "a") as out:
        if run_child(command, stdout=out, stderr=subprocess.STDOUT).returncode != 0:
            raise Failure(f"llama.cpp: {step} failed; the last lines of {log} say why")


def build(targets):
    options = {**OPTIONS, **processor_options()}
    key = hashlib.sha256(repr([VERSION, sorted(options.items())]).encode()).hexdigest()[:10]
    root = cache_dir() / f"llama.cpp-{VERSION}-{key}"
    source, binary, log = root / "src", root / "build", root / "build.log"
    with locked("llama"):
        root.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            require_space(1_500_000_000)
            archive = root / "source.tar.gz"
            if not archive.exists():
                say(f"llama.cpp: fetching the source ({PACKAGE} {VERSION}, 77 MB)")
            pip_download(f"{PACKAGE}=={VERSION}", archive, SHA256, source=True)
            extract(archive, source)
            archive.unlink()
        stamp = binary / f".built-{targets}"
        if not stamp.exists():
            say(f"llama.cpp: building {', '.join(TARGETS[targets])} (some minutes; log in {log})")
            run(
                ["cmake", "-S", source, "-B", binary, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())],
                log,
                "configuration",
            )
            run(["cmake", "--build", binary, "--target", *TARGETS[targets]], log, "build")
            stamp.touch()
    return source, binary


def own_copy():
    """The user's llama.cpp, when the environment names one."""
    source, binary = (os.environ.get(f"PBSATTN_LLAMA_{what}") for what in ("SOURCE", "BUILD"))
    if not source and not binary:
        return None
    if not source or not binary:
        raise Failure("PBSATTN_LLAMA_SOURCE and PBSATTN_LLAMA_BUILD go together: set both, or none")
    for path, holds in ((source, "include/llama.h"), (binary, "CMakeCache.txt")):
        if not os.path.exists(os.path.join(path, holds)):
            raise Failure(f"{path}: holds no {holds}; name llama.cpp's source and build folders")
    return source, binary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", choices=list(TARGETS))
    arguments = parser.parse_args()
    for path in own_copy() or build(arguments.targets):
        print(path)
    return 0


if __name__ == "__main__":
    run_main(main)
