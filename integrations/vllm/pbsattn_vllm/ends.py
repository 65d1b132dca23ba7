"""How many tokens of its prompt come after each row of a batch, which vLLM's metadata doesn't tell.

A chunk that ends no prompt has no rows that must see everything. vLLM's model runners know the prompts, and have the
metadata of a batch made by one method that sees the batch too: while it runs, what they know is kept here. Nothing is known
of a batch that comes another way, as a draft's, and of one whose lists don't agree with what is kept.
"""

import functools
import sys
import typing
from collections.abc import Callable, Sequence

# By module of vLLM 0.26.0: class, method, and what it is called with to the tokens that each row's request prefills: its
# prompt, and by the second runner after a preemption what it had answered too.
_METHODS: dict[str, tuple[str, str, Callable[..., typing.Any]]] = {
    "vllm.v1.worker.gpu.model_states.default": (
        "DefaultModelState",
        "prepare_attn",
        lambda _, batch, *__, **___: batch.prefill_len_np,
    ),
    "vllm.v1.worker.gpu_model_runner": (
        "GPUModelRunner",
        "_build_attention_metadata",
        lambda runner, *_, **__: runner.input_batch.num_prompt_tokens,
    ),
}
_lens: typing.Any = None  # of the batch whose metadata is being made


def watch() -> None:
    """Keeps what the model runners of this process know while they make a batch's metadata; any number of times."""
    for module, (kind, method, lens_of) in _METHODS.items():
        if module in sys.modules:
            owner = getattr(sys.modules[module], kind)
            made = getattr(owner, method)
            if not hasattr(made, "pbsattn"):
                setattr(owner, method, _watched(made, lens_of))


def _watched(made: Callable[..., typing.Any], lens_of: Callable[..., typing.Any]) -> Callable[..., typing.Any]:
    @functools.wraps(made)
    def watched(*given: typing.Any, **named: typing.Any) -> typing.Any:
        global _lens
        _lens = lens_of(*given, **named)
        try:
            return made(*given, **named)
        finally:
            _lens = None

    watched.pbsattn = True  # type: ignore[attr-defined]
    return watched


def known() -> bool:
    """Whether a model runner tells of the batch whose metadata is being made."""
    return _lens is not None


def tokens_after(starts: Sequence[int], lens: Sequence[int], prefilling: Sequence[bool]) -> list[int] | None:
    """The tokens that each row's request has still to prefill after it; None where that isn't known.

    starts, lens and prefilling: the batch's lists, as `pbsattn.serving.rows` has them. vLLM says that a row prefills where
    something was left to prefill before it: what is kept here is this batch's only if by it the same holds for every row.
    """
    if _lens is None or not len(starts) - 1 == len(lens) == len(prefilling) <= len(_lens):
        return None
    known = [int(each) for each in _lens[: len(lens)]]
    for i, prefills in enumerate(prefilling):
        own = starts[i + 1] - starts[i]
        if own > 0 and prefills != (lens[i] - own < known[i]):
            return None
    return [max(all_of_it - kv_len, 0) for all_of_it, kv_len in zip(known, lens)]
