"""FlashAttention's kernels as SGLang calls them, in PyTorch: with these SGLang's own FlashAttention class, which the plug-in
stands on, runs on the CPU. They check what they are called with, and count. In the place of sgl_kernel, which is CUDA
alone, is a module without kernels."""

import types
import typing

import torch


class Calls:
    """What the stand-ins computed."""

    def __init__(self) -> None:
        self.tokens = 0


calls = Calls()


def flash_attn_with_kvcache(
    *,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k_new: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_softmax_lse: bool,
    out: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    ver: int,
    **rest: typing.Any,
) -> torch.Tensor:
    """Attention of q [T, Hq, D] over pages of k_cache and v_cache [pages, tokens, Hkv, D], row by row."""
    assert causal is True and return_softmax_lse is False and ver == 3 and set(rest) <= {"num_splits"}
    starts, lens = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    assert starts[0] == 0 and starts[-1] <= q.shape[0]
    assert len(starts) == len(lens) + 1 == page_table.shape[0] + 1 and page_table.dtype == torch.int32
    assert cu_seqlens_k_new.diff().tolist() == lens and cu_seqlens_k_new[0] == 0
    out = torch.full_like(q, torch.nan) if out is None else out
    assert out.shape == q.shape
    page = k_cache.shape[1]
    for i, kv_len in enumerate(lens):
        tokens = starts[i + 1] - starts[i]
        assert tokens <= max_seqlen_q and tokens <= kv_len
        if tokens == 0:
            continue
        pages = page_table[i, : -(-kv_len // page)].long()
        heads = q.shape[1] // k_cache.shape[2]
        keys, values = (
            each[pages].flatten(0, 1)[:kv_len].transpose(0, 1).repeat_interleave(heads, 0) for each in (k_cache, v_cache)
        )
        sees = torch.ones(tokens, kv_len, dtype=torch.bool).tril(kv_len - tokens)
        if window_size[0] >= 0:
            sees = sees.triu(kv_len - tokens - window_size[0])
        logits = q[starts[i] : starts[i + 1]].transpose(0, 1) @ keys.mT * softmax_scale
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        logits = logits.masked_fill(~sees, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(logits)[:, None, None].expand(-1, tokens, 1)], -1)
        out[starts[i] : starts[i + 1]] = (logits.softmax(-1)[..., :kv_len] @ values).transpose(0, 1)
        calls.tokens += tokens
    return out


def missing(name: str) -> typing.Callable[..., typing.Any]:
    """What sgl_kernel has under a name: nothing that may be called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def called(*_: typing.Any, **__: typing.Any) -> typing.Any:
        raise RuntimeError(f"sgl_kernel.{name}: a CUDA kernel")

    return called


def sgl_kernel() -> dict[str, types.ModuleType]:
    """Modules in the place of sgl_kernel's."""
    modules = {name: types.ModuleType(name) for name in ("sgl_kernel", "sgl_kernel.flash_attn")}
    for module in modules.values():
        module.__getattr__ = missing
    modules["sgl_kernel"].__path__ = []
    return modules


def install() -> None:
    """Gives SGLang's module of FlashAttention this function, and its registry a GPU that fa3 takes."""
    from sglang.srt.layers.attention import attention_registry, flashattention_backend

    flashattention_backend.flash_attn_with_kvcache = flash_attn_with_kvcache
    attention_registry.get_device_capability = lambda: (9, 0)
