"""Attention of a layer: the rows that pbsattn takes by pbsattn, the others by vLLM's FlashAttention, each row once."""

import re
import typing

import torch

from pbsattn.serving.layers import Layer
from pbsattn.serving.rows import Row

from .memory import buffer
from .metadata import Split
from .taking import left_or_taken, recorder, reserve, settings, teller


class RowsImpl:
    """A mixin before vLLM's FlashAttentionImpl."""

    def __init__(self, *given: typing.Any, **named: typing.Any) -> None:
        from vllm.config import get_current_vllm_config

        super().__init__(*given, **named)
        self.pbsattn_config = get_current_vllm_config()

    def forward(
        self,
        layer: typing.Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: typing.Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes attention of query [T, Hq, D] into output, and returns it.

        kv_cache [pages, Hkv, tokens of a page, 2 D] holds keys and values, those of key and value [T, Hkv, D] among them.
        """
        forward = super().forward  # type: ignore[misc]
        taken = left_or_taken(layer)
        if attn_metadata is None and isinstance(taken, Layer):  # memory is being profiled
            reserve(taken, self.pbsattn_config, query.device)
        split: Split | None = getattr(attn_metadata, "pbsattn", None)
        if split is None or isinstance(taken, str) or output_scale is not None or output_block_scale is not None:
            return forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)

        def dense(begin: int, end: int, metadata: typing.Any) -> None:
            part = (None if each is None else each[begin:end] for each in (query, key, value))
            forward(layer, *part, kv_cache, metadata, output[begin:end])

        for run, metadata in split.runs:
            dense(run.begin, run.end, metadata)
        # In float32, from the model's weights as they are now.
        sinks = self.sinks.detach().float() if taken.facts.sinks else None  # type: ignore[attr-defined]
        for row in split.rows:
            if taken.leaves(row):  # though not all layers do
                dense(row.begin, row.end, split.dense(row.index))
                continue
            try:
                self._row(taken, row, query, key, value, kv_cache, split.block_table, output, sinks)
            # FlashAttention writes the whole row, whatever of it was written before.
            except (MemoryError, torch.OutOfMemoryError) as error:
                told = f"{taken.facts.name}: a row of {row.tokens} tokens over {row.kv_len} goes to FlashAttention: {error}"
                kind = f"{taken.facts.name}: {re.sub('[0-9]+', 'N', str(error))}"
                teller.warn_once(kind, f"{told}. Others will without a word")
                dense(row.begin, row.end, split.dense(row.index))
        return output

    @staticmethod
    def _row(
        taken: Layer,
        row: Row,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        q, out = query[row.begin : row.end], output[row.begin : row.end]
        pages = kv_cache.transpose(1, 2)  # [pages, tokens, Hkv, 2 D]
        count = 0 if not row.has_context and key is not None else -(-row.kv_len // pages.shape[1])
        gathered = taken.gathered(count * pages.shape[1])
        plan = buffer.plan_beside(gathered, taken, row)
        space, workspace = buffer.take(gathered, plan.workspace_size, query.device)
        table = None
        if count == 0:  # the projections are all keys and values there are
            k, v = key[None, row.begin : row.end], value[None, row.begin : row.end]  # type: ignore[index]
        elif taken.in_place:
            k, v = pages.split(taken.facts.head_dim, dim=-1)
            table = block_table[row.index : row.index + 1, :count]
        else:
            wide = pages.view(torch.int64)  # PyTorch copies an element at a time
            both = space.view(torch.int64).view(count, *wide.shape[1:])
            torch.index_select(wide, 0, block_table[row.index, :count], out=both)
            k, v = both.view(kv_cache.dtype).flatten(0, 1)[None, : row.kv_len].split(taken.facts.head_dim, dim=-1)
        stats = taken.run(plan, q[None], k, v, out[None], workspace, stats=settings().stats, sinks=sinks, page_table=table)
        if stats is not None:
            recorder.add(row, taken.index, stats)
