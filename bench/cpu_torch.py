#!/usr/bin/env python3
"""The CPU backend against PyTorch's scaled_dot_product_attention, in one process, in turn.

    ./dev bench cpu-torch [--json FILE] [--threads N] [--runs N] [--limit SECONDS] [--tokens N ...] [--head-dims D ...]

First the errors of both against float64, on inputs of N(0, 1) and with queries eight times that (peaky); then rates, which
count 4 x head_dim operations for each pair that causal attention sees. Inputs are bf16 or float32, as many KV heads as
query heads, since PyTorch repeats them otherwise. Samples are taken on undisturbed cores, as bench/sampling.h has it.
PBSATTN_CPU_PATH forces a code path.
"""

import argparse
import ctypes
import datetime
import json
import os
import pathlib
import subprocess
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tools"))
from common import run_main, write_whole

HEADS = 1  # so that a sample is short: a core seldom stays undisturbed for long
DTYPES = {torch.float32: 0, torch.bfloat16: 2}
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Library:
    def __init__(self, path):
        self.c = ctypes.CDLL(str(path))
        self.c.bench_create.restype = ctypes.c_void_p
        self.c.bench_run.restype = ctypes.c_double
        self.c.bench_path.restype = self.c.bench_error.restype = ctypes.c_char_p

    def attention(self, q, threads, method="full", top_p=1.0):
        """A function of q, k, v and out, and the code path it takes."""
        heads, tokens, head_dim = q.shape[1:]
        sizes = (ctypes.c_int64 * 4)(heads, heads, tokens, head_dim)
        plan = self.c.bench_create(method.encode(), ctypes.c_float(top_p), DTYPES[q.dtype], threads, sizes)
        if not plan:
            raise SystemExit(f"bench cpu-torch: {self.c.bench_error().decode()}")
        plan = ctypes.c_void_p(plan)

        def run(q, k, v, out):
            density = self.c.bench_run(plan, *(ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out)))
            if density < 0:
                raise SystemExit(f"bench cpu-torch: {self.c.bench_error().decode()}")
            return density

        return run, self.c.bench_path(plan).decode()

    def sample(self, runs, limit, threads, calls):
        """Of two calls, taken in turn: seconds, spread, and how many samples were undisturbed, taken, counted."""
        failures = []

        def guarded(call):
            def run():
                try:
                    if not failures:
                        call()
                except BaseException as failure:  # which C++ would not hand on
                    failures.append(failure)

            return ctypes.CFUNCTYPE(None)(run)

        seconds, spreads, counts = (ctypes.c_double * 2)(), (ctypes.c_double * 2)(), (ctypes.c_int * 3 * 2)()
        self.c.bench_sample(runs, ctypes.c_double(limit), threads, *map(guarded, calls), seconds, spreads, counts)
        if failures:
            raise failures[0]
        return [(seconds[i], spreads[i], *counts[i]) for i in range(2)]


class Report:
    def __init__(self, commit):
        self.commit, self.records = commit, []

    def add(self, case, params, metric, value, unit, peer_value, ratio, runs=1, spread=0.0, undisturbed=None, samples=None):
        self.records.append(
            {
                "suite": "cpu-torch",
                "case": case,
                "params": params,
                "metric": metric,
                "value": value,
                "unit": unit,
                "peer": "PyTorch",
                "peer_value": peer_value,
                "ratio": ratio,
                "runs": runs,
                "spread": spread,
                "undisturbed": undisturbed,
                "samples": samples,
                "device": processor(),
                "commit": self.commit,
                "date": datetime.date.today().isoformat(),
            }
        )
        words = " ".join(f"{key}={value}" for key, value in params.items())
        print(
            f"{case:<7} {words:<66} {metric:<16} {value:>10.4g} {unit:<8} {peer_value:>10.4g} PyTorch {ratio:>6.2f}x  "
            + (f"(spread {spread:.0%}; {undisturbed} of {samples} undisturbed)" if samples else ""),
            flush=True,
        )


def processor():
    with open("/proc/cpuinfo") as file:
        names = [line.split(": ", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def inputs(tokens, head_dim, dtype, peak=1.0):
    generator = torch.Generator().manual_seed(tokens + head_dim)
    q, k, v = (torch.randn(1, HEADS, tokens, head_dim, generator=generator) for _ in range(3))
    return [t.to(dtype).contiguous() for t in (q * peak, k, v)]


def errors(library, report, head_dim, threads):
    tokens = 2048
    for name, peak in (("N(0, 1)", 1.0), ("peaky", 8.0)):
        for dtype in DTYPES:
            q, k, v = inputs(tokens, head_dim, dtype, peak)
            truth = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
            ours = torch.empty_like(q)
            run, path = library.attention(q, threads)
            run(q, k, v, ours)
            theirs = scaled_dot_product_attention(q, k, v, is_causal=True)
            params = {"n": tokens, "head_dim": head_dim, "inputs": name, "dtype": NAMES[dtype], "path": path}
            for metric, of in (
                ("rms error", lambda e: e.square().mean().sqrt().item()),
                ("largest error", lambda e: e.abs().max().item()),
            ):
                value, peer = (of(x.double() - truth) for x in (ours, theirs))
                report.add("error", params, metric, value, "", peer, peer / value)


def rates(library, report, tokens, head_dim, dtype, arguments):
    q, k, v = inputs(tokens, head_dim, dtype)
    ours = torch.empty_like(q)
    run, path = library.attention(q, arguments.threads)
    calls = (lambda: run(q, k, v, ours), lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    (seconds, spread, undisturbed, samples, runs), (peer_seconds, *_) = library.sample(
        arguments.runs, arguments.limit, arguments.threads, calls
    )
    difference = (ours - calls[1]()).double().norm() / ours.double().norm()
    if not difference < 2e-2:
        raise SystemExit(f"bench cpu-torch: the results differ by {difference:.2g}")
    gflop = 2e-9 * HEADS * head_dim * tokens * (tokens + 1)
    params = {"n": tokens, "head_dim": head_dim, "dtype": NAMES[dtype], "threads": arguments.threads, "path": path}
    report.add(
        "dense",
        params,
        "rate",
        gflop / seconds,
        "GFLOP/s",
        gflop / peer_seconds,
        peer_seconds / seconds,
        runs,
        spread,
        undisturbed,
        samples,
    )


def commit():
    done = subprocess.run(
        ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, help="write the measurements there")
    parser.add_argument("--threads", type=int, default=1, help="of both")
    parser.add_argument("--runs", type=int, default=5, help="undisturbed samples wanted of each")
    parser.add_argument("--limit", type=float, default=60, help="seconds to wait for them, for each row")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--commit", default=commit(), help="what to write as the commit")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library, report = Library(arguments.library.resolve()), Report(arguments.commit)
    print(
        f"{processor()}, PyTorch {torch.__version__}, commit {arguments.commit}, medians of {arguments.runs} undisturbed "
        "samples"
    )
    for head_dim in arguments.head_dims:
        errors(library, report, head_dim, arguments.threads)
    for head_dim in arguments.head_dims:
        for tokens in arguments.tokens:
            for dtype in (torch.bfloat16, torch.float32):
                rates(library, report, tokens, head_dim, dtype, arguments)
    if arguments.json:
        write_whole(arguments.json, json.dumps(report.records, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
