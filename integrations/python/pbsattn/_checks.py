"""What is wrong with the tensors of a call, as the library can't say: it sees addresses and strides."""

import torch

Shape = tuple[int, ...]  # as torch.Size, or with tokens and heads in their places
LAYOUTS = ("bhsd", "bshd")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # pbsattn::DType


def sizes_of(shape: Shape, layout: str) -> tuple[int, int, int, int]:
    """Batch, heads, tokens, head_dim."""
    return (shape[0], shape[1], shape[2], shape[3]) if layout == "bhsd" else (shape[0], shape[2], shape[1], shape[3])


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f'layout "{layout}": no such layout; there are "bhsd" (batch, head, token, head_dim) and "bshd"')


def check_tensor(name: str, tensor: object) -> None:
    """Raises what is wrong with one tensor by itself."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: a {type(tensor).__name__}; pass a torch.Tensor")
    if tensor.dim() != 4:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} has {tensor.dim()} dimensions; pass 4: batch, head, token "
            'and head_dim (layout="bhsd"), or batch, token, head and head_dim (layout="bshd")'
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {tensor.dtype}; pbsattn takes float32, float16 and bfloat16; convert it")


def check_stride(name: str, stride: Shape) -> None:
    if stride[3] != 1:
        raise ValueError(f"{name}: its last dimension has stride {stride[3]}, not 1; call {name}.contiguous()")


def refuse_negated(**tensors: torch.Tensor | None) -> None:
    """Raises if a tensor's memory isn't what it says. None is no tensor."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_neg():
            raise ValueError(f"{name}: lazily negated, so its memory holds the other sign; pass a tensor of its own")


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """Raises what is wrong with the tensors of a call; the rest is the plan's to check."""
    check_layout(layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.device != q.device:
            raise ValueError(f"{name} on {tensor.device} but q on {q.device}; move them to one device")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"v: shape {tuple(v.shape)} is not k's {tuple(k.shape)} but for head_dim; keys and values come in pairs"
        )
    batch, _, _, head_dim = sizes_of(q.shape, layout)
    k_batch, _, _, k_head_dim = sizes_of(k.shape, layout)
    if k_batch != batch or k_head_dim != head_dim:
        raise ValueError(
            f"k: shape {tuple(k.shape)} does not go with q's {tuple(q.shape)} (layout {layout}); "
            "batch and head_dim must be equal"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel() == 0:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} is empty; pass at least one token")


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor, layout: str) -> None:
    """Raises what is wrong with the sinks of a call."""
    if sinks is None:
        return
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"sinks: a {type(sinks).__name__}; pass a torch.Tensor")
    q_heads = q.shape[1 if layout == "bhsd" else 2]
    if sinks.dtype != torch.float32 or sinks.shape != (q_heads,) or not sinks.is_contiguous():
        raise ValueError(
            f"sinks: {sinks.dtype} {tuple(sinks.shape)}; pass a contiguous float32 tensor of q's heads, ({q_heads},)"
        )
    if sinks.device != q.device:
        raise ValueError(f"sinks on {sinks.device} but q on {q.device}; move them to one device")
    refuse_negated(sinks=sinks)


def refuse_gradient(who: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None) -> None:
    """Raises if somebody waits for a gradient by these tensors: by backward() or in forward mode."""
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    ):
        raise NotImplementedError(
            f"{who} computes no gradient, and an input requires one; call it under torch.no_grad(), or detach the inputs"
        )
    if _dual_level() >= 0 and any(
        torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in (q, k, v, sinks)
        if tensor is not None
    ):
        raise NotImplementedError(f"{who} computes no gradient, and an input has a tangent; pass it without one")


def _dual_level() -> int:
    """That of forward-mode differentiation, below 0 outside of it."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1)
