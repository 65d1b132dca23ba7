#!/usr/bin/env python3
"""Checks, then times the CUDA backend on bf16 inputs, with PyTorch's kernels as peers in the same process.

    ./dev bench gpu [--json FILE] [--reference PATH] [--qkv FILE] [--only CASE...] [--runs N]

Needs PyTorch with CUDA and a Hopper GPU. Dense rates count half of the N x N pairs, sparse rates the pairs of visited
blocks, 4 x head_dim operations each. Inputs rotate between buffers, and peers take turns with us.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import traceback

import torch

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools"))  # for timing.py, too

import peers
from check import check
from inputs import from_file, random_mask, random_set, shuffle, to_lists, with_density
from library import BLOCK, SEGMENT, Library
from timing import Report, keep_busy, milliseconds, milliseconds_in_graphs

from common import run_main

HEADS, KV_HEADS = 32, 8
K = 1024
MIB = 1 << 20
# What the paper measured (arXiv 2510.21270), at which the whole op is timed.
PAPER_DENSITY = {8 * K: 0.579, 32 * K: 0.405, 128 * K: 0.219}
# What `choosing` times: every score that there is on CUDA, with settings that keep few blocks, so that it's over soon.
CHOOSING = {
    **dict.fromkeys(("pbs", "pbs+", "xattention", "mean-pool", "prism", "flexprefill"), {"top_p": 0.5}),
    **dict.fromkeys(("pbs-threshold", "pbs-sampled"), {"threshold": 0.01}),
    "flashprefill": {"threshold": 0.5},
    "minference": {},
}


class Bench:
    def __init__(self, library, report, runs, reference):
        self.library, self.report, self.runs, self.reference = library, report, runs, reference

    def sets(self, n, head_dim=128):
        """Together larger than the L2 cache several times."""
        return [random_set(n, HEADS, KV_HEADS, head_dim, seed) for seed in range(4 if n <= 8 * K else 2)]

    def rotating(self, function, sets):
        """A call for timing; it writes to its own output where it takes one."""
        return lambda i: function(*sets[i % len(sets)])

    def times(self, functions, sets, n):
        calls = {name: self.rotating(function, sets) for name, function in functions.items()}
        if n <= 8 * K:
            return milliseconds_in_graphs(calls, 3 * self.runs)
        return milliseconds(calls, self.runs)

    def with_output(self, function, sets):
        out = torch.empty_like(sets[0][0])
        return lambda q, k, v: function(q, k, v, out)

    # --------------------------------------------------------------------------------------------------------- cases

    def ceilings(self):
        """What this card gives to a large product and to a large copy."""
        a, b = (torch.randn(8 * K, 8 * K, device="cuda").bfloat16() for _ in range(2))
        source, target = (torch.empty(512 * MIB, dtype=torch.float32, device="cuda") for _ in range(2))
        times = milliseconds({"product": lambda i: a @ b, "copy": lambda i: target.copy_(source)}, 3 * self.runs)
        self.report.add(
            "ceiling", {"n": 8 * K}, "product", [2 * (8 * K) ** 3 / t / 1e9 for t in times["product"]], "TFLOP/s"
        )
        self.report.add("ceiling", {"bytes": 4096 * MIB}, "copy", [4096 * MIB / t / 1e9 for t in times["copy"]], "TB/s")

    def dense(self):
        for head_dim in (128, 64):
            for n in (8 * K, 32 * K, 128 * K):
                sets = self.sets(n, head_dim)
                flops = 2 * HEADS * head_dim * n * n
                times = self.times(
                    {
                        "ours": self.with_output(self.library.attend, sets),
                        "cuDNN": peers.cudnn,
                        "FlashAttention-2": peers.flash_attention_2,
                    },
                    sets,
                    n,
                )
                rates = {name: [flops / t / 1e9 for t in values] for name, values in times.items()}
                for peer in ("cuDNN", "FlashAttention-2"):
                    ratio = statistics.median(rates["ours"]) / statistics.median(rates[peer])
                    self.report.add(
                        "dense", {"n": n, "head_dim": head_dim}, "rate", rates["ours"], "TFLOP/s", peer, rates[peer], ratio
                    )
                del sets
                torch.cuda.empty_cache()

    def density(self, n=128 * K):
        """Per visited block: random lists over permuted keys, against cuDNN's dense rate and FlexAttention's same mask."""
        sets = self.sets(n)[:1]
        generator = torch.Generator("cuda").manual_seed(3)
        permuted, _ = shuffle(*sets[0][1:], HEADS, SEGMENT, generator)
        out = torch.empty_like(sets[0][0])
        for density in (0.4, 0.2, 0.1):
            mask = random_mask(1, HEADS, n, n, SEGMENT, density, generator)
            lists = to_lists(mask)
            flops = 4 * 128 * BLOCK**2 * mask.sum().item()

            def ours(q, k, v, permuted=permuted, lists=lists):
                return self.library.attend(q, k, v, out, permuted=permuted, lists=lists)

            times = self.times({"ours": ours, "cuDNN": peers.cudnn, "FlexAttention": peers.flex(mask)}, sets, n)
            rates = {name: [flops / t / 1e9 for t in values] for name, values in times.items()}
            rates["cuDNN"] = [2 * HEADS * 128 * n * n / t / 1e9 for t in times["cuDNN"]]
            for peer in ("cuDNN", "FlexAttention"):
                name = "cuDNN, dense" if peer == "cuDNN" else peer
                self.report.add(
                    "density",
                    {"n": n, "head_dim": 128, "density": density},
                    "rate",
                    rates["ours"],
                    "TFLOP/s",
                    name,
                    rates[peer],
                    statistics.median(rates["ours"]) / statistics.median(rates[peer]),
                )
            del mask, lists
            torch.cuda.empty_cache()

    def whole(self):
        """Methods on inputs of which `pbs` visits as much as in the paper; and what goes before attend."""
        for n, target in PAPER_DENSITY.items():
            sets = [with_density(self.library, target, n, HEADS, KV_HEADS, 128, seed=11)]
            self.whole_op("pbs", "pbs", n, sets, self.reference)
            for method in ("pbs-threshold", "pbs-sampled"):
                self.whole_op(method, method, n, sets, threshold=BLOCK / n)

    def choosing(self):
        """What it takes to choose blocks, method by method: permute and select, and their share of cuDNN's dense time."""
        for n in PAPER_DENSITY:
            q, k, v = with_density(self.library, PAPER_DENSITY[n], n, HEADS, KV_HEADS, 128, seed=11)
            out = torch.empty_like(q)
            plans = {method: self.library.plan(method, q, k, **options) for method, options in CHOOSING.items()}
            seconds = {method: [] for method in plans}
            dense = []
            for _ in range(self.runs + 1):
                dense += milliseconds({"cuDNN": lambda _, q=q, k=k, v=v: peers.cudnn(q, k, v)}, 1)["cuDNN"]
                for method, plan in plans.items():
                    keep_busy()
                    stats = plan.stats(q, k, v, out)
                    seconds[method].append(stats.permute_seconds + stats.select_seconds)
            for method in plans:
                times = [s * 1e3 for s in seconds[method][1:]]
                params = {"n": n, "head_dim": 128, "method": method}
                self.report.add("choosing", params, "permute + select", times, "ms", "cuDNN, whole", dense)
                self.report.add(
                    "choosing", params, "share of cuDNN's time", [100 * t / statistics.median(dense) for t in times], "%"
                )

    def whole_op(self, case, method, n, sets, reference=None, **options):
        q, k, v = sets[0]
        out = torch.empty_like(q)
        plan = self.library.plan(method, q, k, **options)
        stats = []
        for _ in range(2 * self.runs + 1):
            keep_busy()
            stats.append(plan.stats(q, k, v, out))
        del stats[0]
        params = {"n": n, "head_dim": q.shape[3], "density": round(stats[0].density, 4)}
        functions = {"ours": self.with_output(plan, sets), "cuDNN": peers.cudnn}
        if reference:
            functions["reference PBS-Attn"] = reference
        times = (
            self.times(functions, sets, n)
            if not reference
            else milliseconds({name: self.rotating(f, sets) for name, f in functions.items()}, self.runs)
        )
        self.report.add_times(case, params, times["ours"], {p: t for p, t in times.items() if p != "ours"})
        before = [(s.permute_seconds + s.select_seconds) * 1e3 for s in stats]
        self.report.add(case, params, "permute + select", before, "ms", "cuDNN, whole", times["cuDNN"])
        for stage in ("permute", "select", "attend"):
            self.report.add(case, params, stage, [getattr(s, f"{stage}_seconds") * 1e3 for s in stats], "ms")
        if reference:
            group = q.shape[1] // k.shape[1]
            repeated = [(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
            alone = milliseconds({"it": self.rotating(reference.on_repeated, repeated)}, self.runs)["it"]
            self.report.add(
                case,
                params,
                "time",
                times["ours"],
                "ms",
                "reference, K and V repeated before",
                alone,
                statistics.median(alone) / statistics.median(times["ours"]),
            )

    def auto(self):
        """Short sequences: `auto` against dense attention."""
        for head_dim in (128, 64):
            for n in (K // 2, 1 * K, 2 * K, 4 * K, 8 * K):
                sets = self.sets(n, head_dim)
                plan = self.library.plan("auto", *sets[0][:2])
                times = self.times({"ours": self.with_output(plan, sets), "cuDNN": peers.cudnn}, sets, n)
                self.report.add_times(
                    "auto", {"n": n, "head_dim": head_dim, "path": plan.path}, times["ours"], {"cuDNN": times["cuDNN"]}
                )

    def workspace(self, n=128 * K):
        sets = [with_density(self.library, PAPER_DENSITY[n], n, HEADS, KV_HEADS, 128, seed=11)]
        plans = {
            "uncapped": self.library.plan("pbs", *sets[0][:2]),
            "512 MiB": self.library.plan("pbs", *sets[0][:2], cap=512 * MIB),
        }
        times = self.times({name: self.with_output(plan, sets) for name, plan in plans.items()}, sets, n)
        for name, plan in plans.items():
            params = {"n": n, "head_dim": 128, "cap": name}
            self.report.add("workspace", params, "size", [plan.workspace_size / MIB], "MiB")
        self.report.add_times("workspace", params, times["512 MiB"], {"uncapped": times["uncapped"]})

    def million(self, n=K * K):
        """A million tokens, at a low top_p so that it takes seconds, under a cap of 1 GiB."""
        q, k, v = random_set(n, HEADS, KV_HEADS, 128, seed=1)
        plan = self.library.plan("pbs", q, k, cap=1024 * MIB, top_p=0.1)
        out = torch.full_like(q, float("nan"))
        stats = plan.stats(q, k, v, out)
        if not torch.isfinite(out[:, :, ::1001]).all():
            raise RuntimeError("a million tokens: outputs are not finite")
        seconds = stats.permute_seconds + stats.select_seconds + stats.attend_seconds
        self.report.add(
            "million",
            {"n": n, "head_dim": 128, "density": round(stats.density, 4), "workspace_mib": plan.workspace_size // MIB},
            "time",
            [seconds],
            "s",
        )

    def repeatable(self, n=32 * K):
        """Bits of outputs over 20 runs, with the workspace poisoned before each."""
        q, k, v = with_density(self.library, PAPER_DENSITY[n], n, HEADS, KV_HEADS, 128, seed=11)
        plan = self.library.plan("pbs", q, k)
        outs = []
        for run in range(20):
            plan.workspace.fill_(run)
            out = torch.full_like(q, float("nan"))
            plan(q, k, v, out)
            outs = outs or [out]
            if not torch.equal(outs[0].view(torch.int16), out.view(torch.int16)):
                raise RuntimeError(f"run {run} of 20 differs from the first")
        self.report.add("repeatable", {"n": n, "head_dim": 128}, "equal runs", [20], "runs")

    def file(self, path):
        sets = [from_file(path)]
        self.whole_op("file", "pbs", sets[0][0].shape[2], sets, self.reference)


CASES = ("ceilings", "dense", "density", "whole", "choosing", "auto", "workspace", "million", "repeatable")


def commit():
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    return git.stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(
        prog="./dev bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, help="write the measurements there")
    parser.add_argument(
        "--reference", type=pathlib.Path, help="a checkout of the published PBS-Attn code, to time beside ours"
    )
    parser.add_argument("--qkv", type=pathlib.Path, help=".safetensors or .npz with q, k and v: [heads][tokens][head_dim]")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--commit", default=commit(), help="what to write as the commit")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("bench gpu: no Hopper GPU that PyTorch can use; run it on an H100 or H200")
    library = Library(arguments.library.resolve())
    if not check(library):
        return 1
    report = Report(arguments.commit)
    bench = Bench(library, report, arguments.runs, arguments.reference and peers.Reference(arguments.reference))
    cases = {case: getattr(bench, case) for case in arguments.only}
    if arguments.qkv:
        cases["file"] = lambda: bench.file(arguments.qkv)
    failed = []
    for name, case in cases.items():
        try:
            case()
        except BrokenPipeError:
            raise
        except Exception:  # the other cases' measurements are worth having all the same
            traceback.print_exc()
            failed.append(name)
        torch.cuda.empty_cache()
        if arguments.json:
            report.write(arguments.json)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
