"""Options by layer and query head: from dicts and files to what each head does, and the errors on the way."""

import json
import re

import pytest
import torch

import pbsattn
from conftest import qkv
from pbsattn import _core
from pbsattn._settings import Heads, Layers, library_options

BASE = {"method": "pbs", "top_p": 0.8}


def test_what_is_said_of_fewer_overrides():
    layers = Layers(
        {
            "5": {"3": {"keep": "none", "sink_blocks": 1}, "*": {"top_p": 0.5}},
            "*": {"7": {"vertical": 3500, "slash": 100}, "*": {"method": "minference"}},
            6: {0: {"slash": 20}},
        }
    )
    assert layers.of(0, BASE, 8)[6:] == [{"method": "minference"}, {"method": "minference", "vertical": 3500, "slash": 100}]
    fifth = layers.of(5, {**BASE, "scale": 0.25, "precision": "bf16"}, 8)
    kept = {"method": "minference", "scale": 0.25, "precision": "bf16", "top_p": 0.5}  # a method leaves both as they were
    assert fifth == [kept] * 3 + [{**kept, "keep": "none", "sink_blocks": 1}] + [kept] * 3 + [
        {**kept, "vertical": 3500, "slash": 100}
    ]
    assert layers.of(6, BASE, 8)[0] == {"method": "minference", "slash": 20}
    assert Layers({"3": {"*": {"top_p": 0.5}}}).of(3, BASE, 8) == [{"method": "pbs", "top_p": 0.5}]
    assert Layers({}).of(3, BASE, 8) == [BASE]


def values_that_pbs_has_not(name, value):
    """Every other name of an option, or a number that is in every number's range."""
    if isinstance(value, int):
        return [value + 128]  # a block of 256 goes with the segment of 256
    if isinstance(value, float):
        return [round(value / 2 + 0.125, 3)]
    with pytest.raises(ValueError, match="no such value; there are") as raised:
        _core.options("pbs", **{name: "?"})
    return [each for each in re.findall(r'"(\w+)"', str(raised.value)) if each != value]


@pytest.mark.parametrize("name, value", _core.options("pbs").as_dict().items())
def test_every_door_sets_the_same(name, value):
    for other in values_that_pbs_has_not(name, value):
        keyword = _core.options("pbs", **{name: other}).as_dict()
        assert keyword == {**_core.options("pbs").as_dict(), name: keyword[name]} and keyword[name] != value
        assert _core.options(f"pbs:{name}={other}").as_dict() == keyword
        try:
            heads = [
                library_options(Layers({"0": {"*": changes}}).of(0, {"method": "full"}, 1))[0].as_dict()
                for changes in ({"method": "pbs", name: other}, {"method": f"pbs:{name}={other}"})
            ]
        except ValueError as refused:  # a score, rule or permutation that pbs has no partner for
            assert name in ("score", "keep", "permutation") and ("score" in str(refused) or "order_scope" in str(refused))
        else:
            assert heads == [keyword, keyword]


def test_a_method_may_name_what_it_else_leaves_to_the_caller():
    layers = Layers({"0": {"*": {"method": "full:precision=f32"}}})
    assert layers.of(0, {"method": "pbs", "precision": "bf16", "scale": 0.5}, 1) == [
        {"method": "full:precision=f32", "scale": 0.5}
    ]


def test_a_method_leaves_what_the_text_of_the_one_before_named():
    """As in the plug-in (tests/ggml/settings_test.cc), which has the model's own scale."""
    text = "pbs:precision=bf16:top_p=0.5:scale=0.25:precision=f32"
    left = {"method": "pbs", "precision": "f32", "scale": 0.25}
    layers = Layers({"*": {"*": {"method": text}}, "0": {"1": {"method": "pbs"}}})
    assert layers.of(0, BASE, 2) == [{"method": text}, left]
    assert layers.of(1, BASE, 2) == [{"method": text}]
    for base in (
        {"method": "pbs:precision=f32", "scale": 0.25, "precision": None},
        {"method": "pbs:scale=0.25:precision=bf16", "precision": "f32"},
    ):
        assert Heads({"1": {"method": "pbs"}}).over([base], 2) == [base, left]
    named = {"method": "full:scale=2"}
    assert Heads({"*": named}).over([{"method": "pbs:scale=0.25"}], 2) == [named]


