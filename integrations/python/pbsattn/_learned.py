"""Learned orders: what their files hold (docs/learned.md)."""

import json
import os
import typing

import torch

from . import _core


class LearnedOrder:
    """The weights of a model's learned order and the settings that go with them. Made by `read_learned`."""

    def __init__(self, file: _core.LearnedFile) -> None:
        self._file = file
        self.name: str = file.name
        """The file's."""
        self.model: str = file.model
        """The model that it was fitted on, for people."""
        self.fitted_on: str = file.fitted_on
        """The texts, for people."""
        self.layers: int = file.layers
        self.query_heads: int = file.query_heads
        self.kv_heads: int = file.kv_heads
        self.head_dim: int = file.head_dim
        self.pairs: str = file.pairs
        """Which columns of a key RoPE turns together: "halves" (i and i + head_dim / 2) or "neighbours" (2i and 2i + 1)."""
        self.settings: typing.Any = json.loads(file.settings)
        """Options by layer and query head, as settings files have them."""
        self.weights: torch.Tensor = torch.from_numpy(file.weights).clone().view(self.layers, self.kv_heads, -1)
        """float32 [layers, kv_heads, 3 head_dim / 2]: of the lengths of a key's pairs, then of its numbers."""

    def in_pairs(self, pairs: str) -> "LearnedOrder":
        """The same for keys whose columns lie in the other pairing, "halves" or "neighbours"."""
        return LearnedOrder(self._file.in_pairs(pairs))

    def require_model(self, *, layers: int, query_heads: int, kv_heads: int, head_dim: int) -> None:
        """Raises ValueError, with both numbers, unless the file is one of a model with these sizes."""
        self._file.require_model(layers, query_heads, kv_heads, head_dim)


def read_learned(path: str | os.PathLike[str]) -> LearnedOrder:
    """Reads the file of a learned order. Raises OSError, or ValueError for what is no such file."""
    with open(path, "rb") as file:
        contents = file.read(_core.largest_learned + 1)
    return LearnedOrder(_core.parse_learned(contents, os.fspath(path)))
