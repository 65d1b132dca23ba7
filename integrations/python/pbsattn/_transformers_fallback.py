"""What pbsattn doesn't compute goes to the attention that the model means: SDPA, or the eager function of its file."""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ._transformers_masks import CausalMask

# Keyword arguments of attention functions that change nothing of what is computed: transformers' models give them to any
# function, and SDPA's ignores them. What isn't here and isn't None means something that only the model knows.
HARMLESS = frozenset(
    (
        "position_ids",
        "cache_position",
        "position_embeddings",
        "past_key_values",
        "use_cache",
        "cache_params",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "logits_to_keep",
        "labels",
        "input_ids",
        "inputs_embeds",
        "token_type_ids",
        "mm_token_type_ids",
        "seq_idx",
        "hidden_states",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "key_value_states",
        "cross_attention_states",
        # of flash attention; the mask, or the lengths of query and key, say the same to others
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "cu_seqlens",
        "max_seqlen",
        "deterministic",
        "sliding_window",
    )
)
_SDPA_TAKES = frozenset(inspect.signature(sdpa_attention_forward).parameters)
_WHAT = {
    "softcap": "its logits are soft-capped",
    "s_aux": "it has attention sinks",
    "position_bias": "it has a position bias",
}


@dataclasses.dataclass
class Own:
    """The attention of a class of attention modules, as its file has it."""

    eager: Callable[..., typing.Any] | None
    takes: frozenset[str]  # arguments that the eager function looks at
    only: bool  # whether the models of that file can't use SDPA


def _inspect(module_class: type) -> Own:
    for each in module_class.__mro__:
        file = sys.modules.get(each.__module__)
        eager = getattr(file, "eager_attention_forward", None)
        if file is not None and eager is not None:
            models: list[typing.Any] = [
                model
                for model in vars(file).values()
                if isinstance(model, type) and issubclass(model, PreTrainedModel) and model.__module__ == file.__name__
            ]
            takes = set(inspect.signature(eager).parameters)
            if "sinks" in eager.__code__.co_names:  # it reads the module's, which s_aux repeats
                takes.add("s_aux")
            return Own(eager, frozenset(takes), bool(models) and not any(model._supports_sdpa for model in models))
    return Own(None, frozenset(), False)


_owns: dict[type, Own] = {}  # by class of attention module


def own(module: torch.nn.Module) -> Own:
    known = _owns.get(type(module))
    return known if known is not None else _owns.setdefault(type(module), _inspect(type(module)))


def unknown(arguments: dict[str, typing.Any]) -> list[str]:
    """The names among an attention call's keyword arguments that mean more than pbsattn and SDPA compute."""
    return (
        []
        if HARMLESS.issuperset(arguments)
        else [name for name, value in arguments.items() if value is not None and name not in HARMLESS]
    )


def describe(names: list[str]) -> str:
    return "; ".join(_WHAT.get(name, f'it is given "{name}", which pbsattn doesn\'t know') for name in names)


def indexer(model: torch.nn.Module) -> str | None:
    """The name of a model's module that picks keys by itself (DeepSeek-V3.2 and others), or None."""
    for name, module in model.named_modules():
        if "indexer" in name.rpartition(".")[2].lower() or "indexer" in type(module).__name__.lower():
            return type(module).__name__
    return None


def fall_back(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | CausalMask | None,
    names: list[str],
    **kwargs: typing.Any,
) -> typing.Any:
    """Attention as the model means it. names: those that unknown() found."""
    takes = own(module)
    if not takes.only and _SDPA_TAKES.issuperset(names):
        return _sdpa(module, query, key, value, mask, **kwargs)
    if takes.eager is not None and takes.takes.issuperset(names):
        added = _added_mask(module, query, key, mask, kwargs.pop("is_causal"))
        return takes.eager(module, query, key, value, added, **kwargs)
    raise NotImplementedError(
        f"{type(module).__name__}: {describe(names)}, and neither SDPA nor the eager attention of its "
        "file takes that; call pbsattn.transformers.disable(model)"
    )


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | CausalMask | None,
    *,
    is_causal: bool | None,
    **kwargs: typing.Any,
) -> typing.Any:
    if type(mask) is not CausalMask:
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **kwargs)
    if not mask.fits(query, key) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, mask.tensor(), is_causal=is_causal, **kwargs)
    key, value = key[:, :, : mask.keys], value[:, :, : mask.keys]
    if mask.window is None and (mask.q_offset == 0 or query.shape[2] == 1):
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)
    return sdpa_attention_forward(module, query, key, value, mask.lower_right(), is_causal=is_causal, **kwargs)


def _added_mask(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | CausalMask | None,
    is_causal: bool | None,
) -> torch.Tensor | None:
    """The mask as eager attention takes it: numbers to add, or none for no mask."""
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and q_len > 1:
        mask = CausalMask(1, q_len, kv_len, 0, query.device)
    added = mask.tensor() if isinstance(mask, CausalMask) else mask
    if added is not None and added.dtype == torch.bool:
        added = torch.zeros(added.shape, dtype=query.dtype, device=added.device).masked_fill(
            ~added, torch.finfo(query.dtype).min
        )
    return added
