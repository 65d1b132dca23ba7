"""What runs keep of a sequence from chunk to chunk."""

import pytest
import torch

import pbsattn

Q, K, V = (torch.randn(1, heads, 1100, 64, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 1))
V = V.repeat(1, 2, 1, 1)


def plan_of(begin, end, **options):
    return pbsattn.plan(q_heads=4, kv_heads=2, q_len=end - begin, kv_len=end, head_dim=64, method="two-step", **options)


def run(begin, end, k, v, **cached):
    plan = plan_of(begin, end, device=k.device)
    q = Q[:, :, begin:end].to(k)
    out = torch.empty_like(q)
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=k.device)
    plan.run(q, k[:, :, :end], v[:, :, :end], out, workspace, **cached)
    return out


def test_chunks_over_a_cache_are_the_same_bits(device):
    k, v = (x.to(device, torch.float32 if device == "cpu" else torch.bfloat16) for x in (K, V))
    size = plan_of(0, 512, device=device).cache_size(1100)
    cache = pbsattn.SegmentCache(torch.empty(size, dtype=torch.uint8, device=device))
    held = []
    for begin, end in ((0, 512), (512, 800), (800, 1100)):
        assert torch.equal(run(begin, end, k, v, cache=cache, cache_valid=begin), run(begin, end, k, v))
        held.append(cache.tokens)
    assert held == [256 if device == "cpu" else 512, 768, 1024]
    changed = v.clone()
    changed[:, :, 300] = 9
    assert torch.equal(run(800, 1100, k, changed, cache=cache, cache_valid=300), run(800, 1100, k, changed))
    if device == "cpu":  # who says what isn't so gets what was; on CUDA values that stay are read where they are
        assert torch.equal(run(800, 1100, k, v, cache=cache, cache_valid=1100), run(800, 1100, k, changed))
    cache.clear()
    assert cache.tokens == 0
    assert torch.equal(run(800, 1100, k, v, cache=cache, cache_valid=1100), run(800, 1100, k, v))


def test_what_a_cache_is_not():
    plan = plan_of(0, 512)
    assert plan_of(0, 512, permutation="last_queries").cache_size(512) == 0
    with pytest.raises(ValueError, match="cache of -1 tokens"):
        plan.cache_size(-1)
    with pytest.raises(TypeError, match="memory: int, no tensor"):
        pbsattn.SegmentCache(100)
    for memory in (torch.empty(8), torch.empty(8, 2, dtype=torch.uint8).t()):
        with pytest.raises(ValueError, match=r"memory: .*pass a contiguous uint8 tensor on the plan's device"):
            pbsattn.SegmentCache(memory)
    cache = pbsattn.SegmentCache(torch.empty(0, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"cache: 513 valid tokens: outside 0 .. 512"):
        run(0, 512, K, V, cache=cache, cache_valid=513)
    with pytest.raises(ValueError, match=r"cache: 1 valid tokens: outside 0 .. 0"):
        run(0, 512, K, V, cache_valid=1)
