"""A prompt that comes in chunks: which of them hold the prompt's `dense_last_rows`, which see everything.

A row is the queries of one block of tokens. A chunk has at least those dense rows that begin in it: of the rows that come
after it only whole ones are counted, as if the chunk ended with a row. So a row which is cut is dense in both of its
chunks, and where a prompt ends inside a row, a chunk may have one dense row more than it needs.
"""

import typing
from collections.abc import Mapping, Sequence

from ._plan import options

ByHead = Sequence[Mapping[str, typing.Any]]  # of each query head, what pbsattn.options takes


class DenseRows(typing.NamedTuple):
    """The dense rows of a prompt's end, in the head that has most of them."""

    most: int
    block: int  # tokens of a row, which are those of all heads

    @property
    def tokens(self) -> int:
        """The tokens at a prompt's end that see everything."""
        return self.most * self.block

    def later(self, after: int) -> int:
        """How many of them lie in later chunks, where so many tokens of the prompt come after a chunk."""
        return min(after // self.block, self.most)


def dense_rows(by_head: ByHead) -> DenseRows:
    """The dense rows of a prompt whose heads have these options."""
    of_heads = [options(**each) for each in by_head]
    return DenseRows(max(int(each["dense_last_rows"]) for each in of_heads), int(of_heads[0]["block"]))


def fewer_dense_rows(by_head: ByHead, later: int) -> list[dict[str, typing.Any]]:
    """The options of heads for a chunk before others that hold so many of the prompt's dense rows."""
    return [{**each, "dense_last_rows": max(int(options(**each)["dense_last_rows"]) - later, 0)} for each in by_head]
