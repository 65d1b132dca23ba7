"""Prefill of transformers models by pbsattn.

    import pbsattn.transformers
    pbsattn.transformers.enable(model, method="pbs", top_p=0.9)
    model.generate(**inputs)                      # the prompt goes through pbsattn, decoding through SDPA
    pbsattn.transformers.stats(model)             # density and time of each layer
    pbsattn.transformers.disable(model)

or, for a while:

    with pbsattn.transformers.enable(model):
        model.generate(**inputs)

Who sends a prompt through a model in chunks says so, as generate(..., prefill_chunk_size=8192) does by itself:

    with pbsattn.transformers.prompt(model, tokens):
        ...                                       # model(chunk, past_key_values=cache) for each

Any model whose attention goes through transformers' AttentionInterface will do, unless it is sparse by an indexer of its
own. What pbsattn takes is causal attention of one prompt or of a batch of equally long ones, in one or several chunks over
a cache, with or without soft-capped logits, sinks, and a sliding window, of which all is computed; on the CPU also with
values of another width than keys. Everything else (decoding, padding, cross attention, training, ...) goes to PyTorch's
SDPA, or to the model's own attention where SDPA can't compute it; the first time something long does, a FallbackWarning
names the reason.
"""

import contextlib
import json
import operator
import os
import typing
from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from . import _core
from ._learned import LearnedOrder, read_learned
from ._settings import HeadChanges, Layers, Value, read_settings
from ._transformers_calls import NAME, FallbackWarning, Layer, LayerStats, State, states
from ._transformers_fallback import indexer, own
from ._transformers_generate import unwatch, watch
from ._transformers_learned import rope_pairs, weights_by_module
from ._transformers_prompts import known

__all__ = [
    "MIN_TOKENS",
    "NAME",
    "Enabled",
    "FallbackWarning",
    "LayerStats",
    "Settings",
    "disable",
    "enable",
    "prompt",
    "read_settings",
    "rope_pairs",
    "stats",
]

# Options by layer and query head ("*" is every one), as a dict or the path of a JSON file.
Settings = str | os.PathLike[str] | typing.Mapping[str | int, HeadChanges]
# Least queries of a call for pbsattn, by device. On a GPU a shorter prefill is bound by the host, which we make no faster.
MIN_TOKENS = {"cpu": 512, "cuda": 2560}


def _configs(model: PreTrainedModel) -> list[typing.Any]:
    """The configs of a model and of its parts, outer ones first."""
    found: dict[int, typing.Any] = {}

    def visit(config: object) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                visit(getattr(config, key, None))

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return list(found.values())


def _implementation_before(config: typing.Any) -> typing.Any:
    """The attention that a config had before any model was enabled with it."""
    if config._attn_implementation != NAME:
        return config._attn_implementation
    return next((before for state in list(states) for each, before in state.before if each is config), "sdpa")


def _restore(state: State) -> None:
    """Gives its configs back what they had, but for those that another enabled model shares.

    A config passes a name on to its parts, which come later and then get their own; not all configs take a dict.
    """
    states.discard(state)
    for config, before in state.before:
        shared = any(each is config for other in list(states) for each, _ in other.before)
        config._attn_implementation = NAME if shared else before


def _layers(model: torch.nn.Module) -> list[Layer]:
    return [module._pbsattn for module in model.modules() if hasattr(module, "_pbsattn")]


def _attention_modules(model: torch.nn.Module) -> list[typing.Any]:
    return [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and getattr(module, "is_causal", False) and hasattr(module, "config")
    ]


def _indices(modules: list[typing.Any]) -> set[int]:
    return {module.layer_idx for module in modules if module.layer_idx is not None}


