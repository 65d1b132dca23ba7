"""The plug-in's cut of batches against vLLM's own classes, without an engine."""

import dataclasses
import importlib
import types

import numpy
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu import input_batch, model_runner
from vllm.v1.worker.gpu.model_states import default

from conftest import logged
from pbsattn.serving.layers import Facts, Layer
from pbsattn.serving.rows import Row, runs_between, take
from pbsattn_vllm import backend, ends, metadata, taking
from pbsattn_vllm.impl import RowsImpl
from pbsattn_vllm.metadata import RowsBuilder, Split, slice_batch


def test_runs_are_batches_of_their_own():
    """As vLLM's second model runner hands them over: decodes first, tensors longer than the batch."""
    tokens, lens = [1, 1, 5, 300, 400], [90, 7, 5, 300, 900]
    starts = torch.tensor([0, *tokens]).cumsum(0).int()
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu_upper_bound=torch.tensor(lens),
        num_reqs=5,
        num_actual_tokens=707,
        max_query_len=400,
        max_seq_len=900,
        block_table_tensor=torch.arange(8 * 60).view(8, 60).int(),
        slot_mapping=torch.arange(1024),
        positions=torch.arange(1024),
        is_prefilling=torch.tensor([False, False, True, True, True]),
    )
    rows = take(starts.tolist(), lens, common.is_prefilling.tolist(), 256)
    assert [row.index for row in rows] == [3, 4]
    (run,) = runs_between(starts.tolist(), rows)
    part = slice_batch(common, run)
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len, part.max_seq_len) == (3, 7, 5, 90)
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist() == [0, 1, 2, 7]
    assert part.seq_lens.tolist() == part.seq_lens_cpu_upper_bound.tolist() == lens[:3]
    assert part.slot_mapping.tolist() == part.positions.tolist() == list(range(7))
    last = slice_batch(common, run._replace(first=4, last=5, begin=307, end=707))
    assert last.query_start_loc.tolist() == [0, 400] and last.slot_mapping.tolist() == list(range(307, 707))
    assert torch.equal(last.block_table_tensor, common.block_table_tensor[4:5]) and last.is_prefilling.tolist() == [True]
    assert common.num_reqs == 5 and common.query_start_loc.tolist() == starts.tolist()


@pytest.fixture
def told(monkeypatch):
    """What the plug-in logs, as in a process of its own with PBSATTN_MIN_TOKENS=2."""
    log = []
    taking.settings.cache_clear()
    monkeypatch.setenv("PBSATTN_MIN_TOKENS", "2")
    monkeypatch.setattr(taking.teller, "warned", set())
    with logged(log):
        yield log
    taking.settings.cache_clear()


def facts_of(name, window=None):
    return Facts(name, "Attention", "decoder", 1, 1, 64, 64, 1.0, "float32", "float32", window)


NEVER_LEAVES = types.SimpleNamespace(leaves=lambda row: False, dense_tokens=128)


def rows_of_builder(tokens, drafts, lens=None, kinds=None, tells=True):
    """The rows that a builder takes of a batch of prefills, if its runner tells that they are."""
    builder = object.__new__(backend.Builder)
    builder._kinds = kinds or [NEVER_LEAVES]
    builder._least = taking.least_tokens(types.SimpleNamespace(num_speculative_tokens=drafts))
    starts = torch.tensor([0, *tokens]).cumsum(0).int()
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(tokens),
        seq_lens_cpu_upper_bound=torch.tensor(lens or tokens),
        num_reqs=len(tokens),
        num_actual_tokens=sum(tokens),
        max_query_len=max(tokens),
        max_seq_len=max(tokens),
        block_table_tensor=torch.zeros(len(tokens), 1).int(),
        slot_mapping=torch.arange(sum(tokens)),
        is_prefilling=torch.tensor([True] * len(tokens)) if tells else None,
    )
    return [row.index for row in builder._rows(common)]


def test_no_row_is_taken_in_a_batch_that_may_replay_a_graph(told):
    """Of prefills as long as a step of decodes with their drafts."""
    assert rows_of_builder([4, 4], drafts=3) == [] and rows_of_builder([4, 5], drafts=3) == [1]
    assert rows_of_builder([2, 2], drafts=0) == [0, 1]


def test_a_batch_with_lists_of_another_is_told_once(told):
    for _ in range(2):
        assert rows_of_builder([4, 4], drafts=0, lens=[4]) == []
    assert len(told) == 1 and "2 rows has 1 lengths" in told[0]


