"""What runs keep of a sequence from chunk to chunk."""

import pytest
import torch

import pbsattn

Q, K, V = (torch.randn(1, heads, 1100, 64, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 1))
V = V.repeat(1, 2, 1, 1)


def plan_of(begin, end, **options):
    return pbsattn.plan(q_heads=4, kv_heads=2, q_len=end - begin, kv_len=end, head_dim=64, method="two-step", **options)


def run(begin, end, k, v, **cached):
    plan = plan_of(begin, end)
    q = Q[:, :, begin:end]
    out = torch.empty_like(q)
    plan.run(q, k[:, :, :end], v[:, :, :end], out, torch.empty(plan.workspace_size, dtype=torch.uint8), **cached)
    return out


def test_chunks_over_a_cache_are_the_same_bits():
    cache = pbsattn.SegmentCache(torch.empty(plan_of(0, 512).cache_size(1100), dtype=torch.uint8))
    held = []
    for begin, end in ((0, 512), (512, 800), (800, 1100)):
        assert torch.equal(run(begin, end, K, V, cache=cache, cache_valid=begin), run(begin, end, K, V))
        held.append(cache.tokens)
    assert held == [256, 768, 1024]
    v = V.clone()
    v[:, :, 300] = 9
    assert torch.equal(run(800, 1100, K, v, cache=cache, cache_valid=300), run(800, 1100, K, v))
    # Who says what isn't so gets what was.
    assert torch.equal(run(800, 1100, K, V, cache=cache, cache_valid=1100), run(800, 1100, K, v))
    cache.clear()
    assert cache.tokens == 0
    assert torch.equal(run(800, 1100, K, V, cache=cache, cache_valid=1100), run(800, 1100, K, V))


def test_what_a_cache_is_not():
    plan = plan_of(0, 512)
    assert plan_of(0, 512, permutation="last_queries").cache_size(512) == 0
    with pytest.raises(ValueError, match="cache of -1 tokens"):
        plan.cache_size(-1)
    with pytest.raises(TypeError, match="memory: int, no tensor"):
        pbsattn.SegmentCache(100)
    for memory in (torch.empty(8), torch.empty(8, 2, dtype=torch.uint8).t()):
        with pytest.raises(ValueError, match=r"memory: .*pass a contiguous uint8 tensor on the CPU"):
            pbsattn.SegmentCache(memory)
    cache = pbsattn.SegmentCache(torch.empty(0, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"cache: 513 valid tokens: outside 0 .. 512"):
        run(0, 512, K, V, cache=cache, cache_valid=513)
    with pytest.raises(ValueError, match=r"cache: 1 valid tokens: outside 0 .. 0"):
        run(0, 512, K, V, cache_valid=1)
