"""The op: against the definition, in every layout and dtype, and under PyTorch's compilers and graphs."""

import pytest
import torch

import pbsattn
from conftest import FORCED_BF16, dense, error, f32_tolerance, in_threads, qkv, sdpa_error

OP = torch.ops.pbsattn.attention.default


@pytest.mark.parametrize("method", [dict(method="full"), dict(method="pbs", top_p=1.0)], ids=["full", "pbs-all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [dict(q_len=700), dict(q_len=300, kv_len=1111, batch=2, head_dim=128), dict(q_len=1, kv_len=130, q_heads=6, kv_heads=1)],
    ids=["whole", "chunk", "one-query"],
)
def test_all_blocks_is_dense_attention(device, method, dtype, shape):
    q, k, v = qkv(device, dtype=dtype, **shape)
    out, lse = pbsattn.attention(q, k, v, return_lse=True, **method)
    truth, true_lse = dense(q, k, v)
    assert error(out, truth) <= max(2 * sdpa_error(q, k, v, truth), f32_tolerance(0, 1e-2))
    torch.testing.assert_close(lse.double().cpu(), true_lse, rtol=0, atol=1e-2)


def test_float32_on_the_cpu():
    q, k, v = qkv("cpu", 400, dtype=torch.float32)
    assert error(pbsattn.attention(q, k, v, method="full"), dense(q, k, v)[0]) < f32_tolerance(1e-5, 1e-2)


def test_mixed_dtypes_on_the_cpu():
    q, k, v = qkv("cpu", 300)
    truth, _ = dense(q, k, v)
    out = pbsattn.attention(q.float(), k, v.half(), method="full")
    assert out.dtype == torch.float32 and error(out, truth) < 1e-2


def test_scale(device):
    q, k, v = qkv(device, 300)
    truth, _ = dense(q, k, v, scale=0.3)
    assert error(pbsattn.attention(q, k, v, method="full", scale=0.3), truth) < 1e-2


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "layer",
    [dict(sinks=True), dict(softcap=2.0), dict(window=100), dict(window=300, softcap=2.0, sinks=True), dict(head_dim_v=24)],
    ids=lambda layer: "+".join(layer),
)
def test_what_layers_of_models_carry(layer, layout):
    torch._dynamo.reset()  # the other cases, which it would count as the same
    q, k, v = qkv("cpu", 300, 450, batch=2, dtype=torch.float32)
    layer = dict(layer)
    v = v[..., : layer.pop("head_dim_v", 64)].contiguous()
    sinks = torch.randn(4) if layer.pop("sinks", False) else None
    truth, true_lse = dense(q, k, v, sinks=sinks, **layer)
    given = [t.transpose(1, 2) for t in (q, k, v)] if layout == "bshd" else [q, k, v]
    for call in (pbsattn.attention, torch.compile(pbsattn.attention, backend="eager", fullgraph=True, dynamic=False)):
        out, lse = call(*given, layout=layout, method="pbs", top_p=1.0, sinks=sinks, return_lse=True, **layer)
        assert error(out.transpose(1, 2) if layout == "bshd" else out, truth) < f32_tolerance(1e-5, 1e-2)
        torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=f32_tolerance(1e-4, 1e-1))
    if layout == "bhsd":
        by_definition, _ = pbsattn.trace(q, k, v, method="pbs", top_p=1.0, sinks=sinks, reference=True, **layer)
        assert error(by_definition, truth) < 1e-6


def test_a_plan_takes_what_layers_carry():
    q, k, v = qkv("cpu", 300, dtype=torch.float32)
    v, sinks = v[..., :40].contiguous(), torch.randn(4)
    plan = pbsattn.plan(q_heads=4, kv_heads=2, q_len=300, kv_len=300, head_dim=64, head_dim_v=40, method="full", window=70)
    workspace, out = torch.empty(plan.workspace_size, dtype=torch.uint8), torch.empty(1, 4, 300, 40)
    truth, _ = dense(q, k, v, sinks=sinks, window=70)
    plan.run(q, k, v, out, workspace, sinks=sinks)
    assert error(out, truth) < f32_tolerance(1e-5, 1e-2)
    run = plan.bind(q, k, v, out.zero_(), workspace, sinks=sinks)
    run()
    assert error(out, truth) < f32_tolerance(1e-5, 1e-2)
    with pytest.raises(ValueError, match="not the plan's shape .*40"):
        plan.run(q, k, k, torch.empty_like(q), workspace)
    with pytest.raises(ValueError, match=r"out: .*pass a tensor like q: torch.float32 \(1, 4, 300, 40\)"):
        plan.run(q, k, v, torch.empty_like(q), workspace)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(sinks=torch.zeros(3)), r"sinks: torch.float32 \(3,\); .* \(4,\)"),
        (dict(sinks=torch.zeros(4, dtype=torch.bfloat16)), "sinks: torch.bfloat16 .*float32"),
        (dict(sinks=torch.zeros(1, 4)), r"sinks: torch.float32 \(1, 4\)"),
        (dict(sinks=torch.zeros(8)[::2]), "sinks: .*contiguous"),
        (dict(softcap=-1.0), "softcap -1: not a finite, positive number; 0 stands for none"),
        (dict(softcap=float("nan")), "softcap nan"),
        (dict(softcap=float("inf")), "softcap inf"),
        (dict(method="pbs:softcap=nan"), "softcap nan"),
        (dict(window=0), "window 0: not positive"),
        (dict(window=-5), "window -5: not positive"),
    ],
)
def test_what_layers_carry_is_checked(change, says):
    q, k, v = qkv("cpu", 300)
    with pytest.raises(ValueError, match=says):
        pbsattn.attention(q, k, v, **change)


