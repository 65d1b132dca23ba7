"""How long a prompt is that generate(prefill_chunk_size=...) sends through a model in chunks.

transformers 5 does that in a method of its models, `_prefill`, which sees the whole prompt. An enabled model has one of its
own in its place; where a version has no such method, or another, nothing is known and each chunk's last rows are dense.
"""

import functools
import inspect
import typing
import weakref
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from . import _transformers_prompts
from ._transformers_calls import State

_HOOK = "_prefill"


class _Prefill:
    """A model's `_prefill`, which tells of the prompt while it runs."""

    def __init__(self, model: PreTrainedModel, state: State) -> None:
        self._model = weakref.ref(model)  # which holds this: its memory is to go with it, and at once
        self.state = state
        self.before: Callable[..., typing.Any] | None = vars(model).get(_HOOK)

    def __getstate__(self) -> dict[str, typing.Any]:  # of a copy, which is of the model's copy
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, values: dict[str, typing.Any]) -> None:
        self.__dict__.update(values, _model=weakref.ref(values["_model"]))

    def __call__(self, *given: typing.Any, **named: typing.Any) -> typing.Any:
        model = self._model()
        inner = self.before or functools.partial(getattr(type(model), _HOOK), model)
        # A graph would keep the length of the prompt that it was made with. After disable(), where somebody's own method may
        # still call this one, no layer asks for what is known.
        tokens = None if torch.compiler.is_compiling() else _tokens(inner, given, named)
        if tokens is None:
            return inner(*given, **named)
        with _transformers_prompts.known([self.state], tokens):
            return inner(*given, **named)


def _tokens(prefill: Callable[..., typing.Any], given: typing.Any, named: typing.Any) -> int | None:
    """The tokens of a prompt that comes in chunks; None for another, or one that can't be told from it."""
    try:
        arguments = inspect.signature(prefill).bind(*given, **named).arguments
        ids, config, others = (arguments[name] for name in ("input_ids", "generation_config", "model_kwargs"))
        if config.prefill_chunk_size is None:
            return None
        cache = others.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            return None  # of which tokens chunks are then made differs between versions
        return int(ids.shape[-1]) or None  # none where it has embeddings instead
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def watch(model: PreTrainedModel, state: State) -> None:
    """Has the generate() of a model, and of models in it, tell of its prompts."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and callable(getattr(type(module), _HOOK, None)):
            vars(module)[_HOOK] = _Prefill(module, state)


def unwatch(model: torch.nn.Module, states: Iterable[State]) -> None:
    """Gives a model what watch() has put away."""
    ended = set(states)
    for module in model.modules():
        hook = vars(module).get(_HOOK)
        if isinstance(hook, _Prefill) and hook.state in ended:
            if hook.before is None:
                del vars(module)[_HOOK]
            else:
                vars(module)[_HOOK] = hook.before
