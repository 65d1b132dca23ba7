"""The settings of plug-ins of servers, and their rules for layers, without a server."""

import dataclasses
import json
import pathlib
import re

import pytest

import pbsattn
import pbsattn_sglang
import pbsattn_vllm
from learned_files import save_learned
from pbsattn.serving.layers import Facts, Layer, Refused, layer_of, most_memory, reason_to_leave
from pbsattn.serving.settings import _FIELDS, REFUSE, Settings, read


def test_defaults():
    assert read({}) == Settings() == Settings(method="auto", min_tokens=2560, unsupported="leave", layers=None)


def test_variables():
    given = {
        "PBSATTN_METHOD": "pbs:top_p=0.8",
        "PBSATTN_SEGMENT": "512",
        "PBSATTN_MIN_TOKENS": "300",
        "PBSATTN_LAYERS": "0-2, 7",
        "PBSATTN_WORKSPACE_CAP_MIB": "64",
        "PBSATTN_UNSUPPORTED": "refuse",
        "PBSATTN_OVER_FLASH_ATTN": "1",
        "PBSATTN_STATS": "0",
        "PBSATTN_CPU_PATH": "the library's own",
    }
    settings = read(given)
    assert pbsattn.options(settings.method) == pbsattn.options("pbs", top_p=0.8, segment=512)
    assert settings == Settings(settings.method, 300, (), frozenset({0, 1, 2, 7}), 64 << 20, "refuse", True)


def test_variables_go_over_the_file(tmp_path):
    (tmp_path / "heads.json").write_text(json.dumps({"*": {"3": {"keep": "all"}}}))
    file = {
        "method": "pbs",
        "top_p": 0.8,
        "segment": 512,
        "layers": [1],
        "settings": str(tmp_path / "heads.json"),
        "stats": True,
    }
    (tmp_path / "all.json").write_text(json.dumps(file))
    settings = read({"PBSATTN_CONFIG": str(tmp_path / "all.json"), "PBSATTN_TOP_P": "0.7", "PBSATTN_STATS": "0"})
    assert pbsattn.options(settings.method) == pbsattn.options("pbs", top_p=0.7, segment=512)
    assert (settings.layers, settings.stats) == (frozenset({1}), False)
    assert settings.head_options(5, 2, 2) == [{"method": settings.method}, {"method": settings.method, "keep": "all"}]


def test_variables_are_those_that_the_page_tells():
    page = (pathlib.Path(__file__).parents[2] / "docs/vllm.md").read_text()
    told = set(re.findall(r"^\| `(PBSATTN_\w+)", page, re.MULTILINE))
    assert told == {f"PBSATTN_{name.upper()}" for name in ("method", "config", "top_p", *_FIELDS)}


LEARNED = "two-step:permutation=learned:order_scope=kv_head"
WRONG = {
    "PBSATTN_METHOD": [
        ("pbz", "no such method"),
        ("pbs:top_p=2", "outside"),
        ("pbs:scale=2", "brings its own scale"),
        (LEARNED, "a file has; name it, PBSATTN_LEARNED"),
        ("two-step:permutation=arrival", "none is brought"),
    ],
    "PBSATTN_TOP_P": [("x", "not a number"), ("2", "outside")],
    "PBSATTN_SOFTCAP": [("30", "brings its own softcap")],
    "PBSATTN_MIN_TOKENS": [("1", "from 2 up"), ("-5", "from 2 up"), ("3.5", "from 2 up"), ("many", "from 2 up")],
    "PBSATTN_LAYERS": [("0-", "indices"), ("a", "indices"), ("1-2-3", "indices"), ("5-3", "indices")],
    "PBSATTN_WORKSPACE_CAP_MIB": [("0", "from 1 up")],
    "PBSATTN_UNSUPPORTED": [("stop", "leave")],
    "PBSATTN_OVER_FLASH_ATTN": [("yes", "neither 0 nor 1")],
    "PBSATTN_LEARNED": [(__file__, "test_serving_settings.py")],
    "PBSATTN_STATS": [("file.txt", "neither 0 nor 1")],
}


@pytest.mark.parametrize(("name", "value", "told"), [(name, *each) for name, values in WRONG.items() for each in values])
def test_wrong_variables_are_named(name, value, told):
    with pytest.raises(ValueError, match=told) as raised:
        read({name: value})
    assert str(raised.value).startswith(f"{name}: ")


