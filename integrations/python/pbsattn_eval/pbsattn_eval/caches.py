"""Keys and values as caches of fewer bits hold them."""

import torch

_BLOCK = 32  # numbers that share a scale


def _blocks(x):
    return x.float().unflatten(-1, (-1, _BLOCK))


def _q8_0(x):
    blocks = _blocks(x)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale).nan_to_num_(0).round() * scale.half().float()).flatten(-2)


def _q4_0(x):
    blocks = _blocks(x)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    levels = ((blocks / scale).nan_to_num_(0) + 8.5).trunc().clamp_(max=15) - 8
    return (levels * scale.half().float()).flatten(-2)


ROUNDED = {"f16": torch.Tensor.half, "q8_0": _q8_0, "q4_0": _q4_0}


def rounded(x, kind):
    """Returns keys or values as a cache of llama.cpp's type `kind` gives them back, in their own type. The last dimension is
    one head's, a multiple of 32."""
    return ROUNDED[kind](x).to(x.dtype)
