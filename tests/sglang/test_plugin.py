"""The plug-in's pieces against SGLang's own classes, without its scheduler."""

import dataclasses
import importlib.metadata
import json
import random
import sys
import types

import pytest
import sglang
import torch
from sglang.srt import server_args
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

import pbsattn
import pbsattn_sglang
import torch_flash
from conftest import DIM, HEADS, KV_HEADS, LONGEST, REQUESTS, attribute, runner_of
from pbsattn.serving.layers import Refused
from pbsattn_sglang import backend, taking
from pbsattn_sglang.rows import RowsBackend


def test_sglang_finds_it():
    found = [each for each in importlib.metadata.entry_points(group="sglang.srt.plugins") if each.name == "pbsattn"]
    assert [each.load() for each in found] == [pbsattn_sglang.register]


def test_registering(settings, log, model):
    for _ in range(2):
        pbsattn_sglang.register()
    given = f"--model-path {model} --device cpu --prefill-attention-backend pbs --decode-attention-backend torch_native"
    assert server_args.prepare_server_args(given.split()).prefill_attention_backend == "pbs"
    assert server_args.ATTENTION_BACKEND_CHOICES.count("pbs") == 1
    made = ATTENTION_BACKENDS["pbs"](runner_of())
    assert isinstance(made, backend.Backend) and isinstance(made, FlashAttentionBackend)
    assert len(log) == 1 and "takes 2 of 2 layers (0 .. 1)" in log[0]


@pytest.mark.parametrize(
    ("variable", "version", "told"),
    [
        ("pbz", "0.5.17", "PBSATTN_METHOD: .*no such method"),
        ("pbs", "0.5.18", "SGLang 0.5.18: not tested with pbsattn-sglang .*, which was with 0.5.17"),
    ],
)
def test_what_cannot_be_used_leaves_everything(settings, log, monkeypatch, variable, version, told):
    settings(method=variable)
    monkeypatch.setattr(sglang, "__version__", version)
    pbsattn_sglang.register()
    (line,) = log
    assert line.endswith("every layer is left to FlashAttention")
    assert type(ATTENTION_BACKENDS["pbs"](runner_of())) is FlashAttentionBackend
    settings(unsupported="refuse")
    with pytest.raises(ValueError, match=told):
        pbsattn_sglang.register()


def test_without_the_runtime(settings, log, monkeypatch):
    """As where only the plug-in is installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pbsattn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pbsattn", None)
    pbsattn_sglang.register()
    assert "import of pbsattn" in log[0] and type(ATTENTION_BACKENDS["pbs"](runner_of())) is FlashAttentionBackend


def test_with_another_runtime(settings, log, monkeypatch):
    monkeypatch.setattr(pbsattn, "__version__", "0.1.0")
    pbsattn_sglang.register()
    assert "pbsattn 0.1.0, pbsattn-sglang" in log[0]


def made(runner):
    """The plug-in's backend of a runner, and SGLang's own."""
    own = FlashAttentionBackend(runner)
    return backend.create(own, runner), own


class Batch:
    """Random rows, (tokens, tokens before) each, of requests that stand in random pages."""

    def __init__(self, runner, rows, seed=0, padding=0, mode=ForwardMode.EXTEND):
        draw = torch.Generator().manual_seed(seed)
        page = runner.page_size
        pages = torch.randperm(runner.token_to_kv_pool.size // page, generator=draw) + 1
        per_request = LONGEST // page
        for i in range(REQUESTS):
            own = pages[i * per_request : (i + 1) * per_request]
            slots = (own[:, None] * page + torch.arange(page)).flatten()
            runner.req_to_token_pool.req_to_token[i, : len(slots)] = slots.int()
        tokens, before = [each[0] for each in rows], [each[1] for each in rows]
        lens = [sum(each) for each in rows]
        table = runner.req_to_token_pool.req_to_token
        slots = [table[i, first:last] for i, (first, last) in enumerate(zip(before, lens))]
        self.tokens = sum(tokens)
        of_all = self.tokens + padding
        self.forward = ForwardBatch(
            forward_mode=mode,
            batch_size=len(rows),
            input_ids=torch.zeros(of_all, dtype=torch.int64),
            req_pool_indices=torch.arange(len(rows)),
            seq_lens=torch.tensor(lens),
            seq_lens_cpu=torch.tensor(lens),
            seq_lens_sum=sum(lens),
            out_cache_loc=torch.cat([*slots, torch.zeros(padding, dtype=torch.int32)]).long(),
            positions=torch.zeros(of_all, dtype=torch.int64),
            extend_num_tokens=self.tokens,
            extend_seq_lens=torch.tensor(tokens),
            extend_prefix_lens=torch.tensor(before),
            extend_seq_lens_cpu=tokens,
            extend_prefix_lens_cpu=before,
        )
        shapes = [(of_all, HEADS * DIM), (of_all, KV_HEADS * DIM), (of_all, KV_HEADS * DIM)]
        self.qkv = [torch.randn(shape, generator=draw) for shape in shapes]

    def outputs(self, runner, backend, **named):
        """What the model's layers make of it, by a backend."""
        with forward_context(ForwardContext(attn_backend=backend)):
            backend.init_forward_metadata(self.forward)
            return [layer(*self.qkv, self.forward, **named)[: self.tokens] for layer in runner.model.layers]


