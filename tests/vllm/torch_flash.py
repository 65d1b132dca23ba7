"""FlashAttention's kernels as vLLM calls them, in PyTorch: with these vLLM's own FlashAttention classes, which the plug-in
stands on, run on the CPU. They check what they are called with, and count."""

import typing
from collections.abc import Sequence

import torch

VERSION = 3  # with schedules made ahead, as on a Hopper GPU


class Calls:
    """What the stand-ins computed."""

    def __init__(self) -> None:
        self.tokens = 0


calls = Calls()


def get_scheduler_metadata(
    *,
    batch_size: int,
    max_seqlen_q: int,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    window_size: Sequence[int] | None,
    **_: typing.Any,
) -> torch.Tensor:
    """A schedule is good for the batch and the window that it was made of alone; this one is those."""
    return torch.cat([torch.tensor([batch_size, max_seqlen_q, *(window_size or (-1, -1))]), cu_seqlens_q, cache_seqlens])


def flash_attn_varlen_func(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None,
    block_table: torch.Tensor,
    scheduler_metadata: torch.Tensor | None,
    softcap: float,
    s_aux: torch.Tensor | None,
    **rest: typing.Any,
) -> None:
    """Attention of q [T, Hq, D] over pages of k and v [pages, tokens, Hkv, D], row by row."""
    assert causal is True
    assert rest["alibi_slopes"] is None and rest["mask_mod"] is None
    starts, lens = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert starts[0] == 0 and starts[-1] <= q.shape[0] == out.shape[0]
    assert len(starts) == len(lens) + 1 == block_table.shape[0] + 1
    if scheduler_metadata is not None:
        made_of = get_scheduler_metadata(
            batch_size=len(lens),
            max_seqlen_q=max_seqlen_q,
            cache_seqlens=seqused_k,
            cu_seqlens_q=cu_seqlens_q,
            window_size=window_size,
        )
        assert torch.equal(scheduler_metadata, made_of), "a schedule of another batch or window"
    for i, kv_len in enumerate(lens):
        tokens = starts[i + 1] - starts[i]
        assert tokens <= max_seqlen_q and kv_len <= max_seqlen_k and tokens <= kv_len
        if tokens == 0:
            continue
        pages = block_table[i, : -(-kv_len // k.shape[1])].long()
        heads = q.shape[1] // k.shape[2]
        keys, values = (each[pages].flatten(0, 1)[:kv_len].transpose(0, 1).repeat_interleave(heads, 0) for each in (k, v))
        sees = torch.ones(tokens, kv_len, dtype=torch.bool).tril(kv_len - tokens)
        if window_size is not None and window_size[0] >= 0:
            sees = sees.triu(kv_len - tokens - window_size[0])
        logits = q[starts[i] : starts[i + 1]].transpose(0, 1) @ keys.mT * softmax_scale
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        logits = logits.masked_fill(~sees, -torch.inf)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.to(logits)[:, None, None].expand(-1, tokens, 1)], -1)
        out[starts[i] : starts[i + 1]] = (logits.softmax(-1)[..., :kv_len] @ values).transpose(0, 1)
        calls.tokens += tokens


def reshape_and_cache_flash(
    key: torch.Tensor, value: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, *_: typing.Any
) -> None:
    """Writes keys and values [T, Hkv, D] into slots of pages."""
    used = slots >= 0
    page, token = slots[used] // k.shape[1], slots[used] % k.shape[1]
    k[page, token] = key[: slots.shape[0]][used]
    v[page, token] = value[: slots.shape[0]][used]


def install() -> None:
    """Gives vLLM's module of FlashAttention these functions."""
    from vllm.v1.attention.backends import fa_utils, flash_attn

    for function in (flash_attn_varlen_func, reshape_and_cache_flash, get_scheduler_metadata):
        setattr(flash_attn, function.__name__, function)
    flash_attn.flash_attn_supports_sinks = lambda: True
    for module in (fa_utils, flash_attn):
        module.get_flash_attn_version = lambda *_, **__: VERSION
