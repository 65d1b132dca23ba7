"""What runs keep of a sequence for later ones."""

import torch

from . import _core


class SegmentCache:
    """Keeps a sequence's complete segments as plans pack them, so that a chunk's run packs new ones alone.

    One for each layer and sequence, or batch of sequences that are as long as each other. It changes no result. A run
    (`Plan.run`) is told how many of the first tokens have the keys, values and order weights that they had when the cache
    saw them; what isn't said to be so, or is of another plan's options, shape or code path, is made anew. One run at a
    time may have it.

    memory: a contiguous uint8 tensor on the plan's device, of `Plan.cache_size` bytes for the longest sequence; it is kept
    alive. On CUDA runs with it go to one stream, or wait for each other.
    Raises TypeError or ValueError.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        if not isinstance(memory, torch.Tensor):
            raise TypeError(f"memory: {type(memory).__name__}, no tensor; torch.empty(size, dtype=torch.uint8) will do")
        if memory.dtype != torch.uint8 or not memory.is_contiguous() or memory.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"memory: {memory.dtype} on {memory.device}; pass a contiguous uint8 tensor on the plan's device: "
                "torch.empty(size, dtype=torch.uint8, device=plan.device)"
            )
        self._memory = memory
        self._core = _core.SegmentCache(memory.data_ptr(), memory.nbytes)

    @property
    def tokens(self) -> int:
        """How many of the sequence's first tokens it keeps; a run uses their whole segments."""
        return self._core.tokens

    def clear(self) -> None:
        """Forgets them."""
        self._core.clear()