CASES = {
    "pages of 1": {"page_size": 1},
    "pages of 8": {"page_size": 8},
    "pages of 16": {},
    "pages of 128": {"page_size": 128},
    "capped logits": {"logit_cap": 20.0},
    "a window": {"window": 300},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_random_batches(settings, case, monkeypatch):
    """Outputs are FlashAttention's, and each token is computed once."""
    runner = runner_of(**case)
    ours, own = made(runner)
    row_of, counted, by_both = RowsBackend._row, [], 0

    def counting(self, taken, row, *given):
        counted.append(row.tokens)
        row_of(self, taken, row, *given)

    monkeypatch.setattr(RowsBackend, "_row", counting)
    draw = random.Random(0)
    for seed in range(8):
        page = max(runner.page_size, 16)
        rows = [
            (draw.choice([1, 5, 63, 64, 200, 333]), draw.choice([0, 0, page, 2 * page, 3 * page]))
            for _ in range(draw.randrange(1, REQUESTS))
        ]
        batch = Batch(runner, rows, seed, mode=draw.choice([ForwardMode.EXTEND, ForwardMode.MIXED]))
        expected = batch.outputs(runner, own)
        counted.clear()
        torch_flash.calls.tokens = 0
        got = batch.outputs(runner, ours)
        assert sum(counted) + torch_flash.calls.tokens == batch.tokens * len(runner.model.layers)
        by_both += bool(counted and torch_flash.calls.tokens)
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert by_both


ROWS = [(5, 0), (200, 32), (1, 77), (300, 0), (90, 160)]


def test_sinks(settings):
    runner = runner_of()
    ours, own = made(runner)
    batch, sinks = Batch(runner, ROWS), torch.randn(HEADS)
    got, expected = (batch.outputs(runner, each, sinks=sinks) for each in (ours, own))
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected[0], batch.outputs(runner, own)[0], atol=1e-3)


def test_keys_that_are_in_the_cache_already(settings):
    """As where RoPE's kernel writes them: what is handed over beside may have another form."""
    runner = runner_of()
    ours, own = made(runner)
    batch = Batch(runner, ROWS)
    expected = batch.outputs(runner, own)
    for given in batch.qkv[1:]:
        given.fill_(torch.nan)
    # Both layers have written their keys and values, each its own.
    for one, other in zip(batch.outputs(runner, ours, save_kv_cache=False), expected):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_an_output_of_a_graph_is_written_in_place(settings):
    """With padding behind the last row, as a CUDA graph of the parts between has it."""
    runner = runner_of()
    ours, own = made(runner)
    batch = Batch(runner, ROWS, padding=20)
    expected = batch.outputs(runner, own)[-1]
    output = torch.full((batch.tokens + 20, HEADS * DIM), torch.nan)
    batch.forward._attn_output = output
    got = batch.outputs(runner, ours)[-1]
    assert got.data_ptr() == output.data_ptr() and batch.forward._attn_output is output
    torch.testing.assert_close(output[: batch.tokens], expected, atol=2e-5, rtol=1e-4)
    assert output[batch.tokens :].eq(0).all()


def taken_rows(ours, forward):
    ours.init_forward_metadata(forward)
    return 0 if ours._step is None else len(ours._step._rows)


