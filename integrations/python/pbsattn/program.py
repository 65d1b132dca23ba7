"""How commands end, and how they write files: of this package, of pbsattn_eval, and of the tools of the source tree, which
take this file by its path, so it imports nothing but the standard library."""

from __future__ import annotations  # the tools run on Python 3.9, too

import contextlib
import errno
import os
import pathlib
import signal
import stat
import sys
import typing
from collections.abc import Callable

__all__ = ["CLOSED_PIPE", "Status", "Terminated", "guarded", "missing", "run", "status_of", "write_whole"]

Status = typing.Union[int, str, None]  # how a command ends, as sys.exit() takes it
CLOSED_PIPE = 128 + signal.SIGPIPE  # what a shell says of a program that this signal ended


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whatever cleans up after Ctrl-C cleans up after this."""


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
    raise Terminated


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status that an interrupted command ends with."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def missing(error: ImportError) -> str:
    """What an ImportError says is not installed, and the way out, in a line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"needs {package}, which is not installed; pip install {package}"
    return f"something it needs is missing or too old: {' '.join(str(error).split())}"


def guarded(name: str, main: Callable[[], Status], *failures: type[Exception], interrupted: str = "interrupted") -> Status:
    """Returns the status that main() does, a number, None or a line that tells what went wrong.

    Exceptions of the types `failures`, something that isn't installed, and an interruption become such a line or a number; a
    reader that closed the pipe early has what it wanted, so it isn't even told.
    """
    told: tuple[type[Exception], ...] = (*failures, OSError)
    try:
        return main()
    except SystemExit as end:
        return end.code
    except BrokenPipeError:
        return CLOSED_PIPE
    except ImportError as error:
        return f"{name}: {missing(error)}"
    except told as error:
        return f"{name}: {error}"
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(OSError):
            print(f"{name}: {interrupted}", file=sys.stderr)
        return status_of(interrupt)


def run(
    name: str, main: Callable[[], Status], *failures: type[Exception], interrupted: str = "interrupted"
) -> typing.NoReturn:
    """Ends the process with guarded()'s status, or that of an output that can't be written. SIGTERM interrupts it."""
    signal.signal(signal.SIGTERM, _terminate)
    status = guarded(name, main, *failures, interrupted=interrupted)
    if sys.stdout is None:  # it was closed before Python began, which prints to nowhere then
        sys.exit(status or f"{name}: standard output: it is closed; let it lead somewhere, and run it again")
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more, and complains
        if error.errno == errno.EPIPE:
            status = status or CLOSED_PIPE
        else:
            status = status or f"{name}: standard output: {error.strerror}; make room or write elsewhere, and run it again"
    sys.exit(status)


def _is_standard_output(path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:  # one of them isn't there
        return False


def write_whole(path: str | os.PathLike[str], text: str | bytes) -> None:
    """Writes a file, text in UTF-8, that appears whole or not at all. A symbolic link stays, and what it names is written;
    a pipe or a device, which can't be replaced, is written to as it is."""
    path = pathlib.Path(path)
    data = text.encode() if isinstance(text, str) else text
    # Asked of the path as it is: /dev/stdout of a pipe leads to no file.
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(data)
        return
    path = pathlib.Path(os.path.realpath(path))
    if _is_standard_output(path):
        raise OSError(f"{path}: is standard output, which the table goes to; name another file")
    partial = pathlib.Path(f"{path}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