class Enabled:
    """What enable() returns: a context manager that disables at its end."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __enter__(self) -> PreTrainedModel:
        return self._model

    def __exit__(self, *_: object) -> None:
        disable(self._model)


def _options_by_module(
    modules: list[typing.Any],
    base: dict[str, Value],
    options: dict[str, Value],
    settings: Settings | None,
    learned: LearnedOrder | None,
    with_settings: bool,
) -> dict[typing.Any, dict[str, typing.Any]]:
    """attention()'s options, by module: `base`, then the learned order's settings if they count, `options`, `settings`."""
    weights = {} if learned is None else weights_by_module(learned, modules)
    of_file = Layers(learned.settings, learned.name) if learned is not None and with_settings else Layers({})
    layers = Layers({} if settings is None else settings)
    by_module: dict[typing.Any, dict[str, typing.Any]] = {}
    for each in (of_file, layers):
        each.check(_indices(modules))
    given = {name: value for name, value in options.items() if value is not None}
    for module in modules:
        q_heads = module.config.num_attention_heads
        heads = [{**head, **given} for head in of_file.over(module.layer_idx, [base], q_heads)]
        heads = layers.of(module.layer_idx, heads, q_heads)
        if learned is None:
            _require_no_weights(heads[0])
        made = heads[0] if len(heads) == 1 else dict(heads[0], heads=json.dumps(dict(enumerate(heads))))
        by_module[module] = {**made, **weights.get(module, {})}
    return by_module


def _require_no_weights(options: dict[str, typing.Any]) -> None:
    """Raises for options that need a learned order. Heads of a layer have one permutation."""
    if _core.options(**options).as_dict()["permutation"] == "learned":
        raise ValueError('permutation "learned": it goes by weights, which a file has; pass it, learned="model.pbs"')


def _named_options(method: str) -> dict[str, Value]:
    """The options that a method's text names, "auto:threshold=0.01", with their values."""
    values = _core.options(method).as_dict()
    return {name: values[name] for name in (part.partition("=")[0] for part in method.split(":")[1:])}