def test_batches_that_are_left(settings, log):
    runner = runner_of()
    ours, _ = made(runner)
    log.clear()
    forward = Batch(runner, ROWS).forward
    assert taken_rows(ours, forward) == 3
    for name, value in (
        ("attn_cp_metadata", object()),
        ("extend_seq_lens_cpu", [5, 5, 1, 5, 5]),
        ("forward_mode", ForwardMode.SPLIT_PREFILL),
    ):
        with attribute(forward, name, value):
            assert taken_rows(ours, forward) == 0
    assert taken_rows(ours, forward) == 3 and log == []
    with attribute(forward, "extend_prefix_lens_cpu", [0, 32, 77, 0]):
        assert taken_rows(ours, forward) == 0
    assert len(log) == 1 and log[0].endswith("Such batches go to FlashAttention")


def test_a_batch_in_a_whole_graph_is_left(settings):
    runner = runner_of()
    ours, own = made(runner)
    batch = Batch(runner, ROWS)
    expected = batch.outputs(runner, own)
    assert taken_rows(ours, batch.forward) == 3
    ours.init_forward_metadata_out_graph(batch.forward, in_capture=True)
    torch_flash.calls.tokens = 0
    with forward_context(ForwardContext(attn_backend=ours)):
        got = [layer(*batch.qkv, batch.forward) for layer in runner.model.layers]
    assert torch_flash.calls.tokens == 2 * batch.tokens and all(map(torch.equal, got, expected))


def test_a_layer_that_reads_anothers_keys_is_left(settings):
    runner = runner_of()
    ours, own = made(runner)
    batch = Batch(runner, ROWS)
    batch.outputs(runner, own)
    batch.qkv[1:] = [None, None]
    assert all(map(torch.equal, batch.outputs(runner, ours), batch.outputs(runner, own)))


def test_rows_that_are_dense_are_left(settings):
    settings(method="auto")  # which is dense where rows are this short
    runner = runner_of()
    ours, own = made(runner)
    batch = Batch(runner, ROWS)
    assert all(map(torch.equal, batch.outputs(runner, ours), batch.outputs(runner, own)))


def test_a_row_without_memory_is_told_once_a_layer(settings, log):
    runner = runner_of()
    ours, own = made(runner)
    ours._buffer = backend.Buffer()
    log.clear()
    batch = Batch(runner, ROWS)
    for _ in range(2):
        assert all(map(torch.allclose, batch.outputs(runner, ours), batch.outputs(runner, own)))
    assert [line.split(":")[1] for line in log] == [" layers.0", " layers.1"]


def test_other_errors_of_a_row_are_not_hidden(settings, monkeypatch):
    def wrong(*_):
        raise ValueError("a tensor of another shape")

    monkeypatch.setattr(RowsBackend, "_row", wrong)
    runner = runner_of()
    ours, _ = made(runner)
    with pytest.raises(ValueError, match="another shape"):
        Batch(runner, ROWS).outputs(runner, ours)


def graphs(name):
    return types.SimpleNamespace(prefill=types.SimpleNamespace(backend=name))


LEFT = {
    "data-parallel": {"args": {"enable_dp_attention": True}},
    "PD multiplexing": {"args": {"enable_pdmux": True}},
    "DBO": {"args": {"enable_two_batch_overlap": True}},
    "invariance": {"args": {"enable_deterministic_inference": True}},
    "whole prefills are CUDA graphs": {"args": {"cuda_graph_config": graphs("full")}},
    "go through the KV cache": {"args": {"is_embedding": True, "chunked_prefill_size": -1, "disable_radix_cache": True}},
    "across to an encoder": {"is_cross_attention": True},
    "head_dim is 32": {"v_head_dim": 32},
    "encoded as ALIBI": {"pos_encoding_mode": "ALIBI"},
    "capped by square": {"logit_cap": 3.0, "logit_capping_method": "square"},
}


@pytest.mark.parametrize(("told", "case"), LEFT.items(), ids=LEFT)
def test_what_is_left(settings, log, told, case):
    runner = runner_of(**case)
    ours, own = made(runner)
    assert ours is own and len(log) == 1
    assert log[0].startswith("pbsattn: leaves 2 layers to FlashAttention (layers.0 ...): ") and told in log[0]
    settings(unsupported="refuse")
    with pytest.raises(Refused, match=told):
        made(runner)


