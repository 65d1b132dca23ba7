"""Who we are measured against, in the same process and on the same tensors. Each gives a function of (q, k, v)."""

import pathlib
import sys

import torch
from library import BLOCK, SEGMENT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def sdpa(backend):
    def call(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


cudnn = sdpa(SDPBackend.CUDNN_ATTENTION)
flash_attention_2 = sdpa(SDPBackend.FLASH_ATTENTION)


def flex(mask):
    """FlexAttention with the block mask [batch, head, row, block], causal on the diagonal."""
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
    block_mask = BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, j: i >= j,
        compute_q_blocks=False,
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


class Reference:
    """The published PBS-Attn code, from a checkout of its repository."""

    def __init__(self, path):
        if not (pathlib.Path(path) / "pbs_attn" / "src" / "pbs.py").exists():
            raise SystemExit(f"--reference {path}: no pbs_attn/src/pbs.py in it; name a checkout of the reference code")
        sys.path.insert(0, str(path))
        from pbs_attn.src import pbs

        self.forward = pbs.permuted_block_sparse_attn_fwd

    def __call__(self, q, k, v):
        """It takes as many KV heads as query heads, so repeating them is part of it."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return self.on_repeated(q, k, v)

    def on_repeated(self, q, k, v):
        return self.forward(q, k, v, block_size=BLOCK, segment_size=SEGMENT, threshold=0.9, causal=True)
