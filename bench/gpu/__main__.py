#!/usr/bin/env python3
"""Checks, then times the CUDA backend on bf16 inputs, with others' kernels as peers in the same process.

    ./dev bench gpu [--json FILE] [--reference PATH] [--qkv FILE] [--only CASE...] [--peers WORD...] [--runs N]

Needs PyTorch with CUDA and a Hopper GPU, which bring cuDNN, FlashAttention-2 and FlexAttention as peers. Others are timed
where their packages are installed, and left out with a word where not:

    FlashAttention-3                   fa3-fwd==0.0.3
    FlashAttention-4, dense and lists  flash-attn-4==4.0.0b36 nvidia-cutlass-dsl[cu13]==4.8.1
    cuDNN over block lists             nvidia-cudnn-frontend==1.32.0 nvidia-cutlass-dsl[cu13]==4.8.1
    the published PBS-Attn code        --reference, a checkout of its repository

Each peer's output is compared with ours before it is timed; what differs ends the run with 1. Dense rates count half of the
N x N pairs, sparse rates the pairs of visited blocks, 2 x (head_dim + head_dim_v) operations each. Inputs rotate between
buffers. Fast peers take turns with us; slow ones, which let the card cool, with us alone. Copies into a peer's layout and
the building of its lists are not timed. A line names the strongest peer of each row.
"""

import argparse
import functools
import pathlib
import statistics
import subprocess
import sys
import traceback

import torch

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools"))  # for timing.py, too

import peers
from attend_cases import density, layers
from check import check
from chunked import chunks
from inputs import HEADS, KV_HEADS, PAPER_DENSITY, K, from_file, random_set, with_density
from library import ARRIVAL, BLOCK, KV_HEAD, LEARNED, Library
from paged import pages
from timing import Report, keep_busy, milliseconds, milliseconds_in_graphs, pairs_of, params_of

from common import run_main

MIB = 1 << 20
# Orders of two-step scores, and what twice the queries cost that reach twice as far.
TWO_STEP = {
    "no order": {},
    "learned": {"permutation": LEARNED, "order_scope": KV_HEAD},
    "arrival": {"permutation": ARRIVAL, "order_scope": KV_HEAD},
    "learned, 8 of 8": {
        "permutation": LEARNED,
        "order_scope": KV_HEAD,
        "two_step_queries": 32,
        "two_step_exact": 8,
        "two_step_reach": 8,
    },
}
# What `choosing` times: every score that there is on CUDA, with settings that keep few blocks, so that it's over soon.
CHOOSING = {
    **dict.fromkeys(("pbs", "pbs+", "xattention", "mean-pool", "prism", "flexprefill"), {"top_p": 0.5}),
    **dict.fromkeys(("pbs-threshold", "pbs-sampled"), {"threshold": 0.01}),
    "flashprefill": {"threshold": 0.5},
    "minference": {},
    "pbs-two-step": {},
    **{f"two-step, {name}": {"method": "two-step", **options} for name, options in TWO_STEP.items()},
}


