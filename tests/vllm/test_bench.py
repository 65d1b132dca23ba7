"""The benchmark of the plug-in, on a tiny model: rows go to either in turns, and a run goes on where it was stopped."""

import argparse
import contextlib
import importlib
import json
import pathlib
import sys
import types

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import engine
import torch_flash
from pbsattn_vllm import impl
from tiny_models import prompt

BENCH = pathlib.Path(__file__).parents[2] / "integrations/vllm/bench"
GIVEN = argparse.Namespace(
    lengths=[300],
    chunk=256,
    most=512,
    most_len=1024,
    runs=1,
    methods=["pbs:top_p=0.5"],
    only={},
    requests=14,
    longest=300,
    cache=450,
    least=64,
    answer=48,
    vocabulary=512,
)


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    found = [importlib.import_module(name) for name in ("served", "parts", "records")]
    for name in ("served", "parts", "records", "prompts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return found


@pytest.fixture
def bench(models, modules, monkeypatch):
    """Its modules and an engine, whose rows of pbsattn are counted."""
    served, parts, records = modules
    rows, row = [], impl.RowsImpl._row

    def watched(taken, which, *rest):
        rows.append(which)
        row(taken, which, *rest)

    monkeypatch.setattr(impl.RowsImpl, "_row", staticmethod(watched))
    for name in ("PBSATTN_METHOD", "PBSATTN_MIN_TOKENS"):
        monkeypatch.setenv(name, "")
    torch_flash.install()
    own = AttentionBackendEnum.CPU_ATTN
    register_backend(own, "pbsattn_vllm.backend.Backend")
    methods = {"pbs:top_p=0.5": {"PBSATTN_METHOD": "pbs:top_p=0.5", "PBSATTN_MIN_TOKENS": "64"}}
    made = served.Served(
        models["llama"],
        methods,
        "",
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        num_gpu_blocks_override=100,
    )
    try:
        yield parts, records, made, rows
    finally:
        register_backend(own, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend")
        closing = object.__new__(engine.Engine)
        closing.llm = made.llm
        del made
        closing.close()


def test_parts(bench, tmp_path):
    parts, records, served, rows = bench
    path, ids = tmp_path / "r.json", prompt(1, 1024)
    kept = records.Records(path, {"commit": "of a test"}, 1e9)
    parts.first(served, kept, GIVEN, ids)
    assert {(row.tokens, row.kv_len) for row in rows} == {(256, 256), (268, 268)}
    assert len(rows) == 2 * 5 * 3, "by each chunk, a warm-up and four runs, three layers, and none by FlashAttention"
    rows.clear()
    served.attend("flash")
    served.first_token(ids[:300])
    assert rows == []
    assert served.reserved > 0
    parts.random(served, kept, GIVEN, ids)
    made = json.loads(path.read_text())
    assert [each["params"]["chunk"] for each in made if each["metric"] == "time to first token"] == [256, 256, 300, 300]
    differ = [each for each in made if "differ" in each["metric"]]
    assert {each["case"]: each["value"] for each in differ} == {"every block": 0, "flash in other chunks": 0}
    assert any(each["metric"] == "preemptions" and each["value"] for each in made)
    assert all(each["commit"] == "of a test" for each in made) and rows

    again = records.Records(path, {}, 1e9)
    parts.first(served, again, GIVEN, ids)
    parts.random(served, again, GIVEN, ids)
    assert again.made == made
    assert not records.Records(tmp_path / "other.json", {}, -1).left("first"), "no case begins when the time is over"


class Answers:
    """Stands where an engine does, and answers what the part `random` asks."""

    def __init__(self, served):
        self.served, self.asked, self.methods = served, [], {}
        self.pool = types.SimpleNamespace(get_num_free_blocks=lambda: 1)

    def attend(self, method):
        pass

    def chunks(self, tokens):
        pass

    def forget(self):
        pass

    @contextlib.contextmanager
    def small_cache(self, tokens):
        yield

    @contextlib.contextmanager
    def preemptions(self):
        yield []

    def serve(self, requests, logprobs):
        self.asked += requests
        return [self.served.Answer(tokens=[0] * each.make) for each in requests]


def test_random_requests_fit_and_another_cache_is_another_case(modules, tmp_path):
    """Prompts with their answers, in the sequence that the engine was made for; what a run says to try begins something."""
    served, parts, records = modules
    kept, given = records.Records(tmp_path / "r.json", {}, 1e9), argparse.Namespace(**vars(GIVEN))
    given.most_len, given.longest, given.answer, given.requests = 400, 10_000, 256, 200
    engine = Answers(served)
    parts.random(engine, kept, given, [])
    assert len(engine.asked) == 600 and max(len(each.ids) for each in engine.asked) == 144
    for name, other in (("cache", 300), ("answer", 128), ("chunk", 128)):
        engine.asked.clear()
        parts.random(engine, kept, given, [])
        assert engine.asked == []
        setattr(given, name, other)
        parts.random(engine, kept, given, [])
        assert len(engine.asked) == 600, name
