"""Inputs: random ones, ones whose attention is as sparse as asked for, and real Q, K and V from a file."""

import math
import pathlib

import torch
from library import BLOCK, SEGMENT

HEADS, KV_HEADS = 32, 8
K = 1024
# What the paper measured (arXiv 2510.21270), at which the whole op is timed.
PAPER_DENSITY = {8 * K: 0.579, 32 * K: 0.405, 128 * K: 0.219}


def randn(generator, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def random_set(n, heads, kv_heads, head_dim, seed, head_dim_v=None):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim_v or head_dim))
    return tuple(randn(generator, 1, h, n, width) for h, width in shapes)


def structured_set(n, heads, kv_heads, head_dim, strength, seed, head_dim_v=None):
    """Queries share a direction; keys lie along it as strongly as their segment's and their own draw say.

    So some segments matter more than others, and in each segment some keys more than others, as in real heads. The
    larger `strength`, the fewer blocks hold the attention.
    """
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    direction = torch.nn.functional.normalize(draw(1, kv_heads, 1, head_dim), dim=-1)
    pull = 4.0
    q = draw(1, heads, n, head_dim) + pull * direction.repeat_interleave(heads // kv_heads, 1)
    of_segment = draw(1, kv_heads, math.ceil(n / SEGMENT), 1).repeat_interleave(SEGMENT, 2)[:, :, :n]
    along = of_segment + draw(1, kv_heads, n, 1)
    k = draw(1, kv_heads, n, head_dim) + strength * along * direction
    return q.bfloat16(), k.bfloat16(), draw(1, kv_heads, n, head_dim_v or head_dim).bfloat16()


def with_density(library, target, n, heads, kv_heads, head_dim, seed, tolerance=0.01):
    """A structured set of which the method `pbs` visits about `target` of the causal blocks."""
    low, high = 0.0, 40.0
    for _ in range(12):
        strength = (low + high) / 2
        q, k, v = structured_set(n, heads, kv_heads, head_dim, strength, seed)
        density = library.plan("pbs", q, k).stats(q, k, v, torch.empty_like(q)).density
        if abs(density - target) < tolerance * target:
            break
        low, high = (strength, high) if density > target else (low, strength)
    return q, k, v


def from_file(path):
    """q, k, v of a .safetensors or .npz file: [heads][tokens][head_dim], with or without a batch axis before."""
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        arrays = load_file(path)
    elif path.suffix == ".npz":
        import numpy

        arrays = {name: torch.from_numpy(array) for name, array in numpy.load(path).items()}
    else:
        raise SystemExit(f"--qkv {path}: neither .safetensors nor .npz; save tensors q, k and v in one of these")
    if not {"q", "k", "v"} <= arrays.keys():
        raise SystemExit(f"--qkv {path}: has {sorted(arrays)}, not q, k and v; name the tensors so")
    tensors = [arrays[name] if arrays[name].dim() == 4 else arrays[name][None] for name in "qkv"]
    return tuple(t.to("cuda", torch.bfloat16).contiguous() for t in tensors)


# ------------------------------------------------------------------------------------------- block masks, orders of keys


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


def shuffle(k, v, heads, segment, generator):
    """Shuffles keys within complete segments for each of `heads`. Returns permuted K and V and the order."""
    batch, kv_heads, kv_len, _ = k.shape
    length = kv_len // segment * segment
    draw = torch.rand(batch, heads, length // segment, segment, device="cuda", generator=generator)
    order = draw.argsort(-1) + torch.arange(0, length, segment, device="cuda")[:, None]
    order = order.flatten(2)

    def take(t):
        index = order[..., None].expand(-1, -1, -1, t.shape[3])
        return t.repeat_interleave(heads // kv_heads, 1).gather(2, index).contiguous()

    return (take(k), take(v)), order
