"""Block lists that bench/gpu gives to others' kernels, and the merge of two attentions, without a GPU."""

import math
import pathlib
import sys

import torch

sys.path.append(str(pathlib.Path(__file__).parents[2] / "bench" / "gpu"))

from block_lists import before_own, merge, padded, to_lists

BLOCK, SEGMENT = 4, 8


def random_blocks(heads, rows, seed=1):
    """A causal block mask in which each row has its diagonal."""
    draw = torch.rand(1, heads, rows, rows, generator=torch.Generator().manual_seed(seed)) < 0.4
    return draw.tril() | torch.eye(rows, dtype=torch.bool)


def test_padded_lists_name_each_rows_blocks_in_order():
    mask = random_blocks(3, 7)
    count, index = padded(mask)
    assert count.dtype == index.dtype == torch.int32
    assert count.shape == mask.shape[:3] and index.shape == mask.shape
    for head in range(3):
        for row in range(7):
            blocks = mask[0, head, row].nonzero().flatten().tolist()
            assert index[0, head, row, : count[0, head, row]].tolist() == blocks


def test_lists_one_after_the_other_name_the_same_blocks():
    mask = random_blocks(2, 6)
    start, count, blocks = to_lists(mask)
    found = [blocks[s : s + c].tolist() for s, c in zip(start.tolist(), count.tolist())]
    assert found == [row.nonzero().flatten().tolist() for row in mask.flatten(0, 2)]


def test_before_own_leaves_out_the_segment():
    assert before_own(torch.ones(1, 1, 5, 5, dtype=torch.bool), 2)[0, 0].int().tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
    ]


def attention(q, k, v, seen):
    """Output and log-sum-exp; 0 and -inf where nothing is seen."""
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).nan_to_num(0) @ v, lse


def test_merge_gives_attention_over_both_sets_of_keys():
    heads, tokens = 2, 24
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, tokens, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    before = before_own(random_blocks(heads, tokens // BLOCK), SEGMENT // BLOCK)
    before = before.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    segment = torch.arange(tokens) // SEGMENT
    own = causal & (segment[:, None] == segment)
    out, lse = attention(q, k, v, before)
    assert torch.isneginf(lse[:, :, :SEGMENT]).all()  # the first segment has nothing before it

    by_segment = [t[0].unflatten(1, (-1, SEGMENT)).transpose(0, 1) for t in (q, k, v)]
    own_out, own_lse = attention(*by_segment, causal[:SEGMENT, :SEGMENT])
    expected, _ = attention(q, k, v, before | own)
    torch.testing.assert_close(merge(out, lse, own_out, own_lse), expected)