WRONG_FILES = {
    "[1]": "not an object",
    "{": "not JSON",
    '{"metod": "pbs"}': '"metod": no such setting',
    '{"settings": {"x": {}}}': 'layer "x": not a number',
    '{"settings": {"0": {"-1": {}}}}': 'head "-1": not a number',
    '{"settings": {"0": []}}': "not an object of heads, of layer 0",
    '{"settings": {"0": {"7": 3}}}': "layer 0, head 7: 3: not an object",
    '{"settings": {"0": {"7": {"keep": "most"}}}}': "layer 0, head 7: ",
    '{"settings": {"0": {"7": {"top_p": 3}}}}': "layer 0, head 7: top_p 3: outside",
    '{"settings": {"0": {"7": {"top_p": true}}}}': "layer 0, head 7: top_p true: neither",
    '{"settings": {"0": {"7": {"window": 3}}}}': "layer 0, head 7: window: a layer of the model brings its own",
    '{"settings": {"*": {"*": {"nope": 3}}}}': r"layer \*, head \*: .*nope",
    '{"layers": [true]}': "indices",
    '{"min_tokens": 2.5}': "from 2 up",
}


@pytest.mark.parametrize(("text", "told"), WRONG_FILES.items())
def test_wrong_files_are_named(tmp_path, text, told):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as raised:
        read({"PBSATTN_CONFIG": str(path)})
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there():
    with pytest.raises(OSError, match=r"no\.json"):
        read({"PBSATTN_CONFIG": "no.json"})


def with_changes(tmp_path, changes, **variables):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(changes))
    return read({"PBSATTN_SETTINGS": str(path), **variables})


def test_settings_go_over_each_other(tmp_path):
    """A layer over every layer, a head over every head; a method leaves nothing of what was before it."""
    changes = {
        "5": {"3": {"keep": "none"}, "*": {"segment": 128}},
        "*": {"*": {"top_p": 0.5, "segment": 512}, "2": {"method": "minference"}},
    }
    settings = with_changes(tmp_path, changes)
    assert settings.head_options(0, 1, 2) == [{"method": "auto", "top_p": 0.5, "segment": 512}, {"method": "minference"}]
    assert settings.head_options(5, 2, 2) == [
        {"method": "minference", "segment": 128},
        {"method": "auto", "top_p": 0.5, "segment": 128, "keep": "none"},
    ]


def test_the_runtime_makes_the_same_of_them(tmp_path):
    """One file for llama.cpp, transformers and vLLM."""
    from pbsattn._settings import Layers

    changes = {
        "*": {"*": {"top_p": 0.5}, "7": {"vertical": 3500}},
        "0": {"*": {"keep": "all"}, "2": {"method": "pbs:top_p=0.3"}},
    }
    settings, layers = with_changes(tmp_path, changes, PBSATTN_METHOD="pbs"), Layers(changes)
    for layer in range(3):
        ours, theirs = settings.head_options(layer, 0, 8), layers.of(layer, {"method": "pbs"}, 8)
        assert [pbsattn.options(**each) for each in ours] == [pbsattn.options(**each) for each in theirs]


FACTS = Facts(
    "model.layers.3.self_attn.attn", "Attention", "decoder", 4, 2, 64, 64, 0.125, "float32", "float32", model_layers=8
)


def test_ranks_take_their_heads(tmp_path):
    """Settings are by global head: rank 1 of 2, with 4 heads each, has heads 4 .. 7."""
    settings = with_changes(tmp_path, {"3": {"1": {"top_p": 0.25}, "5": {"top_p": 0.5}}})
    by_rank = [
        [
            head.get("top_p")
            for head in json.loads(layer_of(dataclasses.replace(FACTS, rank=rank, ranks=2), settings, 8, 8).heads)
        ]
        for rank in range(2)
    ]
    assert by_rank == [[None, 0.25, None, None], [None, 0.5, None, None]]


LEFT = {
    "kind": ("ChunkedLocalAttention", "ChunkedLocalAttention"),
    "attn_type": ("encoder_only", "encoder_only"),
    "alibi": (True, "ALiBi"),
    "head_dim_v": (128, "head_dim is 128"),
    "cache_dtype": ("float8_e4m3fn", "KV cache is float8_e4m3fn"),
    "shares_cache": (True, "shares"),
    "bidirectional_ranges": (True, "images"),
    "draft": (True, "draft"),
    "name": ("model.attn", "no layer's index"),
    "context_parallel": (True, "DCP or PCP"),
    "micro_batches": (True, "DBO"),
    "batch_invariant": (True, "invariance"),
    "other": ("its pool is none", "its pool is none"),
}


