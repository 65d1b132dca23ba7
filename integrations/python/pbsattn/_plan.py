"""Plans from tensors: which plan a call needs, and how the library reads a tensor."""

import atexit
import os
import typing
from collections.abc import Callable

import torch

from . import _core
from ._settings import HeadChanges, Heads, Value, library_options

METHODS = dict(_core.methods())
"""Name and summary of every method."""

_View = tuple[int, int, int, int, int]  # address, dtype, and the strides of batch, head and token
# What a plan's run and trace take: views of q, k, v and the output, log-sum-exp, workspace and its size, stream.
_Addresses = tuple[_View, _View, _View, _View, int, int, int, int]
_Shape = tuple[int, ...]  # as torch.Size, or with tokens and heads in their places

LAYOUTS = ("bhsd", "bshd")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # pbsattn::DType
_MOST_PLANS = 512  # kept; a chunked prefill makes one for each chunk


def _view(tensor: torch.Tensor, stride: _Shape, layout: str) -> _View:
    """A tensor as the library reads it: address, dtype, and the strides of batch, head and token."""
    if layout == "bhsd":
        return (tensor.data_ptr(), _DTYPES[tensor.dtype], stride[0], stride[1], stride[2])
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], stride[0], stride[2], stride[1])


def _sizes(shape: _Shape, layout: str) -> tuple[int, int, int, int]:
    """Batch, heads, tokens, head_dim."""
    return (shape[0], shape[1], shape[2], shape[3]) if layout == "bhsd" else (shape[0], shape[2], shape[1], shape[3])


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f'layout "{layout}": no such layout; there are "bhsd" (batch, head, token, head_dim) and "bshd"')


def check_tensor(name: str, tensor: object) -> None:
    """Raises what is wrong with one tensor by itself."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: a {type(tensor).__name__}; pass a torch.Tensor")
    if tensor.dim() != 4:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} has {tensor.dim()} dimensions; pass 4: batch, head, token "
            'and head_dim (layout="bhsd"), or batch, token, head and head_dim (layout="bshd")'
        )
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: dtype {tensor.dtype}; pbsattn takes float32, float16 and bfloat16; convert it")


def check_stride(name: str, stride: _Shape) -> None:
    if stride[3] != 1:
        raise ValueError(f"{name}: its last dimension has stride {stride[3]}, not 1; call {name}.contiguous()")


def refuse_negated(**tensors: torch.Tensor | None) -> None:
    """Raises if a tensor's memory isn't what it says. None is no tensor."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_neg():
            raise ValueError(f"{name}: lazily negated, so its memory holds the other sign; pass a tensor of its own")


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """Raises what is wrong with the tensors of a call; the rest is the plan's to check."""
    check_layout(layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.device != q.device:
            raise ValueError(f"{name} on {tensor.device} but q on {q.device}; move them to one device")
    if k.shape != v.shape:
        raise ValueError(f"v: shape {tuple(v.shape)} is not k's {tuple(k.shape)}; keys and values come in pairs")
    batch, _, _, head_dim = _sizes(q.shape, layout)
    k_batch, _, _, k_head_dim = _sizes(k.shape, layout)
    if k_batch != batch or k_head_dim != head_dim:
        raise ValueError(
            f"k: shape {tuple(k.shape)} does not go with q's {tuple(q.shape)} (layout {layout}); "
            "batch and head_dim must be equal"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel() == 0:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} is empty; pass at least one token")


def refuse_gradient(who: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises if somebody waits for a gradient by these tensors: by backward() or in forward mode."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise NotImplementedError(
            f"{who} computes no gradient, and an input requires one; call it under torch.no_grad(), or detach the inputs"
        )
    if _dual_level() >= 0 and any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in (q, k, v)):
        raise NotImplementedError(f"{who} computes no gradient, and an input has a tangent; pass it without one")


def _dual_level() -> int:
    """That of forward-mode differentiation, below 0 outside of it."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1)


def options(method: str = "pbs", **overrides: Value) -> dict[str, float | int | str]:
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
        (batch, q_heads, kv_heads, q_len, kv_len, head_dim),
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
) -> _core.Plan:
    """The plan of a call. `key` decides everything a plan depends on; a new one is checked first."""
    found = _plans.get(key)
    if found is None:
        check_inputs(q, k, v, layout)
        batch, q_heads, q_len, head_dim = _sizes(q.shape, layout)
        _, kv_heads, kv_len, _ = _sizes(k.shape, layout)
        found = _make(options(q_heads), q.device, batch, q_heads, kv_heads, q_len, kv_len, head_dim, torch.get_num_threads())
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
    stats: bool = False,
    trace: bool = False,
) -> typing.Any:
    """Runs a plan on tensors that go with it. Returns Stats or None, with `trace` Stats and Trace."""
    if q.is_neg() or k.is_neg() or v.is_neg():  # as .imag of a conjugate is: memory holds the other sign
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    given = _addresses(q, k, v, out, lse, workspace, layout)
    return plan.trace(*given) if trace else plan.run(*given, stats)


def _addresses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor,
    layout: str,
) -> _Addresses:
    """Tensors as a plan's run and trace take them."""
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
    )


