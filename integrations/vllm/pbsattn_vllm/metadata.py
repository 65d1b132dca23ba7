"""Cuts a batch into the rows that pbsattn computes and the runs of others, once a step for a group of layers."""

import dataclasses
import functools
import typing
from collections.abc import Callable

import torch

from pbsattn.serving.rows import Row, Run, runs_between, take

from . import ends
from .taking import least_tokens, left_or_taken, reserve, tell, teller


@dataclasses.dataclass(frozen=True)
class Split:
    """What `build` adds to vLLM's metadata of a batch with rows for pbsattn, as its attribute `pbsattn`."""

    rows: list[Row]
    runs: list[tuple[Run, typing.Any]]  # with vLLM's metadata of each
    block_table: torch.Tensor  # [rows of the batch, pages] int32
    dense: Callable[[int], typing.Any]  # vLLM's metadata of one row, for a layer that can't compute it


def slice_batch(c: typing.Any, run: Run) -> typing.Any:
    """vLLM's common metadata of some rows that stand one after another, as if they were the batch."""
    rows, tokens = slice(run.first, run.last), slice(run.begin, run.end)

    def cut(tensor: typing.Any, where: slice = rows) -> typing.Any:
        return None if tensor is None else tensor[where]

    starts = c.query_start_loc_cpu[run.first : run.last + 1] - run.begin
    lens = c.seq_lens_cpu_upper_bound[rows]
    return c.replace(
        query_start_loc=c.query_start_loc[run.first : run.last + 1] - run.begin,
        query_start_loc_cpu=starts,
        seq_lens=c.seq_lens[rows],
        seq_lens_cpu_upper_bound=lens,
        num_reqs=run.last - run.first,
        num_actual_tokens=run.end - run.begin,
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(lens.max()),
        block_table_tensor=c.block_table_tensor[rows],
        slot_mapping=c.slot_mapping[tokens],
        is_prefilling=cut(c.is_prefilling),
        positions=cut(c.positions, tokens),
        _seq_lens_cpu=cut(c._seq_lens_cpu),
        _num_computed_tokens_cpu=cut(c._num_computed_tokens_cpu),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class RowsBuilder:
    """A mixin before vLLM's FlashAttentionMetadataBuilder."""

    supports_update_block_table = False  # runs hold slices of the block table
    aot_sliding_window: tuple[int, int] | None  # vLLM's; None before the first build
    layer_names: list[str]  # these three too
    vllm_config: typing.Any
    device: typing.Any

    def __init__(
        self, kv_cache_spec: typing.Any, layer_names: list[str], vllm_config: typing.Any, device: typing.Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        ends.watch()
        self.choose_rows()

    def choose_rows(self) -> None:
        """Finds which layers are taken, by the settings as they are now, reserves memory for them, and tells."""
        config = self.vllm_config
        of_name = config.compilation_config.static_forward_context
        layers = {name: left_or_taken(of_name[name]) for name in self.layer_names}
        taken = [layer for layer in layers.values() if not isinstance(layer, str)]
        for layer in taken:
            reserve(layer, config, self.device)
        self._kinds = list(
            {(layer.shape, layer.facts.window): layer for layer in taken}.values()
        )  # that leave the same rows
        self._all = len(taken) == len(layers)
        self._least = least_tokens(config)
        tell(layers, config)

    def left_alone(self) -> None:
        """Takes no row from now on."""
        self._kinds = []

    def build(self, common_prefix_len: int, common_attn_metadata: typing.Any, fast_build: bool = False) -> typing.Any:
        c, build = common_attn_metadata, super().build  # type: ignore[misc]
        rows = self._rows(c)
        if not rows:
            return build(common_prefix_len, c, fast_build)
        # With full CUDA graphs vLLM's schedules, which fast_build leaves out, are all in one buffer: the batch's own is the
        # only one there may be, and only layers that are left read it. The first build finds the window that all later
        # schedules are made for, unless it is a fast one.
        metadata = build(0, c, fast_build or (self._all and self.aot_sliding_window is not None))
        starts = c.query_start_loc_cpu.tolist()[: c.num_reqs + 1]
        runs = [(run, build(0, slice_batch(c, run), True)) for run in runs_between(starts, rows)]

        @functools.cache
        def dense(index: int) -> typing.Any:
            return build(0, slice_batch(c, Run(index, index + 1, starts[index], starts[index + 1])), True)

        metadata.pbsattn = Split(rows, runs, c.block_table_tensor, dense)
        return metadata

    def _rows(self, c: typing.Any) -> list[Row]:
        if (
            not self._kinds
            or c.max_query_len < self._least
            or c.causal is not True
            or c.seq_lens_cpu_upper_bound is None
            or c.mm_req_doc_ranges
            or c.rswa_prefix_lens is not None
        ):
            return []
        if c.is_prefilling is None:
            teller.warn_once("prefills", "this model runner doesn't tell which rows prefill: FlashAttention computes them")
            return []
        lists = (
            c.query_start_loc_cpu.tolist()[: c.num_reqs + 1],
            c.seq_lens_cpu_upper_bound.tolist()[: c.num_reqs],
            c.is_prefilling.tolist()[: c.num_reqs],
        )
        after = ends.tokens_after(*lists)
        try:
            rows = take(*lists, self._least, after)
        except ValueError as error:
            teller.warn_once("lists", f"{error}. Such batches go to FlashAttention")
            return []
        rows = [row for row in rows if not all(kind.leaves(row) for kind in self._kinds)]
        if rows and after is None and any(kind.dense_tokens for kind in self._kinds):
            why = "tells of another batch's prompts" if ends.known() else "doesn't tell which chunk ends its prompt"
            teller.warn_once(why, f"this model runner {why}: the last rows of every such chunk see everything")
        return rows
