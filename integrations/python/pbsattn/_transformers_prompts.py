"""What is known of prompts that go through a model in chunks: how many tokens of them are still to come."""

import contextlib
import contextvars
import typing
from collections.abc import Iterable, Iterator

if typing.TYPE_CHECKING:
    from ._transformers_calls import Layer, State


class Prompt:
    """A prompt that goes through some models: its tokens, and how many of them each layer has seen."""

    def __init__(self, states: "Iterable[State]", tokens: int, outer: "Prompt | None") -> None:
        self.states = set(states)
        self.tokens = tokens
        self.outer = outer  # around this one
        self.begin: int | None = None  # keys that were cached before it
        self.holds = True
        self.seen: dict[int, int] = {}  # tokens, by layer
        self.spared: dict[int, Layer] = {}  # layers in which a chunk has had fewer dense rows than its options say

    def after(self, layer: "Layer", offset: int, tokens: int) -> int:
        """The prompt's tokens that come after a chunk, whose `tokens` in a layer have `offset` keys before them.

        0, as where nothing is known, once a chunk goes beyond the prompt or its cache has other keys than came before.
        """
        end = self.seen[id(layer)]
        before = end - tokens
        if self.begin is None:
            self.begin = offset - before
        if offset + tokens == self.begin + before:  # the chunk before again: a module that a forward runs more than once
            self.seen[id(layer)] = end = before
            before = end - tokens
        if self.holds and (self.begin < 0 or offset != self.begin + before):
            expected = before + max(self.begin, 0)
            self._give_up(layer, "cache", f"a chunk has {offset} keys before it, where {expected} tokens came before")
        if self.holds and end > self.tokens:
            self._give_up(layer, "beyond", f"a chunk ends at token {end}")
        return self.tokens - end if self.holds else 0

    def _give_up(self, layer: "Layer", kind: str, why: str) -> None:
        self.holds = False
        layer.state.tell(
            kind, f"{why} of a prompt that was said to have {self.tokens}; from here on each chunk's last rows are dense"
        )

    def finish(self) -> None:
        """Tells of a prompt whose end, which was to have the dense rows, hasn't come."""
        for key, layer in self.spared.items():
            if self.holds and self.seen[key] < self.tokens:
                layer.state.tell(
                    "short",
                    f"{self.seen[key]} tokens came of a prompt that was said to have {self.tokens}; "
                    "its last rows, which are dense, were not among them",
                )


class Chunk(typing.NamedTuple):
    """A call of a layer's attention, of a prompt that is known."""

    prompt: Prompt
    layer: "Layer"
    tokens: int

    def options(self, offset: int) -> dict[str, typing.Any]:
        """attention()'s options for this chunk, which has so many keys before it."""
        assert self.layer.options is not None  # else it isn't pbsattn's
        options = self.layer.options_before(self.prompt.after(self.layer, offset, self.tokens))
        if options is not self.layer.options:
            self.prompt.spared[id(self.layer)] = self.layer
        return options


# Of this thread or task, and of tasks that it starts: another one's prompts through the same model are not these.
_innermost: contextvars.ContextVar[Prompt | None] = contextvars.ContextVar("pbsattn_prompt", default=None)


@contextlib.contextmanager
def known(states: "Iterable[State]", tokens: int) -> Iterator[None]:
    """What goes through models of these states in the `with` block is one prompt of so many tokens."""
    made = Prompt(states, tokens, _innermost.get())
    token = _innermost.set(made)
    try:
        yield
    finally:
        _innermost.reset(token)
    made.finish()


def chunk_of(layer: "Layer", tokens: int) -> Chunk | None:
    """A call of a layer's attention as part of the innermost prompt that is known of its model; counts its tokens."""
    found, each = None, _innermost.get()
    while each is not None:
        if layer.state in each.states:
            each.seen[id(layer)] = each.seen.get(id(layer), 0) + tokens
            found = found or each
        each = each.outer
    return None if found is None else Chunk(found, layer, tokens)