def test_sinks_that_want_a_gradient_are_refused():
    q, k, v = qkv("cpu", 300)
    with pytest.raises(NotImplementedError, match="no gradient"):
        pbsattn.attention(q, k, v, sinks=torch.zeros(4, requires_grad=True), method="pbs")
    with pytest.raises(TypeError, match="sinks: a list"):
        pbsattn.attention(q, k, v, sinks=[0.0] * 4, method="pbs")


def test_options_choose_blocks(device):
    q, k, v = qkv(device, 3000)
    whole, all_blocks = pbsattn.attention(q, k, v, top_p=1.0, return_stats=True, method="pbs")
    _, some = pbsattn.attention(q, k, v, top_p=0.5, return_stats=True, method="pbs")
    last, more = pbsattn.attention(q, k, v, top_p=0.5, dense_last_rows=2, return_stats=True, method="pbs")
    assert all_blocks.density == 1.0
    assert some.density < more.density < 1.0
    assert all_blocks.seconds > 0
    torch.testing.assert_close(last[:, :, -100:], whole[:, :, -100:], rtol=0, atol=2e-2)


def test_layouts_agree(device):
    q, k, v = qkv(device, 1500, batch=2)
    across = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    out, lse = pbsattn.attention(q, k, v, return_lse=True, method="pbs")
    moved, moved_lse = pbsattn.attention(*across, layout="bshd", return_lse=True, method="pbs")
    assert moved.is_contiguous() and moved.shape == across[0].shape
    assert torch.equal(moved.transpose(1, 2), out)
    assert torch.equal(moved_lse, lse)
    views = [t.transpose(1, 2) for t in across]  # BHSD by strides alone
    assert torch.equal(pbsattn.attention(*views, method="pbs"), out)


def test_slices_of_a_cache(device):
    q, k, v = qkv(device, 200, 900)
    cache = torch.full((2, 1, 2, 1024, 64), float("nan"), dtype=q.dtype, device=q.device)
    cache[0, :, :, :900], cache[1, :, :, :900] = k, v
    assert torch.equal(
        pbsattn.attention(q, cache[0, :, :, :900], cache[1, :, :, :900], method="pbs"),
        pbsattn.attention(q, k, v, method="pbs"),
    )


def test_lazily_negated_tensors(device):
    """Their memory holds the other sign; every way in has to mind that."""
    q, k, v = qkv(device, 300, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    expected = pbsattn.attention(q, k, v, method="pbs")
    plan = pbsattn.plan(q_heads=4, kv_heads=2, q_len=300, kv_len=300, head_dim=64, device=device, method="pbs")
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
    for which in range(3):
        given = [q, k, v]
        given[which] = torch._neg_view(-given[which])
        assert given[which].is_neg()
        out = torch.empty_like(q)
        plan.run(*given, out, workspace)
        for got in (
            pbsattn.attention(*given, method="pbs"),
            pbsattn.attention(*given, return_stats=True, method="pbs")[0],
            pbsattn.trace(*given, method="pbs")[0],
            OP(*given, method="pbs")[0],
            out,
        ):
            assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="out: lazily negated"):
        plan.run(q, k, v, torch._neg_view(out), workspace)
    with pytest.raises(ValueError, match="lse: lazily negated"):
        plan.run(q, k, v, out, workspace, lse=torch._neg_view(torch.empty(1, 4, 300, device=device)))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(device, layout):
    q, k, v = qkv(device, 256, batch=2)
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    for return_lse in (False, True):
        torch.library.opcheck(OP, (q, k, v), dict(layout=layout, return_lse=return_lse, settings="top_p=0.8"))
    layer = dict(sinks=torch.randn(4, device=device), settings="softcap=2.0,window=100")
    values = v[..., :24].contiguous() if device == "cpu" else v  # a GPU's are as wide as these keys
    torch.library.opcheck(OP, (q, k, values), dict(layout=layout, return_lse=True, **layer))


