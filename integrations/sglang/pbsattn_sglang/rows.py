"""Attention of a layer: the rows that pbsattn takes by pbsattn, the others by SGLang's FlashAttention, each row once."""

import dataclasses
import itertools
import re
import typing

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from pbsattn.serving.layers import Layer
from pbsattn.serving.memory import Buffer
from pbsattn.serving.rows import Row, Run, runs_between, take
from pbsattn.serving.settings import Settings
from pbsattn.serving.stats import Recorder

from .taking import teller


class Step:
    """A batch: what of it may be pbsattn's, and SGLang's metadata of its parts."""

    def __init__(self, starts: list[int], rows: list[Row], metadata: typing.Any) -> None:
        self.tokens = starts[-1]
        self.metadata = metadata
        self._starts, self._rows = starts, rows
        self._runs: dict[tuple[Row, ...], list[Run]] = {}
        self._parts: dict[Run, typing.Any] = {}

    def rows_of(self, layer: Layer) -> tuple[Row, ...]:
        """The rows that a layer's options and window leave to pbsattn."""
        return tuple(row for row in self._rows if not layer.leaves(row))

    def runs(self, rows: tuple[Row, ...]) -> list[Run]:
        """The others, as runs of such as stand together."""
        if rows not in self._runs:
            self._runs[rows] = runs_between(self._starts, rows)
        return self._runs[rows]

    def part(self, run: Run) -> typing.Any:
        """SGLang's metadata of rows that stand one after another, as if they were the batch."""
        if run not in self._parts:
            m, rows, bounds = self.metadata, slice(run.first, run.last), slice(run.first, run.last + 1)
            starts = self._starts[bounds]
            self._parts[run] = dataclasses.replace(
                m,
                cache_seqlens_int32=m.cache_seqlens_int32[rows],
                cu_seqlens_q=m.cu_seqlens_q[bounds] - run.begin,
                cu_seqlens_k=m.cu_seqlens_k[bounds] - m.cu_seqlens_k[run.first],
                max_seq_len_q=max(end - begin for begin, end in itertools.pairwise(starts)),
                page_table=m.page_table[rows],
                swa_page_table=None if m.swa_page_table is None else m.swa_page_table[rows],
                local_attn_metadata=None,  # of layers that are left
            )
        return self._parts[run]


