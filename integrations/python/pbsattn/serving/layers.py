"""Which layers pbsattn takes, by an allow-list over plain facts, and what it computes them with."""

import dataclasses
import functools
import json
import re
import typing

import torch

import pbsattn

from .._chunks import DenseRows, dense_rows, fewer_dense_rows
from .rows import Row
from .settings import REFUSE, Settings


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the rules ask of a layer, and of the engine that it is in. Heads are those of this process."""

    name: str  # "model.layers.3.self_attn.attn"
    kind: str  # the name of its class
    attn_type: str
    q_heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    scale: float
    dtype: str  # "bfloat16"
    cache_dtype: str  # of the cached keys and values
    window: int | None = None  # tokens that a query sees, itself among them; None is all
    alibi: bool = False
    softcap: float = 0.0  # 0 is none
    sinks: bool = False
    shares_cache: bool = False
    bidirectional_ranges: bool = False  # of images in a prompt
    draft: bool = False  # of a draft model, or maybe
    model_layers: int = 0
    model_kv_heads: int = 0  # of all ranks; this process has some of them, or one that others have too
    rope_pairs: str | None = None  # which columns of its keys RoPE turns together; None is unknown
    other: str | None = None  # why its server's plug-in leaves it, of what these facts don't say
    context_parallel: bool = False  # DCP or PCP
    micro_batches: bool = False  # DBO
    batch_invariant: bool = False
    rank: int = 0  # of tensor parallelism
    ranks: int = 1
    device: str = "cpu"
    page_size: int = 128  # tokens of a page of its KV cache

    @property
    def index(self) -> int | None:
        """The layer's index in the model, where its name has one number."""
        return index_of(self.name)


def index_of(name: str) -> int | None:
    """The index that a layer's name tells, where it has one number."""
    numbers = re.findall(r"(?:^|\.)([0-9]+)(?=\.|$)", name)
    return int(numbers[0]) if len(numbers) == 1 else None


def reason_to_leave(facts: Facts) -> str | None:
    """Why a layer isn't one that pbsattn computes exactly, whatever the device and the settings; None if it is."""
    rules = {
        f"it is {facts.kind}, not the engine's plain Attention": facts.kind != "Attention",
        f"its attention is of type {facts.attn_type}": facts.attn_type != "decoder",
        "it has ALiBi slopes": facts.alibi,
        f"its values' head_dim is {facts.head_dim_v}, its keys' {facts.head_dim}": facts.head_dim_v != facts.head_dim,
        f"its KV cache is {facts.cache_dtype}, the model {facts.dtype}": facts.cache_dtype != facts.dtype,
        "it shares another layer's KV cache": facts.shares_cache,
        "images see themselves in both directions": facts.bidirectional_ranges,
        "it is a draft model's, or can't be told from one": facts.draft,
        "its name has no layer's index": facts.index is None,
        "context is parallel (DCP or PCP)": facts.context_parallel,
        "micro-batches overlap (DBO)": facts.micro_batches,
        "batch invariance is asked for": facts.batch_invariant,
        facts.other or "": facts.other is not None,
    }
    return next((reason for reason, holds in rules.items() if holds), None)


