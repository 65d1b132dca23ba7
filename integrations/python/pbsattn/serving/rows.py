"""Which rows of a batch are pbsattn's: from lists on the host.

A batch is the tokens of its rows one after another; row i has tokens starts[i] .. starts[i + 1] and attends to its request's
first lens[i] tokens, of which its own are the last. Decodes may stand anywhere, rows may be empty, and tokens after the last
row are padding.
"""

import dataclasses
import typing
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch."""

    index: int
    begin: int  # its tokens in the batch
    end: int
    kv_len: int  # tokens that its last query sees
    after: int = 0  # tokens of its prompt that come after it, in later chunks; 0 where that isn't known

    @property
    def tokens(self) -> int:
        """The row's own tokens, its queries."""
        return self.end - self.begin

    @property
    def has_context(self) -> bool:
        """Whether it sees tokens of earlier chunks, or of the prefix cache, that are in pages alone."""
        return self.kv_len > self.tokens


class Run(typing.NamedTuple):
    """Rows first .. last - 1, which stand one after another and are not pbsattn's, and their tokens in the batch."""

    first: int
    last: int
    begin: int
    end: int


def take(
    starts: Sequence[int],
    lens: Sequence[int],
    prefilling: Sequence[bool],
    min_tokens: int,
    after: Sequence[int] | None = None,
) -> list[Row]:
    """The rows that pbsattn computes, if their layer doesn't leave them: prefills of min_tokens or more.

    after: tokens of each row's prompt that come after it, where they are known.

    A row whose lens is less than its own tokens isn't taken. Raises ValueError where the lists are not of one batch.
    """
    rows = len(starts) - 1
    if not (rows == len(lens) == len(prefilling)):
        raise ValueError(f"a batch of {rows} rows has {len(lens)} lengths, and says of {len(prefilling)} if they prefill")
    taken = []
    for i in range(rows):
        row = Row(i, starts[i], starts[i + 1], lens[i], after[i] if after else 0)
        if prefilling[i] and row.tokens >= min_tokens and row.kv_len >= row.tokens:
            taken.append(row)
    return taken


def runs_between(starts: Sequence[int], taken: Sequence[Row]) -> list[Run]:
    """The rows that are not taken, as runs of such as stand together; runs without a token are left out."""
    runs, first = [], 0
    for end in [*(row.index for row in taken), len(starts) - 1]:
        if starts[first] < starts[end]:
            runs.append(Run(first, end, starts[first], starts[end]))
        first = end + 1
    return runs