def test_a_method_with_options_of_its_own_is_taken_by_the_op_and_by_plans():
    q, k, v = qkv("cpu", 300, q_heads=2, kv_heads=1)
    torch.testing.assert_close(
        pbsattn.attention(q, k, v, method="pbs:top_p=0.5:segment=128"),
        pbsattn.attention(q, k, v, method="pbs", top_p=0.5, segment=128),
        rtol=0,
        atol=0,
    )
    sizes = dict(q_heads=2, kv_heads=1, q_len=300, kv_len=300, head_dim=64)
    options = pbsattn.plan(method="pbs:top_p=0.5:segment=128", segment=384, **sizes).options
    assert (options["top_p"], options["segment"]) == (0.5, 384), "a keyword comes after the method's own"
    for method, message in (
        ("pbs:top_p", '"top_p" is no OPTION=VALUE'),
        ("pbs:p=1", 'option "p": no such option'),
        ("pbs:top_p=7", "top_p 7: outside"),
        ("pbz:top_p=1", 'did you mean "pbs"'),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            pbsattn.plan(method=method, **sizes)


def test_a_file_says_what_a_dict_does(tmp_path):
    given = {"*": {"*": {"method": "minference"}}, "1": {"2": {"slash": 77}}}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(given))
    assert Layers(path).of(1, BASE, 4) == Layers(given).of(1, BASE, 4)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "settings: [] is not an object of layers"),
        ({"x": {}}, 'layer "x": not a number from 0 up'),
        ({"-1": {}}, 'layer "-1": not a number from 0 up'),
        ({"0": 3}, "layer 0, : 3 is not an object of heads"),
        ({"0": {"1.5": {}}}, 'layer 0, head "1.5": not a number'),
        ({"0": {"*": 1}}, "layer 0, head *: 1 is not an object of options"),
        ({"0": {"1": {"top_p": True}}}, "layer 0, head 1: top_p True: neither a number nor a name"),
        ({"0": {"1": {"topp": 1}}}, "layer 0, head 1: option 'topp': no such option"),
        ({"0": {"1": {"method": "pbz"}}}, 'layer 0, head 1: method "pbz": no such method'),
        ({"a\nb": {}}, 'layer "a?b": not a number from 0 up'),
        ({"0\0": {}}, 'layer "0?": not a number from 0 up'),
        (
            {"3": {"*": {"top_k\0x": 2}}},
            'layer 3, head *: "top_k?x" contains a NUL character, which no option has; take it out',
        ),
        (
            {"3": {"1": {"keep": "all\0"}}},
            'layer 3, head 1: "all?" contains a NUL character, which no option has; take it out',
        ),
        ({"*": {"1": {"vertical": 1.5}}}, "layer *, head 1: vertical 1.5: not an int"),
        ({"0": {"9": {"top_p": 0.5}}}, "layer 0, head 9: there are 4 query heads, 0 .. 3"),
        ({"0": {"2": {"top_p": 7}}}, "layer 0, head 2: top_p 7: outside"),
        ({"0": {"*": {"softcap": float("nan")}}}, "layer 0, softcap nan: not a finite, positive number; 0 stands for none"),
        ({"0": {"*": {"softcap": float("inf")}}}, "layer 0, softcap inf: not a finite"),
        ({"0": {"*": {"method": "pbs:softcap=-1"}}}, "layer 0, softcap -1: not a finite"),
        ({"0": {"2": {"segment": 512}}}, "layer 0, segment of head 2 is not head 0's; heads may differ in keep"),
    ],
)
def test_an_error_names_layer_head_and_option(given, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        Layers(given).of(0, BASE, 4)
    assert message in str(raised.value)


def test_a_file_is_named(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="settings.json: not JSON: Expecting"):
        Layers(path)
    path.write_text('{"0": {"1": {"topp": 1}}}')
    with pytest.raises(TypeError, match="settings.json: layer 0, head 1: option 'topp'"):
        Layers(path)
    with pytest.raises(FileNotFoundError, match="absent.json"):
        Layers(tmp_path / "absent.json")


def test_each_head_keeps_what_its_options_keep(device):
    q, k, v = qkv(device, 700)
    heads = {
        "*": {"top_p": 0.6},
        1: {"keep": "all"},
        2: {"keep": "none", "local_blocks": 2},
        "3": {"keep": "top_k", "top_k": 1},
    }
    out, trace = pbsattn.trace(q, k, v, heads=heads, method="pbs")
    assert torch.equal(out, pbsattn.attention(q, k, v, heads=json.dumps(heads), method="pbs"))
    for h, options in enumerate(Heads(heads).over([{"method": "pbs"}], 4)):
        alone, alone_trace = pbsattn.trace(q, k, v, **options)
        assert torch.equal(trace.kept[:, h], alone_trace.kept[:, h])
        # On a GPU a plan whose heads all keep every block has a kernel of its own, which rounds in another order.
        rounding = 0 if device == "cpu" else 2**-7
        torch.testing.assert_close(out[:, h], alone[:, h], rtol=2 * rounding, atol=rounding)
    assert len({int(trace.kept[0, h].sum()) for h in range(4)}) == 4


def test_a_plan_and_a_compiled_call_take_heads():
    q, k, v = qkv("cpu", 600)
    heads = {"0": {"keep": "all"}, "1": {"top_p": 0.3}}
    wanted = pbsattn.attention(q, k, v, heads=heads, method="pbs")
    plan = pbsattn.plan(q_heads=4, kv_heads=2, q_len=600, kv_len=600, head_dim=64, heads=heads, method="pbs")
    out = torch.empty_like(q)
    plan.run(q, k, v, out, torch.empty(plan.workspace_size, dtype=torch.uint8))
    assert torch.equal(out, wanted)
    text = json.dumps(heads)
    compiled = torch.compile(
        lambda q, k, v: pbsattn.attention(q, k, v, heads=text, method="pbs"), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(q, k, v), wanted)


@pytest.mark.parametrize(
    "heads, message",
    [
        ("{", "heads: not JSON"),
        ([1], "is not an object of heads"),
        ({"0": {"top_p": {}}}, "head 0: top_p {}: neither a number nor a name"),
        ({"4": {"top_p": 0.5}}, "head 4: there are 4 query heads"),
        ({"1": {"block": 64}}, "block of head 1 is not head 0's"),
    ],
)
def test_errors_of_a_call(heads, message):
    q, k, v = qkv("cpu", 40)
    with pytest.raises(ValueError) as raised:
        pbsattn.attention(q, k, v, heads=heads, method="pbs")
    assert message in str(raised.value)