class Shape(typing.NamedTuple):
    """What plans of a layer's rows depend on, besides the rows."""

    heads: str  # as Layer has them
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    device: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that is taken."""

    index: int
    facts: Facts
    heads: str  # options of its query heads, by head, as JSON: layers of the same options share plans
    in_place: bool = False  # its keys and values are read from their pages, not gathered from them first
    weights: torch.Tensor | None = dataclasses.field(default=None, compare=False)  # of a learned order, [Hkv, 3 D / 2]

    @property
    def shape(self) -> Shape:
        """What plans of its rows depend on, besides the rows."""
        f = self.facts
        return Shape(self.heads, f.q_heads, f.kv_heads, f.head_dim, f.scale, f.softcap, f.device)

    @property
    def dense_tokens(self) -> int:
        """The tokens at a prompt's end that see everything, in the head that has most of them."""
        return _dense_rows(self.heads).tokens

    def afters(self, kv_len: int) -> range:
        """Values of `after` that stand for all: a row's plan changes with whole rows of blocks, until none is dense."""
        return range(0, min(self.dense_tokens, kv_len) + 1, _dense_rows(self.heads).block)

    def plan(self, tokens: int, kv_len: int, memory: int | None, after: int = 0) -> pbsattn.Plan:
        """The plan of a row after which so many tokens of its prompt come.

        Layers, chunks and requests of one shape share it. Raises what pbsattn.plan raises.
        """
        return _plan(_before_others(self.shape, after), tokens, kv_len, memory)

    def leaves(self, row: Row) -> bool:
        """Whether a row is FlashAttention's in this layer: it sees more than the layer's window, as no query may, or its
        plan is full attention, as `auto` is where that is faster."""
        window = self.facts.window
        return (window is not None and row.kv_len > window) or _is_dense(
            _before_others(self.shape, row.after), row.tokens, row.kv_len
        )

    def gathered(self, tokens: int) -> int:
        """Bytes of so many tokens' keys and values, where a run needs them gathered."""
        f = self.facts
        return 0 if self.in_place else tokens * f.kv_heads * 2 * f.head_dim * getattr(torch, f.dtype).itemsize

    def run(
        self,
        plan: pbsattn.Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
        **others: typing.Any,
    ) -> typing.Any:
        """Runs a plan of the layer's on tensors [B, S, H, D], with Plan.run's other arguments. Returns what that returns."""
        pairs = {} if self.weights is None else {"order_weights": self.weights, "rope_pairs": self.facts.rope_pairs}
        return plan.run(q, k, v, out, workspace, layout="bshd", **pairs, **others)


