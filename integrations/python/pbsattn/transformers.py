"""Prefill of transformers models by pbsattn.

    import pbsattn.transformers
    pbsattn.transformers.enable(model, method="pbs", top_p=0.9)
    model.generate(**inputs)                      # the prompt goes through pbsattn, decoding through SDPA
    pbsattn.transformers.stats(model)             # density and time of each layer
    pbsattn.transformers.disable(model)

or, for a while:

    with pbsattn.transformers.enable(model):
        model.generate(**inputs)

Any model whose attention goes through transformers' AttentionInterface will do. What pbsattn takes is causal
attention of one prompt or of a batch of equally long ones, in one or several chunks over a cache. Everything else
(decoding, padding, sliding windows, soft-cap, sinks, training, ...) goes to PyTorch's SDPA; the first time something
long does, a FallbackWarning names the reason.
"""

import dataclasses
import json
import sys
import threading
import warnings
import weakref

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from . import _core
from ._op import attention
from ._settings import Layers

NAME = "pbsattn"  # of our attention in transformers' tables
# Least queries of a call for pbsattn, by device. On a GPU a shorter prefill is bound by the host, which is no faster with us.
MIN_TOKENS = {"cpu": 512, "cuda": 2560}


class FallbackWarning(UserWarning):
    """A long attention call went to SDPA."""


@dataclasses.dataclass
class LayerStats:
    """What the last prefill did in one layer, summed over its chunks."""

    layer: int
    taken: int = 0  # calls computed by pbsattn
    left: int = 0  # calls of min_tokens or more left to SDPA
    reason: str | None = None  # why the last of them was left
    visited_blocks: int = 0
    causal_blocks: int = 0
    seconds: float = 0.0
    measured: bool = False  # on CUDA only with enable(..., stats=True)

    @property
    def density(self) -> float | None:
        """Blocks computed, as a share of dense causal attention's; None where nothing was measured."""
        return self.visited_blocks / self.causal_blocks if self.causal_blocks else None


class _State:
    """What enable() set for one model."""

    def __init__(self, model, options, by_layer, min_tokens, layers, measure):
        self.options = options
        self.by_layer = by_layer  # of the layers that have settings of their own
        self.min_tokens = min_tokens
        self.layers = layers
        self.measure = measure
        self.model_name = type(model).__name__
        self.previous = _implementations(model)
        self.configs = []
        self.records = {}
        self.warned = set()
        self.forward = threading.local()  # what the mask function saw in this thread's current forward

    def warn(self, reason, layer):
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"{self.model_name}: attention of layer {layer} goes to SDPA, not to pbsattn: {reason}",
                          FallbackWarning, stacklevel=2)

    def record(self, layer, first_chunk):
        if first_chunk or layer not in self.records:
            self.records[layer] = LayerStats(layer)
        return self.records[layer]


_states = {}  # by the id of the config that attention modules and mask functions hold


def _state_of(config):
    return _states.get(id(config))


# ------------------------------------------------------------------------------------------------- masks


def _plain_causal(q_length, kv_length, q_offset, attention_mask):
    """Whether nothing but causality masks the keys, which may go on unused behind the last query (StaticCache)."""
    end = q_offset + q_length
    if torch.compiler.is_compiling():  # a graph can't look into a mask
        return attention_mask is None and end == kv_length
    if attention_mask is None:
        return end == kv_length or q_offset == 0
    mask = attention_mask[:, :kv_length].bool()
    return (end == kv_length or q_offset == 0) and bool(mask[:, :end].all()) and not bool(mask[:, end:].any())


def _mask(*, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, attention_mask=None,
          local_size=None, allow_is_causal_skip=True, config=None, **kwargs):
    """None for what is plainly causal, else SDPA's mask.

    SDPA's own function gives None only to the first chunk of a prefill, and builds Sq x Skv booleans for the others.
    """
    state = _state_of(config)
    plain = (state is not None and allow_is_causal_skip and mask_function is causal_mask_function
             and local_size is None and kv_offset == 0 and isinstance(q_offset, int)
             and _plain_causal(q_length, kv_length, q_offset, attention_mask))
    if state is not None and mask_function is causal_mask_function and not torch.compiler.is_compiling():
        state.forward.unused_keys = kv_length - q_offset - q_length if plain else 0
    if plain:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
                     mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
                     allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length), config=config, **kwargs)


