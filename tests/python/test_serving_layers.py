"""What a server's layer takes and leaves of rows, and the plans of those it takes, without a server."""

import dataclasses
import json
import logging
import types

import pytest
import torch

import pbsattn
from pbsattn.serving import layers
from pbsattn.serving.layers import Facts, Layer, layer_of, leaves_all, most_memory, reads_pages
from pbsattn.serving.memory import Buffer
from pbsattn.serving.rows import Row
from pbsattn.serving.settings import Settings
from pbsattn.serving.telling import Teller

FACTS = Facts(
    "model.layers.3.self_attn.attn", "Attention", "decoder", 4, 2, 64, 64, 0.125, "float32", "float32", model_layers=8
)


@pytest.mark.parametrize("page_size", [8, 16, 64, 128, 176, 256])
@pytest.mark.parametrize("permutation", ["none", "last_queries"])
def test_keys_that_stay_are_gathered_from_pages_that_tiles_do_not_divide(permutation, page_size):
    facts = dataclasses.replace(FACTS, page_size=page_size)
    layer = layer_of(facts, Settings(method=f"pbs:permutation={permutation}"), 300, 700)
    assert layer.in_place is (page_size % (128 if permutation == "none" else 16) == 0)


def test_pages_that_a_device_refuses_are_gathered(monkeypatch):
    """As where the library has no kernel that reads them; only what it refuses by name counts."""

    def refused(*_, page_table, **__):
        raise NotImplementedError("pages of 16 tokens")

    layer = Layer(0, FACTS, json.dumps([{"method": "pbs"}] * 4))
    assert reads_pages(layer)
    monkeypatch.setattr(pbsattn.Plan, "run", refused)
    layers._reads_pages.cache_clear()
    assert not reads_pages(layer)
    monkeypatch.setattr(pbsattn.Plan, "run", lambda *_, **__: 1 / 0)
    layers._reads_pages.cache_clear()
    with pytest.raises(ZeroDivisionError):
        reads_pages(layer)
    layers._reads_pages.cache_clear()


@pytest.mark.parametrize(
    ("method", "tokens", "kv_len", "dense"),
    [("auto", 300, 300, True), ("auto", 8192, 1 << 17, False), ("full", 8192, 1 << 17, True), ("pbs", 300, 300, False)],
)
def test_rows_whose_plan_is_dense(method, tokens, kv_len, dense):
    layer = Layer(0, FACTS, json.dumps([{"method": method}] * 4))
    assert layer.leaves(Row(0, 0, tokens, kv_len)) is dense


def test_rows_that_are_dense_in_some_heads_are_not():
    layer = Layer(0, FACTS, json.dumps([{"method": "pbs", "keep": "all"}] * 2 + [{"method": "pbs"}] * 2))
    assert not layer.leaves(Row(0, 0, 8192, 8192))


@pytest.mark.parametrize(
    ("after", "rows"),
    [(0, [5, 1]), (127, [5, 1]), (128, [4, 0]), (544, [1, 0]), (639, [1, 0]), (640, [0, 0]), (10**6, [0, 0])],
)
def test_dense_rows_are_those_of_the_prompt(after, rows):
    """Wherever it is cut into chunks: five of 128 tokens in some heads, one in others, of which some may come later."""
    by_head = [{"method": "two-step:dense_last_rows=5", "threshold": 0.01}] * 2 + [{"method": "two-step"}] * 2
    layer = Layer(0, FACTS, json.dumps(by_head))
    made = [json.loads(layers._before_others(layer.shape, after).heads)[head] for head in (0, 2)]
    assert [pbsattn.options(**each)["dense_last_rows"] for each in made] == rows
    assert [pbsattn.options(**each)["threshold"] for each in made] == [
        pytest.approx(0.01),
        pbsattn.options("two-step")["threshold"],
    ]
    for fewer, more in ((640, 10**6), (0, 127), (128, 255)):
        assert layer.plan(512, 2048, None, after=fewer) is layer.plan(512, 2048, None, after=more), "plans are kept"


