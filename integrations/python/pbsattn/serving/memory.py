"""Workspace and gathered pages: one buffer that all layers of a process share, reserved before requests come."""

import torch

import pbsattn

from .layers import Layer, Refused, most_memory
from .rows import Row
from .settings import REFUSE, Settings

ALIGNMENT = 256


class Buffer:
    """The buffer of one process."""

    def __init__(self) -> None:
        self.size = 0  # bytes reserved
        self._own: torch.Tensor | None = None

    def reserve(self, size: int, device: torch.device) -> None:
        """Makes the buffer at least that large. Raises MemoryError where it may grow no more, or memory is out."""
        if size > self.size:
            self._bytes(size, device)
            self.size = size

    def take(self, first: int, second: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Two parts of the buffer, in bytes; the next call's lie over them. Raises MemoryError where it is too small."""
        begin = -(-first // ALIGNMENT) * ALIGNMENT
        if begin + second > self.size:
            raise MemoryError(f"a row takes {begin + second} bytes, and {self.size} are reserved")
        whole = self._bytes(self.size, device)
        return whole[:first], whole[begin : begin + second]

    def left(self, first: int) -> int:
        """Bytes that remain beside a first part of that many; less than 1 where none do."""
        return self.size - -(-first // ALIGNMENT) * ALIGNMENT

    def plan_beside(self, gathered: int, layer: Layer, row: Row) -> pbsattn.Plan:
        """The plan of a row whose gathered pages take so many bytes of the buffer. Raises what `Layer.plan` does."""
        left = self.left(gathered)
        if left < 1:
            raise MemoryError(f"its gathered pages alone take {gathered} bytes, and {self.size} are reserved")
        return layer.plan(row.tokens, row.kv_len, left, row.after)

    def reserve_row(self, layer: Layer, tokens: int, kv_len: int, settings: Settings, device: torch.device) -> str | None:
        """Reserves what the greatest row takes, up to the cap. Returns what to warn of where that isn't enough for it.

        Raises Refused instead where the settings say so.
        """
        try:
            self.reserve(min(settings.memory, most_memory(layer, tokens, kv_len)), device)
            for after in layer.afters(kv_len):
                self.plan_beside(layer.gathered(kv_len), layer, Row(0, 0, tokens, kv_len, after))
        except MemoryError as error:
            told = f"rows of {tokens} tokens over {kv_len}: {error}; raise PBSATTN_WORKSPACE_CAP_MIB"
            if settings.unsupported == REFUSE:
                raise Refused(f"pbsattn: {told}") from None
            return f"{told}. Such rows go to FlashAttention"
        return None

    def _bytes(self, size: int, device: torch.device) -> torch.Tensor:
        if self._own is None or self._own.numel() < size:
            try:
                self._own = torch.empty(size, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                raise MemoryError(f"{size} bytes of workspace: {error}") from None
        return self._own