class RowsBackend:
    """A mixin before SGLang's FlashAttentionBackend."""

    forward_metadata: typing.Any  # SGLang's, these four
    token_to_kv_pool: typing.Any
    page_size: int
    device: typing.Any

    def __init__(
        self, runner: typing.Any, layers: dict[typing.Any, Layer], buffer: Buffer, recorder: Recorder, settings: Settings
    ) -> None:
        super().__init__(runner)  # type: ignore[call-arg]
        self.pbsattn_layers = layers  # by SGLang's
        self._buffer, self._recorder, self._settings = buffer, recorder, settings
        self._step: Step | None = None

    def init_forward_metadata(self, forward_batch: typing.Any) -> None:
        """SGLang's metadata of a batch, and what of it is pbsattn's."""
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        self._step = self._cut(forward_batch)

    def _cut(self, batch: typing.Any) -> Step | None:
        tokens, before = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
        if (
            batch.forward_mode not in (ForwardMode.EXTEND, ForwardMode.MIXED)
            or tokens is None
            or before is None
            or batch.attn_cp_metadata is not None
            or batch.encoder_lens is not None
            or max(tokens, default=0) < self._settings.min_tokens
        ):
            return None
        starts = [0, *itertools.accumulate(tokens)]
        try:
            lens = [own + prefix for own, prefix in zip(tokens, before, strict=True)]
            if len(lens) != batch.batch_size:
                raise ValueError(f"a batch of {batch.batch_size} rows has {len(lens)} lengths")
            # A decode in a mixed batch is a row of one token, too short to be taken.
            rows = take(starts, lens, [True] * len(lens), self._settings.min_tokens)
        except ValueError as error:
            teller.warn_once("lists", f"{error}. Such batches go to FlashAttention")
            return None
        return Step(starts, rows, self.forward_metadata) if rows else None

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: typing.Any,
        forward_batch: typing.Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **others: typing.Any,
    ) -> torch.Tensor:
        """Attention of q [T, Hq D] over cached keys and values, those of k and v [T, Hkv, D] among them: [T, Hq D].

        save_kv_cache: k and v are to be written into the cache; else they are there already, or in another form.
        """
        taken, step = self.pbsattn_layers.get(layer), self._step
        rows: tuple[Row, ...] = ()
        if (
            taken is not None
            and step is not None
            and step.metadata is self.forward_metadata  # else a batch in a CUDA graph, which can't hold pbsattn's rows
            and k is not None
            and v is not None
            and q.dtype == k.dtype == v.dtype
            and q.shape[0] == k.shape[0] >= step.tokens
            and all(each is None for each in others.values())
        ):
            rows = step.rows_of(taken)
        if not rows:
            return super().forward_extend(  # type: ignore[misc]
                q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **others
            )
        assert taken is not None and step is not None and k is not None and v is not None  # else there is no row
        if save_kv_cache:
            where = KVWriteLoc(forward_batch.out_cache_loc, self.forward_metadata.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
        out = forward_batch._attn_output  # of a batch whose other parts are CUDA graphs
        if out is None:
            out = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        out[step.tokens :].zero_()  # padding
        for run in step.runs(rows):
            self._dense(step, run, q, layer, forward_batch, out, sinks)
        of_heads = q.reshape(q.shape[0], layer.tp_q_head_num, layer.head_dim)
        new = (k, v) if save_kv_cache else None
        for row in rows:
            try:
                self._row(taken, row, of_heads, new, layer, out.view(of_heads.shape), sinks)
            # FlashAttention writes the whole row, whatever of it was written before.
            except (MemoryError, torch.OutOfMemoryError) as error:
                told = f"{taken.facts.name}: a row of {row.tokens} tokens over {row.kv_len} goes to FlashAttention: {error}"
                kind = f"{taken.facts.name}: {re.sub('[0-9]+', 'N', str(error))}"
                teller.warn_once(kind, f"{told}. Others will without a word")
                run = Run(row.index, row.index + 1, row.begin, row.end)
                self._dense(step, run, q, layer, forward_batch, out, sinks)
        return out.view(q.shape[0], -1)

    def _dense(
        self,
        step: Step,
        run: Run,
        q: torch.Tensor,
        layer: typing.Any,
        forward_batch: typing.Any,
        out: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        kept = self.forward_metadata, forward_batch._attn_output
        part = out[run.begin : run.end]
        self.forward_metadata, forward_batch._attn_output = step.part(run), part
        try:
            made = super().forward_extend(  # type: ignore[misc]
                q[run.begin : run.end], None, None, layer, forward_batch, False, sinks=sinks
            )
        finally:
            self.forward_metadata, forward_batch._attn_output = kept
        if made.data_ptr() != part.data_ptr():  # kernels of FlashAttention that take no output
            part.copy_(made.view(part.shape))

    def _row(
        self,
        taken: Layer,
        row: Row,
        q: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        layer: typing.Any,
        out: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Computes a row of q and out [T, Hq, D]. new: keys and values [T, Hkv, D] of the batch, as the cache has them."""
        whole = new is not None and not row.has_context
        count = 0 if whole else -(-row.kv_len // self.page_size)
        gathered = taken.gathered(count * self.page_size)
        plan = self._buffer.plan_beside(gathered, taken, row)
        space, workspace = self._buffer.take(gathered, plan.workspace_size, q.device)
        table = None
        if new is not None and whole:  # the projections are all keys and values there are
            k, v = (each[None, row.begin : row.end] for each in new)
        else:
            shape = (-1, self.page_size, taken.facts.kv_heads, taken.facts.head_dim)
            k, v = (each.view(shape) for each in self.token_to_kv_pool.get_kv_buffer(layer.layer_id))
            table = self.forward_metadata.page_table[row.index : row.index + 1, :count]
            if not taken.in_place:
                copies = space.view(k.dtype).view(2, count, *k.shape[1:])
                for copy, pages in zip(copies, (k, v)):
                    torch.index_select(pages, 0, table[0], out=copy)
                k, v = (copy.flatten(0, 1)[None, : row.kv_len] for copy in copies)
                table = None
        stats = taken.run(
            plan,
            q[None, row.begin : row.end],
            k,
            v,
            out[None, row.begin : row.end],
            workspace,
            stats=self._settings.stats,
            sinks=None if sinks is None else sinks.detach().float(),
            page_table=table,
        )
        if stats is not None:
            self._recorder.add(row, taken.index, stats)
