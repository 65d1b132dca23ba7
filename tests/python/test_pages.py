"""Keys and values in pages of a server's cache: the same bits as contiguous ones, through every door; what is refused."""

import re

import pytest
import torch

import pbsattn
from conftest import qkv

METHOD = dict(method="pbs", top_p=0.7, block=32, segment=64)
# On each device blocks that it takes, lengths of some of these, and a width of values.
OF_DEVICE = {"cpu": (METHOD, 150, 300, 40), "cuda": (METHOD | dict(block=128, segment=256), 400, 1000, 64)}


def in_pages(k, v, size, layout="bhsd", one_row=True):
    """Caches of keys and values [B, Hkv, Skv, D] in a layout, and the table of their pages, which lie in random order."""
    batch, heads, tokens, dim = k.shape
    entries = -(-tokens // size)
    pages = batch * entries + 2
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(size)).int()[: batch * entries].view(batch, -1)
    table = table.to(k.device)

    def cached(*tensors):
        width = sum(tensor.shape[3] for tensor in tensors)
        cache = torch.full((pages, heads, size, width), torch.nan, dtype=k.dtype, device=k.device)
        if layout == "bshd":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        for token in range(tokens):
            row = torch.cat([tensor[:, :, token] for tensor in tensors], dim=2)
            cache[table[:, token // size], :, token % size] = row
        return cache if layout == "bhsd" else cache.transpose(1, 2)

    if one_row:
        cache = cached(k, v)
        return cache[..., :dim], cache[..., dim:], table
    return cached(k), cached(v), table


@pytest.mark.parametrize("one_row", [True, False], ids=["one row", "apart"])
@pytest.mark.parametrize("size", [16, 48, 512])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_pages_give_the_bits_of_contiguous_tensors(device, layout, size, one_row):
    torch._dynamo.reset()  # the other cases, which it would count as the same
    method, q_len, kv_len, width = OF_DEVICE[device]
    q, k, v = qkv(device, q_len, kv_len, batch=2)
    v = v[..., :width].contiguous()
    k_pages, v_pages, table = in_pages(k, v, size, layout, one_row)
    if layout == "bshd":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    wanted, wanted_lse = pbsattn.attention(q, k, v, layout=layout, return_lse=True, **method)
    for call in (pbsattn.attention, torch.compile(pbsattn.attention, backend="eager", fullgraph=True, dynamic=False)):
        out, lse = call(q, k_pages, v_pages, page_table=table, kv_len=kv_len, layout=layout, return_lse=True, **method)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    _, stats = pbsattn.attention(
        q, k_pages, v_pages, page_table=table, kv_len=kv_len, layout=layout, return_stats=True, **method
    )
    assert 0 < stats.density < 1


def test_a_table_may_be_part_of_a_wider_one():
    q, k, v = qkv("cpu", 100, 200, batch=2)
    k_pages, v_pages, table = in_pages(k, v, 16)
    wide = torch.full((5, table.shape[1] + 7), -1, dtype=torch.int32)  # what no call reads may be anything
    wide[1:3, 2 : 2 + table.shape[1]] = table
    out = pbsattn.attention(q, k_pages, v_pages, page_table=wide[1:3, 2:], kv_len=200, **METHOD)
    assert torch.equal(out, pbsattn.attention(q, k, v, **METHOD))


def test_plans_and_traces(device):
    method, q_len, kv_len, _ = OF_DEVICE[device]
    q, k, v = qkv(device, q_len, kv_len, batch=2)
    k_pages, v_pages, table = in_pages(k, v, 48)
    wanted, trace = pbsattn.trace(q, k, v, **method)
    out, paged = pbsattn.trace(q, k_pages, v_pages, page_table=table, kv_len=kv_len, **method)
    assert torch.equal(out, wanted) and torch.equal(paged.order, trace.order) and torch.equal(paged.kept, trace.kept)
    if device == "cpu":
        paged_reference, _ = pbsattn.trace(q, k_pages, v_pages, page_table=table, kv_len=kv_len, reference=True, **method)
        reference, _ = pbsattn.trace(q, k, v, reference=True, **method)
        assert torch.equal(paged_reference, reference)

    sizes = dict(batch=2, q_heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, head_dim=64)
    plan = pbsattn.plan(**sizes, device=q.device, **method)
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
    out = torch.zeros_like(q)
    plan.run(q, k_pages, v_pages, out, workspace, page_table=table)
    assert torch.equal(out, wanted)
    out.zero_()
    again = plan.bind(q, k_pages, v_pages, out, workspace, page_table=table)
    again()
    assert torch.equal(out, wanted)
    plan.run(q, k, v, out, workspace)
    assert torch.equal(out, wanted), "the same plan takes both"


def test_opcheck():
    q, k, v = qkv("cpu", 100, 200, batch=2)
    k_pages, v_pages, table = in_pages(k, v, 16)
    torch.library.opcheck(
        torch.ops.pbsattn.attention.default, (q, k_pages, v_pages), dict(page_table=table, kv_len=200, return_lse=True)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(kv_len=None), "kv_len None with a page_table; pass both"),
        (dict(page_table=None), "kv_len 200 without a page_table; pass both"),
        (dict(kv_len=2.5), "kv_len 2.5: a float; pass an int"),
        (dict(kv_len=0), "kv_len 0"),
        (dict(page_table=[[0] * 13] * 2), "page_table: a list; pass a torch.Tensor"),
        (dict(page_table=torch.zeros(2, 13, dtype=torch.long)), "page_table: torch.int64 (2, 13); pass an int32"),
        (dict(page_table=torch.zeros(2, 12, dtype=torch.int32)), "page_table: torch.int32 (2, 12); pass an int32"),
        (dict(page_table=torch.zeros(1, 13, dtype=torch.int32)), "(2, 13) or wider, as kv_len 200 takes in pages of 16"),
        (dict(page_table=torch.zeros(13, 2, dtype=torch.int32).T), "page_table: its last dimension has stride 2"),
        (dict(page_table=torch.full((2, 13), 28, dtype=torch.int32)), "page table: page 28 at entry 0 of batch entry 0"),
    ],
)
def test_what_is_refused(change, says):
    q, k, v = qkv("cpu", 100, 200, batch=2)
    k_pages, v_pages, table = in_pages(k, v, 16)
    given = dict(page_table=table, kv_len=200)
    pbsattn.attention(q, k_pages, v_pages, **given)  # a plan that is kept checks no less
    with pytest.raises((TypeError, ValueError), match=re.escape(says)):
        pbsattn.attention(q, k_pages, v_pages, **{**given, **change})


def test_pages_of_a_size_that_the_library_lacks_are_refused():
    q, k, v = qkv("cpu", 100, 200, batch=2)
    k_pages, v_pages, table = in_pages(k, v, 24)
    with pytest.raises(ValueError, match="pages: size 24: no multiple of 16"):
        pbsattn.attention(q, k_pages, v_pages, page_table=table, kv_len=200)
    plan = pbsattn.plan(batch=2, q_heads=4, kv_heads=2, q_len=100, kv_len=200, head_dim=64)
    with pytest.raises(ValueError, match="pages: size 24"):
        plan.run(q, k_pages, v_pages, q.clone(), torch.empty(plan.workspace_size, dtype=torch.uint8), page_table=table)