class Builds:
    """Stands where FlashAttention's builder does, and gives back what it was asked to build."""

    aot_sliding_window: tuple[int, int] | None = (-1, -1)

    def build(self, common_prefix_len, common, fast_build=False):
        return types.SimpleNamespace(common=common)

    def build_for_cudagraph_capture(self, common):
        return self.build(common_prefix_len=0, common_attn_metadata=common)


class SplitBuilder(RowsBuilder, Builds):
    """The plug-in's builder without one of vLLM's."""


def by_second_runner(
    tokens, computed, prompts, mode, padded_tokens, padded_rows=None, for_capture=False, kinds=None, known=None
):
    """What the plug-in's builder makes of a batch as vLLM's model runner V2 hands it over, by that runner's own functions.

    By request: tokens of this step, tokens computed before, tokens of its prompt. known: those that the runner tells of.
    """
    ends.watch()
    builder = object.__new__(SplitBuilder)
    builder._kinds, builder._all, builder._least = kinds or [NEVER_LEAVES], True, 256
    names = model_runner.sort_batch_req_ids({str(i): each for i, each in enumerate(tokens)}, 1)
    order = numpy.array([int(name) for name in names])
    scheduled, before, of_prompt = (numpy.array(each, dtype=numpy.int32)[order] for each in (tokens, computed, prompts))
    rows, padded_rows = len(order), padded_rows or len(order)
    starts = numpy.full(padded_rows + 1, scheduled.sum(), dtype=numpy.int32)
    starts[: rows + 1] = numpy.concatenate([[0], scheduled.cumsum()])
    lens = numpy.zeros(padded_rows, dtype=numpy.int32)
    lens[:rows] = before + scheduled
    batch = types.SimpleNamespace(
        num_reqs=rows,
        num_reqs_after_padding=padded_rows,
        num_tokens=int(scheduled.sum()),
        num_tokens_after_padding=padded_tokens,
        num_scheduled_tokens=scheduled,
        query_start_loc_np=starts,
        query_start_loc=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(lens),
        seq_lens_cpu_upper_bound=torch.from_numpy(lens),
        dcp_local_seq_lens=None,
        positions=torch.arange(padded_tokens),
        is_prefilling_np=before < of_prompt,
        prefill_len_np=of_prompt if known is None else numpy.array(known, dtype=numpy.int32)[order],
        prompt_lens=None,
    )
    state = types.SimpleNamespace(supports_mm_inputs=False, encoder_cache=None, max_model_len=4096)
    group = types.SimpleNamespace(get_metadata_builder=lambda _: builder, layer_names=["layer"])
    metadata = default.DefaultModelState.prepare_attn(
        state,
        batch,
        mode,
        (torch.arange(padded_rows * 64).view(padded_rows, 64).int(),),
        torch.arange(padded_tokens)[None],
        [[group]],
        types.SimpleNamespace(kv_cache_groups=[None]),
        for_capture,
    )
    return metadata["layer"]


def test_batches_of_the_second_model_runner():
    """Prefills stand last, by length; a decode whose prompt is over isn't taken, however many tokens it has."""
    tokens, computed, prompts = [400, 1, 300, 5, 1, 280], [512, 90, 0, 0, 300, 60], [2000, 90, 300, 5, 299, 50]
    metadata = by_second_runner(tokens, computed, prompts, CUDAGraphMode.PIECEWISE, 1024)
    split = metadata.pbsattn
    assert [(row.index, row.begin, row.end, row.kv_len) for row in split.rows] == [(4, 287, 587, 300), (5, 587, 987, 912)]
    ((run, part),) = split.runs
    assert (run.first, run.last, run.begin, run.end) == (0, 4, 0, 287)
    assert part.common.query_start_loc_cpu.tolist() == [0, 1, 2, 7, 287] and part.common.max_seq_len == 340
    assert part.common.slot_mapping.tolist() == list(range(287))
    assert split.dense(5).common.seq_lens.tolist() == [912]
    assert torch.equal(split.block_table, metadata.common.block_table_tensor)


def test_graphs_of_the_second_model_runner(told):
    """Whose lists of a batch of decodes are padded, but for who prefills; and what it captures prefills nothing."""
    padded = by_second_runner([1, 1, 1], [9, 8, 7], [9, 8, 7], CUDAGraphMode.FULL, 4, padded_rows=4)
    assert not hasattr(padded, "pbsattn") and padded.common.num_reqs == 4
    captured = by_second_runner([512], [0], [0], CUDAGraphMode.PIECEWISE, 512, for_capture=True)
    assert not hasattr(captured, "pbsattn") and told == []


