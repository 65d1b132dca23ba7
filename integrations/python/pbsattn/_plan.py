"""Plans from tensors: which plan a call needs, and how the library reads a tensor."""

import atexit
import os
import typing
from collections.abc import Callable

import torch

from . import _core
from ._cache import SegmentCache
from ._checks import DTYPES, PAIRS, Carried, Shape, check_inputs, check_stride, check_tensor, refuse_gradient, refuse_negated
from ._settings import HeadChanges, Heads, Value, library_options

METHODS = dict(_core.methods())
"""Name and summary of every method."""

_View = tuple[int, int, int, int, int]  # address, dtype, and the strides of batch, head and token
# What a plan's run and trace take: views of q, k, v and the output, log-sum-exp, workspace and its size, stream, the address
# and number of sinks and of the order's weights, with their pairs, and what Carried.pages tells.
_Addresses = tuple[
    _View, _View, _View, _View, int, int, int, int, tuple[int, int], tuple[int, int, int], tuple[int, int, int, int]
]

_MOST_PLANS = 512  # kept; a chunked prefill makes one for each chunk


def _view(tensor: torch.Tensor, stride: Shape, layout: str) -> _View:
    """A tensor as the library reads it: address, dtype, and the strides of batch, head and token."""
    if layout == "bhsd":
        return (tensor.data_ptr(), DTYPES[tensor.dtype], stride[0], stride[1], stride[2])
    return (tensor.data_ptr(), DTYPES[tensor.dtype], stride[0], stride[2], stride[1])


def options(method: str = "auto", **overrides: Value) -> dict[str, float | int | str]:
    """Every option of a method with its value: {"top_p": 0.9, "keep": "top_p", ...}; enumerators are names.

    overrides: options of `attention` that replace the method's own, where not None. Raises TypeError or ValueError.
    """
    return _core.options(method, **overrides).as_dict()


def describe_cpu() -> _core.DeviceInfo:
    """The processor: its name, threads, the code paths that it can run, and the ones chosen for float32 and bfloat16."""
    return _core.describe_cpu()


def head_options(method: str, options: dict[str, Value], heads: HeadChanges | None, q_heads: int) -> list[_core.Options]:
    """The library's options of a call: one for all heads, or one of each."""
    if not heads:
        return [_core.options(method, **options)]
    return library_options(Heads(heads).over([{"method": method, **options}], q_heads))


def _make(
    options: list[_core.Options],
    device: torch.device,
    batch: int,
    q_heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    head_dim_v: int,
    threads: int,
    workspace_cap: int | None = None,
) -> _core.Plan:
    if device.type == "cuda" and not _core.has_cuda:
        raise NotImplementedError("device cuda: this build of pbsattn has no CUDA backend; install it where nvcc is")
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"device {device}: pbsattn computes on cpu and cuda; move the tensors")
    index = 0
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return _core.Plan(
        options[0] if len(options) == 1 else options,
        device.type,
        index,
        threads,
        (batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim_v),
        workspace_cap,
    )


_plans: dict[tuple[typing.Any, ...], _core.Plan] = {}
os.register_at_fork(after_in_child=_plans.clear)
atexit.register(_plans.clear)


def plan_of(
    key: tuple[typing.Any, ...],
    options: Callable[[int], list[_core.Options]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    carried: Carried,
) -> _core.Plan:
    """The plan of a call. `key` decides everything a plan depends on; a new one is checked first."""
    found = _plans.get(key)
    if found is None:
        check_inputs(q, k, v, layout, carried.page_table is not None)
        carried.check(q, k, layout)
        sizes = carried.sizes(q, v, layout)
        found = _make(options(sizes[1]), q.device, *sizes, torch.get_num_threads())
        while len(_plans) >= _MOST_PLANS:
            _plans.pop(next(iter(_plans)), None)
        _plans[key] = found
    return found


def _current_stream(index: int) -> int:
    """The current CUDA stream of a device, as an address."""
    return torch.cuda.current_stream(index).cuda_stream


# PyTorch's own compiler calls this to launch its kernels: a tenth of the cost of building a Stream object.
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


def run(
    plan: _core.Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor,
    layout: str,
    carried: Carried,
    stats: bool = False,
    trace: bool = False,
) -> typing.Any:
    """Runs a plan on tensors that go with it. Returns Stats or None, with `trace` Stats and Trace."""
    if q.is_neg() or k.is_neg() or v.is_neg():  # as .imag of a conjugate is: memory holds the other sign
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    given = _addresses(q, k, v, out, lse, workspace, layout, carried)
    return plan.trace(*given) if trace else plan.run(*given, stats)


def _addresses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor,
    layout: str,
    carried: Carried,
) -> _Addresses:
    """Tensors as a plan's run and trace take them."""
    sinks, weights, pairs, *_ = carried
    q_stride, k_stride, v_stride = q.stride(), k.stride(), v.stride()
    if q_stride[3] != 1 or k_stride[3] != 1 or v_stride[3] != 1:
        for name, stride in (("q", q_stride), ("k", k_stride), ("v", v_stride)):
            check_stride(name, stride)
    index = q.get_device()
    return (
        _view(q, q_stride, layout),
        _view(k, k_stride, layout),
        _view(v, v_stride, layout),
        _view(out, out.stride(), layout),
        0 if lse is None else lse.data_ptr(),
        workspace.data_ptr(),
        workspace.nbytes,
        current_stream(index) if index >= 0 else 0,
        (0, 0) if sinks is None else (sinks.data_ptr(), sinks.numel()),
        (0, 0, 0) if weights is None else (weights.data_ptr(), weights.numel(), PAIRS.index(pairs)),
        carried.pages(k, layout),
    )