# --------------------------------------------------------------------------------------------- attention


def _reason_to_leave(module, query, key, value, mask, dropout, is_causal, kwargs):
    """Why a call isn't one that pbsattn takes; None if it is."""
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "it is not causal (an encoder, or cross attention)"
    if kwargs.get("softcap") is not None:
        return "its logits are soft-capped"
    if kwargs.get("s_aux") is not None:
        return "it has attention sinks"
    if kwargs.get("position_bias") is not None:
        return "it has a position bias"
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        return f"it is a sliding window of {window} tokens"
    if mask is not None:
        return "its mask is more than causal (padding, packed sequences, or one passed in)"
    if kwargs.get("output_attentions"):
        return "the attention weights are asked for"
    if dropout or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
        return "it is training: pbsattn computes no gradient; use torch.no_grad()"
    if value.shape[-1] != query.shape[-1]:
        return f"its values have head_dim {value.shape[-1]}, its keys {query.shape[-1]}"
    return None


def _sdpa(module, query, key, value, mask, **kwargs):
    """SDPA, told of the causal offset that a mask of None stands for here; the model's own where SDPA is wrong."""
    q_len, kv_len = query.shape[2], key.shape[2]
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is None and sinks is None:
        if mask is None and 1 < q_len < kv_len:
            mask = causal_lower_right(q_len, kv_len)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    # SDPA would ignore either without a word.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__}: has soft-capped logits or sinks, which SDPA can't compute, and "
                                  "no eager attention of its own; disable pbsattn for this model")
    if mask is None and q_len > 1:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **kwargs)


def _forward(module, query, key, value, attention_mask, **kwargs):
    """The function behind AttentionInterface: q [B, Hq, Sq, D], k, v [B, Hkv, Skv, D] -> [B, Sq, Hq, D]."""
    state = _state_of(getattr(module, "config", None))
    # Short prompts wait for the host, so the plainest calls go to SDPA before anything else is asked.
    if (state is not None and query.shape[2] < state.min_tokens and query.shape[2] == key.shape[2]
            and kwargs.get("softcap") is None and kwargs.get("s_aux") is None):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _pick(state, module, query, key, value, attention_mask, **kwargs)


def _pick(state, module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """A call of any kind: computed by pbsattn, or why not by SDPA."""
    if state is not None and attention_mask is None and not torch.compiler.is_compiling():
        if unused := getattr(state.forward, "unused_keys", 0):
            key, value = key[:, :, :-unused], value[:, :, :-unused]
    layer = getattr(module, "layer_idx", None)
    long = state is not None and query.shape[2] >= state.min_tokens
    if long and (state.layers is None or layer in state.layers):
        reason = _reason_to_leave(module, query, key, value, attention_mask, dropout, is_causal, kwargs)
        record = state.record(layer, first_chunk=query.shape[2] == key.shape[2])
        if reason is None:
            try:
                out = _attend(state, record, query, key, value, scaling)
                record.taken += 1
                return out, None
            except NotImplementedError as refusal:  # this device takes no such tensors
                reason = str(refusal)
        record.left += 1
        record.reason = reason
        if not torch.compiler.is_compiling():  # a graph holds no warning
            state.warn(reason, layer)
    return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
                 **kwargs)


def _attend(state, record, query, key, value, scaling):
    options = {"scale": scaling, **state.by_layer.get(record.layer, state.options)}
    # Tokens before heads, by strides alone, so that the output comes in the order that the model wants.
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not (state.measure or q.device.type == "cpu") or torch.compiler.is_compiling():
        return attention(q, k, v, layout="bshd", **options)
    out, stats = attention(q, k, v, layout="bshd", return_stats=True, **options)
    record.visited_blocks += stats.visited_blocks
    record.causal_blocks += stats.causal_blocks
    record.seconds += stats.seconds
    record.measured = True
    return out


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)


# ------------------------------------------------------------------------------------------------- models


def _implementations(model):
    """The attention of a model and of its parts, as set_attn_implementation takes them."""
    config = model.config
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {"": config._attn_implementation,
            **{key: part._attn_implementation for key, part in parts.items() if part is not None}}


def _attention_modules(model):
    return [module for module in model.modules()
            if hasattr(module, "layer_idx") and getattr(module, "is_causal", False) and hasattr(module, "config")]