def enable(
    model: PreTrainedModel,
    *,
    method: str | None = None,
    min_tokens: int | None = None,
    layers: Iterable[int] | None = None,
    settings: Settings | None = None,
    learned: str | os.PathLike[str] | LearnedOrder | None = None,
    stats: bool = False,
    **options: Value,
) -> Enabled:
    """Sends the prefill of a transformers model to pbsattn, until disable() or the end of a `with` block.

    method and options: those of pbsattn.attention (top_p, dense_last_rows, ...); by default "auto"
    (two-step, or dense where that is faster).
    settings: options of single layers and query heads over those: the path of a JSON file, or the same as a dict:
    {"*": {"*": {"method": "minference"}, "7": {"vertical": 3500}}, "0": {"*": {"keep": "all"}}} (layer, head, options).
    learned: the file of a learned order of this model (docs/learned.md), or what pbsattn.read_learned gives: the weights of
    permutation="learned" in each layer. With method "auto" keys take this order and the file's settings count, under options
    and settings.
    min_tokens: calls with fewer queries go to SDPA (by default fewer than 512 on the CPU and than 2560 on CUDA); so do
    layers whose index is not in `layers`, if that is given.
    stats: measure density and time on CUDA too, where that waits for every layer; on the CPU they are always measured.

    Raises ValueError if no layer of the model can be taken, if it is sparse by itself, or an option is wrong, and for a file
    of another model; RuntimeError if it is enabled already; TypeError for what is not a transformers model.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model: a {type(model).__name__}; pass a transformers PreTrainedModel")
    name = type(model).__name__
    if _layers(model):
        raise RuntimeError(f"{name}: pbsattn is enabled already; disable it first, to change its settings")
    # Checks the options now, not in the middle of a prefill; the reference takes whatever one of the devices takes.
    method = "auto" if method is None else method
    by_file = learned is not None and str(method).partition(":")[0] == "auto"
    if by_file:
        options = {**_named_options(method), **options}
    base: dict[str, typing.Any] = {"method": _core.learned_method if by_file else method}
    _core.Plan(_core.options(base["method"], **options), "reference", 0, 1, (1, 1, 1, 1, 1, 64, 0))
    if learned is None:
        _require_no_weights({**base, **options})
    elif not isinstance(learned, LearnedOrder):
        learned = read_learned(learned)
    if own_choice := indexer(model):
        raise ValueError(
            f"{name}: it is sparse already: its {own_choice} picks the keys that each query sees, and hands them "
            "to attention functions of its own; pbsattn would attend to others. Use the model without pbsattn"
        )
    modules = _attention_modules(model)
    no_interface = f"{name}: has no causal attention that goes through transformers' AttentionInterface"
    if not modules or not model._can_set_attn_implementation():
        raise ValueError(no_interface)
    if layers is not None:
        layers, indices = frozenset(layers), _indices(modules)
        if unknown_layers := layers - indices:
            raise ValueError(
                f"layers {sorted(unknown_layers)}: {name} has no such layers; it has "
                f"{f'0 .. {max(indices)}' if indices else 'none with an index'}"
            )
    if min_tokens is None:
        min_tokens = MIN_TOKENS.get(model.device.type, 512)
    if min_tokens < 2:
        raise ValueError(f"min_tokens {min_tokens}: decoding is not for pbsattn; 2 is the least")
    by_module = {}
    if settings is not None or learned is not None:
        by_module = _options_by_module(modules, base, options, settings, learned, with_settings=by_file)
    # What modules without a place of their own in these get, if anything calls them.
    others = {**base, **options} if learned is None else None
    before = [(config, _implementation_before(config)) for config in _configs(model)]
    state = State(model, before, min_tokens, stats)
    states.add(state)
    try:
        model.set_attn_implementation(NAME)
        if all(module.config._attn_implementation != NAME for module in modules):
            raise ValueError(no_interface)
    except BaseException:
        _restore(state)
        raise
    for module_name, module in model.named_modules():
        if hasattr(module, "config") and not isinstance(module, PreTrainedModel):
            index = getattr(module, "layer_idx", None)
            left = layers is not None and index not in layers
            module._pbsattn = Layer(state, module_name, index, None if left else by_module.get(module, others))
            own(module)  # looked up now, not while a graph is compiled
    watch(model, state)
    return Enabled(model)


def _require_layers(model: torch.nn.Module) -> list[Layer]:
    layers = _layers(model)
    if not layers:
        raise RuntimeError(f"{type(model).__name__}: pbsattn is not enabled; call pbsattn.transformers.enable(model)")
    return layers


def _states(model: torch.nn.Module) -> set[State]:
    return {layer.state for layer in _require_layers(model)}


def prompt(model: torch.nn.Module, tokens: int) -> contextlib.AbstractContextManager[None]:
    """A `with` block in which one prompt of so many tokens goes through an enabled model, in chunks over a cache.

    Its `dense_last_rows`, which attend to everything, are then the prompt's, not those of every chunk. Tokens that the cache
    has before the first chunk don't count. It holds for this thread or task, and for tasks that are
    started in the block, whose tokens count together. generate(prefill_chunk_size=N) does it itself.

    From a chunk on that goes beyond the prompt, or that has other keys before it than came, the last rows of each are dense,
    as without the block. That is told once, by a FallbackWarning, and so is a prompt whose end doesn't come: no row of it
    is dense. In a compiled model the last rows of every chunk are.

    Raises RuntimeError if pbsattn is not enabled, and ValueError where tokens is no whole number from 1 on.
    """
    states_of_it = _states(model)
    try:
        count = 0 if isinstance(tokens, bool) else operator.index(tokens)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"tokens {tokens!r}: not a whole number from 1 on; pass the prompt's length, ids.shape[1]")
    return known(states_of_it, count)


def disable(model: PreTrainedModel) -> None:
    """Gives a model the attention back that it had before enable(). RuntimeError if it is not enabled."""
    states_of_it = _states(model)
    unwatch(model, states_of_it)
    for state in states_of_it:
        _restore(state)
    for module in model.modules():
        module.__dict__.pop("_pbsattn", None)


def stats(model: PreTrainedModel) -> list[LayerStats]:
    """What the last prefill did, by layer; layers without an index come last. RuntimeError if pbsattn is not enabled."""
    records = [layer.record for layer in _require_layers(model) if layer.record is not None]
    return sorted(records, key=lambda record: (record.layer is None, record.layer or 0))