@pytest.mark.parametrize(("field", "value", "told"), [(field, *each) for field, each in LEFT.items()], ids=LEFT)
def test_layers_that_are_left(field, value, told):
    facts = dataclasses.replace(FACTS, **{field: value})
    assert told in reason_to_leave(facts)
    assert told in layer_of(facts, Settings(), 8, 8)
    if field != "draft":
        with pytest.raises(Refused, match=r"layer model\..*PBSATTN_LAYERS.*UNSUPPORTED"):
            layer_of(facts, Settings(unsupported=REFUSE), 8, 8)
    assert "not among" in layer_of(facts, Settings(layers=frozenset({2}), unsupported=REFUSE), 8, 8)


def test_every_rule_has_a_case():
    asked = {field.name for field in dataclasses.fields(Facts)} - set(LEFT)
    numbers = {"q_heads", "kv_heads", "head_dim", "scale", "dtype", "window", "model_layers", "rank", "ranks", "device"}
    assert asked == numbers | {"softcap", "sinks", "model_kv_heads", "rope_pairs", "page_size"}
    assert reason_to_leave(FACTS) is None


def test_a_layer_that_is_taken():
    layer = layer_of(FACTS, Settings(method="pbs:top_p=0.5"), 300, 700)
    assert isinstance(layer, Layer) and layer.index == 3
    plan = layer.plan(300, 700, None)
    assert plan is layer_of(FACTS, Settings(method="pbs:top_p=0.5"), 300, 700).plan(300, 700, None), "plans are kept"
    assert plan.options["top_p"] == 0.5 and plan.options["scale"] == 0.125
    assert most_memory(layer, 300, 700) >= plan.workspace_size
    gathered = dataclasses.replace(layer, in_place=False)
    assert layer.in_place and layer.gathered(700) == 0
    assert most_memory(gathered, 300, 700) == plan.workspace_size + gathered.gathered(768), "whole pages of 128"
    assert gathered.gathered(700) == 700 * 2 * 2 * 64 * 4


SIZES = {"layers": 8, "query_heads": 4, "kv_heads": 2, "head_dim": 64}
OF_MODEL = dataclasses.replace(FACTS, model_kv_heads=2, rope_pairs="halves")


def with_learned(tmp_path, settings=None, sizes=SIZES, **variables):
    """Settings with the file of a learned order, and its weights."""
    weights = save_learned(tmp_path / "model.pbs", settings=settings, sizes=sizes)
    return read({"PBSATTN_LEARNED": str(tmp_path / "model.pbs"), **variables}), weights


def test_a_learned_order(tmp_path):
    """With `auto` the file's settings count, below the method's own options and the user's settings."""
    of_file = {"3": {"*": {"threshold_tokens": 64}, "1": {"permutation": "none", "dense_last_rows": 9}}}
    settings, weights = with_learned(tmp_path, of_file, PBSATTN_METHOD="auto:dense_last_rows=5")
    heads = settings.head_options(3, 0, 2)
    assert [pbsattn.options(**each)["permutation"] for each in heads] == ["learned", "none"]
    assert [pbsattn.options(**each)["dense_last_rows"] for each in heads] == [5, 5]
    assert [pbsattn.options(**each)["threshold_tokens"] for each in heads] == [64, 64]
    settings, weights = with_learned(tmp_path)
    layer = layer_of(OF_MODEL, settings, 2048, 2048)
    assert isinstance(layer, Layer) and layer.in_place and layer.weights.equal(weights[3])
    settings, _ = with_learned(tmp_path, of_file, PBSATTN_METHOD="pbs")
    assert settings.head_options(3, 0, 2) == [{"method": "pbs"}] * 2