STEP = [400, 1, 300, 200], [512, 90, 0, 60], [2000, 90, 300, 1000], CUDAGraphMode.PIECEWISE, 1024


def test_what_comes_after_chunks_of_the_second_model_runner(told):
    """Which sorts a batch: of a chunk before others, a decode, a whole prompt and a chunk that is too short to be taken."""
    rows = by_second_runner(*STEP).pbsattn.rows
    assert [(row.tokens, row.kv_len, row.after) for row in rows] == [(300, 300, 0), (400, 912, 1088)] and told == []


@pytest.mark.parametrize("known", [[2000, 91, 300, 1000], [500, 90, 300, 1000]])
def test_a_batch_that_the_runner_tells_other_things_of(told, known):
    """By lists of another batch, every chunk may end its prompt."""
    for _ in range(2):
        assert [row.after for row in by_second_runner(*STEP, known=known).pbsattn.rows] == [0, 0]
    assert len(told) == 1 and "tells of another batch's prompts" in told[0]


def test_fewer_lens_than_rows_tell_nothing(monkeypatch):
    monkeypatch.setattr(ends, "_lens", [2000, 90, 300])
    assert ends.tokens_after([0, 1, 2, 3, 4], [9] * 4, [True] * 4) is None


def test_a_runner_that_does_not_tell_what_ends_a_prompt_is_told_once(told):
    """Where there are rows that see everything at a prompt's end, and not where no head has them."""
    kinds = [
        Layer(0, facts_of("model.layers.0.attn"), f'[{{"method": "pbs", "dense_last_rows": {rows}}}]') for rows in (0, 1)
    ]
    assert rows_of_builder([300, 400], drafts=0, kinds=kinds[:1]) == [0, 1] and told == []
    for _ in range(2):
        assert rows_of_builder([300, 400], drafts=0, kinds=kinds) == [0, 1]
    assert len(told) == 1 and "which chunk ends its prompt" in told[0]


def test_a_runner_that_does_not_tell_what_prefills_is_told_once(told):
    """As vLLM's second, of models with cross attention; not of decodes, which are too short anyway."""
    assert rows_of_builder([1, 1], drafts=0, tells=False) == [] and told == []
    for _ in range(2):
        assert rows_of_builder([4, 4], drafts=0, tells=False) == []
    assert len(told) == 1 and "which rows prefill" in told[0]


def test_what_comes_after_chunks_is_known_while_a_batch_is_made():
    """Once it is, or failed to be, the next batch's may come from elsewhere, as a draft model's."""
    fails = types.SimpleNamespace(leaves=lambda row: row.tokens / row.after)
    with pytest.raises(ZeroDivisionError):
        by_second_runner([300], [0], [300], CUDAGraphMode.PIECEWISE, 512, kinds=[fails])
    assert ends._lens is None and ends.tokens_after([0, 300], [300], [True]) is None
    made = default.DefaultModelState.prepare_attn
    ends.watch()
    assert default.DefaultModelState.prepare_attn is made


def test_what_is_watched_is_vllms():
    """The batch of the second model runner, which stands for itself above, has what is read, and both have their methods."""
    assert {"prefill_len_np", "is_prefilling_np"} <= {field.name for field in dataclasses.fields(input_batch.InputBatch)}
    for module, (kind, method, _) in ends._METHODS.items():
        assert method in vars(getattr(importlib.import_module(module), kind))


def test_rows_that_are_dense_are_not_taken():
    """FlashAttention reads their pages in place; in one run with the rows beside them."""
    given = [300, 400], [0, 512], [300, 2000], CUDAGraphMode.PIECEWISE, 1024
    short = types.SimpleNamespace(leaves=lambda row: row.kv_len < 500)
    every = types.SimpleNamespace(leaves=lambda row: True)
    for kinds, taken in (([short], [1]), ([every], []), ([short, NEVER_LEAVES], [0, 1]), ([every, short], [1])):
        metadata = by_second_runner(*given, kinds=kinds)
        assert [row.index for row in getattr(metadata, "pbsattn", Split([], [], None, None)).rows] == taken


