"""Density and time of the rows that pbsattn computed, by layer, logged when the last layer has computed a row,
or in the next step where it left the row to FlashAttention."""

import dataclasses
import logging
import typing

from .rows import Row


@dataclasses.dataclass(frozen=True)
class Record:
    """What one layer did with a row."""

    layer: int
    visited_blocks: int
    causal_blocks: int
    seconds: float


class Recorder:
    """Records of the rows of a process."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.last_layer = -1  # of those that pbsattn takes
        self._layer = -1  # the latest
        self._open: dict[Row, list[Record]] = {}

    def add(self, row: Row, layer: int, stats: typing.Any) -> None:
        """Adds what a layer did with a row: stats as Plan.run gives them. In each step layers come in ascending order."""
        records = self._open.get(row, [])
        if layer < self._layer or (records and layer <= records[-1].layer):
            # Another step: what is open are rows that the last layer left to FlashAttention.
            for left, of_left in self._open.items():
                self.show(left, of_left)
            self._open.clear()
        self._layer = layer
        records = self._open.setdefault(row, [])
        records.append(Record(layer, stats.visited_blocks, stats.causal_blocks, stats.seconds))
        if layer >= self.last_layer:
            self.show(row, self._open.pop(row))

    def show(self, row: Row, records: list[Record]) -> None:
        """Logs a row, of the layers that computed it."""
        visited, causal = (sum(getattr(each, name) for each in records) for name in ("visited_blocks", "causal_blocks"))
        self._log.info(
            "pbsattn: row of %d tokens over %d: density %.3f, %.1f ms of attention; layer density ms: %s",
            row.tokens,
            row.kv_len,
            visited / max(causal, 1),
            1e3 * sum(each.seconds for each in records),
            ", ".join(
                f"{each.layer} {each.visited_blocks / max(each.causal_blocks, 1):.3f} {1e3 * each.seconds:.2f}"
                for each in records
            ),
        )
