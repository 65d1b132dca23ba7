"""Stubs of an older C library, so that what is linked here runs on systems that have no younger one.

A linker binds each symbol to the youngest version that the machine's glibc has, so what is built on Debian 12 asks for
glibc 2.34. Zig carries the symbols of every glibc and writes libraries that have those of one, without code: linked
against them, objects of the machine's own compiler ask for no more than that one has. The headers stay the machine's; a
function that only they know is left without a version, which tools/wheels.py finds.
"""

import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

from common import Failure, cache_dir, error_line, locked, run_child

VERSION = "2.28"
# libstdc++ reads this variable of glibc 2.32 to leave out atomic operations while there is one thread: here it never does.
LATER = "char __libc_single_threaded = 0;\n"
# What the linker takes for -lc: functions of four libraries that are one since 2.34 still lie apart.
LIBC = "INPUT(libc.so.6 AS_NEEDED(libdl.so.2 libpthread.so.0 librt.so.1 {loader}) libc_nonshared.a later.o)\n"


def _make(python, folder):
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        source = scratch / "later.c"
        source.write_text(LATER)
        compiler = [str(python), "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-gnu.{VERSION}"]
        told = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": name, "ZIG_LOCAL_CACHE_DIR": name}
        for options in (["-c", "-O2", "-fPIC", "-o", str(folder / "later.o")], ["-shared", "-o", str(scratch / "later.so")]):
            done = run_child(
                [*compiler, *options, str(source)], env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            if done.returncode != 0:
                raise Failure(f'zig cc failed, it said "{error_line(done.stderr)}"; run it again')
        # What it linked against lies in its cache.
        made = [*scratch.glob("o/*/lib*.so.*"), *scratch.glob("o/*/libc_nonshared.a")]
        for file in made:
            shutil.copy(file, folder)
    (loader,) = (file.name for file in made if file.name.startswith("libld."))
    (folder / "libc.so").write_text(LIBC.format(loader=loader))
    for library in ("libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1"):
        (folder / library.rpartition(".")[0]).symlink_to(library)


def stubs(python):
    """The folder of the stubs, for the linker's -L, made once by the Zig of a Python's packages."""
    zig = subprocess.run([python, "-m", "ziglang", "version"], capture_output=True, text=True, check=True).stdout.strip()
    folder = cache_dir() / f"glibc-{VERSION}-zig-{zig}"
    with locked("glibc"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as name:
                made = pathlib.Path(name, "made")
                made.mkdir()
                _make(python, made)
                made.rename(folder)
    return folder
