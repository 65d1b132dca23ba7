"""Attention calls of transformers models: which of them pbsattn computes, and what it tells of them."""

import dataclasses
import json
import math
import typing
import warnings
import weakref

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import _core, _transformers_prompts
from ._chunks import ByHead, DenseRows, dense_rows, fewer_dense_rows
from ._op import attention
from ._transformers_fallback import HARMLESS, describe, fall_back, own, unknown
from ._transformers_masks import CausalMask, causal_mask

NAME = "pbsattn"  # of our attention in transformers' tables


class FallbackWarning(UserWarning):
    """A long attention call was left to SDPA or to the model's own eager attention, or a prompt isn't what was said."""


@dataclasses.dataclass
class LayerStats:
    """What the last prefill did in one layer, summed over its chunks."""

    layer: int | None  # its index, where its module has one
    taken: int = 0  # calls computed by pbsattn
    left: int = 0  # calls of min_tokens or more left to SDPA or eager attention
    reason: str | None = None  # why the last of them was left
    visited_blocks: int = 0
    causal_blocks: int = 0
    seconds: float = 0.0
    measured: bool = False  # on CUDA only with enable(..., stats=True)
    module: str = ""  # the name of its attention module in the model

    @property
    def density(self) -> float | None:
        """Blocks computed, as a share of dense causal attention's; None where nothing was measured."""
        return self.visited_blocks / self.causal_blocks if self.causal_blocks else None


class State:
    """What enable() set for one model."""

    def __init__(
        self, model: PreTrainedModel, before: list[tuple[typing.Any, typing.Any]], min_tokens: int, measure: bool
    ) -> None:
        self.min_tokens = min_tokens
        self.measure = measure
        self.model_name = type(model).__name__
        self.before = before  # (config, its attention before) of the model and its parts
        self.warned: set[str] = set()

    def __setstate__(self, values: dict[str, typing.Any]) -> None:  # of a copy of a model, which is enabled as the model is
        self.__dict__.update(values)
        states.add(self)

    def warn(self, reason: str, layer: int | str) -> None:
        self.tell(reason, f"attention of layer {layer} goes to SDPA or eager attention, not to pbsattn: {reason}")

    def tell(self, kind: str, message: str) -> None:
        """Warns, once of a kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"{self.model_name}: {message}", FallbackWarning, stacklevel=3)


states: weakref.WeakSet[State] = weakref.WeakSet()  # of the models that are enabled; their modules hold them


_OF_LAYER = ("order_weights", "rope_pairs")  # which attention() takes beside options


@dataclasses.dataclass
class Layer:
    """What a module of an enabled model knows of it, as its attribute `_pbsattn`."""

    state: State
    name: str
    index: int | None
    options: dict[str, typing.Any] | None = None  # attention()'s; None where it is left to SDPA without a word
    record: LayerStats | None = None
    dense_rows: DenseRows | None = None  # of its options, once they were asked for
    # Options for chunks before others, by the dense rows that those hold.
    before_others: dict[int, dict[str, typing.Any]] = dataclasses.field(default_factory=dict)

    def options_before(self, after: int) -> dict[str, typing.Any]:
        """Its options for a chunk after which so many tokens of its prompt come."""
        assert self.options is not None
        if not after:
            return self.options
        if self.dense_rows is None:
            self.dense_rows = dense_rows(self._by_head())
        later = self.dense_rows.later(after)
        if later and later not in self.before_others:
            fewer = fewer_dense_rows(self._by_head(), later)
            heads = {"heads": json.dumps(dict(enumerate(fewer)))} if "heads" in self.options else {}
            self.before_others[later] = {**self.options, **fewer[0], **heads}
        return self.before_others[later] if later else self.options

    def _by_head(self) -> ByHead:
        assert self.options is not None
        if "heads" in self.options:
            return list(json.loads(self.options["heads"]).values())
        return [{name: value for name, value in self.options.items() if name not in _OF_LAYER}]

    def of_call(self, first_chunk: bool) -> LayerStats:
        if first_chunk or self.record is None:
            self.record = LayerStats(self.index, module=self.name)
        return self.record


def _reason_to_leave(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | CausalMask | None,
    names: list[str],
    dropout: float,
    scaling: float | torch.Tensor | None,
    causal: bool,
    kwargs: dict[str, typing.Any],
) -> str | None:
    """Why a call isn't one that pbsattn takes; None if it is."""
    if mask is None and not causal:
        return "it is not causal (an encoder, or cross attention)"
    if others := [name for name in names if name not in _TAKEN]:
        return describe(others)
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window and not (type(mask) is CausalMask and mask.window == window):
        return f"it is a sliding window of {window} tokens"
    if mask is not None and type(mask) is not CausalMask:
        return "its mask is more than causal (padding, packed sequences, or one passed in)"
    if query.shape[2] != key.shape[2] if mask is None else not mask.fits(query, key):
        return "its keys are of other tokens than its queries, and no mask says which it sees"
    if kwargs.get("output_attentions"):
        return "the attention weights are asked for"
    sinks = kwargs.get("s_aux")
    if dropout or (
        torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value, sinks) if each is not None)
    ):
        return "it is training: pbsattn computes no gradient; use torch.no_grad()"
    if sinks is not None and sinks.shape != query.shape[1:2]:
        return f"its sinks have shape {tuple(sinks.shape)}; it has {query.shape[1]} query heads"
    if isinstance(scaling, torch.Tensor):
        return "its scale is a tensor"
    softcap = kwargs.get("softcap")
    if softcap is not None and not 0 < softcap < math.inf:
        return f"its soft-cap is {softcap}, not a finite, positive number"
    return _lacking(query, value, softcap)


