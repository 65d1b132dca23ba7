#!/usr/bin/env python3
"""Checks, then times the CUDA attend stage alone against PyTorch's attention on the same GPU.

    nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -Iinclude -Xcompiler -fPIC -shared \\
        -o libattend.so bench/gpu_attend_shim.cu src/cuda/attend_sm90.cu src/cuda/tensor_map.cc
    python3 bench/gpu_attend.py libattend.so [more.so ...] [--json FILE] [--flex]

Rates count 4 x head_dim operations for each pair of a visited block (masked halves of diagonal blocks not counted for
dense). Lists of a given density are random, with the own segment and block 0 always in.
"""

import argparse
import ctypes
import json
import math
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 128


class Attend:
    def __init__(self, path):
        self.name = path.rsplit("/", 1)[-1].removesuffix(".so")
        self.library = ctypes.CDLL(path)
        self.library.attend_bench_scratch.restype = ctypes.c_size_t

    def __call__(self, q, k, v, out, lse=None, scale=None, segment=256, permuted=None, lists=None):
        batch, q_heads, q_len, head_dim = q.shape
        kv_heads, kv_len = k.shape[1:3]
        scratch_bytes = self.library.attend_bench_scratch(
            *(ctypes.c_int64(x) for x in (batch, q_heads, q_len, kv_len)))
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device="cuda")
        order_heads = permuted[0].shape[1] if permuted else 0
        sizes = (ctypes.c_int64 * 9)(batch, q_heads, kv_heads, q_len, kv_len, head_dim, segment, order_heads,
                                     q.dtype == torch.bfloat16)
        strides = (ctypes.c_int64 * 12)(*(s for t in (q, k, v, out) for s in t.stride()[:3]))
        pointer = lambda t: ctypes.c_void_p(None if t is None else t.data_ptr())
        k_permuted, v_permuted = permuted or (None, None)
        row_start, row_count, blocks = lists or (None, None, None)
        error = self.library.attend_bench(
            sizes, ctypes.c_float(scale or head_dim**-0.5), pointer(q), pointer(k), pointer(v), pointer(out), strides,
            pointer(lse), pointer(k_permuted), pointer(v_permuted), pointer(row_start), pointer(row_count),
            pointer(blocks), pointer(scratch), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if error:
            raise RuntimeError(f"attend: CUDA error {error}")


# ------------------------------------------------------------------------------------------------------- block lists


def random_mask(batch, heads, q_len, kv_len, segment, density, generator):
    """[batch, head, row, block]: blocks before the own segment at random, about `density` of the causal ones."""
    blocks = math.ceil(kv_len / BLOCK)
    first_row = (kv_len - q_len) // BLOCK
    row = torch.arange(first_row, blocks, device="cuda")[:, None]
    block = torch.arange(blocks, device="cuda")[None, :]
    own_begin = row // (segment // BLOCK) * (segment // BLOCK)
    own = (block >= own_begin) & (block <= row)
    draw = torch.rand(batch, heads, blocks - first_row, blocks, device="cuda", generator=generator)
    forced = own | ((block == 0) & (row >= 0))
    # So many free blocks to draw from that the total meets the density.
    free = ((block < own_begin) & (block > 0)).sum(1, keepdim=True)
    want = (density * (row + 1) - forced.sum(1, keepdim=True)).clamp(min=0)
    return forced | ((block < own_begin) & (draw < want / free.clamp(min=1)))


def to_lists(mask):
    """CSR with counts of [batch, head, row, block]."""
    flat = mask.flatten(0, 2)
    count = flat.sum(1)
    start = count.cumsum(0) - count
    return start.contiguous(), count.int().contiguous(), flat.nonzero()[:, 1].int().contiguous()


def permute(k, v, heads, segment, generator):
    """Shuffles keys within complete segments for each of `heads`. Returns permuted K and V and the order."""
    batch, kv_heads, kv_len, head_dim = k.shape
    length = kv_len // segment * segment
    draw = torch.rand(batch, heads, length // segment, segment, device="cuda", generator=generator)
    order = draw.argsort(-1) + torch.arange(0, length, segment, device="cuda")[:, None]
    order = order.flatten(2)
    index = order[..., None].expand(-1, -1, -1, head_dim)
    take = lambda t: t.repeat_interleave(heads // kv_heads, 1).gather(2, index).contiguous()
    return (take(k), take(v)), order


# ------------------------------------------------------------------------------------------------------- correctness


def token_mask(mask, order, q_len, kv_len, segment):
    """[batch, head, query, key]: what a query sees, from the block mask and the order of keys."""
    batch, heads, rows, blocks = mask.shape
    q_offset = kv_len - q_len
    first_row = q_offset // BLOCK
    query = torch.arange(q_offset, kv_len, device="cuda")
    key = torch.arange(kv_len, device="cuda")
    slot = key.expand(batch, heads, -1).clone()
    if order is not None:
        slot[:, :, : order.shape[2]] = order.repeat_interleave(heads // order.shape[1], 1).argsort(-1)
    per_row = mask[:, :, query // BLOCK - first_row]
    by_slot = per_row.gather(3, (slot // BLOCK)[:, :, None, :].expand(-1, -1, q_len, -1))
    own_from = query // segment * segment
    return torch.where((key < own_from[:, None])[None, None], by_slot, (key <= query[:, None])[None, None])


def reference(q, k, v, mask, scale, dtype):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).to(dtype) for t in (k, v))
    scores = (q.to(dtype) @ k.mT).to(torch.promote_types(dtype, torch.float32)) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(dtype) @ v, scores.logsumexp(-1)


def check_case(attend, generator, batch, q_heads, kv_heads, q_len, kv_len, head_dim, dtype, segment, density,
               order_heads, layout):
    def tensor(heads, tokens):
        shape = {"bhsd": (batch, heads, tokens, head_dim), "bshd": (batch, tokens, heads, head_dim)}[layout]
        t = torch.randn(shape, device="cuda", dtype=torch.float32, generator=generator).to(dtype)
        return t if layout == "bhsd" else t.transpose(1, 2)

    q, k, v = tensor(q_heads, q_len), tensor(kv_heads, kv_len), tensor(kv_heads, kv_len)
    out = torch.full_like(q, math.nan)
    lse = torch.full((batch, q_heads, q_len), math.nan, device="cuda")
    permuted, order = permute(k, v, order_heads, segment, generator) if order_heads else (None, None)
    mask = random_mask(batch, q_heads, q_len, kv_len, segment, density or 1, generator)
    attend(q, k, v, out, lse, segment=segment, permuted=permuted, lists=to_lists(mask) if density else None)
    torch.cuda.synchronize()
    tokens = token_mask(mask, order, q_len, kv_len, segment)
    first = out.clone()
    for _ in range(3):
        out.fill_(math.nan)
        attend(q, k, v, out, lse, segment=segment, permuted=permuted, lists=to_lists(mask) if density else None)
    repeats = torch.equal(first, out)
    truth, truth_lse = reference(q, k, v, tokens, head_dim**-0.5, torch.float64)
    plain, _ = reference(q, k, v, tokens, head_dim**-0.5, dtype)
    error = ((out - truth).norm() / truth.norm()).item()
    plain_error = ((plain - truth).norm() / truth.norm()).item()
    lse_error = (lse - truth_lse).abs().max().item()
    plain_error = max(plain_error, 1e-6)  # one key alone is exact
    ok = error <= 2 * plain_error and lse_error < 2e-3 and repeats
    if not ok:
        print(f"WRONG {attend.name} q {batch}x{q_heads}x{q_len} kv {kv_heads}x{kv_len} d {head_dim} {dtype} "
              f"segment {segment} density {density} orders {order_heads} {layout}: error {error:.2e} plain "
              f"{plain_error:.2e} lse {lse_error:.2e} same bits again {repeats}")
    return ok, error / plain_error


# batch, query heads, KV heads, q_len, kv_len, head_dim, dtype, segment, density, heads with an order, layout
CASES = [(b, 4, kv, q_len, kv_len, d, t, s, density, orders, layout)
         for d in (64, 128) for t in (torch.bfloat16, torch.float16)
         for b, kv, q_len, kv_len, s, density, orders, layout in (
             (1, 1, 1, 1, 256, None, 0, "bhsd"), (1, 2, 128, 128, 256, None, 0, "bhsd"),
             (2, 4, 77, 77, 256, None, 0, "bshd"), (1, 2, 1000, 1000, 256, None, 0, "bshd"),
             (2, 2, 2048, 2048, 256, None, 4, "bhsd"), (1, 1, 300, 2111, 256, None, 0, "bhsd"),
             (2, 2, 2048, 2048, 256, 0.4, 4, "bhsd"), (1, 2, 2111, 2111, 256, 0.3, 2, "bshd"),
             (1, 1, 300, 2111, 256, 0.5, 4, "bshd"), (2, 1, 130, 1500, 512, 0.2, 1, "bhsd"),
             (1, 2, 1, 2000, 256, 0.3, 2, "bhsd"), (1, 4, 5000, 5000, 1024, 0.1, 4, "bhsd"))]


def check(attend):
    generator = torch.Generator("cuda").manual_seed(1)
    results = [check_case(attend, generator, *case) for case in CASES]
    good = sum(ok for ok, _ in results)
    print(f"{attend.name}: {good} of {len(CASES)} cases right, worst error {max(r for _, r in results):.2f} of plain's")
    return good == len(CASES)


def check_poison(attend):
    """A value that is not finite spoils what dense attention spoils, and nothing else."""
    ok = True
    for where, value in (("v", math.nan), ("v", math.inf), ("k", math.nan), ("q", math.nan), ("k", math.inf)):
        for d in (64, 128):
            generator = torch.Generator("cuda").manual_seed(2)
            q, k, v = (torch.randn(1, 1, 700, d, device="cuda", generator=generator).bfloat16() for _ in range(3))
            clean, out = torch.empty_like(q), torch.empty_like(q)
            attend(q, k, v, clean)
            {"q": q, "k": k, "v": v}[where][0, 0, 300, 5] = value
            attend(q, k, v, out)
            same = torch.isnan(out) == False
            expect = torch.ones_like(same)
            if where == "q":
                expect[:, :, 300] = False
            elif where == "k":
                expect[:, :, 300:] = False
            else:
                expect[:, :, 300:, 5] = False
            spoilt = torch.isfinite(out) == False
            if where == "k" and value == math.inf:  # a score of -inf spoils nothing
                spoilt, expect = spoilt[:, :, :300], expect[:, :, :300]
                same = same[:, :, :300]
            if not torch.equal(spoilt, ~expect) or not torch.equal(out[:, :, :300], clean[:, :, :300]):
                unspoilt = (out[:, :, :300] == clean[:, :, :300]) | ~expect[:, :, :300]
                if not (torch.equal(spoilt, ~expect) and unspoilt.all()):
                    print(f"WRONG {attend.name}: {value} in {where} d {d}: {spoilt.sum()} spoilt, want {(~expect).sum()}")
                    ok = False
    q = torch.full((1, 1, 200, 64), 1.0, device="cuda").bfloat16()
    k = torch.full((1, 1, 200, 64), -math.inf, device="cuda").bfloat16()
    out, lse = torch.full_like(q, math.nan), torch.zeros(1, 1, 200, device="cuda")
    attend(q, k, q, out, lse)
    if (out != 0).any() or (lse != -math.inf).any():
        print(f"WRONG {attend.name}: rows of -inf")
        ok = False
    print(f"{attend.name}: values that are not finite: {'right' if ok else 'WRONG'}")
    return ok


# ------------------------------------------------------------------------------------------------------------ timing


def time_all(calls, runs, warmup=2):
    """Median milliseconds and spread of each call, taken in turns so that drift meets all alike."""
    times = {name: [] for name in calls}
    for i in range(warmup + runs):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(i)
            stop.record()
            stop.synchronize()
            if i >= warmup:
                times[name].append(start.elapsed_time(stop))
    return {name: (statistics.median(t), (max(t) - min(t)) / statistics.median(t)) for name, t in times.items()}


def replay(call, repeats):
    """A CUDA graph of several calls."""
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            call(i)
    return lambda i: graph.replay()


def bench(attends, n, head_dim, densities, runs, heads=32, kv_heads=8, flex=False):
    """Yields (case, name, milliseconds, spread, teraflops)."""
    generator = torch.Generator("cuda").manual_seed(3)
    sets = 2 if n <= 32768 else 1
    make = lambda h: [torch.randn(1, h, n, head_dim, device="cuda", generator=generator).bfloat16() for _ in range(sets)]
    q, k, v = make(heads), make(kv_heads), make(kv_heads)
    out = torch.empty_like(q[0])

    def cudnn(i):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q[i % sets], k[i % sets], v[i % sets], is_causal=True, enable_gqa=True)

    calls = {"cudnn": cudnn}
    for attend in attends:
        calls[attend.name] = lambda i, attend=attend: attend(q[i % sets], k[i % sets], v[i % sets], out)
    repeats = 1
    if n <= 8192:  # the launch would count
        repeats = 8
        calls = {name: replay(call, repeats) for name, call in calls.items()}
    flops = 2 * heads * head_dim * n * n
    for name, (ms, spread) in time_all(calls, runs).items():
        yield f"dense d{head_dim} n{n}", name, ms / repeats, spread, flops * repeats / ms / 1e9

    if densities:
        permuted, _ = permute(k[0], v[0], heads, 256, generator)
    for density in densities:
        mask = random_mask(1, heads, n, n, 256, density, generator)
        lists = to_lists(mask)
        visited = mask.sum().item()
        calls = {attend.name: lambda i, attend=attend: attend(q[0], k[0], v[0], out, permuted=permuted, lists=lists)
                 for attend in attends}
        if flex:
            calls["flex"] = flex_call(q[0], k[0], v[0], mask)
        for name, (ms, spread) in time_all(calls, runs).items():
            yield f"density {density} d{head_dim} n{n}", name, ms, spread, 4 * head_dim * BLOCK**2 * visited / ms / 1e9
        del mask, lists


def flex_call(q, k, v, mask):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    count = mask.sum(-1, dtype=torch.int32)
    index = torch.argsort(mask.to(torch.uint8), dim=-1, descending=True, stable=True).int()
    rows = torch.arange(mask.shape[2], device="cuda")
    full = mask.clone()
    full[:, :, rows, rows] = False
    full_count = full.sum(-1, dtype=torch.int32)
    full_index = torch.argsort(full.to(torch.uint8), dim=-1, descending=True, stable=True).int()
    partial_count = (count - full_count).contiguous()
    partial_index = torch.zeros_like(index)
    partial_index[..., 0] = rows.int()
    del index
    block_mask = BlockMask.from_kv_blocks(partial_count, partial_index, full_count, full_index, BLOCK_SIZE=BLOCK,
                                          mask_mod=lambda b, h, i, j: i >= j, compute_q_blocks=False)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda i: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="+")
    parser.add_argument("--json")
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--cases", default="128:32768,64:32768,128:131072:0.4:0.2:0.1",
                        help="head_dim:n[:density...], comma-separated")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--no-check", action="store_true")
    args = parser.parse_args()
    attends = [Attend(path) for path in args.library]
    right = attends if args.no_check else [a for a in attends if check(a) and check_poison(a)]
    rows = []
    for case in args.cases.split(","):
        head_dim, n, *densities = case.split(":")
        for row in bench(right, int(n), int(head_dim), [float(d) for d in densities], args.runs, flex=args.flex):
            rows.append(row)
            print("{:28s} {:16s} {:9.3f} ms  spread {:5.1%} {:7.1f} TFLOP/s".format(*row), flush=True)
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump([dict(zip(("case", "name", "ms", "spread", "tflops"), row)) for row in rows], file, indent=1)
    return 0 if len(right) == len(attends) else 1


if __name__ == "__main__":
    sys.exit(main())