@pytest.mark.parametrize(("ranks", "kv_heads", "first"), [(1, 2, [0]), (2, 1, [0, 1]), (4, 1, [0, 0, 1, 1])])
def test_weights_are_by_global_head(tmp_path, ranks, kv_heads, first):
    """KV heads that are fewer than ranks are in several of them."""
    settings, weights = with_learned(tmp_path)
    for rank in range(ranks):
        facts = dataclasses.replace(OF_MODEL, q_heads=4 // ranks, kv_heads=kv_heads, rank=rank, ranks=ranks)
        assert layer_of(facts, settings, 2048, 2048).weights.equal(weights[3, first[rank] : first[rank] + kv_heads])


def test_a_learned_order_in_the_other_pairing(tmp_path):
    settings, _ = with_learned(tmp_path)
    layer = layer_of(dataclasses.replace(OF_MODEL, rope_pairs="neighbours"), settings, 2048, 2048)
    assert layer.weights.equal(settings.learned.in_pairs("neighbours").weights[3])


def test_a_learned_order_of_another_model(tmp_path):
    settings, _ = with_learned(tmp_path, sizes={**SIZES, "kv_heads": 1}, PBSATTN_UNSUPPORTED="refuse")
    with pytest.raises(Refused, match="model.pbs"):
        layer_of(OF_MODEL, settings, 8, 8)
    settings, _ = with_learned(tmp_path)
    assert "turns together" in layer_of(dataclasses.replace(OF_MODEL, rope_pairs=None), settings, 8, 8)


def test_a_layer_brings_its_soft_cap():
    layer = layer_of(dataclasses.replace(FACTS, softcap=30.0, sinks=True), Settings(), 300, 700)
    assert isinstance(layer, Layer) and layer.plan(300, 700, None).options["softcap"] == 30
    assert layer_of(FACTS, Settings(), 300, 700).plan(300, 700, None).options["softcap"] == 0
    told = layer_of(dataclasses.replace(FACTS, softcap=-1.0), Settings(), 300, 700)
    assert isinstance(told, str) and "softcap -1" in told


def test_layers_that_the_user_left():
    assert "not among" in layer_of(FACTS, Settings(layers=frozenset({2}), unsupported=REFUSE), 8, 8)
    assert isinstance(layer_of(FACTS, Settings(layers=frozenset({3})), 8, 8), Layer)


def test_what_the_device_lacks():
    told = layer_of(dataclasses.replace(FACTS, head_dim=12, head_dim_v=12), Settings(), 8, 8)
    assert isinstance(told, str) and "head_dim" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"8": {"*": {"top_p": 0.5}}}, "layer 8: the model has 8, 0 .. 7"), ({"*": {"4": {"top_p": 0.5}}}, "head 4")],
)
def test_settings_of_another_model(tmp_path, changes, told):
    """No layer is taken by settings that are another model's."""
    assert told in layer_of(FACTS, with_changes(tmp_path, changes), 8, 8)
    with pytest.raises(Refused, match=told):
        layer_of(FACTS, with_changes(tmp_path, changes, PBSATTN_UNSUPPORTED="refuse"), 8, 8)


def test_heads_of_a_layer_share_what_they_must(tmp_path):
    told = layer_of(FACTS, with_changes(tmp_path, {"3": {"1": {"segment": 512}}}), 8, 8)
    assert isinstance(told, str) and "segment" in told


PLUGINS = {"vLLM": (pbsattn_vllm, "0.26.0"), "SGLang": (pbsattn_sglang, "0.5.17")}


@pytest.fixture(params=PLUGINS)
def plugin(request):
    return PLUGINS[request.param][0]


@pytest.mark.parametrize("server", PLUGINS)
def test_versions_that_were_tested(server):
    plugin, version = PLUGINS[server]
    for tested in (version, f"{version}+cpu", f"{version}.post1"):
        assert plugin.untested(tested) is None
    for other in (f"{version}.1", "0.5.16", "0.5.18", "0.25.0", "0.33.0", f"{version}rc1", "dev"):
        assert f"{server} {other}: not tested" in plugin.untested(other)


def test_versions_go_together(plugin):
    assert plugin.__version__ == pbsattn.__version__


@pytest.mark.parametrize(
    ("variable", "text", "refuses"),
    [
        (None, None, False),
        ("refuse", None, True),
        ("stop", '{"unsupported": "refuse"}', False),
        ("leave", '{"unsupported": "refuse"}', False),
        ("refuse", '{"unsupported": "leave"}', True),
        (None, '{"unsupported": "refuse", "metod": 3}', True),
        (None, '{"unsupported": "refuse", "settings": "/no/such.json"}', True),
        (None, '{"unsupported": "leave"}', False),
        (None, '{"unsupported"', False),
        (None, "[" * 100_000, False),
        (None, "[1]", False),
        (None, b"\xff", False),
    ],
)
def test_what_refuses_whatever_else_is_wrong(plugin, tmp_path, monkeypatch, variable, text, refuses):
    if variable:
        monkeypatch.setenv("PBSATTN_UNSUPPORTED", variable)
    if text:
        (tmp_path / "c.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("PBSATTN_CONFIG", str(tmp_path / "c.json"))
    assert plugin.refuses() is refuses


def test_a_file_that_is_not_there_refuses_nothing(plugin, monkeypatch):
    monkeypatch.setenv("PBSATTN_CONFIG", "/no/such.json")
    assert plugin.refuses() is False
