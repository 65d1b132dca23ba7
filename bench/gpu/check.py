"""What has to be right before anything is timed: the attend stage against fp64, and the whole op against its definition."""

import math

import torch
from block_lists import to_lists
from inputs import random_mask, shuffle, structured_set
from library import BLOCK, SEGMENT


def token_mask(mask, order, q_len, kv_len, segment):
    """[batch, head, query, key]: what a query sees, from the block mask and the order of keys."""
    batch, heads = mask.shape[:2]
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


def attention(q, k, v, mask, dtype):
    """Masked attention computed in one dtype; scores in float32 at least."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).to(dtype) for t in (k, v))
    scores = (q.to(dtype) @ k.mT).to(torch.promote_types(dtype, torch.float32)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(dtype) @ v, scores.logsumexp(-1)


def judge(what, out, lse, q, k, v, mask):
    """The error against fp64 is at most twice that of a plain implementation in the inputs' dtype."""
    truth, truth_lse = attention(q, k, v, mask, torch.float64)
    plain, _ = attention(q, k, v, mask, q.dtype)
    error = ((out - truth).norm() / truth.norm()).item()
    plain_error = max(((plain - truth).norm() / truth.norm()).item(), 1e-6)  # one key alone is exact
    lse_error = (lse - truth_lse).abs().max().item()
    if error <= 2 * plain_error and lse_error < (2**-8 if q.dtype == torch.bfloat16 else 2**-10):  # of weights as rounded
        return True
    print(f"WRONG {what}: error {error:.2e}, plain {plain_error:.2e}, log-sum-exp {lse_error:.2e}")
    return False


# batch, KV heads of 4 query heads, q_len, kv_len, segment, density (None: dense), heads with an order, layout
ATTEND_CASES = (
    (1, 1, 1, 1, 256, None, 0, "bhsd"),
    (1, 2, 128, 128, 256, None, 0, "bhsd"),
    (2, 4, 77, 77, 256, None, 0, "bshd"),
    (1, 2, 1000, 1000, 256, None, 0, "bshd"),
    (2, 2, 2048, 2048, 256, None, 4, "bhsd"),
    (1, 1, 300, 2111, 256, None, 0, "bhsd"),
    (2, 2, 2048, 2048, 256, 0.4, 4, "bhsd"),
    (1, 2, 2111, 2111, 256, 0.3, 2, "bshd"),
    (1, 1, 300, 2111, 256, 0.5, 4, "bshd"),
    (2, 1, 130, 1500, 512, 0.2, 1, "bhsd"),
    (1, 2, 1, 2000, 256, 0.3, 2, "bhsd"),
    (1, 4, 5000, 5000, 1024, 0.1, 4, "bhsd"),
)


def check_attend(library, generator, widths, dtype, case):
    batch, kv_heads, q_len, kv_len, segment, density, order_heads, layout = case
    heads = 4

    def tensor(count, tokens, width):
        shape = (batch, count, tokens, width) if layout == "bhsd" else (batch, tokens, count, width)
        t = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        return t if layout == "bhsd" else t.transpose(1, 2)

    head_dim, head_dim_v = widths
    q, k, v = tensor(heads, q_len, head_dim), tensor(kv_heads, kv_len, head_dim), tensor(kv_heads, kv_len, head_dim_v)
    out = torch.full_like(q[..., :head_dim_v], math.nan)
    lse = torch.full((batch, heads, q_len), math.nan, device="cuda")
    permuted, order = shuffle(k, v, order_heads, segment, generator) if order_heads else (None, None)
    mask = random_mask(batch, heads, q_len, kv_len, segment, density or 1, generator)
    lists = to_lists(mask) if density else None
    library.attend(q, k, v, out, lse, segment, permuted, lists)
    return judge(
        f"attend {case} head_dim {widths} {dtype}", out, lse, q, k, v, token_mask(mask, order, q_len, kv_len, segment)
    )


def define_pbs(q, k, top_p):
    """What the method decides, from its definition: block mask [batch, head, row, block] and order [batch, head, slot]."""
    batch, heads, n, head_dim = q.shape
    k = k.repeat_interleave(heads // k.shape[1], 1)
    length = n // SEGMENT * SEGMENT
    scale = 1 / math.sqrt(head_dim)
    scores = ((q[:, :, -BLOCK:].float() @ k[:, :, :length].float().mT) * scale).softmax(-1).sum(2)
    by_segment = scores.unflatten(2, (-1, SEGMENT))
    order = (
        by_segment.argsort(dim=-1, descending=True, stable=True) + torch.arange(0, length, SEGMENT, device="cuda")[:, None]
    ).flatten(2)
    blocks, rows = length // BLOCK, math.ceil(n / BLOCK)
    moved = k[:, :, :length].gather(2, order[..., None].expand(-1, -1, -1, head_dim))
    pooled_k = moved.float().unflatten(2, (blocks, BLOCK)).mean(3).to(k.dtype).float()
    padded_q = torch.nn.functional.pad(q.float(), (0, 0, 0, rows * BLOCK - n))
    pooled_q = padded_q.unflatten(2, (rows, BLOCK)).mean(3).to(q.dtype).float()
    row = torch.arange(rows, device="cuda")[:, None]
    block = torch.arange(rows, device="cuda")[None, :]
    own_begin = row // (SEGMENT // BLOCK) * (SEGMENT // BLOCK)
    weights = torch.zeros(batch, heads, rows, rows, device="cuda")
    hidden = block[:, :blocks] >= own_begin
    weights[..., :blocks] = (pooled_q @ pooled_k.mT * scale).masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0)
    ranked, index = weights.sort(dim=-1, descending=True, stable=True)
    kept = ranked.cumsum(-1) - ranked < top_p
    mask = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, index, kept & (ranked > 0))
    sink = (order == 0).int().argmax(-1)[:, :, None] // BLOCK
    mask |= block == sink[..., None]
    mask |= block >= own_begin
    return mask & (block <= row), order


def check_pbs(library, widths):
    """The whole op; a block whose score lies at the threshold may fall on either side of it."""
    head_dim, head_dim_v = widths
    q, k, v = structured_set(3001, 4, 2, head_dim, 3.0, seed=5, head_dim_v=head_dim_v)
    out = torch.full_like(q[..., :head_dim_v], math.nan)
    plan = library.plan("pbs", q, k, head_dim_v=head_dim_v)
    plan.workspace.fill_(255)
    visited = plan.stats(q, k, v, out).visited_blocks
    mask, order = define_pbs(q, k, 0.9)
    truth, _ = attention(q, k, v, token_mask(mask, order, 3001, 3001, SEGMENT), torch.float64)
    error = ((out - truth).norm() / truth.norm()).item()
    wanted = mask.sum().item()
    if abs(visited - wanted) <= 0.01 * wanted and error < 2e-2:
        return True
    print(f"WRONG pbs head_dim {widths}: {visited} blocks visited, {wanted} wanted; error {error:.2e}")
    return False


def check(library):
    generator = torch.Generator("cuda").manual_seed(1)
    right = [
        check_attend(library, generator, widths, dtype, case)
        for widths in library.widths
        for dtype in (torch.bfloat16, torch.float16)
        for case in ATTEND_CASES
    ]
    right += [check_pbs(library, widths) for widths in library.widths]
    print(f"{sum(right)} of {len(right)} checks passed", flush=True)
    return all(right)