def test_compiles_without_a_graph_break(device):
    def block(q, k, v):
        out, lse = pbsattn.attention(q * 0.5, k, v, top_p=0.8, return_lse=True, method="pbs")
        return out + 1, lse

    inputs = qkv(device, 600)
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for got, expected in zip(compiled(*inputs), block(*inputs)):
        torch.testing.assert_close(got, expected)
    longer = qkv(device, 800)
    torch.testing.assert_close(compiled(*longer)[0], block(*longer)[0])


def test_cuda_graph(device):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    q, k, v = qkv(device, 1500)
    pbsattn.attention(q, k, v, method="pbs")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pbsattn.attention(q, k, v, method="pbs")
    for source in (q, k, v):
        source.copy_(torch.randn_like(source))
    graph.replay()
    assert torch.equal(out, pbsattn.attention(q, k, v, method="pbs"))


def test_side_stream(device):
    if device == "cpu":
        pytest.skip("streams are CUDA's")
    q, k, v = qkv(device, 4000)
    expected = pbsattn.attention(q, k, v, method="pbs")
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = pbsattn.attention(late, k, v, method="pbs")
    stream.synchronize()
    assert torch.equal(out, expected)


def test_many_threads(device):
    inputs = [qkv(device, n) for n in (300, 500, 700, 900)]
    expected = [pbsattn.attention(*each, method="pbs") for each in inputs]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(pbsattn.attention(*inputs[i % 4], method="pbs"), expected[i % 4]):
                wrong.append(i)

    in_threads(work, 8)
    assert wrong == []


