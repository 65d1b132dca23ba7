"""Where memory is out, calls raise, and the process goes on."""

import subprocess
import sys

CHILD = """
import resource

import torch

import pbsattn


def tokens(heads, count):
    return torch.ones(1, 1, 1, 8).expand(1, heads, count, 8)  # one token in memory, whatever the count


small = [torch.randn(1, heads, 200, 64) for heads in (4, 2, 2)]
torch.set_num_threads(1)
expected = pbsattn.attention(*small)
torch.set_num_threads(2)  # the second thread starts under the limit
with open("/proc/self/statm", encoding="utf-8") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (128 << 20),) * 2)

keys = tokens(1, 1 << 16)
large = tokens(1, 1 << 24)
for name, call in {
    "output of 2 GiB": lambda: pbsattn.attention(tokens(4, 1 << 24), large, large, method="full"),
    "workspace of 3 GiB": lambda: pbsattn.attention(tokens(1, 1), large, large),
    "trace of 256 MiB": lambda: pbsattn.trace(tokens(1024, 1), keys, keys, method="full"),
}.items():
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        print(f"{name}: {type(error).__name__}: {error}")
    else:
        print(f"{name}: nothing raised")
    assert torch.equal(pbsattn.attention(*small), expected), name
"""


def test_under_a_limit_of_address_space():
    ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    output, workspace, trace = ran.stdout.splitlines()
    for line in (output, workspace):  # PyTorch allocates these and says so
        assert "RuntimeError" in line and "can't allocate memory" in line
    assert trace == (
        "trace of 256 MiB: MemoryError: out of memory: the system gives this process no more; free some, or raise its limit"
    )
