"""Which layers pbsattn takes, by an allow-list over plain facts, and what it computes them with. Knows nothing of vLLM."""

import dataclasses
import functools
import json
import re

import pbsattn

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
    context_parallel: bool = False  # DCP or PCP
    micro_batches: bool = False  # DBO
    batch_invariant: bool = False
    rank: int = 0  # of tensor parallelism
    ranks: int = 1
    device: str = "cpu"

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
        f"it is {facts.kind}, not vLLM's plain Attention": facts.kind != "Attention",
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
    }
    return next((reason for reason, holds in rules.items() if holds), None)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that is taken."""

    index: int
    facts: Facts
    heads: str  # options of its query heads, by head, as JSON: layers of the same options share plans

    def plan(self, tokens: int, kv_len: int, memory: int | None) -> pbsattn.Plan:
        """The plan of a row; layers, chunks and requests of one shape share it. Raises what pbsattn.plan raises."""
        f = self.facts
        of_layer = self.heads, f.q_heads, f.kv_heads, f.head_dim, f.scale, f.softcap
        return _plan(*of_layer, tokens, kv_len, f.device, memory)


@functools.lru_cache(maxsize=2048)  # chunks of a long prompt, times layers with options of their own
def _plan(
    heads: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    softcap: float,
    tokens: int,
    kv_len: int,
    device: str,
    memory: int | None,
) -> pbsattn.Plan:
    by_head = json.loads(heads)
    return pbsattn.plan(
        q_heads=q_heads,
        kv_heads=kv_heads,
        q_len=tokens,
        kv_len=kv_len,
        head_dim=head_dim,
        device=device,
        workspace_cap=memory,
        scale=scale,
        softcap=softcap,
        **(by_head[0] if all(each == by_head[0] for each in by_head) else {"heads": dict(enumerate(by_head))}),
    )


_PAGE_SLACK = 1024  # tokens: a row's last page is gathered whole


class Refused(ValueError):
    """A layer that can't be taken, and the user asked not to start then."""


def layer_of(facts: Facts, settings: Settings, tokens: int, kv_len: int) -> Layer | str:
    """A layer as it is taken, or why it is left. tokens and kv_len: the most that a row can have.

    Raises Refused where the settings refuse what can't be taken. Layers that the user named none of are left without that.
    """
    index = facts.index
    try:
        settings.check_model(facts.model_layers, facts.q_heads * facts.ranks)
        if settings.layers is not None and index not in settings.layers:
            return "it is not among the layers that the settings name"
        reason = reason_to_leave(facts)
        if reason is None:
            assert index is not None  # else there is a reason
            heads = settings.head_options(index, facts.rank * facts.q_heads, facts.q_heads)
            layer = Layer(index, facts, json.dumps(heads))
            layer.plan(tokens, kv_len, None)  # which refuses what the device lacks
            return layer
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = str(error)
    if settings.unsupported == REFUSE and not facts.draft:
        raise Refused(
            f"pbsattn: layer {facts.name}: {reason}; to leave it to FlashAttention name the others in PBSATTN_LAYERS, "
            "or leave PBSATTN_UNSUPPORTED unset"
        )
    return reason


def most_memory(layer: Layer, tokens: int, kv_len: int, element: int) -> int:
    """Bytes for the greatest row, if no cap bounds them: gathered pages, and the workspace of all heads at once."""
    return gathered_bytes(layer.facts, kv_len + _PAGE_SLACK, element) + layer.plan(tokens, kv_len, None).workspace_size


def gathered_bytes(facts: Facts, tokens: int, element: int) -> int:
    """Bytes of so many tokens' keys and values."""
    return tokens * facts.kv_heads * 2 * facts.head_dim * element