def run_reference(
    options: list[_core.Options], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, carried: Carried
) -> tuple[torch.Tensor, _core.Stats, _core.Trace]:
    """What the definition gives: output, Stats and Trace. q, k, v are on the CPU; options as head_options() makes them."""
    check_inputs(q, k, v, layout, carried.page_table is not None)
    if q.device.type != "cpu":
        raise ValueError(f"q on {q.device}: the reference computes on the CPU; move q, k and v there")
    sizes = carried.sizes(q, v, layout)
    plan = _core.Plan(options[0] if len(options) == 1 else options, "reference", 0, 1, sizes)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8)
    stats, raw = run(plan, q, k, v, out, None, workspace, layout, carried, trace=True)
    return out, stats, raw


class Plan:
    """A checked configuration, for callers who keep the workspace themselves. Made by `plan`."""

    def __init__(self, core: _core.Plan, device: torch.device, shape: tuple[int, ...]) -> None:
        self._core = core
        self.device = device
        self._shape = shape

    @property
    def workspace_size(self) -> int:
        """Bytes of workspace that a run needs."""
        return self._core.workspace_size

    def cache_size(self, tokens: int) -> int:
        """Bytes of a SegmentCache for this plan and those of other lengths up to so many tokens; 0 if it uses none."""
        return self._core.cache_size(tokens)

    @property
    def path(self) -> str:
        """The code path chosen, for example "avx2_f32" or "sm90"."""
        return self._core.path

    @property
    def options(self) -> dict[str, float | int | str]:
        """Every option with its value, the scale resolved."""
        return self._core.options.as_dict()

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
        *,
        lse: torch.Tensor | None = None,
        layout: str = "bhsd",
        stats: bool = False,
        sinks: torch.Tensor | None = None,
        order_weights: torch.Tensor | None = None,
        rope_pairs: str = PAIRS[0],
        page_table: torch.Tensor | None = None,
        cache: SegmentCache | None = None,
        cache_valid: int = 0,
    ) -> _core.Stats | None:
        """Computes attention of q [B, Hq, Sq, D] over k [B, Hkv, Skv, D] and v [B, Hkv, Skv, Dv] into out [B, Hq, Sq, Dv],
        of q's dtype, without allocating.

        workspace: a uint8 tensor of at least workspace_size bytes on the plan's device. lse: a contiguous float32
        tensor [B, Hq, Sq], or None. sinks, order_weights, rope_pairs, page_table: as in `attention`; kv_len is the
        plan's. cache: what earlier chunks of the sequence left, and takes what this one makes; the first cache_valid
        tokens are as they were when it saw them. layout="bshd" reads all four tensors as [B, S, H, D]. On CUDA the work
        joins the current stream. With stats=True it waits for its work and returns Stats.

        Raises TypeError or ValueError for what is not the plan's, MemoryError for too small a workspace and
        NotImplementedError where an input wants a gradient.
        """
        carried = self._carried(sinks, order_weights, rope_pairs, page_table)
        self._check("Plan.run", q, k, v, out, workspace, lse, layout, carried)
        if cache is None and cache_valid == 0:
            ran: _core.Stats | None = run(self._core, q, k, v, out, lse, workspace, layout, carried, stats)
            return ran
        refuse_negated(q=q, k=k, v=v)
        given = _addresses(q, k, v, out, lse, workspace, layout, carried)
        return self._core.run(*given, stats, None if cache is None else cache._core, cache_valid)

    def bind(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
        *,
        lse: torch.Tensor | None = None,
        layout: str = "bhsd",
        sinks: torch.Tensor | None = None,
        order_weights: torch.Tensor | None = None,
        rope_pairs: str = PAIRS[0],
        page_table: torch.Tensor | None = None,
    ) -> Callable[[], None]:
        """Returns a function that does what `run` does with these tensors, as often as it is called, checking nothing again.

        It keeps them alive. On CUDA its work joins the stream that is current when it is made. Raises what `run` does.
        """
        carried = self._carried(sinks, order_weights, rope_pairs, page_table)
        self._check("Plan.bind", q, k, v, out, workspace, lse, layout, carried)
        refuse_negated(q=q, k=k, v=v)
        core, given = self._core, _addresses(q, k, v, out, lse, workspace, layout, carried)

        def run_again(_kept: tuple[object, ...] = (q, k, v, out, lse, workspace, carried)) -> None:
            core.run(*given, False)

        return run_again

    def _carried(
        self,
        sinks: torch.Tensor | None,
        order_weights: torch.Tensor | None,
        rope_pairs: str,
        page_table: torch.Tensor | None,
    ) -> Carried:
        kv_len = None if page_table is None else self._shape[5]
        return Carried(sinks, order_weights, rope_pairs, page_table, kv_len)

    def _check(
        self,
        who: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
        lse: torch.Tensor | None,
        layout: str,
        carried: Carried,
    ) -> None:
        """Raises what is wrong with the tensors of a run."""
        check_inputs(q, k, v, layout, carried.page_table is not None)
        carried.check(q, k, layout)
        check_tensor("out", out)
        check_stride("out", out.stride())
        batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim_v = carried.sizes(q, v, layout)
        shape = (batch, q_heads, q_len, head_dim, kv_heads, kv_len, head_dim_v)
        if shape != self._shape:
            raise ValueError(
                f"q {tuple(q.shape)}, v {tuple(v.shape)}: not the plan's shape (B, Hq, Sq, D, Hkv, Skv, Dv) = "
                f"{self._shape}; make a plan for each shape"
            )
        wanted = (*q.shape[:3], v.shape[3])
        if out.shape != wanted or out.dtype != q.dtype:
            raise ValueError(f"out: {out.dtype} {tuple(out.shape)}; pass a tensor like q: {q.dtype} {wanted}")
        rows = (shape[0], shape[1], shape[2])
        if lse is not None and not (lse.dtype == torch.float32 and lse.shape == rows and lse.is_contiguous()):
            raise ValueError(f"lse: {lse.dtype} {tuple(lse.shape)}; pass a contiguous float32 tensor of shape {rows}")
        if workspace.dtype != torch.uint8 or not workspace.is_contiguous():
            raise ValueError(
                f"workspace: {workspace.dtype}, not contiguous uint8; "
                f"torch.empty({self.workspace_size}, dtype=torch.uint8, device=...) will do"
            )
        for name, tensor in (("q", q), ("out", out), ("workspace", workspace), ("lse", lse)):
            if tensor is not None and tensor.device != self.device:
                raise ValueError(f"{name} on {tensor.device}: the plan is for {self.device}; move it")
        refuse_negated(out=out, lse=lse)
        refuse_gradient(who, q, k, v, carried.sinks, carried.order_weights)


def plan(
    *,
    batch: int = 1,
    q_heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    head_dim_v: int = 0,
    device: str | torch.device = "cpu",
    method: str = "auto",
    workspace_cap: int | None = None,
    threads: int = 0,
    heads: HeadChanges | None = None,
    **options: Value,
) -> Plan:
    """A plan for one shape, for callers who keep the workspace themselves.

    The queries are the last q_len of kv_len tokens; kv_heads divides q_heads; head_dim_v is the values'
    width, head_dim unless set. workspace_cap bounds the workspace in
    bytes: the plan then works head by head. threads (CPU): 0 takes one for each processor. heads, options: those of
    `attention`. Raises ValueError, NotImplementedError (this device doesn't take it) or MemoryError (the cap).
    """
    device = torch.device(device)
    core = _make(
        head_options(method, options, heads, q_heads),
        device,
        batch,
        q_heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        head_dim_v,
        threads,
        workspace_cap,
    )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Plan(core, device, (batch, q_heads, q_len, head_dim, kv_heads, kv_len, head_dim_v or head_dim))
