"""Masks of transformers models that needn't be built: what is plainly causal travels as the lengths it consists of."""

import typing
from collections.abc import Callable

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils import _pytree
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask, sliding_window_overlay


class CausalMask:
    """A causal mask [batch, 1, q_length, kv_length]: query i sees keys 0 .. q_offset + i; those from `keys` on lie unused.

    With a window it sees only the last `window` of them, and the cache may have dropped keys before the first, `dropped`
    of them.

    The mask function gives it to a model in place of a tensor, and the model hands it to those layers that it is for. So
    what one forward's mask says holds for these layers alone: nothing is kept beside it that could reach cross attention,
    another forward or another thread. Whatever else a model does with it happens to the boolean tensor it stands for.
    """

    dtype = torch.bool
    ndim = 4

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int,
        device: torch.device,
        window: int | None = None,
        dropped: int = 0,
    ) -> None:
        self.shape = torch.Size((batch_size, 1, q_length, kv_length))
        self.q_offset = q_offset
        self.keys = q_offset + q_length
        self.device = device
        self.window = window
        self.dropped = dropped
        self._made: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        rows = torch.arange(self.q_offset, self.keys, device=self.device)
        keys = torch.arange(self.shape[3], device=self.device)
        seen = keys <= rows[:, None]
        if self.window is not None:
            seen &= keys > rows[:, None] - self.window
        return seen.expand(self.shape)

    def lower_right(self) -> torch.Tensor:
        """The same without the unused keys, as SDPA takes it without q_length x keys booleans, where it can."""
        if self.window is not None:
            if self._made is None:  # once for all layers
                self._made = self.tensor()
            return self._made[..., : self.keys]
        if torch.compiler.is_compiling():
            return self.tensor()[..., : self.keys]
        return causal_lower_right(self.shape[2], self.keys)

    def fits(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        return self.shape[2] == query.shape[2] and self.shape[3] == key.shape[2]

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def to(self, *args: typing.Any, **kwargs: typing.Any) -> "torch.Tensor | CausalMask":
        if len(args) != 1 or not isinstance(args[0], (str, int, torch.device)) or kwargs.keys() - {"non_blocking"}:
            return self.tensor().to(*args, **kwargs)
        batch_size, _, q_length, kv_length = self.shape
        device = torch.device(args[0])
        return CausalMask(batch_size, q_length, kv_length, self.q_offset, device, self.window, self.dropped)

    def __getitem__(self, index: typing.Any) -> "torch.Tensor | CausalMask":
        if (
            isinstance(index, tuple)
            and len(index) == 4
            and all(isinstance(each, slice) for each in index)
            and all(each.indices(n) == (0, n, 1) for each, n in zip(index, self.shape))
        ):
            return self  # a model that cuts a mask to the length it has
        return self.tensor()[index]

    def __getattr__(self, name: str) -> typing.Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., typing.Any],
        types: typing.Any,
        args: tuple[typing.Any, ...] = (),
        kwargs: dict[str, typing.Any] | None = None,
    ) -> typing.Any:
        args, kwargs = _pytree.tree_map_only(cls, cls.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def _add_operators() -> None:
    def operator(name: str) -> Callable[..., typing.Any]:
        return lambda self, *others: getattr(self.tensor(), name)(*others)

    for name in (
        "and",
        "rand",
        "or",
        "ror",
        "xor",
        "rxor",
        "add",
        "radd",
        "sub",
        "rsub",
        "mul",
        "rmul",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "invert",
        "len",
        "iter",
        "bool",
    ):  # which Python looks for in the class alone
        setattr(CausalMask, f"__{name}__", operator(f"__{name}__"))


_add_operators()


def _plainly_causal(q_length: int, kv_length: int, q_offset: int, attention_mask: torch.Tensor | None) -> bool:
    """Whether nothing but causality masks the keys, which may go on unused behind the last query (StaticCache)."""
    end = q_offset + q_length
    if torch.compiler.is_compiling():  # a graph can't look into a mask
        return attention_mask is None and end == kv_length
    if attention_mask is None:
        return end == kv_length or q_offset == 0
    mask = attention_mask[:, :kv_length].bool()
    return (end == kv_length or q_offset == 0) and bool(mask[:, :end].all()) and not bool(mask[:, end:].any())


def _closed_over(function: Callable[..., typing.Any], maker: Callable[..., typing.Any]) -> typing.Any:
    """What a function that `maker` has made closes over; None where another has made it."""
    code = getattr(function, "__code__", None)
    closure: tuple[typing.Any, ...] = getattr(function, "__closure__", None) or ()
    known = code is not None and code in maker.__code__.co_consts and len(closure) == 1
    return closure[0].cell_contents if known else None


def _window_of(mask_function: Callable[..., typing.Any]) -> int | None:
    """The window of a mask function of transformers that says no more than that and causality; None if it does."""
    if torch.compiler.is_compiling():
        return None
    parts = _closed_over(mask_function, and_masks)
    if not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    window = _closed_over(parts[0], sliding_window_overlay)
    return window if type(window) is int and window > 0 else None


def causal_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., typing.Any] = causal_mask_function,
    attention_mask: torch.Tensor | CausalMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: typing.Any = "cpu",
    **kwargs: typing.Any,
) -> torch.Tensor | CausalMask | None:
    """The function behind AttentionMaskInterface: SDPA's mask, but a CausalMask where that says it all.

    SDPA's own function gives None to the first chunk of a prefill, and builds q_length x kv_length booleans for the others.
    None means here what it means there: causal to a module that is, of the first keys if there are more; to others nothing.
    """
    if type(attention_mask) is CausalMask:  # made before, by generate() or by the model around this one
        return attention_mask
    if (
        allow_is_causal_skip
        and mask_function is causal_mask_function
        and local_size is None
        and kv_offset == 0
        and isinstance(q_offset, int)
        and _plainly_causal(q_length, kv_length, q_offset, attention_mask)
    ):
        if q_length == kv_length or (q_length == 1 and q_offset + 1 == kv_length):
            return None
        return CausalMask(batch_size, q_length, kv_length, q_offset, device)
    if (
        allow_is_causal_skip
        and q_length > 1
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        and (window := _window_of(mask_function)) is not None
        and (attention_mask is None or bool(attention_mask[:, kv_offset : kv_offset + kv_length].all()))
    ):
        # Places are counted from the first key that the cache still has.
        if q_length == kv_length <= window:
            return None
        hiding = window if window < kv_length else None
        return CausalMask(batch_size, q_length, kv_length, q_offset - kv_offset, device, hiding, kv_offset)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        device=device,
        **kwargs,
    )
