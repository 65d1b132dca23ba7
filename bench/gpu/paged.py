"""Keys and values in pages of a cache beside contiguous ones: what each stage takes, and the bits of the outputs."""

import statistics

import torch
from inputs import HEADS, KV_HEADS, PAPER_DENSITY, K, with_density
from library import KV_HEAD, LEARNED
from timing import keep_busy, milliseconds

METHODS = {
    "full": {},
    "two-step": {},
    "pbs": {},
    "two-step, learned": {"method": "two-step", "permutation": LEARNED, "order_scope": KV_HEAD},
}
SIZES = (16, 128)
STAGES = ("permute", "select", "attend")


def in_pages(k, v, size):
    """Keys and values [1, heads, tokens, width] as pages [page, head, place, width] of a cache [page][place][head][row],
    whose rows have a key and its value, and the table of the pages, which lie in random order."""
    _, heads, tokens, width = k.shape
    count = tokens // size
    table = torch.randperm(count, device="cuda", generator=torch.Generator("cuda").manual_seed(size)).int()[None]
    cache = torch.full((count + 1, size, heads, width + v.shape[3]), torch.nan, dtype=k.dtype, device="cuda")
    cache[table[0].long()] = torch.cat([k[0], v[0]], 2).transpose(0, 1).reshape(count, size, heads, -1)
    cache = cache.transpose(1, 2)
    return cache[..., :width], cache[..., width:], table


def pages(bench):
    for n in (32 * K, 128 * K):
        sets = with_density(bench.library, PAPER_DENSITY[n], n, HEADS, KV_HEADS, 128, seed=11)
        for name, options in METHODS.items():
            one_method(bench, n, name, options, *sets)
            torch.cuda.empty_cache()


def one_method(bench, n, name, options, q, k, v):
    inputs = {"contiguous": (k, v, None)} | {size: in_pages(k, v, size) for size in SIZES}
    plan = bench.library.plan(q=q, k=k, **{"method": name} | options)
    outs = {lie: torch.full_like(q, torch.nan) for lie in inputs}
    stats = {lie: [] for lie in inputs}
    for _ in range(2 * bench.runs + 1):
        for lie, (keys, values, table) in inputs.items():
            keep_busy()
            stats[lie].append(plan.stats(q, keys, values, outs[lie], table))

    def call(lie):
        keys, values, table = inputs[lie]
        return lambda _: plan(q, keys, values, outs[lie], table=table)

    times = milliseconds({lie: call(lie) for lie in inputs}, 2 * bench.runs)
    stages = ("attend",) if name == "full" else STAGES
    for size in SIZES:
        params = {"n": n, "head_dim": 128, "method": name, "page": size}
        if not torch.equal(outs["contiguous"].view(torch.int16), outs[size].view(torch.int16)):
            bench.wrong.append(f"pages of {size}, {name}")
            print(f"WRONG pages of {size}, {name} at {n}: other bits than contiguous keys give", flush=True)
        values = {
            stage: [[getattr(s, f"{stage}_seconds") * 1e3 for s in stats[lie][1:]] for lie in (size, "contiguous")]
            for stage in stages
        } | {"time": [times[size], times["contiguous"]]}
        for metric, (paged, contiguous) in values.items():
            ratio = statistics.median(contiguous) / statistics.median(paged)
            bench.report.add("pages", params, metric, paged, "ms", "contiguous", contiguous, ratio)