_TAKEN = ("softcap", "s_aux")  # that others may not know


def _lacking(query: torch.Tensor, value: torch.Tensor, softcap: float | None) -> str | None:
    """What the call has that its device's backend hasn't; said before, since a compiled call can't be refused."""
    width, width_v = query.shape[-1], value.shape[-1]
    if query.device.type == "cuda":
        if width_v != width and (width, width_v) != (192, 128):
            return f"its values have head_dim {width_v}, its keys {width}; on a GPU they are of one width, or 128 and 192"
        if softcap is not None and width not in (64, 128):
            return f"its logits are soft-capped at head_dim {width}; on a GPU they are at 64 and 128"
    elif query.device.type == "cpu" and width_v != width and (width_v % 8 or width_v > 256):
        return f"its values have head_dim {width_v}; on a CPU they are of a multiple of 8 up to 256"
    return None


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | CausalMask | None,
    **kwargs: typing.Any,
) -> typing.Any:
    """The function behind AttentionInterface: q [B, Hq, Sq, D], k, v [B, Hkv, Skv, D] -> [B, Sq, Hq, D]."""
    layer = getattr(module, "_pbsattn", None)
    chunk = None
    if layer is not None and not torch.compiler.is_compiling():  # a graph would keep what was known when it was made
        chunk = _transformers_prompts.chunk_of(layer, query.shape[2])
    # Short prompts wait for the host, so the plainest calls go to SDPA before anything else is asked.
    if (
        (layer is None or query.shape[2] < layer.state.min_tokens)
        and type(attention_mask) is not CausalMask
        and _PLAIN.issuperset(kwargs)
        and not own(module).only
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _pick(layer, chunk, module, query, key, value, attention_mask, **kwargs)


_PLAIN = HARMLESS | {"dropout", "scaling", "is_causal"}


def _pick(
    layer: Layer | None,
    chunk: _transformers_prompts.Chunk | None,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | CausalMask | None,
    dropout: float = 0.0,
    scaling: float | torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: typing.Any,
) -> typing.Any:
    """A call of any kind: computed by pbsattn, or why not by the model's own attention."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if type(mask) is CausalMask and mask.q_offset == 0 and mask.window is None and not getattr(module, "is_causal", True):
        # As SDPA has it: the mask was left out for the module to say. A causal module that says is_causal=False in a call
        # has seen a mask that says it instead (Moonshine).
        mask = None
    names = unknown(kwargs)
    if layer is not None and layer.options is not None and query.shape[2] >= layer.state.min_tokens:
        reason = _reason_to_leave(query, key, value, mask, names, dropout, scaling, causal, kwargs)
        offset = mask.q_offset + mask.dropped if type(mask) is CausalMask else key.shape[2] - query.shape[2]
        record = layer.of_call(first_chunk=offset == 0)
        if reason is None:
            try:
                carried = {name: kwargs[name] for name in _TAKEN if kwargs.get(name) is not None}
                options = layer.options if chunk is None else chunk.options(offset)
                out = _attend(options, record, layer.state.measure, query, key, value, mask, scaling, **carried)
                record.taken += 1
                return out, None
            except NotImplementedError as refusal:  # this device takes no such tensors
                reason = str(refusal)
        record.left += 1
        record.reason = reason
        if not torch.compiler.is_compiling():  # a graph holds no warning
            layer.state.warn(reason, layer.name if layer.index is None else layer.index)
    return fall_back(module, query, key, value, mask, names, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)


def _attend(
    settings: dict[str, typing.Any],
    record: LayerStats,
    measure: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: CausalMask | None,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    if mask is not None and mask.keys < key.shape[2]:
        key, value = key[:, :, : mask.keys], value[:, :, : mask.keys]
    options = {"scale": None if scaling is None else float(scaling), **settings}
    if softcap is not None:
        options["softcap"] = float(softcap)
    if mask is not None and mask.window is not None:
        options["window"] = mask.window
    if s_aux is not None:
        options["sinks"] = s_aux.float().contiguous()
    weights = settings.get("order_weights")
    if weights is not None and weights.device != key.device:  # the model has moved since
        settings["order_weights"] = options["order_weights"] = weights.to(key.device)
    # Tokens before heads, by strides alone, so that the output comes in the order that the model wants.
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not (measure or q.device.type == "cpu") or torch.compiler.is_compiling():
        return attention(q, k, v, layout="bshd", **options)
    out, stats = attention(q, k, v, layout="bshd", return_stats=True, **options)
    record.visited_blocks += stats.visited_blocks
    record.causal_blocks += stats.causal_blocks
    if mask is not None and mask.dropped:  # dense attention would compute the keys that the cache has dropped, too
        block = int(_core.options(settings["method"], block=settings.get("block")).as_dict()["block"])
        rows = -(-mask.keys // block) - mask.q_offset // block
        record.causal_blocks += query.shape[0] * query.shape[1] * rows * -(-mask.dropped // block)
    record.seconds += stats.seconds
    record.measured = True
    return out


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, causal_mask)
