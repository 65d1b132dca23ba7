"""Bad input is a Python exception of the right type that names the value, the rule and the way out."""

import multiprocessing
import subprocess
import sys

import pytest
import torch

import pbsattn
from conftest import has_gpu, qkv

Q, K, V = qkv("cpu", 40)


@pytest.mark.parametrize(
    "exception, message, call",
    [
        (TypeError, "a list; pass a torch.Tensor", lambda: pbsattn.attention([1.0], K, V)),
        (ValueError, "3 dimensions; pass 4", lambda: pbsattn.attention(Q[0], K, V)),
        (TypeError, "torch.float64; pbsattn takes float32", lambda: pbsattn.attention(Q.double(), K, V)),
        (TypeError, "torch.int32; pbsattn takes", lambda: pbsattn.attention(Q.int(), K.int(), V.int())),
        (
            ValueError,
            "k on meta but q on cpu",
            lambda: pbsattn._op.compute(Q, K.to("meta"), V, "pbs", "", "", "bhsd", False, pbsattn._checks.Carried(), False),
        ),
        (ValueError, "kv_heads 2: must divide q_heads 3", lambda: pbsattn.attention(Q[:, :3], K, V)),
        (ValueError, "not k's", lambda: pbsattn.attention(Q, K, V[:, :, :30])),
        (ValueError, "batch and head_dim must be equal", lambda: pbsattn.attention(Q[..., :32], K, V)),
        (ValueError, "stride 2, not 1; call q.contiguous", lambda: pbsattn.attention(Q[..., ::2], K[..., ::2], V[..., ::2])),
        (ValueError, "is empty", lambda: pbsattn.attention(Q[:, :, :0], K, V)),
        (ValueError, "is empty", lambda: pbsattn.attention(Q[:0], K[:0], V[:0])),
        (ValueError, "q_len 40: outside 1 .. kv_len 20", lambda: pbsattn.attention(Q, K[:, :, :20], V[:, :, :20])),
        (NotImplementedError, "no gradient", lambda: pbsattn.attention(Q.clone().requires_grad_(), K, V)),
        (ValueError, 'no such method; did you mean "pbs"', lambda: pbsattn.attention(Q, K, V, method="pbz")),
        (ValueError, "top_p 1.5: outside", lambda: pbsattn.attention(Q, K, V, top_p=1.5)),
        (ValueError, "top_p nan: outside", lambda: pbsattn.attention(Q, K, V, top_p=float("nan"))),
        (TypeError, "top_p [0.9]: not a float", lambda: pbsattn.attention(Q, K, V, top_p=[0.9])),
        (TypeError, "no such option; there are", lambda: pbsattn.attention(Q, K, V, topp=0.9)),
        (ValueError, "segment 100: no multiple", lambda: pbsattn.attention(Q, K, V, segment=100)),
        (ValueError, "dense_last_rows -1", lambda: pbsattn.attention(Q, K, V, dense_last_rows=-1)),
        (
            ValueError,
            "rules 'other': no such value; there are \"reference_code\"",
            lambda: pbsattn.attention(Q, K, V, rules="other"),
        ),
        (ValueError, 'layout "sbhd": no such layout', lambda: pbsattn.attention(Q, K, V, layout="sbhd")),
        (
            TypeError,
            "no such option; there are",
            lambda: pbsattn.plan(q_heads=1, kv_heads=1, q_len=8, kv_len=8, head_dim=64, topp=0.5),
        ),
        (
            TypeError,
            "block 2.5: not an int",
            lambda: pbsattn.plan(q_heads=1, kv_heads=1, q_len=8, kv_len=8, head_dim=64, block=2.5),
        ),
        (
            NotImplementedError,
            "computes on",
            lambda: pbsattn.plan(q_heads=1, kv_heads=1, q_len=8, kv_len=8, head_dim=64, device="meta"),
        ),
        (ValueError, "threads -1", lambda: pbsattn.plan(q_heads=1, kv_heads=1, q_len=8, kv_len=8, head_dim=64, threads=-1)),
    ],
)
def test_message(exception, message, call):
    with pytest.raises(exception) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "message, call",
    [
        (
            "settings method='pbs': method is an argument of its own; pass it as method='pbs'",
            lambda: torch.ops.pbsattn.attention(Q, K, V, settings="method='pbs'"),
        ),
        ("top_p ?(: pass a plain float", lambda: torch.ops.pbsattn.attention(Q, K, V, settings="top_p=\n(")),
        ('method 5: no text; pass, say, "pbs"', lambda: pbsattn.attention(Q, K, V, method=5)),
        ("method None: no text", lambda: pbsattn.options(None)),
        (r"method '\ud800': no text", lambda: pbsattn.attention(Q, K, V, method="\ud800")),
        ("head 0: method 5: no text", lambda: pbsattn.attention(Q, K, V, heads={"0": {"method": 5}})),
    ],
)
def test_a_method_that_is_none_is_named_in_one_line(message, call):
    with pytest.raises(TypeError) as raised:
        call()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_gradient_is_refused_under_compile_too():
    compiled = torch.compile(lambda q, k, v: pbsattn.attention(q, k, v), backend="eager")
    with pytest.raises(NotImplementedError, match="no gradient"):
        compiled(Q.clone().requires_grad_(), K, V)
    with torch.no_grad():
        compiled(Q.clone().requires_grad_(), K, V)


