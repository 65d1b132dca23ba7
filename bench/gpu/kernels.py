#!/usr/bin/env python3
"""Times every kernel of two builds of the CUDA backend, call by call in turns in one process.

    python3 bench/gpu/kernels.py [--tokens N] [--runs N] [--control] [--only WORD...] BEFORE AFTER

BEFORE and AFTER are two builds' libpbsattn-bench-gpu.so (./dev build cuda pbsattn-bench-gpu). Runs plans of every score
and every head width that both take, so that every kernel runs: bf16 at --tokens, f16 at a quarter of them. Of a kernel
that runs in many plans, the line tells of the one where it takes longest. With --control a second copy of BEFORE takes
turns too, and its ratio stands beside that of AFTER: how far equal code is apart. Ends with 1 where the median of one, or
of a stage, is above --limit times that before and further from it than the control's, and is so when measured again.
Needs PyTorch with CUDA and a Hopper GPU.
"""

import argparse
import json
import pathlib
import re
import shutil
import statistics
import sys
import tempfile

import torch

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools"))

from inputs import structured_set
from library import ARRIVAL, KV_HEAD, LEARNED, Library, Options, Plan

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
    "two-step": ("two-step", {}),
    "two-step, learned": ("two-step", {"permutation": LEARNED, "order_scope": KV_HEAD}),
    "two-step, arrival": ("two-step", {"permutation": ARRIVAL, "order_scope": KV_HEAD}),
}


def make_plan(library, method, q, k, v, by_head=False, **changes):
    options = library.options(method, **changes)
    if by_head:  # which differ
        heads = (Options * q.shape[1])(*[options] * q.shape[1])
        heads[0].top_p = 0.8
        options = heads
    return Plan(library, options, q, k, head_dim_v=v.shape[3])


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


def turns(sides, runs):
    """Sides in the order in which they run: forwards and backwards, so that none always follows the same one."""
    return [side for run in range(runs) for side in (range(sides) if run % 2 == 0 else reversed(range(sides)))]


def split(events, counts, order):
    """Times of each launch of each side, from sides that launch counts[side] kernels each in `order`."""
    expected = sum(counts[side] for side in order)
    if len(events) != expected:
        raise RuntimeError(f"the profiler saw {len(events)} kernels of {expected}; run it again")
    times = [[[] for _ in range(count)] for count in counts]
    position = 0
    for side in order:
        for launch in range(counts[side]):
            times[side][launch].append(events[position + launch][1])
        position += counts[side]
    return times


def measure(plans, tensors, runs):
    """{"stage or kernel": [microseconds before, after and of the control]}: medians of runs in turns."""
    q, k, v = tensors
    out = q.new_empty(*q.shape[:3], v.shape[3])
    order = turns(len(plans), runs)
    stats = [[] for _ in plans]
    for plan in plans:
        plan(q, k, v, out)
    for side in order:
        stats[side].append(plans[side].stats(q, k, v, out))
    result = {}
    for stage in STAGES:
        result[f"stage {stage}"] = [
            statistics.median(getattr(s, f"{stage}_seconds") for s in of_side) * 1e6 for of_side in stats
        ]
    calls = [lambda plan=plan: plan(q, k, v, out) for plan in plans]
    launches = [profile([call]) for call in calls]
    counts = [len(of_side) for of_side in launches]
    if len(set(counts)) != 1:
        raise RuntimeError(f"{counts[0]} kernels before, {counts[1]} after; they can't be paired")
    times = split(profile([calls[side] for side in order]), counts, order)
    for launch, (name, _) in enumerate(launches[1]):
        sums = result.setdefault(name, [0.0] * len(plans))  # launches of one kernel add up
        for side, of_side in enumerate(times):
            sums[side] += statistics.median(of_side[launch])
    return result


def is_slower(times, limit):
    before, after, *control = times
    # Stages and kernels of a few microseconds are as long as the clock's steps and a launch's jitter.
    noise = max([0.3, *(abs(time - before) for time in control)])
    return after > before * limit and after - before > noise


def ratios(times):
    return "".join(f"{time / times[0]:8.3f}" if times[0] > 0 else f"{'':8}" for time in times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--limit", type=float, default=1.01)
    parser.add_argument("--control", action="store_true", help="times a copy of BEFORE too")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases in whose names one of these stands")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("kernels: no Hopper GPU that PyTorch can use; run it on an H100 or H200")
    libraries = [Library(path.resolve()) for path in (arguments.before, arguments.after)]
    if arguments.control:
        with tempfile.TemporaryDirectory() as folder:  # one path would be one library
            libraries.append(Library(pathlib.Path(shutil.copy(arguments.before, folder))))
    widths = [pair for pair in libraries[0].widths if pair in libraries[1].widths]
    longest = {}  # kernel or stage of a width -> (times, case)
    for dtype, tokens in ((torch.bfloat16, arguments.tokens), (torch.float16, arguments.tokens // 4)):
        for head_dim, head_dim_v in widths:
            tensors = [t.to(dtype) for t in structured_set(tokens, HEADS, KV_HEADS, head_dim, 4.0, 7, head_dim_v)]
            for case, (method, changes) in CASES.items():
                if arguments.only and not any(word in case for word in arguments.only):
                    continue
                try:
                    plans = [make_plan(library, method, *tensors, **changes) for library in libraries]
                except RuntimeError as error:  # a build from before it could
                    print(f"without {case}: {error}", flush=True)
                    continue
                times_of = measure(plans, tensors, arguments.runs)
                slow = {name for name, times in times_of.items() if is_slower(times, arguments.limit)}
                if slow:  # what was chance is gone the second time
                    again = measure(plans, tensors, 2 * arguments.runs)
                    times_of.update({name: again[name] for name in slow if name in again})
                where = f"{case}, {str(dtype).removeprefix('torch.')}, {tokens} x {head_dim}"
                for name, times in times_of.items():
                    key = (
                        f"{name} of {where}"
                        if name.startswith("stage ")
                        else f"{name} {where.partition(', ')[2]}"
                        if "<" not in name
                        else name
                    )
                    if key not in longest or times[1] > longest[key][0][1]:
                        longest[key] = (times, where)
            del plans, tensors
            torch.cuda.empty_cache()
    columns = f"{'ratio':>8}{'control':>8}" if arguments.control else f"{'ratio':>8}"
    print(f"{'kernel or stage':<66} {'before us':>10} {'after us':>10}{columns}  in")
    slower = 0
    for key, (times, where) in sorted(longest.items()):
        slow = is_slower(times, arguments.limit)
        slower += slow
        print(
            f"{key:<66} {times[0]:10.2f} {times[1]:10.2f}{ratios(times)}  {'' if key.startswith('stage ') else where}"
            + ("  SLOWER" if slow else "")
        )
    print(f"{len(longest)} compared at {torch.cuda.get_device_name()}, {slower} slower than {arguments.limit} times before")
    return 1 if slower else 0


if __name__ == "__main__":
    run_main(main)