def leaves_all(layer: Layer, least: int, tokens: int, kv_len: int) -> bool:
    """Whether a layer leaves every row there can be, of `least` to `tokens` tokens over at most kv_len; asked of some sizes,
    each twice the one before, with the greatest."""

    def sizes(first: int, last: int) -> list[int]:
        doubled = (first << step for step in range((last // first).bit_length()))
        return [*doubled, last]

    longest = min(kv_len, layer.facts.window or kv_len)
    return longest < least or all(
        layer.leaves(Row(0, 0, own, seen, after=kv_len - seen))
        for own in sizes(least, min(tokens, longest))
        for seen in sizes(own, longest)
    )


def _before_others(shape: Shape, after: int) -> Shape:
    """The shape for a row after which so many tokens of its prompt come: of the prompt's `dense_last_rows` it has at
    least those that begin in it."""
    later = _dense_rows(shape.heads).later(after)
    return shape._replace(heads=_fewer_dense_rows(shape.heads, later)) if later else shape


@functools.lru_cache(maxsize=2048)
def _dense_rows(heads: str) -> DenseRows:
    return dense_rows(json.loads(heads))


@functools.lru_cache(maxsize=2048)
def _fewer_dense_rows(heads: str, later: int) -> str:
    return json.dumps(fewer_dense_rows(json.loads(heads), later))


@functools.lru_cache(maxsize=4096)
def _is_dense(shape: Shape, tokens: int, kv_len: int) -> bool:
    heads = set(map(json.dumps, json.loads(shape.heads)))
    each = (_plan(shape._replace(heads=f"[{head}]"), tokens, kv_len, None) for head in heads)
    return all(plan.options["keep"] == "all" for plan in each)


_PAGE_STEP = 16  # tokens, of which a page that is read in place is a multiple
_TILE = 128  # keys that kernels load at once


def in_place(layer: Layer) -> bool:
    """Whether the layer's keys and values are read from their pages, and not gathered from them first.

    A method that moves keys reads each once. Others read them for every row of blocks, in tiles: from pages that tiles don't
    divide that takes half as long again on a GPU, and gathering them is reckoned at a fifth of that.
    """
    page_size = layer.facts.page_size
    moves = all(pbsattn.options(**each)["permutation"] != "none" for each in json.loads(layer.heads))
    return page_size % (_PAGE_STEP if moves else _TILE) == 0 and reads_pages(layer)


_PROBED = 1024  # tokens


def reads_pages(layer: Layer) -> bool:
    """Whether this device takes the layer's keys and values in pages: found by running its method on some, once a kind."""
    f = layer.facts
    return _reads_pages(layer.heads, f.q_heads, f.kv_heads, f.head_dim, f.dtype, f.softcap, f.rope_pairs or "", f.device)


@functools.lru_cache(maxsize=2048)
def _reads_pages(
    heads: str, q_heads: int, kv_heads: int, head_dim: int, dtype: str, softcap: float, pairs: str, device: str
) -> bool:
    # Not dense, however short: it is the method's stages that may not take pages.
    by_head = [{**each, "fallback": "never"} for each in json.loads(heads)]
    facts = Facts("", "", "", q_heads, kv_heads, head_dim, head_dim, 1.0, dtype, dtype, softcap=softcap, device=device)
    weights = torch.zeros(kv_heads, 3 * head_dim // 2, device=device) if pairs else None
    layer = Layer(0, dataclasses.replace(facts, rope_pairs=pairs or None), json.dumps(by_head), weights=weights)
    plan = layer.plan(_PROBED, _PROBED, None)
    q, out = (torch.zeros(1, _PROBED, q_heads, head_dim, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    pages = q.new_zeros(_PROBED // _PAGE_STEP, _PAGE_STEP, kv_heads, 2 * head_dim)
    table = torch.arange(len(pages), dtype=torch.int32, device=device)[None]
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
    k, v = pages.split(head_dim, -1)
    try:
        layer.run(plan, q, k, v, out, workspace, page_table=table)
    except NotImplementedError:
        return False
    return True


@functools.lru_cache(maxsize=2048)  # chunks of a long prompt, times layers with options of their own
def _plan(shape: Shape, tokens: int, kv_len: int, memory: int | None) -> pbsattn.Plan:
    by_head = json.loads(shape.heads)
    return pbsattn.plan(
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        q_len=tokens,
        kv_len=kv_len,
        head_dim=shape.head_dim,
        device=shape.device,
        workspace_cap=memory,
        scale=shape.scale,
        softcap=shape.softcap,
        **(by_head[0] if all(each == by_head[0] for each in by_head) else {"heads": dict(enumerate(by_head))}),
    )


class Refused(ValueError):
    """A layer that can't be taken, and the user asked not to start then."""


def layer_of(facts: Facts, settings: Settings, tokens: int, kv_len: int) -> Layer | str:
    """A layer as it is taken, or why it is left. tokens and kv_len: the most that a row can have.

    Raises Refused where the settings refuse what can't be taken. Layers that the user named none of are left without that.
    """
    index = facts.index
    try:
        settings.check_model(facts.model_layers, facts.q_heads * facts.ranks, facts.model_kv_heads, facts.head_dim)
        if settings.layers is not None and index not in settings.layers:
            return "it is not among the layers that the settings name"
        reason = reason_to_leave(facts)
        if reason is None:
            assert index is not None  # else there is a reason
            heads = settings.head_options(index, facts.rank * facts.q_heads, facts.q_heads)
            layer = Layer(index, facts, json.dumps(heads), weights=weights_of(facts, settings))
            layer.plan(tokens, kv_len, None)  # which refuses what the device lacks
            return dataclasses.replace(layer, in_place=in_place(layer))
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = str(error)
    if settings.unsupported == REFUSE and not facts.draft:
        raise Refused(
            f"pbsattn: layer {facts.name}: {reason}; to leave it to FlashAttention name the others in PBSATTN_LAYERS, "
            "or leave PBSATTN_UNSUPPORTED unset"
        )
    return reason


def weights_of(facts: Facts, settings: Settings) -> torch.Tensor | None:
    """The weights of a layer's KV heads in a learned order. Raises ValueError where its keys' columns are unknown."""
    if settings.learned is None:
        return None
    if facts.rope_pairs is None:
        raise ValueError(
            f"{settings.learned.name}: the engine doesn't tell which columns of keys RoPE turns together, so a learned "
            "order can't be fitted to them; leave PBSATTN_LEARNED unset"
        )
    first = facts.rank * facts.model_kv_heads // facts.ranks
    weights = settings.learned.in_pairs(facts.rope_pairs).weights[facts.index, first : first + facts.kv_heads]
    return weights.contiguous().to(facts.device)


def most_memory(layer: Layer, tokens: int, kv_len: int) -> int:
    """Bytes for the greatest row, if no cap bounds them: gathered pages, and the workspace of all heads at once."""
    page_size = layer.facts.page_size
    workspace = max(layer.plan(tokens, kv_len, None, after).workspace_size for after in layer.afters(kv_len))
    return layer.gathered(-(-kv_len // page_size) * page_size) + workspace