@pytest.mark.parametrize(
    ("of", "name", "value", "told"),
    [
        ("runner", "is_draft_worker", True, "draft"),
        ("runner", "kv_cache_dtype", torch.float8_e4m3fn, "KV cache is float8_e4m3fn"),
        ("pool", "kv_cache_layout", "hnd", "lies as hnd"),
        ("own", "use_mla", True, "MLA"),
        ("own", "is_encoder_decoder", True, "encoder"),
        ("own", "is_prefill_aware_swa", True, "windows follow"),
    ],
)
def test_what_else_is_left(settings, of, name, value, told):
    runner = runner_of()
    if of == "runner":
        setattr(runner, name, value)
    own = FlashAttentionBackend(runner)
    if of != "runner":
        setattr(own if of == "own" else runner.token_to_kv_pool, name, value)
    (first, *_) = taking.layers_of(runner, own, backend.read()).values()
    assert told in first[1]


def test_other_pools_are_left(settings):
    class NoOpMHATokenToKVPool(memory_pool.MHATokenToKVPool):
        """As SGLang's own of that name."""

    runner = runner_of()
    runner.token_to_kv_pool.__class__ = NoOpMHATokenToKVPool
    assert "NoOpMHATokenToKVPool" in taking.reason_for_all(runner, FlashAttentionBackend(runner))


def test_layers_that_are_left_one_by_one(settings):
    runner = runner_of()
    own, layer = FlashAttentionBackend(runner), runner.model.layers[0]
    assert taking.reason_for(layer, "layers.0", own) is None and "layer_id" in taking.reason_for(layer, "layers.1", own)
    for name, value, told in (("xai_temperature_len", 9, "by length"), ("use_irope", True, "iRoPE")):
        with attribute(layer, name, value), attribute(own, "has_local_attention", True):
            assert told in taking.reason_for(layer, "layers.0", own)
    with attribute(layer, "k_scale", torch.ones(1)), attribute(own, "kv_cache_dtype_str", "bf16"):
        assert "scales" in taking.reason_for(layer, "layers.0", own)
    with attribute(layer, "sliding_window_size", 99), attribute(own, "use_sliding_window_kv_pool", True):
        assert "pool of sliding windows" in taking.reason_for(layer, "layers.0", own)


def test_rows_are_told(settings, log):
    settings(stats="1")
    runner = runner_of()
    ours, _ = made(runner)
    log.clear()
    Batch(runner, ROWS).outputs(runner, ours)
    rows = [line.split(": density")[0] for line in log]
    assert rows == [f"pbsattn: row of {own} tokens over {own + before}" for own, before in ROWS if own >= 64]
    assert all("density 1.000" in line and "; layer density ms: 0 1.000" in line and ", 1 1.000" in line for line in log)


def test_ranks_and_columns(settings, tmp_path, monkeypatch):
    """Settings are by global head: rank 1 of 2 has heads 4 .. 7. Keys' columns are as SGLang's embeddings turn them."""
    (tmp_path / "heads.json").write_text('{"1": {"5": {"top_p": 0.5}}}')
    settings(settings=str(tmp_path / "heads.json"))
    runner = runner_of()
    runner.ps = dataclasses.replace(runner.ps, attn_tp_rank=1, attn_tp_size=2)
    own = FlashAttentionBackend(runner)
    taken = [each for _, each in taking.layers_of(runner, own, backend.read()).values()]
    by_head = [[head.get("top_p") for head in json.loads(each.heads)] for each in taken]
    assert by_head == [[None] * 4, [None, 0.5, None, None]]
    monkeypatch.setattr(factory, "_ROPE_DICT", {})
    assert taking.rope_pairs() is None
    for neox, pairs in ((True, "halves"), (False, None)):
        factory.get_rope(DIM, DIM, 100, 10_000, neox)
        assert taking.rope_pairs() == pairs
    monkeypatch.setattr(factory, "_ROPE_DICT", {"only": factory.get_rope(DIM, DIM, 100, 10_000, False)})
    assert taking.rope_pairs() == "neighbours"


@pytest.mark.parametrize(("chunk", "most"), [(512, 512), (-1, LONGEST), (None, LONGEST), (4096, LONGEST)])
def test_most_tokens_of_a_chunk(chunk, most):
    assert taking.most_tokens(runner_of(args={"chunked_prefill_size": chunk})) == (most, LONGEST)
