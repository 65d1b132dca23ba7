"""The attend stage by itself: layers that carry something, and lists of blocks."""

import dataclasses
import functools
import statistics

import peers
import torch
from block_lists import to_lists
from inputs import HEADS, KV_HEADS, K, random_mask, shuffle
from library import BLOCK, SEGMENT
from timing import pairs_of, params_of


def window_pairs(n, window):
    """Returns how many pairs of queries and keys the blocks have that a window of some tokens passes through."""
    row = torch.arange(n // BLOCK)
    return (row + 1 - (row * BLOCK - window + 1).clamp(min=0) // BLOCK).sum().item() * BLOCK**2


def layers(bench, n=128 * K):
    """Dense attention of layers that carry something, against others' of the same and against our own without."""
    sinks = torch.randn(HEADS, device="cuda", generator=torch.Generator("cuda").manual_seed(5))
    carried = {"nothing": {}, "sinks": {"sinks": sinks}, "softcap": {"softcap": 50.0}, "window": {"window": 4096}}
    for widths in bench.library.widths:
        sets = bench.sets(n, *widths)
        plain = bench.rotating(bench.attend(sets), sets)
        for name, what in carried.items():
            if name == "softcap" and widths[0] not in (64, 128):  # which no plan takes
                continue
            ours = bench.with_output(functools.partial(bench.library.attend, **what), sets)
            fast, _ = bench.right(peers.of_layer(**what), sets, ours(*sets[0]))
            calls = {"ours": bench.rotating(ours, sets), "ours, nothing": plain}
            rotations = bench.race(calls, fast, {}, n)

            def rates(side, times, name=name, widths=widths):
                pairs = window_pairs(n, 4096) if name == "window" and side != "ours, nothing" else n * n / 2
                return [2 * HEADS * sum(widths) * pairs / t / 1e9 for t in times]

            params = params_of(n, widths, carries=name)
            bench.report.add_peers("layers", params, "rate", "TFLOP/s", pairs_of(rotations, "ours", rates))
            mine, without = (rates(side, rotations[0][side]) for side in ("ours", "ours, nothing"))
            ratio = statistics.median(mine) / statistics.median(without)
            bench.report.add("layers", params, "rate", mine, "TFLOP/s", "ours, nothing", without, ratio)
        del sets, plain, ours, fast, calls
        torch.cuda.empty_cache()


def density(bench):
    """Per visited block: random lists over permuted keys, against others' dense rates and their kernels over lists."""
    for widths in bench.library.widths:
        for n in (32 * K, 128 * K) if widths == (128, 128) else (32 * K,):
            sets = bench.sets(n, *widths)[:1]
            generator = torch.Generator("cuda").manual_seed(3)
            for density in (0.4, 0.2, 0.1) if widths == (128, 128) else (0.2,):
                one_density(bench, n, widths, density, sets, generator)
                torch.cuda.empty_cache()


def one_density(bench, n, widths, density, sets, generator):
    q, k, v = sets[0]
    mask = random_mask(1, HEADS, n, n, SEGMENT, density, generator)
    lists = to_lists(mask)

    def over(permuted):
        def attend(q, k, v, out):
            bench.library.attend(q, k, v, out, permuted=permuted, lists=lists)

        return bench.with_output(attend, sets)

    orders = {"KV head": KV_HEADS, "query head": HEADS}  # an order of keys for each
    ours = {f"ours, {order}": over(shuffle(k, v, heads, SEGMENT, generator)[0]) for order, heads in orders.items()}
    ours["ours, dense"] = bench.attend(sets)
    dense = [dataclasses.replace(peer, name=f"{peer.name}, dense") for peer in peers.dense() if not peer.slow]
    fast, _ = bench.right(dense, sets, ours["ours, dense"](q, k, v))
    # Others take keys as they come, so what they compute is ours over keys that didn't move.
    fast_lists, slow = bench.right(peers.sparse(mask), sets, over((k, v))(q, k, v))
    calls = {name: bench.rotating(function, sets) for name, function in ours.items()}
    rotations = bench.race(calls, fast | fast_lists, slow, n)
    visited, causal = 2 * BLOCK**2 * mask.sum().item(), HEADS * n * n

    def rates(name, times):
        return [(causal if name.endswith("dense") else visited) * sum(widths) / t / 1e9 for t in times]

    for order in orders:
        params = params_of(n, widths, density=density, order=order)
        pairs = pairs_of(rotations, f"ours, {order}", rates)
        bench.report.add_peers("density", params, "rate", "TFLOP/s", pairs)
        of_order, of_dense = (rates(name, rotations[0][name]) for name in (f"ours, {order}", "ours, dense"))
        ratio = statistics.median(of_order) / statistics.median(of_dense)
        bench.report.add("density", params, "rate", of_order, "TFLOP/s", "ours, dense", of_dense, ratio)
