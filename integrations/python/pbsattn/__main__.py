"""python -m pbsattn: what this installation computes on, and the methods it knows."""

import sys
from collections.abc import Iterable, Iterator

import torch

from . import METHODS, __version__, _core, describe_cpu, plan, program


def _devices() -> Iterator[tuple[str, str, str]]:
    """Name, hardware, and what it takes, of every device."""
    cpu = describe_cpu()
    yield "cpu", f"{cpu.processor}, {cpu.threads} thread(s)", f"f32 by {cpu.f32_path}, bf16 by {cpu.bf16_path}"
    if not _core.has_cuda:
        yield "cuda", "-", "this build has no CUDA backend; install pbsattn where nvcc is"
        return
    if not torch.cuda.is_available():
        yield "cuda", "-", "PyTorch sees no CUDA device"
    for index in range(torch.cuda.device_count()):
        try:
            path = plan(q_heads=1, kv_heads=1, q_len=1, kv_len=1, head_dim=64, device=f"cuda:{index}").path
            takes = f"f16 and bf16 by {path}"
        except NotImplementedError as refusal:
            takes = str(refusal)
        yield f"cuda:{index}", torch.cuda.get_device_name(index), takes


def _print_table(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    print(title)
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[-1])


def _list() -> None:
    print(f"pbsattn {__version__}, PyTorch {torch.__version__}\n")
    _print_table("devices", _devices())
    print()
    _print_table("methods", METHODS.items())


def main(arguments: list[str]) -> program.Status:
    """Returns the exit status, or a line that tells what is wrong."""
    command = arguments[0] if arguments else ""
    if command == "":
        _list()
        return None
    if command in ("eval", "report", "bench"):  # commands of ours until 0.2
        return moved(command)
    return f'pbsattn: command "{command}": no such command; without one it lists the devices and methods'


def moved(command: str) -> int:
    """Names the new command in place of an old one. Returns 2, the exit status."""
    new = "python -m pbsattn_eval" + ("" if command == "eval" else f" {command}")
    print(
        f'pbsattn: command "{command}": it is {new} now; in the source tree, pip install ./integrations/python/pbsattn_eval '
        "brings it",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    program.run("pbsattn", lambda: main(sys.argv[1:]), NotImplementedError, RuntimeError)
