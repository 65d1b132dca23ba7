"""Learned orders: their files, and the doors that take them."""

import pytest
import safetensors
import torch

import pbsattn
from learned_files import SIZES, save_learned


def test_a_file_says_what_is_in_it(tmp_path):
    path = tmp_path / "tiny.pbs"
    weights = save_learned(path, settings={"0": {"*": {"permutation": "none"}}}, pairs="neighbours", command="learn")
    learned = pbsattn.read_learned(path)
    assert (learned.name, learned.model, learned.fitted_on) == (str(path), "tiny", "noise")
    assert {name: getattr(learned, name) for name in SIZES} == SIZES
    assert learned.pairs == "neighbours"
    assert learned.settings == {"0": {"*": {"permutation": "none"}}}
    assert torch.equal(learned.weights, weights)
    with safetensors.safe_open(path, "pt") as file:  # what others see in it
        assert torch.equal(file.get_tensor("order_weights"), weights)


def test_pairs_are_converted_and_back(tmp_path):
    path = tmp_path / "tiny.pbs"
    weights = save_learned(path)
    learned = pbsattn.read_learned(path)
    converted = learned.in_pairs("neighbours")
    assert converted.pairs == "neighbours"
    assert torch.equal(converted.weights[..., :32], weights[..., :32])
    assert torch.equal(converted.weights[..., 32::2], weights[..., 32:64])
    assert torch.equal(converted.weights[..., 33::2], weights[..., 64:])
    assert torch.equal(converted.in_pairs("halves").weights, weights)
    assert torch.equal(learned.in_pairs("halves").weights, weights)
    with pytest.raises(ValueError, match='pairs "thirds"'):
        learned.in_pairs("thirds")


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "tiny.pbs"
    save_learned(path)
    learned = pbsattn.read_learned(path)
    learned.require_model(**SIZES)
    for name, what in zip(SIZES, ("layers", "query heads", "KV heads", "numbers in a head")):
        with pytest.raises(ValueError, match=rf"tiny.pbs: of tiny with {SIZES[name]} {what}.*the model has 6"):
            learned.require_model(**{**SIZES, name: 6})


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "tiny.pbs"
    with pytest.raises(FileNotFoundError):
        pbsattn.read_learned(path)
    with pytest.raises(IsADirectoryError):
        pbsattn.read_learned(tmp_path)
    for metadata, rule in (
        ({"format": "pbsattn-learned-9"}, 'format "pbsattn-learned-9"'),
        ({"pairs": "thirds"}, 'pairs "thirds"'),
        ({"weights": torch.full((2, 2, 96), torch.nan)}, "nan in layer 0"),
        ({"weights": torch.zeros(2, 2, 95)}, r"shape \[2,2,95\]"),
        ({"weights": torch.zeros(2, 2, 96, dtype=torch.float64)}, "data_offsets"),
    ):
        save_learned(path, **metadata)
        with pytest.raises(ValueError, match=f"tiny.pbs: .*{rule}"):
            pbsattn.read_learned(path)
    save_learned(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        pbsattn.read_learned(path)


# ------------------------------------------------------------------------------------------------ the op

METHOD = "pbs:permutation=learned:order_scope=kv_head:top_p=0.5"


def exact_keys(batch, heads, tokens, head_dim=64):
    """Keys whose numbers, and the lengths of whose pairs, are small whole numbers, so that every sum of them is exact. Their
    pairs are halves."""
    triples = torch.tensor([[3, 4], [4, 3], [5, 12], [8, 15], [0, 7], [6, 0]])
    pairs = triples[torch.randint(len(triples), (batch, heads, tokens, head_dim // 2))]
    pairs = pairs * (1 - 2 * torch.randint(2, pairs.shape))
    return torch.cat([pairs[..., 0], pairs[..., 1]], -1).float()


def exact_weights(heads, head_dim=64):
    return torch.randint(-4, 5, (heads, head_dim * 3 // 2)).float()


def to_neighbours(columns):
    """What lies in halves, as neighbours."""
    return columns.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def order_of(k, weights, segment=256):
    """The order of keys [B, Hkv, S, D] in halves by its definition, [B, Hkv, S]."""
    half = k.shape[-1] // 2
    features = torch.cat([(k[..., :half] ** 2 + k[..., half:] ** 2).sqrt(), k], -1).double()
    score = (features * weights.double()[:, None]).sum(-1)
    order = torch.arange(k.shape[2]).expand(score.shape).clone()
    for begin in range(0, k.shape[2] // segment * segment, segment):
        of_segment = score[..., begin : begin + segment]
        order[..., begin : begin + segment] = begin + of_segment.argsort(dim=-1, descending=True, stable=True)
    return order


def problem(batch=2, q_heads=4, kv_heads=2, tokens=1300):
    k = exact_keys(batch, kv_heads, tokens)
    return torch.randn(batch, q_heads, 300, 64), k, torch.randn_like(k), exact_weights(kv_heads)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("reference", [False, True])
def test_keys_move_by_their_weights(layout, reference):
    q, k, v, weights = problem()
    given = [t.transpose(1, 2) for t in (q, k, v)] if layout == "bshd" else [q, k, v]
    options = dict(method=METHOD, layout=layout, reference=reference)
    _, trace = pbsattn.trace(*given, order_weights=weights, **options)
    expected = order_of(k, weights).repeat_interleave(2, 1)
    assert torch.equal(trace.order.long(), expected)
    assert (expected != torch.arange(1300)).float().mean() > 0.5
    given[1] = to_neighbours(given[1])
    weights = torch.cat([weights[:, :32], to_neighbours(weights[:, 32:])], -1)
    _, trace = pbsattn.trace(*given, order_weights=weights, rope_pairs="neighbours", **options)
    assert torch.equal(trace.order.long(), expected)
    _, trace = pbsattn.trace(*given, order_weights=torch.zeros(2, 96), **options)
    assert torch.equal(trace.order.long(), torch.arange(1300).expand(2, 4, 1300))


def test_every_way_to_call_takes_weights():
    torch._dynamo.reset()
    q, k, v, weights = problem()
    for pairs in ("halves", "neighbours"):
        given = dict(order_weights=weights, rope_pairs=pairs)
        out, _ = pbsattn.trace(q, k, v, method=METHOD, **given)
        assert torch.equal(pbsattn.attention(q, k, v, method=METHOD, **given), out)
        compiled = torch.compile(pbsattn.attention, backend="eager", fullgraph=True, dynamic=False)
        assert torch.equal(compiled(q, k, v, method=METHOD, **given), out)
        plan = pbsattn.plan(batch=2, q_heads=4, kv_heads=2, q_len=300, kv_len=1300, head_dim=64, method=METHOD)
        workspace, ran = torch.empty(plan.workspace_size, dtype=torch.uint8), torch.empty_like(q)
        plan.run(q, k, v, ran, workspace, **given)
        assert torch.equal(ran, out)
        plan.bind(q, k, v, ran.zero_(), workspace, **given)()
        assert torch.equal(ran, out)
        options = "permutation='learned',order_scope='kv_head',top_p=0.5"  # as METHOD has them
        assert torch.equal(torch.ops.pbsattn.attention(q, k, v, settings=options, **given)[0], out)
    short = (q[:1, :, :20], k[:1, :, :300], v[:1, :, :300])
    torch.library.opcheck(torch.ops.pbsattn.attention.default, short, dict(settings=options, **given))
    unread = pbsattn.attention(q, k, v, method="pbs", order_weights=weights)
    assert torch.equal(unread, pbsattn.attention(q, k, v, method="pbs")), "for other methods"


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(order_weights=torch.zeros(2, 64)), r"order_weights: torch.float32 \(2, 64\); .* \(2, 96\)"),
        (dict(order_weights=torch.zeros(4, 96)), r"order_weights: .* \(2, 96\)"),
        (dict(order_weights=torch.zeros(2, 96, dtype=torch.bfloat16)), "order_weights: torch.bfloat16 .*float32"),
        (dict(order_weights=torch.zeros(2, 192)[:, ::2]), "order_weights: .*contiguous"),
        (dict(order_weights=torch.zeros(2, 96, device="meta")), "order_weights on meta but q on cpu"),
        (dict(order_weights=torch._neg_view(torch.zeros(2, 96))), "order_weights: lazily negated"),
        (dict(order_weights=torch.full((2, 96), torch.nan)), "order_weights: nan"),
        (dict(order_weights=torch.zeros(2, 96), rope_pairs="thirds"), "rope_pairs 'thirds'"),
        (dict(), "order_weights of 0 numbers"),
    ],
)
def test_weights_are_checked(change, says):
    q, k, v, _ = problem(batch=1)
    with pytest.raises(ValueError, match=says):
        pbsattn.attention(q, k, v, method=METHOD, **change)
    with pytest.raises(ValueError, match=says):
        pbsattn.trace(q, k, v, method=METHOD, reference=True, **change)


def test_weights_that_want_a_gradient_are_refused():
    q, k, v, weights = problem(batch=1)
    wanted = weights.clone().requires_grad_()
    for call in (pbsattn.attention, torch.ops.pbsattn.attention, pbsattn.trace):
        with pytest.raises(NotImplementedError, match="no gradient"):
            call(q, k, v, order_weights=wanted)
    with pytest.raises(TypeError, match="order_weights: a list"):
        pbsattn.attention(q, k, v, order_weights=[0.0] * 192)
    with torch.no_grad():
        out = pbsattn.attention(q, k, v, method=METHOD, order_weights=torch.nn.Parameter(weights))
    assert torch.equal(out, pbsattn.attention(q, k, v, method=METHOD, order_weights=weights))