def run_reference(
    options: list[_core.Options], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str
) -> tuple[torch.Tensor, _core.Stats, _core.Trace]:
    """What the definition gives: output, Stats and Trace. q, k, v are on the CPU; options as head_options() makes them."""
    check_inputs(q, k, v, layout)
    if q.device.type != "cpu":
        raise ValueError(f"q on {q.device}: the reference computes on the CPU; move q, k and v there")
    batch, q_heads, q_len, head_dim = _sizes(q.shape, layout)
    _, kv_heads, kv_len, _ = _sizes(k.shape, layout)
    plan = _core.Plan(
        options[0] if len(options) == 1 else options, "reference", 0, 1, (batch, q_heads, kv_heads, q_len, kv_len, head_dim)
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8)
    stats, raw = run(plan, q, k, v, out, None, workspace, layout, trace=True)
    return out, stats, raw


class Plan:
    """A checked configuration, for callers who keep the workspace themselves. Made by `plan`."""

    def __init__(self, core: _core.Plan, device: torch.device, shape: tuple[int, int, int, int, int, int]) -> None:
        self._core = core
        self.device = device
        self._shape = shape

    @property
    def workspace_size(self) -> int:
        """Bytes of workspace that a run needs."""
        return self._core.workspace_size

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
    ) -> _core.Stats | None:
        """Computes attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Skv, D] into out (as q), without allocating.

        workspace: a uint8 tensor of at least workspace_size bytes on the plan's device. lse: a contiguous float32
        tensor [B, Hq, Sq], or None. layout="bshd" reads all four tensors as [B, S, H, D]. On CUDA the work joins the
        current stream. With stats=True it waits for its work and returns Stats.

        Raises TypeError or ValueError for what is not the plan's, MemoryError for too small a workspace and
        NotImplementedError where an input wants a gradient.
        """
        self._check("Plan.run", q, k, v, out, workspace, lse, layout)
        ran: _core.Stats | None = run(self._core, q, k, v, out, lse, workspace, layout, stats)
        return ran

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
    ) -> Callable[[], None]:
        """Returns a function that does what `run` does with these tensors, as often as it is called, checking nothing again.

        It keeps them alive. On CUDA its work joins the stream that is current when it is made. Raises what `run` does.
        """
        self._check("Plan.bind", q, k, v, out, workspace, lse, layout)
        refuse_negated(q=q, k=k, v=v)
        core, given = self._core, _addresses(q, k, v, out, lse, workspace, layout)

        def run_again(_kept: tuple[object, ...] = (q, k, v, out, lse, workspace)) -> None:
            core.run(*given, False)

        return run_again

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
    ) -> None:
        """Raises what is wrong with the tensors of a run."""
        check_inputs(q, k, v, layout)
        check_tensor("out", out)
        check_stride("out", out.stride())
        shape = (*_sizes(q.shape, layout), *_sizes(k.shape, layout)[1:3])
        if shape != self._shape:
            raise ValueError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)}: not the plan's shape (B, Hq, Sq, D, Hkv, Skv) = "
                f"{self._shape}; make a plan for each shape"
            )
        if out.shape != q.shape or out.dtype != q.dtype:
            raise ValueError(f"out: {out.dtype} {tuple(out.shape)}; pass a tensor like q: {q.dtype} {tuple(q.shape)}")
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
        refuse_gradient(who, q, k, v)


def plan(
    *,
    batch: int = 1,
    q_heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    device: str | torch.device = "cpu",
    method: str = "pbs",
    workspace_cap: int | None = None,
    threads: int = 0,
    heads: HeadChanges | None = None,
    **options: Value,
) -> Plan:
    """A plan for one shape, for callers who keep the workspace themselves.

    The queries are the last q_len of kv_len tokens; kv_heads divides q_heads. workspace_cap bounds the workspace in
    bytes: the plan then works head by head. threads (CPU): 0 takes one for each processor. heads, options: those of
    `attention`. Raises ValueError, NotImplementedError (this device doesn't take it) or MemoryError (the cap).
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    core = _make(
        head_options(method, options, heads, q_heads),
        device,
        batch,
        q_heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        threads,
        workspace_cap,
    )
    return Plan(core, device, (batch, q_heads, q_len, head_dim, kv_heads, kv_len))
