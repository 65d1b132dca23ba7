"""A prompt in chunks beside the same in one call, with and without what a SegmentCache keeps from chunk to chunk."""

import statistics

import torch
from inputs import HEADS, KV_HEADS, PAPER_DENSITY, K, with_density
from library import KV_HEAD, LEARNED
from timing import milliseconds

TOKENS, CHUNK = 128 * K, 8 * K
ORDERS = {"no order": {}, "learned": {"permutation": LEARNED, "order_scope": KV_HEAD}}


def chunks(bench):
    for heads, kv_heads in ((HEADS, KV_HEADS), (12, 2)):
        q, k, v = with_density(bench.library, PAPER_DENSITY[TOKENS], TOKENS, heads, kv_heads, 128, seed=11)
        for order, options in ORDERS.items():
            one_order(bench, order, options, q, k, v)
            torch.cuda.empty_cache()


def one_order(bench, order, options, q, k, v):
    def plan(begin, end, **more):
        return bench.library.plan("two-step", q[:, :, begin:end], k[:, :, :end], **options, **more)

    whole = plan(0, TOKENS)
    begins = range(0, TOKENS, CHUNK)
    # A prompt's dense last rows are those of its last chunk.
    ended = [plan(begin, begin + CHUNK, **({} if begin + CHUNK == TOKENS else {"dense_last_rows": 0})) for begin in begins]
    unknown = [plan(begin, begin + CHUNK) for begin in begins]
    cache = ended[-1].cache(TOKENS)
    if whole.weights is not None:  # of all queries, whichever a chunk has
        for each in (*ended, *unknown):
            each.weights = whole.weights
    names = ("whole", "chunks, end not known", "chunks", "chunks, kept")
    outs = {name: torch.full_like(q, torch.nan) for name in names}

    def run(plans, name, kept=None):
        for begin, each in zip(begins, plans):
            end = begin + CHUNK
            parts = (q[:, :, begin:end], k[:, :, :end], v[:, :, :end], outs[name][:, :, begin:end])
            each(*parts, cache=kept, valid=begin)

    calls = {
        "whole": lambda _: whole(q, k, v, outs["whole"]),
        "chunks, end not known": lambda _: run(unknown, "chunks, end not known"),
        "chunks": lambda _: run(ended, "chunks"),
        "chunks, kept": lambda _: run(ended, "chunks, kept", cache),
    }
    times = milliseconds(calls, bench.runs)
    params = {"n": TOKENS, "chunk": CHUNK, "q_heads": q.shape[1], "kv_heads": k.shape[1], "order": order}
    if not torch.equal(outs["chunks"].view(torch.int16), outs["chunks, kept"].view(torch.int16)):
        bench.wrong.append(f"chunks, kept, {order}")
        print(f"WRONG chunks with {order}: other bits with what was kept than without", flush=True)
    bench.report.add("chunks", params, "whole", times["whole"], "ms")
    for name in names[1:]:
        ratio = statistics.median(times["whole"]) / statistics.median(times[name])
        bench.report.add("chunks", params, name, times[name], "ms", "whole", times["whole"], ratio)
    bench.report.add("chunks", params, "kept bytes", [cache.size / (1 << 20)], "MiB")
