#!/usr/bin/env python3
"""Times every kernel of two builds of the CUDA backend, call by call in turns in one process.

    python3 bench/gpu/kernels.py [--tokens N] [--runs N] [--only WORD...] BEFORE AFTER

BEFORE and AFTER are two builds' libpbsattn-bench-gpu.so (./dev build cuda pbsattn-bench-gpu). Runs plans of every score
and both head widths, so that every kernel runs: bf16 at --tokens, f16 at a quarter of them. Of a kernel that runs in many
plans, the line tells of the one where it takes longest. Ends with 1 where the median of one, or of a stage, is above
--limit times that before, and is so when measured again. Needs PyTorch with CUDA and a Hopper GPU.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys
import tempfile

import torch

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools"))

from inputs import structured_set
from library import Library, Options, Plan

from common import run_main

HEADS, KV_HEADS = 32, 8
STAGES = ("permute", "select", "attend")
# Method and options; together they run every kernel.
CASES = {
    "full": ("full", {}),
    "pbs": ("pbs", {"top_p": 0.9}),
    "pbs, segment 512": ("pbs", {"top_p": 0.9, "segment": 512}),
    "pbs, shared order": ("pbs", {"top_p": 0.9, "order_scope": 1}),
    "pbs, corrected": ("pbs", {"top_p": 0.5, "correction": 1}),
    "pbs, by head": ("pbs", {"top_p": 0.9, "by_head": True}),
    "pbs+": ("pbs+", {"top_p": 0.5}),
    "pbs-threshold": ("pbs-threshold", {"threshold": 0.004}),
    "pbs-sampled": ("pbs-sampled", {"threshold": 0.004}),
    "xattention": ("xattention", {"top_p": 0.5}),
    "oracle": ("oracle", {"top_p": 0.5}),
    "mean-pool": ("mean-pool", {"top_p": 0.5}),
    "prism": ("prism", {"top_p": 0.5}),
    "flashprefill": ("flashprefill", {"threshold": 0.5}),
    "minference": ("minference", {}),
    "flexprefill, by masses": ("flexprefill", {"top_p": 0.5, "tau": 0.0}),
    "flexprefill, by pooling": ("flexprefill", {"top_p": 0.5, "tau": 1.0}),
}


def make_plan(library, method, q, k, by_head=False, **changes):
    options = library.options(method, **changes)
    if by_head:  # which differ
        heads = (Options * q.shape[1])(*[options] * q.shape[1])
        heads[0].top_p = 0.8
        options = heads
    return Plan(library, options, q, k)


def short(name):
    """A kernel's name without its namespaces and the parameters it is launched with."""
    name = re.sub(r"\(anonymous namespace\)::|pbsattn::cuda::(attention::|mass::|sm90::)?|^void ", "", name)
    return name.partition("(")[0]


def kernels_of(trace):
    """[(name, microseconds)] of the backend's kernels in a profiler's trace, in the order in which they started."""
    kernels = [event for event in trace["traceEvents"] if event.get("cat") == "kernel" and "pbsattn" in event["name"]]
    return [(short(event["name"]), event["dur"]) for event in sorted(kernels, key=lambda event: event["ts"])]