OP = torch.ops.pbsattn.attention.default


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gradient_through_the_op_is_refused(compiled):
    call = (lambda f: torch.compile(f, backend="aot_eager")) if compiled else (lambda f: f)
    weight = torch.ones(1, dtype=V.dtype, requires_grad=True)
    with pytest.raises(NotImplementedError, match="computes no gradient"):
        call(lambda q: OP(q, K, V)[0])(Q.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="computes no gradient"):
        call(lambda v: OP(Q, K, v * weight)[0])(V)
    with torch.no_grad():
        assert torch.equal(call(lambda v: OP(Q, K, v * weight)[0])(V), pbsattn.attention(Q, K, V))


def test_gradients_of_other_kinds_are_refused():
    forward_ad = torch.autograd.forward_ad
    plan = pbsattn.plan(q_heads=4, kv_heads=2, q_len=40, kv_len=40, head_dim=64)
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8)
    calls = [
        lambda q: OP(q, K, V)[0],
        lambda q: pbsattn.attention(q, K, V),
        lambda q: pbsattn.attention(q, K, V, return_stats=True)[0],
        lambda q: pbsattn.trace(q, K, V)[0],
        lambda q: plan.run(q, K, V, torch.empty_like(Q), workspace),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="no gradient"):
            call(Q.clone().requires_grad_())
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has a tangent"):
            call(forward_ad.make_dual(Q, torch.ones_like(Q)))
        call(Q)
    for call in calls[:2]:
        with pytest.raises(NotImplementedError, match="no gradient"):
            torch.func.grad(lambda q, call=call: call(q).float().sum())(Q)


def test_gpu_limits(device):
    if device == "cpu":
        pytest.skip("the GPU's limits")
    q, k, v = qkv(device, 40, head_dim=96)
    with pytest.raises(NotImplementedError, match="head_dim 96"):
        pbsattn.attention(q, k, v)
    q, k, v = qkv(device, 40, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="f32"):
        pbsattn.attention(q, k, v)
    q, k, v = qkv(device, 40)
    with pytest.raises(ValueError, match="k on cpu but q on cuda"):
        pbsattn.attention(q, k.cpu(), v)


def _run_in_child(plan, *tensors):
    try:
        plan.run(*tensors)
    except RuntimeError:
        sys.exit(3)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use(device):
    """A child of fork computes on the CPU; on a GPU it gets an error. Neither hangs."""
    q, k, v = qkv(device, 600)
    plan = pbsattn.plan(q_heads=4, kv_heads=2, q_len=600, kv_len=600, head_dim=64, device=device, threads=2)
    expected, from_child = torch.empty_like(q), torch.zeros_like(q)
    if device == "cpu":
        from_child.share_memory_()
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
    plan.run(q, k, v, expected, workspace)
    child = multiprocessing.get_context("fork").Process(
        target=_run_in_child, args=(plan, q, k, v, from_child, workspace), daemon=True
    )
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
        pytest.fail("the child hangs")
    if device == "cuda":
        assert child.exitcode == 3
    else:
        assert child.exitcode == 0
        assert torch.equal(from_child, expected)


def test_tables():
    ran = subprocess.run([sys.executable, "-m", "pbsattn"], capture_output=True, text=True, check=True)
    for method in pbsattn.METHODS:
        assert method in ran.stdout
    assert pbsattn._core.describe_cpu().processor in ran.stdout
    assert ("sm90" in ran.stdout) == has_gpu()
