"""Block masks [batch][head][row][block] as the lists that kernels take, and the parts of an attention put together again."""

import torch


def to_lists(mask):
    """Returns start and count of each row, and the blocks of all rows one after the other, rising."""
    flat = mask.flatten(0, 2)
    count = flat.sum(1)
    start = count.cumsum(0) - count
    return start.contiguous(), count.int().contiguous(), flat.nonzero()[:, 1].int().contiguous()


def padded(mask):
    """Returns each row's count, and its blocks, rising, in an array as wide as the mask; what follows them is not read."""
    index = torch.argsort(mask.to(torch.uint8), dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), index.int()


def before_own(mask, segment_blocks):
    """Returns the mask without the blocks of each row's own segment. Rows and blocks both start at token 0."""
    rows = torch.arange(mask.shape[2], device=mask.device)[:, None]
    return mask & (torch.arange(mask.shape[3], device=mask.device) < rows // segment_blocks * segment_blocks)


def merge(out, lse, own, own_lse):
    """Returns attention over two sets of keys from that over each, and the logarithms of both sums.

    out is [1][head][token][width], lse [1][head][token], -inf where no key was seen; own is [segment][head][token][width],
    own_lse [segment][head][token], finite.
    """
    segments, _, length, _ = own.shape
    own, own_lse = own.transpose(0, 1)[None], own_lse.transpose(0, 1)[None, ..., None]
    out, lse = out.unflatten(2, (segments, length)), lse.unflatten(2, (segments, length))[..., None]
    share = torch.sigmoid(lse - own_lse)
    return (share * out + (1 - share) * own).to(out.dtype).flatten(2, 3)
