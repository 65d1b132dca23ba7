"""The op pbsattn::attention: registered with PyTorch, so that compilers and graphs see one node."""

import ast
import json
import threading
import typing

import torch

from . import _core
from ._checks import PAIRS, Carried, check_tensor, refuse_gradient
from ._plan import head_options, plan_of, run
from ._settings import HeadChanges, Value, shown

_library = torch.library.Library("pbsattn", "DEF")
# `settings` are the options that replace the method's own, written as "name=value,name=value": a schema can't be added to
# as easily as the library's options. `heads` are those of query heads, as JSON.
# The method that graphs of 0.2 leave out is "pbs"; `attention` always names one.
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, *, str method='pbs', str settings='', str heads='', str layout='bhsd', "
    "bool return_lse=False, Tensor? sinks=None, Tensor? order_weights=None, str rope_pairs='halves', "
    "Tensor? page_table=None, SymInt? kv_len=None) "
    "-> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def write_settings(options: dict[str, Value]) -> str:
    return ",".join([f"{name}={value!r}" for name, value in options.items() if value is not None])


def _read_settings(settings: str) -> dict[str, Value]:
    options: dict[str, Value] = {}
    for item in settings.split(",") if settings else ():
        name, _, value = item.partition("=")
        if name == "method":
            raise TypeError(f"settings {shown(item)}: method is an argument of its own; pass it as method={shown(value)}")
        try:
            options[name] = float(value) if value in ("nan", "inf", "-inf") else ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise TypeError(f"{shown(name)} {shown(value)}: pass a plain float, int or str") from None
    return options


def write_heads(heads: HeadChanges | str | None) -> str:
    if heads is None or isinstance(heads, str):
        return heads or ""
    try:
        return json.dumps(heads)
    except TypeError as error:
        raise TypeError(f"heads: {error}; pass a dict of dicts of numbers and names") from None


def read_heads(heads: str) -> HeadChanges | None:
    try:
        return json.loads(heads) if heads else None
    except ValueError as error:
        raise ValueError(f"heads: not JSON: {error}") from None


def compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    method: str,
    settings: str,
    heads: str,
    layout: str,
    return_lse: bool,
    carried: Carried,
    stats: bool,
    trace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, typing.Any]:
    """Output, log-sum-exp or None, and what run() gives."""
    index = q.get_device()
    key = (
        method,
        settings,
        heads,
        layout,
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        k.dtype,
        v.dtype,
        index,
        k.get_device(),
        v.get_device(),
        torch.get_num_threads() if index < 0 else 0,
        carried.kv_len,
    )
    plan = plan_of(
        key,
        lambda q_heads: head_options(method, _read_settings(settings), read_heads(heads), q_heads),
        q,
        k,
        v,
        layout,
        carried,
    )
    carried.check(q, k, layout)
    out = _empty_out(q, v)
    lse = _empty_lse(q, layout) if return_lse else None
    if index < 0:
        workspace = _cpu_workspace(plan.workspace_size)
    else:
        workspace = q.new_empty(-(-plan.workspace_size // q.element_size()))  # bytes, in elements of q
    ran = run(plan, q, k, v, out, lse, workspace, layout, carried, stats, trace)
    return out, lse, ran


_kept = threading.local()  # each thread's last CPU workspace: fresh memory costs a page fault every 4 KiB
_MOST_KEPT = 256 << 20


def _cpu_workspace(size: int) -> torch.Tensor:
    kept = getattr(_kept, "workspace", None)
    if kept is not None and kept.numel() >= size:
        return kept
    workspace = torch.empty(size, dtype=torch.uint8)
    if size <= _MOST_KEPT:
        _kept.workspace = workspace
    return workspace


def _empty_out(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if q.shape[3] != v.shape[3]:
        return q.new_empty((*q.shape[:3], v.shape[3]))
    return torch.empty_like(q) if q.is_contiguous() else torch.empty_like(q, memory_format=torch.contiguous_format)


def _empty_lse(q: torch.Tensor, layout: str) -> torch.Tensor:
    heads, tokens = (1, 2) if layout == "bhsd" else (2, 1)
    return q.new_empty((q.shape[0], q.shape[heads], q.shape[tokens]), dtype=torch.float32)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: str = "pbs",
    settings: str = "",
    heads: str = "",
    layout: str = "bhsd",
    return_lse: bool = False,
    sinks: torch.Tensor | None = None,
    order_weights: torch.Tensor | None = None,
    rope_pairs: str = PAIRS[0],
    page_table: torch.Tensor | None = None,
    kv_len: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    carried = Carried(sinks, order_weights, rope_pairs, page_table, kv_len)
    out, lse, _ = compute(q, k, v, method, settings, heads, layout, return_lse, carried, False)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bhsd",
    return_lse: bool = False,
    **_: str | int | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = _empty_lse(q, layout) if return_lse else q.new_empty(0, dtype=torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("pbsattn::attention", _attention_fake, lib=_library)


def _attention_autograd(
    keyset: typing.Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: typing.Any
) -> typing.Any:
    """Refuses what would be cut from the graph in silence; else does what PyTorch does for an op without a gradient."""
    refuse_gradient("pbsattn::attention", q, k, v, given.get("sinks"), given.get("order_weights"))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.pbsattn.attention.default.redispatch(keyset & torch._C._after_autograd_keyset, q, k, v, **given)


_library.impl("attention", _attention_autograd, "Autograd", with_keyset=True)


def _nobody_watches() -> bool:
    """Whether a call is plain eager code, which need not pay 10 microseconds for the way through PyTorch's dispatcher."""
    return not torch.compiler.is_compiling() and _modes() == 0 and _transforms() is None


_PLAIN = {type(None), torch.Tensor, torch.nn.Parameter}  # what else a layer gives, in eager code

# Dispatch modes (fake tensors, tracers) and functorch's transforms; where PyTorch doesn't tell, every call is dispatched.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: str = ...,
    top_p: float | None = ...,
    threshold: float | None = ...,
    dense_last_rows: int | None = ...,
    scale: float | None = ...,
    heads: HeadChanges | str | None = ...,
    layout: str = ...,
    sinks: torch.Tensor | None = ...,
    order_weights: torch.Tensor | None = ...,
    rope_pairs: str = ...,
    page_table: torch.Tensor | None = ...,
    kv_len: int | None = ...,
    return_lse: typing.Literal[False] = ...,
    return_stats: typing.Literal[False] = ...,
    **options: Value,
) -> torch.Tensor: ...


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: str = ...,
    top_p: float | None = ...,
    threshold: float | None = ...,
    dense_last_rows: int | None = ...,
    scale: float | None = ...,
    heads: HeadChanges | str | None = ...,
    layout: str = ...,
    sinks: torch.Tensor | None = ...,
    order_weights: torch.Tensor | None = ...,
    rope_pairs: str = ...,
    page_table: torch.Tensor | None = ...,
    kv_len: int | None = ...,
    return_lse: typing.Literal[True],
    return_stats: typing.Literal[False] = ...,
    **options: Value,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: str = ...,
    top_p: float | None = ...,
    threshold: float | None = ...,
    dense_last_rows: int | None = ...,
    scale: float | None = ...,
    heads: HeadChanges | str | None = ...,
    layout: str = ...,
    sinks: torch.Tensor | None = ...,
    order_weights: torch.Tensor | None = ...,
    rope_pairs: str = ...,
    page_table: torch.Tensor | None = ...,
    kv_len: int | None = ...,
    return_lse: typing.Literal[False] = ...,
    return_stats: typing.Literal[True],
    **options: Value,
) -> tuple[torch.Tensor, _core.Stats]: ...


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: str = ...,
    top_p: float | None = ...,
    threshold: float | None = ...,
    dense_last_rows: int | None = ...,
    scale: float | None = ...,
    heads: HeadChanges | str | None = ...,
    layout: str = ...,
    sinks: torch.Tensor | None = ...,
    order_weights: torch.Tensor | None = ...,
    rope_pairs: str = ...,
    page_table: torch.Tensor | None = ...,
    kv_len: int | None = ...,
    return_lse: typing.Literal[True],
    return_stats: typing.Literal[True],
    **options: Value,
) -> tuple[torch.Tensor, torch.Tensor, _core.Stats]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: str = "auto",
    top_p: float | None = None,
    threshold: float | None = None,
    dense_last_rows: int | None = None,
    scale: float | None = None,
    heads: HeadChanges | str | None = None,
    layout: str = "bhsd",
    sinks: torch.Tensor | None = None,
    order_weights: torch.Tensor | None = None,
    rope_pairs: str = PAIRS[0],
    page_table: torch.Tensor | None = None,
    kv_len: int | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    **options: Value,
) -> typing.Any:
    """Causal attention of the last Sq of Skv tokens, dense or block-sparse.

    q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D]; v: [B, Hkv, Skv, Dv]; Hkv divides Hq (they are never
    repeated), and Sq <= Skv. With layout="bshd": [B, S, H, D]. The last dimension is contiguous, the others may
    have any strides. float32, float16 or bfloat16 on the CPU; float16 or bfloat16 on a Hopper GPU, with D and Dv
    64, 96, 128 or 256, or D 192 and Dv 128.

    method: a name of pbsattn.METHODS, with options of its own if you like, "pbs:top_p=0.95"; "full" is dense, "auto"
    two-step where that is faster. The rest, where not None, replaces the method's own setting:
      top_p            methods that keep by share: keep the blocks whose scores sum to this; 1 keeps all
      threshold        methods that keep by threshold: keep the blocks whose score is at least this; 0 keeps all
      dense_last_rows  this many of the last query blocks attend to everything
      scale            factor on q . k; by default 1 / sqrt(D)
      options          any other field of pbsattn::Options, enumerators as strings: segment=512, order_scope="kv_head"

    heads: options of query heads over those, {"7": {"vertical": 3500, "slash": 100}, "*": {...}}, "*" being every head.
    They may differ in the keep rule and its numbers, and in what is always kept. The same as JSON text spares
    torch.compile a graph break.

    sinks: float32 [Hq], a learned logit of each query head, which enters every query's softmax as one more key without a
    value (GPT-OSS).

    order_weights: float32 [Hkv, 3 D / 2] of permutation="learned", order_scope="kv_head": for each KV head those of the
    lengths of its key's D / 2 pairs, then of its D numbers (docs/learned.md); finite, on q's device. rope_pairs: which
    columns RoPE turns together, "halves" or "neighbours". Other permutations leave both unread.

    page_table: int32 [B, pages], on q's device, for keys and values in a server's cache: token t of a batch entry is at
    place t % N of page page_table[entry, t // N]. k and v are then [P, Hkv, N, D] and [P, Hkv, N, Dv], with layout="bshd"
    [P, N, Hkv, D], of any strides, as slices of one tensor; N is a multiple of 16. kv_len: the tokens, Skv. On a GPU the
    table's entries are not checked: outside 0 .. P - 1 they give results without meaning.

    Returns out [B, Hq, Sq, Dv], of q's dtype and contiguous; with return_lse also the natural log-sum-exp of each
    query's logits, float32 [B, Hq, Sq]; with return_stats also Stats (density, seconds), for which it waits for the work.

    Forward only. Works under torch.compile and, without return_stats, in CUDA graphs.
    Raises TypeError, ValueError, NotImplementedError (this device doesn't take it) or MemoryError.
    """
    plain = type(q) is type(k) is type(v) is torch.Tensor and {type(sinks), type(order_weights), type(page_table)} <= _PLAIN
    if not plain:
        others = (("sinks", sinks), ("order_weights", order_weights), ("page_table", page_table))
        for name, tensor in (("q", q), ("k", k), ("v", v), *others):
            if not isinstance(tensor, torch.Tensor) and (tensor is not None or name in "qkv"):
                check_tensor(name, tensor)
    refuse_gradient("pbsattn.attention", q, k, v, sinks, order_weights)
    if options or not (top_p is threshold is dense_last_rows is scale is None):
        settings = write_settings(
            dict(top_p=top_p, threshold=threshold, dense_last_rows=dense_last_rows, scale=scale, **options)
        )
    else:
        settings = ""
    heads = write_heads(heads)
    carried = Carried(sinks, order_weights, rope_pairs, page_table, kv_len)
    if return_stats:
        out, lse, stats = compute(q, k, v, method, settings, heads, layout, return_lse, carried, True)
        return (out, lse, stats) if return_lse else (out, stats)
    if plain and _nobody_watches():
        out, lse, _ = compute(q, k, v, method, settings, heads, layout, return_lse, carried, False)
        return (out, lse) if return_lse else out
    out, lse = torch.ops.pbsattn.attention.default(
        q,
        k,
        v,
        method=method,
        settings=settings,
        heads=heads,
        layout=layout,
        return_lse=return_lse,
        sinks=sinks,
        order_weights=order_weights,
        rope_pairs=rope_pairs,
        page_table=page_table,
        kv_len=kv_len,
    )
    return (out, lse) if return_lse else out
