"""Learned orders of transformers models: whose file it is, and the weights of each layer."""

import sys
import typing

import torch

from ._learned import LearnedOrder


def rope_pairs(module: torch.nn.Module) -> str:
    """Which columns of its keys RoPE turns together in an attention module: "halves" or "neighbours".

    That is what its file's function does to numbers: nearly all have rotate_half, GPT-OSS another. Raises ValueError where
    neither is there.
    """
    probe = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for each in type(module).__mro__:
        file: typing.Any = sys.modules.get(each.__module__)
        if hasattr(file, "rotate_half"):
            turned = file.rotate_half(probe)
        elif hasattr(file, "_apply_rotary_emb"):
            turned = file._apply_rotary_emb(probe, torch.zeros(2), torch.ones(2))
        else:
            continue
        found = {(-3.0, -4.0, 1.0, 2.0): "halves", (-2.0, 1.0, -4.0, 3.0): "neighbours"}.get(tuple(turned[0].tolist()))
        if found is not None:
            return found
    raise ValueError(
        f"{type(module).__name__}: its file has no function by which to tell the columns that RoPE turns together, so a "
        "learned order can't be fitted to its keys; enable it without"
    )


def _head_dim(module: typing.Any) -> int:
    """The width of its keys. With MLA that is the sum of two parts, and its config's head_dim the second of them."""
    names = ((module, "qk_head_dim"), (module, "head_dim"), (module.config, "head_dim"))
    own = next(filter(None, (getattr(whose, name, None) for whose, name in names)), None)
    return own or module.config.hidden_size // module.config.num_attention_heads


def _require_model(learned: LearnedOrder, module: typing.Any) -> None:
    config = module.config
    heads = config.num_attention_heads
    learned.require_model(
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=_head_dim(module),
    )


def weights_by_module(learned: LearnedOrder, modules: list[typing.Any]) -> dict[typing.Any, dict[str, typing.Any]]:
    """What attention() takes of a learned order in each attention module, whose columns may lie in the other pairing.

    Raises ValueError for an order of another model than these modules'.
    """
    converted: dict[str, LearnedOrder] = {}
    given: dict[typing.Any, dict[str, typing.Any]] = {}
    for module in modules:
        if module.layer_idx is None:
            raise ValueError(
                f"{learned.name}: {type(module).__name__} has no index, so none of the file's layers is its own"
            )
        _require_model(learned, module)
        pairs = rope_pairs(module)
        device = next((parameter.device for parameter in module.parameters()), None)
        if pairs not in converted:
            converted[pairs] = learned.in_pairs(pairs)
        weights = converted[pairs].weights[module.layer_idx]
        if device is not None and device.type != "meta":
            weights = weights.to(device)
        given[module] = {"order_weights": weights, "rope_pairs": pairs}
    return given