def profile(calls):
    """The backend's kernels of calls that follow each other."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for call in calls:
            call()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        return kernels_of(json.loads(pathlib.Path(file.name).read_text(encoding="utf-8")))


def split(events, counts, runs):
    """Times of each launch of both sides, from `runs` turns that launch counts[side] kernels each."""
    if len(events) != runs * sum(counts):
        raise RuntimeError(f"the profiler saw {len(events)} kernels of {runs * sum(counts)}; run it again")
    times = [[[] for _ in range(count)] for count in counts]
    position = 0
    for _ in range(runs):
        for side, count in enumerate(counts):
            for launch in range(count):
                times[side][launch].append(events[position + launch][1])
            position += count
    return times


def measure(plans, tensors, runs):
    """{"stage or kernel": [microseconds before, after]}: medians of runs in turns."""
    q, k, v = tensors
    out = torch.empty_like(q)
    stats = [[] for _ in plans]
    for plan in plans:
        plan(q, k, v, out)
    for _ in range(runs):
        for side, plan in enumerate(plans):
            stats[side].append(plan.stats(q, k, v, out))
    result = {}
    for stage in STAGES:
        pair = [statistics.median(getattr(s, f"{stage}_seconds") for s in of_side) * 1e6 for of_side in stats]
        result[f"stage {stage}"] = pair
    calls = [lambda plan=plan: plan(q, k, v, out) for plan in plans]
    launches = [profile([call]) for call in calls]
    if len(launches[0]) != len(launches[1]):
        raise RuntimeError(f"{len(launches[0])} kernels before, {len(launches[1])} after; they can't be paired")
    counts = [len(of_side) for of_side in launches]
    before, after = split(profile(calls * runs), counts, runs)
    for (name, _), old, new in zip(launches[1], before, after):
        pair = result.setdefault(name, [0.0, 0.0])  # launches of one kernel add up
        pair[0] += statistics.median(old)
        pair[1] += statistics.median(new)
    return result


def is_slower(pair, limit):
    # Stages and kernels of a few microseconds are as long as the clock's steps and a launch's jitter.
    return pair[1] > pair[0] * limit and pair[1] - pair[0] > 0.3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--limit", type=float, default=1.01)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases in whose names one of these stands")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("kernels: no Hopper GPU that PyTorch can use; run it on an H100 or H200")
    libraries = [Library(path.resolve()) for path in (arguments.before, arguments.after)]
    longest = {}  # kernel or stage of a width -> (pair, case)
    for dtype, tokens in ((torch.bfloat16, arguments.tokens), (torch.float16, arguments.tokens // 4)):
        for head_dim in (128, 64):
            tensors = [t.to(dtype) for t in structured_set(tokens, HEADS, KV_HEADS, head_dim, 4.0, 7)]
            for case, (method, changes) in CASES.items():
                if arguments.only and not any(word in case for word in arguments.only):
                    continue
                plans = [make_plan(library, method, *tensors[:2], **changes) for library in libraries]
                pairs = measure(plans, tensors, arguments.runs)
                slow = {name for name, pair in pairs.items() if is_slower(pair, arguments.limit)}
                if slow:  # what was chance is gone the second time
                    again = measure(plans, tensors, 2 * arguments.runs)
                    pairs.update({name: again[name] for name in slow if name in again})
                where = f"{case}, {str(dtype).removeprefix('torch.')}, {tokens} x {head_dim}"
                for name, pair in pairs.items():
                    key = (
                        f"{name} of {where}"
                        if name.startswith("stage ")
                        else f"{name} {where.partition(', ')[2]}"
                        if "<" not in name
                        else name
                    )
                    if key not in longest or pair[1] > longest[key][0][1]:
                        longest[key] = (pair, where)
            del plans, tensors
            torch.cuda.empty_cache()
    print(f"{'kernel or stage':<66} {'before us':>10} {'after us':>10} {'ratio':>7}  in")
    slower = 0
    for key, (pair, where) in sorted(longest.items()):
        slow = is_slower(pair, arguments.limit)
        slower += slow
        ratio = f"{pair[1] / pair[0]:7.3f}" if pair[0] > 0 else f"{'':>7}"
        print(
            f"{key:<66} {pair[0]:10.2f} {pair[1]:10.2f} {ratio}  {'' if key.startswith('stage ') else where}"
            + ("  SLOWER" if slow else "")
        )
    print(f"{len(longest)} compared at {torch.cuda.get_device_name()}, {slower} slower than {arguments.limit} times before")
    return 1 if slower else 0


if __name__ == "__main__":
    run_main(main)