class Bench:
    def __init__(self, library, report, runs, reference, only_peers):
        self.library, self.report, self.runs, self.reference = library, report, runs, reference
        self.only_peers = only_peers
        self.wrong = []

    def sets(self, n, head_dim=128, head_dim_v=None):
        """Together larger than the L2 cache several times."""
        return [random_set(n, HEADS, KV_HEADS, head_dim, seed, head_dim_v) for seed in range(4 if n <= 8 * K else 2)]

    def rotating(self, function, sets):
        return lambda i: function(*sets[i % len(sets)])

    def times(self, calls, n):
        return milliseconds_in_graphs(calls, 3 * self.runs) if n <= 8 * K else milliseconds(calls, self.runs)

    def with_output(self, function, sets):
        """Returns a function of q, k and v that writes to one output of ours, and returns it."""
        q, _, v = sets[0]
        out = q.new_empty(*q.shape[:3], v.shape[3])

        def call(q, k, v):
            function(q, k, v, out)
            return out

        return call

    def right(self, candidates, sets, expected):
        """Returns the calls (fast, slow) of the peers that can run here and compute nearly what is expected."""
        fast, slow = {}, {}
        norm = expected.float().norm()
        for peer in candidates:
            if self.only_peers and not any(word.lower() in peer.name.lower() for word in self.only_peers):
                continue
            try:
                call = peer.on(sets)
                difference = ((call(0).float() - expected.float()).norm() / norm).item()
            except Exception as error:  # what a peer can't do is its own affair
                print(f"without {peer.name} at {tuple(expected.shape)}: {peers.first_line(error)}", flush=True)
                continue
            if difference < 0.02:  # two bf16 outputs differ by some .003
                (slow if peer.slow else fast)[peer.name] = call
            else:
                self.wrong.append(peer.name)
                print(f"WRONG {peer.name} at {tuple(expected.shape)}: differs from ours by {difference:.2e}", flush=True)
        return fast, slow

    def race(self, ours, fast, slow, n):
        """Returns the times of each rotation: ours with all fast peers, then with each slow one alone."""
        return [self.times({**ours, **turns}, n) for turns in (fast, *({name: call} for name, call in slow.items()))]

    def attend(self, sets):
        """Returns our dense attention as a function of q, k and v."""
        return self.with_output(self.library.attend, sets)

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
        for widths in self.library.widths:
            for n in (8 * K, 32 * K, 128 * K):
                sets = self.sets(n, *widths)
                ours = self.attend(sets)
                fast, slow = self.right(peers.dense(), sets, ours(*sets[0]))
                rotations = self.race({"ours": self.rotating(ours, sets)}, fast, slow, n)
                flops = HEADS * sum(widths) * n * n
                pairs = pairs_of(rotations, "ours", lambda _, times, flops=flops: [flops / t / 1e9 for t in times])
                self.report.add_peers("dense", params_of(n, widths), "rate", "TFLOP/s", pairs)
                del sets, ours, fast, slow
                torch.cuda.empty_cache()

    def whole(self):
        """Methods on inputs of which `pbs` visits as much as in the paper; and what goes before attend."""
        for n, target in PAPER_DENSITY.items():
            sets = [with_density(self.library, target, n, HEADS, KV_HEADS, 128, seed=11)]
            self.whole_op("pbs", "pbs", n, sets, self.reference)
            for method in ("pbs-threshold", "pbs-sampled"):
                self.whole_op(method, method, n, sets, threshold=BLOCK / n)
            for name, options in TWO_STEP.items():
                self.whole_op(f"two-step, {name}", "two-step", n, sets, **options)

    def choosing(self):
        """What it takes to choose blocks, method by method: permute and select, and their share of cuDNN's dense time."""
        for n in PAPER_DENSITY:
            q, k, v = with_density(self.library, PAPER_DENSITY[n], n, HEADS, KV_HEADS, 128, seed=11)
            out = torch.empty_like(q)
            plans = {name: self.library.plan(q=q, k=k, **{"method": name} | options) for name, options in CHOOSING.items()}
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
        out = q.new_empty(*q.shape[:3], v.shape[3])
        plan = self.library.plan(method, q, k, head_dim_v=v.shape[3], **options)
        stats = []
        for _ in range(2 * self.runs + 1):
            keep_busy()
            stats.append(plan.stats(q, k, v, out))
        del stats[0]
        params = params_of(n, (q.shape[3], v.shape[3]), density=round(stats[0].density, 4))
        ours = {"ours": self.rotating(self.with_output(plan, sets), sets)}
        fast, _ = self.right([peer for peer in peers.dense() if not peer.slow], sets, self.attend(sets)(q, k, v))
        rotations = self.race(ours, fast, {}, n)
        times = rotations[0]
        if reference:  # not in a graph, which it can't be captured into
            rotations.append(milliseconds({**ours, "reference PBS-Attn": self.rotating(reference, sets)}, self.runs))
        self.report.add_peers(case, params, "time", "ms", pairs_of(rotations, "ours"))
        before = [(s.permute_seconds + s.select_seconds) * 1e3 for s in stats]
        whole = ("cuDNN, whole", times["cuDNN"]) if "cuDNN" in times else ()
        self.report.add(case, params, "permute + select", before, "ms", *whole)
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
        for widths in self.library.widths:
            for n in (K // 2, 1 * K, 2 * K, 4 * K, 8 * K):
                sets = self.sets(n, *widths)
                plan = self.library.plan("auto", *sets[0][:2], head_dim_v=widths[1])
                fast, slow = self.right(peers.dense(), sets, self.attend(sets)(*sets[0]))
                ours = {"ours": self.rotating(self.with_output(plan, sets), sets)}
                pairs = pairs_of(self.race(ours, fast, slow, n), "ours")
                self.report.add_peers("auto", params_of(n, widths, path=plan.path), "time", "ms", pairs)

    def workspace(self, n=128 * K):
        sets = [with_density(self.library, PAPER_DENSITY[n], n, HEADS, KV_HEADS, 128, seed=11)]
        plans = {
            "uncapped": self.library.plan("pbs", *sets[0][:2]),
            "512 MiB": self.library.plan("pbs", *sets[0][:2], cap=512 * MIB),
        }
        times = self.times({name: self.rotating(self.with_output(plan, sets), sets) for name, plan in plans.items()}, n)
        for name, plan in plans.items():
            params = {"n": n, "head_dim": 128, "cap": name}
            self.report.add("workspace", params, "size", [plan.workspace_size / MIB], "MiB")
        ratio = statistics.median(times["uncapped"]) / statistics.median(times["512 MiB"])
        self.report.add("workspace", params, "time", times["512 MiB"], "ms", "uncapped", times["uncapped"], ratio)

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


CASES = {
    "ceilings": Bench.ceilings,
    "dense": Bench.dense,
    "layers": layers,
    "density": density,
    "whole": Bench.whole,
    "choosing": Bench.choosing,
    "pages": pages,
    "chunks": chunks,
    "auto": Bench.auto,
    "workspace": Bench.workspace,
    "million": Bench.million,
    "repeatable": Bench.repeatable,
}


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
    parser.add_argument("--peers", nargs="+", metavar="WORD", help="only peers in whose names one of these stands")
    parser.add_argument(
        "--runs", type=int, default=5, help="turns of each peer; thrice as many up to 8192 tokens (default: 5)"
    )
    parser.add_argument("--commit", default=commit(), help="what to write as the commit")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("bench gpu: no Hopper GPU that PyTorch can use; run it on an H100 or H200")
    library = Library(arguments.library.resolve())
    if not check(library):
        return 1
    report = Report(arguments.commit)
    reference = arguments.reference and peers.Reference(arguments.reference)
    bench = Bench(library, report, arguments.runs, reference, arguments.peers)
    cases = {case: functools.partial(CASES[case], bench) for case in arguments.only}
    if arguments.qkv:
        cases["file"] = functools.partial(bench.file, arguments.qkv)
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
    if failed or bench.wrong:
        print(f"FAILED: {', '.join([*failed, *dict.fromkeys(bench.wrong)])}")
    return 1 if failed or bench.wrong else 0


if __name__ == "__main__":
    run_main(main)