def _never_taken(module):
    """Why no call of this module can be taken, as far as the module itself tells."""
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "its logits are soft-capped"
    if getattr(module, "sinks", None) is not None:
        return "it has attention sinks"
    return None


class Enabled:
    """What enable() returns: a context manager that disables at its end."""

    def __init__(self, model):
        self._model = model

    def __enter__(self):
        return self._model

    def __exit__(self, *_):
        disable(self._model)


def _options_by_layer(modules, settings, base):
    """What `settings` make of attention()'s options, layer by layer."""
    by_layer = {}
    settings = Layers(settings)
    settings.check({module.layer_idx for module in modules})
    for module in modules:
        config = module.config
        heads = settings.of(module.layer_idx, base, config.num_attention_heads)
        by_layer[module.layer_idx] = heads[0] if len(heads) == 1 else dict(
            heads[0], heads=json.dumps({h: options for h, options in enumerate(heads)}))
    return by_layer


def enable(model, *, method="pbs", min_tokens=None, layers=None, settings=None, stats=False, **options) -> Enabled:
    """Sends the prefill of a transformers model to pbsattn, until disable() or the end of a `with` block.

    method and options: those of pbsattn.attention (top_p, dense_last_rows, ...).
    settings: options of single layers and query heads over those: the path of a JSON file, or the same as a dict:
    {"*": {"*": {"method": "minference"}, "7": {"vertical": 3500}}, "0": {"*": {"keep": "all"}}} (layer, head, options).
    min_tokens: calls with fewer queries go to SDPA (by default fewer than 512 on the CPU and than 2560 on CUDA); so do
    layers whose index is not in `layers`, if that is given.
    stats: measure density and time on CUDA too, where that waits for every layer; on the CPU they are always measured.

    Raises ValueError if no layer of the model can be taken, or an option is wrong; RuntimeError if it is enabled
    already; TypeError for what is not a transformers model.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model: a {type(model).__name__}; pass a transformers PreTrainedModel")
    if model.config._attn_implementation == NAME:
        raise RuntimeError(f"{type(model).__name__}: pbsattn is enabled already; disable it first, to change its settings")
    # Checks the options now, not in the middle of a prefill; the reference takes whatever one of the devices takes.
    _core.Plan(_core.options(method, **options), "reference", 0, 1, (1, 1, 1, 1, 1, 64))
    modules = _attention_modules(model)
    if not modules or not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__}: has no causal attention that goes through transformers' AttentionInterface")
    reasons = {_never_taken(module) for module in modules}
    if None not in reasons:
        raise ValueError(f"{type(model).__name__}: pbsattn can take none of its layers: {'; '.join(sorted(reasons))}")
    if layers is not None:
        layers = frozenset(layers)
        if unknown := layers - {module.layer_idx for module in modules}:
            raise ValueError(f"layers {sorted(unknown)}: {type(model).__name__} has no such layers; it has "
                             f"0 .. {max(module.layer_idx for module in modules)}")
    if min_tokens is None:
        min_tokens = MIN_TOKENS.get(model.device.type, 512)
    if min_tokens < 2:
        raise ValueError(f"min_tokens {min_tokens}: decoding is not for pbsattn; 2 is the least")
    by_layer = {} if settings is None else _options_by_layer(modules, settings, dict(method=method, **options))
    state = _State(model, dict(method=method, **options), by_layer, min_tokens, layers, stats)
    state.configs = list({id(module.config): module.config for module in modules}.values())
    model.set_attn_implementation(NAME)
    for config in state.configs:
        _states[id(config)] = state
    weakref.finalize(model, _forget, [id(config) for config in state.configs], state)
    return Enabled(model)


def _forget(ids, state):
    for each in ids:
        if _states.get(each) is state:
            del _states[each]


def _require_state(model):
    for module in _attention_modules(model):
        if (state := _state_of(module.config)) is not None:
            return state
    raise RuntimeError(f"{type(model).__name__}: pbsattn is not enabled; call pbsattn.transformers.enable(model)")


def disable(model):
    """Gives a model the attention back that it had before enable(). RuntimeError if it is not enabled."""
    state = _require_state(model)
    model.set_attn_implementation(state.previous)
    _forget([id(config) for config in state.configs], state)


def stats(model) -> list[LayerStats]:
    """What the last prefill did, layer by layer. RuntimeError if pbsattn is not enabled."""
    return [record for _, record in sorted(_require_state(model).records.items())]
