"""What is wrong with the tensors of a call, as the library can't say: it sees addresses and strides."""

import typing

import torch

Shape = tuple[int, ...]  # as torch.Size, or with tokens and heads in their places
LAYOUTS = ("bhsd", "bshd")
PAIRS = ("halves", "neighbours")  # pbsattn::RopePairs
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


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, paged: bool = False) -> None:
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
    if (k_batch != batch and not paged) or k_head_dim != head_dim:
        raise ValueError(
            f"k: shape {tuple(k.shape)} does not go with q's {tuple(q.shape)} (layout {layout}); "
            "batch and head_dim must be equal"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel() == 0:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} is empty; pass at least one token")


class Carried(typing.NamedTuple):
    """What a model's layer gives to a call besides q, k and v."""

    sinks: torch.Tensor | None = None
    order_weights: torch.Tensor | None = None
    rope_pairs: str = PAIRS[0]
    page_table: torch.Tensor | None = None  # of k and v in pages, of which this many tokens count:
    kv_len: int | None = None

    def check(self, q: torch.Tensor, k: torch.Tensor, layout: str) -> None:
        """Raises what is wrong with it."""
        heads = 1 if layout == "bhsd" else 2
        if self.sinks is not None:
            _check_array("sinks", self.sinks, "of q's heads", (q.shape[heads],), q.device)
        if self.order_weights is not None:
            shape = (k.shape[heads], k.shape[3] // 2 + k.shape[3])
            _check_array("order_weights", self.order_weights, "of k's heads and 3 D / 2", shape, q.device)
        if self.rope_pairs not in PAIRS:
            raise ValueError(f'rope_pairs {self.rope_pairs!r}: no such pairs; there are "halves" and "neighbours"')
        if (self.page_table is None) != (self.kv_len is None):
            raise ValueError(
                f"kv_len {self.kv_len} {'without' if self.page_table is None else 'with'} a page_table; pass both, or none "
                "for k and v that lie contiguous"
            )
        if self.page_table is not None and self.kv_len is not None:
            _check_table(self.page_table, self.kv_len, q.shape[0], sizes_of(k.shape, layout)[2], q.device)

    def sizes(self, q: torch.Tensor, v: torch.Tensor, layout: str) -> tuple[int, int, int, int, int, int, int]:
        """A plan's: batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim_v."""
        batch, q_heads, q_len, head_dim = sizes_of(q.shape, layout)
        _, kv_heads, kv_len, head_dim_v = sizes_of(v.shape, layout)
        kv_len = kv_len if self.kv_len is None else self.kv_len
        return batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim_v

    def pages(self, k: torch.Tensor, layout: str) -> tuple[int, int, int, int]:
        """The table's address and stride, the tokens of a page, and the pages of the cache."""
        if self.page_table is None:
            return 0, 0, 0, 0
        return self.page_table.data_ptr(), self.page_table.stride(0), sizes_of(k.shape, layout)[2], k.shape[0]


def _check_table(table: object, kv_len: object, batch: int, page_size: int, device: torch.device) -> None:
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"page_table: a {type(table).__name__}; pass a torch.Tensor")
    if not isinstance(kv_len, int):
        raise TypeError(f"kv_len {kv_len!r}: a {type(kv_len).__name__}; pass an int, the tokens of each batch entry")
    entries = -(-kv_len // page_size)
    if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != batch or table.shape[1] < entries:
        raise ValueError(
            f"page_table: {table.dtype} {tuple(table.shape)}; pass an int32 tensor of the pages of each batch entry, "
            f"({batch}, {entries}) or wider, as kv_len {kv_len} takes in pages of {page_size}"
        )
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(f"page_table: its last dimension has stride {table.stride(1)}, not 1; call page_table.contiguous()")
    if table.device != device:
        raise ValueError(f"page_table on {table.device} but q on {device}; move them to one device")


def _check_array(name: str, array: object, what: str, shape: Shape, device: torch.device) -> None:
    if not isinstance(array, torch.Tensor):
        raise TypeError(f"{name}: a {type(array).__name__}; pass a torch.Tensor")
    if array.dtype != torch.float32 or array.shape != shape or not array.is_contiguous():
        raise ValueError(f"{name}: {array.dtype} {tuple(array.shape)}; pass a contiguous float32 tensor {what}, {shape}")
    if array.device != device:
        raise ValueError(f"{name} on {array.device} but q on {device}; move them to one device")
    refuse_negated(**{name: array})


def refuse_gradient(who: str, *tensors: torch.Tensor | None) -> None:
    """Raises if somebody waits for a gradient by these tensors: by backward() or in forward mode."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            f"{who} computes no gradient, and an input requires one; call it under torch.no_grad(), or detach the inputs"
        )
    if _dual_level() >= 0 and any(
        torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None
    ):
        raise NotImplementedError(f"{who} computes no gradient, and an input has a tangent; pass it without one")


def _dual_level() -> int:
    """That of forward-mode differentiation, below 0 outside of it."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1)