def test_plan(device):
    q, k, v = qkv(device, 1500)
    shape = dict(q_heads=4, kv_heads=2, q_len=1500, kv_len=1500, head_dim=64, device=device)
    plan = pbsattn.plan(method="pbs", top_p=0.8, **shape)
    assert plan.options["top_p"] == pytest.approx(0.8) and plan.options["scale"] == pytest.approx(0.125)
    assert plan.path
    out, lse = torch.empty_like(q), torch.empty(1, 4, 1500, device=device)
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
    assert plan.run(q, k, v, out, workspace, lse=lse) is None
    expected, expected_lse = pbsattn.attention(q, k, v, top_p=0.8, return_lse=True, method="pbs")
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert 0 < plan.run(q, k, v, out, workspace, stats=True).density <= 1
    with pytest.raises(ValueError, match="plan's shape"):
        plan.run(q[:, :, :10], k, v, out[:, :, :10], workspace)
    with pytest.raises(MemoryError, match="needs"):
        plan.run(q, k, v, out, workspace[: plan.workspace_size // 2])


@pytest.mark.parametrize("method", pbsattn.METHODS)
def test_every_method_is_the_references(device, method):
    if device == "cpu" and FORCED_BF16:
        pytest.skip("products in bf16 are forced")
    # Multiples of 1/8, so that sums are exact however they are made: no decision hangs on rounding, with margins of 1e-5.
    torch.manual_seed(1)
    q, k, v = (
        (torch.randn(1, heads, tokens, 64) * 12).round().to(device) / 8 for heads, tokens in ((2, 300), (1, 1300), (1, 1300))
    )
    if device == "cuda":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    options = dict(
        top_p=0.5,
        threshold=0.9 if method == "flashprefill" else 0.1,
        dense_last_rows=0,
        sink_blocks=0,
        local_blocks=1,
        vertical=10,
        slash=60,
        min_budget=1,
        fallback="never",
    )
    truth, decided = pbsattn.trace(q.cpu(), k.cpu(), v.cpu(), method=method, reference=True, **options)
    out, trace = pbsattn.trace(q, k, v, method=method, **options)
    assert torch.equal(trace.kept, decided.kept)
    assert trace.stats.density == decided.stats.density
    assert error(out, truth.double()) < (1e-2 if device == "cuda" else 1e-5)
    if method != "full":
        assert trace.stats.density < 0.9
        assert error(out, dense(q, k, v)[0]) > 0.1


@pytest.mark.parametrize("method", pbsattn.METHODS)
def test_every_method_by_name(device, method):
    shape = dict(q_heads=4, kv_heads=2, q_len=9, kv_len=9, head_dim=64, device=device)
    options = pbsattn.plan(method=method, **shape).options
    named = ("permutation", "order_scope", "score", "keep", "correction", "rules", "precision", "fallback")
    assert all(isinstance(options[name], str) for name in named)
    assert pbsattn.plan(method=method, **shape, **options).options == options


def test_bound_tensors(device):
    q, k, v = qkv(device, 600)
    plan = pbsattn.plan(q_heads=4, kv_heads=2, q_len=600, kv_len=600, head_dim=64, device=device, method="pbs")
    out, workspace = torch.empty_like(q), torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
    again = plan.bind(q, k, v, out, workspace)
    for _ in range(2):
        q.copy_(torch.randn_like(q))
        assert again() is None
        assert torch.equal(out, pbsattn.attention(q, k, v, method="pbs"))
    with pytest.raises(ValueError, match="plan's shape"):
        plan.bind(q[:, :, :10], k, v, out[:, :, :10], workspace)
    with pytest.raises(ValueError, match="k: lazily negated"):
        plan.bind(q, torch._neg_view(k), v, out, workspace)


def test_options_and_processor():
    options = pbsattn.options("pbs", top_p=0.5, segment=None)
    assert options["top_p"] == 0.5 and options["segment"] == 256 and options["keep"] == "top_p"
    with pytest.raises(TypeError, match="no such option"):
        pbsattn.options("pbs", topp=0.5)
    cpu = pbsattn.describe_cpu()
    assert cpu.processor and cpu.threads >= 1 and {cpu.f32_path, cpu.bf16_path} <= set(cpu.paths)


def test_who_names_no_method_gets_two_step_where_that_is_faster():
    shape = dict(q_heads=4, kv_heads=2, head_dim=64)
    assert pbsattn.options() == pbsattn.options("auto") == pbsattn.options("two-step", fallback="when_faster")
    short = dict(q_len=600, kv_len=600, **shape)
    assert pbsattn.plan(**short).options["keep"] == "all"
    long = dict(q_len=2500, kv_len=2500, **shape)
    assert pbsattn.plan(**long).options == pbsattn.plan(method="two-step", **long).options
    q, k, v = qkv("cpu", 2500)
    weights = torch.randn(2, 96)
    for order in ({}, dict(permutation="learned", order_scope="kv_head", order_weights=weights)):
        out = pbsattn.attention(q, k, v, **order)
        assert torch.equal(out, pbsattn.attention(q, k, v, method="two-step", **order))
        traced, trace = pbsattn.trace(q, k, v, **order)
        assert torch.equal(out, traced) and trace.kept.float().mean() < 1
    assert torch.equal(pbsattn.attention(q, k, v), OP(q, k, v, method="auto")[0])
    assert torch.equal(pbsattn.attention(q, k, v, method="pbs"), OP(q, k, v)[0]), "graphs of 0.2 name no pbs"


def test_workspace_cap(device):
    shape = dict(q_heads=4, kv_heads=2, q_len=4096, kv_len=4096, head_dim=64, device=device, method="pbs")
    whole = pbsattn.plan(**shape)
    capped = pbsattn.plan(workspace_cap=whole.workspace_size * 3 // 4, **shape)
    assert capped.workspace_size <= whole.workspace_size * 3 // 4
    q, k, v = qkv(device, 4096)
    outs = []
    for plan in (whole, capped):
        workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
        outs.append(torch.empty_like(q))
        plan.run(q, k, v, outs[-1], workspace)
    assert torch.equal(*outs)
    with pytest.raises(MemoryError, match="cap"):
        pbsattn.plan(workspace_cap=1000, **shape)


def test_trace_tells_what_was_decided(device):
    q, k, v = qkv(device, q_len=300, kv_len=1000, q_heads=4, kv_heads=2)
    out, trace = pbsattn.trace(q, k, v, top_p=0.5, method="pbs")
    assert torch.equal(out, pbsattn.attention(q, k, v, top_p=0.5, method="pbs"))
    assert trace.first_row == 5 and trace.kept.shape == (1, 4, 3, 8) and trace.order.shape == (1, 4, 1000)
    assert int(trace.kept.sum()) == trace.stats.visited_blocks
    assert all(sorted(order) == list(range(1000)) for order in trace.order[0].tolist())
    assert torch.equal(trace.order // 256, (torch.arange(1000) // 256).expand(1, 4, 1000)), "keys stay in their segments"
    _, whole = pbsattn.trace(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), method="full", layout="bshd")
    assert torch.equal(whole.kept, torch.ones(3, 8, dtype=torch.bool).tril(5).expand(1, 4, 3, 8))
