"""Workspace and gathered pages: one buffer that all layers share, reserved while vLLM profiles memory.

vLLM gives its KV cache what is left after the profile run. What is allocated later would not be in that account, so the
greatest row's bytes are taken from vLLM's own workspace then, up to the cap, and no row asks for more.
"""

import torch

ALIGNMENT = 256


class Buffer:
    """The buffer of one process."""

    def __init__(self) -> None:
        self.size = 0  # bytes reserved
        self._own: torch.Tensor | None = None  # where vLLM keeps no workspace, as on the CPU

    def reserve(self, size: int, device: torch.device) -> None:
        """Makes the buffer at least that large. Raises MemoryError where vLLM lets it grow no more, or memory is out."""
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

    def _bytes(self, size: int, device: torch.device) -> torch.Tensor:
        from vllm.v1.worker import workspace

        try:
            if workspace.is_workspace_manager_initialized():
                (whole,) = workspace.current_workspace_manager().get_simultaneous(((size,), torch.uint8))
                return whole
            if self._own is None or self._own.numel() < size:
                self._own = torch.empty(size, dtype=torch.uint8, device=device)
            return self._own
        except (AssertionError, torch.OutOfMemoryError) as error:  # the first where vLLM lets its workspace grow no more
            raise MemoryError(f"{size} bytes of workspace: {error}") from None


buffer = Buffer()