def test_memory_is_for_the_greatest_plan_of_some_dense_rows(monkeypatch):
    """Where a row has some of them, heads differ otherwise than where it has all or none."""
    layer = Layer(0, FACTS, json.dumps([{"method": "pbs", "dense_last_rows": 3}] + [{"method": "pbs"}] * 3))
    sizes = {0: 500, 128: 700, 256: 900, 384: 600}
    asked = []

    def plan(of, tokens, kv_len, memory, after=0):
        asked.append(after)
        if memory is not None and memory < sizes[after]:
            raise MemoryError(f"{sizes[after]} bytes")
        return types.SimpleNamespace(workspace_size=sizes[after])

    monkeypatch.setattr(Layer, "plan", plan)
    gathered = layer.gathered(4096)
    assert most_memory(layer, 512, 4096) == gathered + 900 and sorted(asked) == [0, 128, 256, 384]
    device = torch.device("cpu")
    assert Buffer().reserve_row(layer, 512, 4096, Settings(memory=gathered + 900), device) is None
    assert "900 bytes" in Buffer().reserve_row(layer, 512, 4096, Settings(memory=gathered + 800), device)
    asked.clear()
    most_memory(layer, 100, 200)
    assert sorted(asked) == [0, 128], "no more come after a row than its sequence has"


def test_auto_without_dense_rows_is_auto():
    layer = Layer(0, FACTS, json.dumps([{"method": "auto"}] * 4))
    (of_head,) = {json.dumps(each) for each in json.loads(layers._before_others(layer.shape, 128).heads)}
    assert pbsattn.options(**json.loads(of_head)) == {**pbsattn.options("auto"), "dense_last_rows": 0}
    assert layer.leaves(Row(0, 0, 300, 300, after=10**4)) and not layer.leaves(Row(0, 0, 8192, 1 << 17, after=10**4))
    most = max(layer.plan(8192, 1 << 17, None, after).workspace_size for after in (0, 500))
    assert most_memory(layer, 8192, 1 << 17) == layer.gathered(1 << 17) + most


@pytest.mark.parametrize(
    ("method", "window", "tokens", "kv_len", "all_of_them"),
    [
        ("auto", None, 300, 1024, True),
        ("auto", None, 300, 1 << 17, False),
        ("auto", None, 8192, 1 << 17, False),
        ("auto", None, 1 << 17, 1 << 17, False),
        ("two-step", None, 300, 4096, False),
        ("two-step", 300, 300, 4096, False),
        ("two-step", 99, 300, 4096, True),
        ("full", None, 8192, 1 << 17, True),
    ],
)
def test_a_layer_that_leaves_every_row_is_told(caplog, method, window, tokens, kv_len, all_of_them):
    layer = Layer(0, dataclasses.replace(FACTS, window=window), json.dumps([{"method": method}] * 4))
    assert leaves_all(layer, 100, tokens, kv_len) is all_of_them
    takes = Layer(1, FACTS, json.dumps([{"method": "pbs"}] * 4))
    cases = ([], [], all_of_them), ([takes], [], False), ([], [takes], False), ([], [layer], all_of_them)
    for beside, others, told in cases:
        caplog.clear()
        of_name = {str(each.index): each for each in (layer, *beside)}
        teller = Teller(logging.getLogger("pbsattn"))
        for _ in range(2):  # two groups of layers
            teller.layers(of_name, "S", Settings(method=method), 100, (tokens, kv_len), "chunk", 0, others)
        warned = [record.getMessage() for record in caplog.records if "takes nothing" in record.getMessage()]
        assert len(warned) == told
        assert all(("PBSATTN_MIN_TOKENS" if window == 99 else "another method") in each for each in warned)


@pytest.mark.parametrize(("kv_len", "leaves"), [(300, False), (400, False), (401, True)])
def test_rows_that_see_more_than_their_layers_window(kv_len, leaves):
    heads = json.dumps([{"method": "pbs"}] * 4)
    assert Layer(0, dataclasses.replace(FACTS, window=400), heads).leaves(Row(0, 0, 300, kv_len)) is leaves
    assert not Layer(0, FACTS, heads).leaves(Row(0, 0, 300, kv_len)), "a layer without one beside it"