def test_each_layer_leaves_its_own_rows(monkeypatch):
    """Of one group, as of a model with windows in some layers where vLLM's hybrid KV cache manager is off."""
    facts = facts_of("model.layers.0.attn")
    kinds = [facts, dataclasses.replace(facts, window=500), dataclasses.replace(facts, head_dim=128), facts]
    layers = {
        str(i): types.SimpleNamespace(impl=types.SimpleNamespace(pbsattn_layer=Layer(i, of, HEADS)))
        for i, of in enumerate(kinds)
    }
    builder = object.__new__(SplitBuilder)
    builder.layer_names, builder.device = list(layers), None
    builder.vllm_config = types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context=layers), num_speculative_tokens=0
    )
    for name in ("reserve", "tell"):
        monkeypatch.setattr(metadata, name, lambda *_: None)
    builder.choose_rows()
    assert sorted(kind.index for kind in builder._kinds) == [1, 2, 3]
    made = by_second_runner([300, 400], [0, 512], [300, 2000], CUDAGraphMode.PIECEWISE, 1024, kinds=builder._kinds)
    assert [row.kv_len for row in made.pbsattn.rows] == [300, 912]
    made = by_second_runner([300, 400], [0, 512], [300, 2000], CUDAGraphMode.PIECEWISE, 1024, kinds=builder._kinds[1:2])
    assert [row.kv_len for row in made.pbsattn.rows] == [300]
    impl, forward = forward_of(1, kv_len=501, window=500)
    forward()
    assert impl.computed == [("row 0", 8)]


@pytest.mark.parametrize("other", [None, 200])
def test_nothing_is_taken_if_no_group_takes_anything(told, monkeypatch, other):
    """A group of sliding layers alone says nothing of the model, as of GPT-OSS, whose windows have 128 tokens."""
    monkeypatch.setenv("PBSATTN_MIN_TOKENS", "256")
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    taken = [Layer(i, facts_of(f"model.layers.{i}.attn", window), HEADS) for i, window in enumerate((128, other))]
    of_name = {each.facts.name: types.SimpleNamespace(impl=types.SimpleNamespace(pbsattn_layer=each)) for each in taken}
    of_name["model.layers.2.mamba"] = types.SimpleNamespace()
    config = types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context=of_name),
        num_speculative_tokens=0,
        model_config=types.SimpleNamespace(max_model_len=4096),
        scheduler_config=types.SimpleNamespace(
            max_num_batched_tokens=1024, max_num_scheduled_tokens=None, long_prefill_token_threshold=0
        ),
    )
    for each in taken:
        taking.tell({each.facts.name: each}, config)
    assert sum("takes 1 of 1 layers" in line for line in told) == 2
    assert sum("takes nothing" in line for line in told) == (other is not None)


class Dense:
    """Stands where FlashAttention's layer does, and notes what it computes."""

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *_):
        self.computed = [*getattr(self, "computed", []), (metadata, len(query))]
        return output


class Rows(RowsImpl, Dense):
    """The plug-in's layer without one of vLLM's."""


HEADS = '[{"method": "pbs"}]'


def forward_of(index, kv_len=8, window=None):
    """A layer, and a function that computes a batch of one row of 8 tokens by it."""
    name = f"model.layers.{index}.attn"
    impl = object.__new__(Rows)
    impl.pbsattn_layer = Layer(index, facts_of(name, window), HEADS)
    split = Split([Row(0, 0, 8, kv_len)], [], torch.zeros(1, 1), lambda row: f"row {row}")
    tensors = [torch.zeros(8, 1, 64) for _ in range(4)]
    metadata = types.SimpleNamespace(pbsattn=split)
    return impl, lambda: impl.forward(types.SimpleNamespace(impl=impl), *tensors[:3], None, metadata, tensors[3])


def test_a_row_without_memory_is_told_once_a_layer(told, monkeypatch):
    sizes = iter(range(100))

    def out_of_memory(*_):
        raise torch.OutOfMemoryError(f"{next(sizes)} bytes")

    monkeypatch.setattr(RowsImpl, "_row", staticmethod(out_of_memory))
    for index in range(2):
        impl, forward = forward_of(index)
        for _ in range(2):
            forward()
        assert impl.computed == [("row 0", 8)] * 2
    assert [line.split(":")[1] for line in told] == [" model.layers.0.attn", " model.layers.1.attn"]


def test_other_errors_of_a_row_are_not_hidden(told, monkeypatch):
    def wrong(*_):
        raise ValueError("a tensor of another shape")

    monkeypatch.setattr(RowsImpl, "_row", staticmethod(wrong))
    impl, forward = forward_of(0)
    with pytest.raises(ValueError, match="another shape"):
        forward()
    assert not hasattr(impl, "computed")
