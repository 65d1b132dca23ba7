"""What a call decided, for inspection: the order of its keys and the blocks that it kept."""

import dataclasses

import torch

from . import _core
from ._checks import PAIRS, Carried, check_inputs, refuse_gradient
from ._op import compute, read_heads, write_heads, write_settings
from ._plan import head_options, run_reference
from ._settings import HeadChanges, Value


@dataclasses.dataclass
class Trace:
    """What one call decided. Row r holds the queries of token block first_row + r; tensors are on the CPU."""

    first_row: int
    order: torch.Tensor  # int32 [B, Hq, Skv]: the token whose key stands at each slot of the permuted sequence
    kept: torch.Tensor  # bool [B, Hq, rows, key blocks]: what each row attends to; blocks of the row's own segment mean
    # tokens in their original order, any other slots of the permuted sequence
    stats: _core.Stats


def trace(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: str = "auto",
    heads: HeadChanges | str | None = None,
    layout: str = "bhsd",
    reference: bool = False,
    sinks: torch.Tensor | None = None,
    order_weights: torch.Tensor | None = None,
    rope_pairs: str = PAIRS[0],
    page_table: torch.Tensor | None = None,
    kv_len: int | None = None,
    **options: Value,
) -> tuple[torch.Tensor, Trace]:
    """The output of `attention` and what was decided on the way, for which it waits. Arguments: those of `attention`.

    reference: computed by the definition, naive loops in double precision on one thread, which takes tensors on the CPU
    alone. Raises what `attention` does.
    """
    carried = Carried(sinks, order_weights, rope_pairs, page_table, kv_len)
    check_inputs(q, k, v, layout, page_table is not None)
    carried.check(q, k, layout)
    refuse_gradient("pbsattn.trace", q, k, v, sinks, order_weights)
    batch, q_heads = q.shape[0], q.shape[1 if layout == "bhsd" else 2]
    heads = write_heads(heads)
    if reference:
        out, stats, raw = run_reference(head_options(method, options, read_heads(heads), q_heads), q, k, v, layout, carried)
    else:
        out, _, (stats, raw) = compute(
            q, k, v, method, write_settings(options), heads, layout, False, carried, True, trace=True
        )
    return out, _trace_of(stats, raw, batch, q_heads)


def _trace_of(stats: _core.Stats, raw: _core.Trace, batch: int, heads: int) -> Trace:
    """The library's trace as tensors."""
    starts, blocks = torch.from_numpy(raw.row_start), torch.from_numpy(raw.block).long()
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    kept = torch.zeros(batch * heads * raw.rows, raw.blocks, dtype=torch.bool)
    kept[rows, blocks] = True
    order = torch.from_numpy(raw.order).clone().view(batch, heads, -1)
    return Trace(raw.first_row, order, kept.view(batch, heads, raw.rows, raw.blocks), stats)
