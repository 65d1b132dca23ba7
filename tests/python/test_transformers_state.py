"""What enable() sets belongs to one model: not to its config, not to its copies, and not to what is saved."""

import copy
import gc
import json
import weakref

import pytest

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn.transformers as pt  # noqa: E402
import tiny  # noqa: E402
from test_transformers_calls import agree, inference, ready, small, tokens, whisper  # noqa: E402, F401

SPARSE = dict(min_tokens=64, method="pbs", top_p=0.05, block=32, segment=32)


@pytest.fixture
def twins():
    """Two models made of one config object."""
    config = tiny.config(transformers.LlamaConfig)
    pair = [ready(transformers.LlamaForCausalLM(config)) for _ in range(2)]
    assert pair[0].config is pair[1].config
    return pair


def test_models_of_one_config_share_no_state(twins):
    one, two = twins
    ids = tokens(200)
    expected, others = one(ids).logits, two(ids).logits
    with pt.enable(one, **SPARSE):
        agree(two(ids).logits, others)
        with pytest.raises(RuntimeError, match="not enabled"):
            pt.stats(two)
        assert pt.stats(one) == []
        with pt.enable(two, min_tokens=64, top_p=1.0, method="pbs"):
            agree(two(ids).logits, others)
            one(ids)
            assert [layer.density for layer in pt.stats(two)] == [1.0, 1.0]
            assert all(layer.density < 1.0 for layer in pt.stats(one))
        agree(two(ids).logits, others)
        one(ids)
        assert pt.stats(one)[0].taken == 1
    assert one.config._attn_implementation == "sdpa"
    agree(one(ids).logits, expected)


def test_models_of_one_config_are_disabled_in_any_order(twins):
    one, two = twins
    one.set_attn_implementation("eager")
    ids = tokens(200)
    others = two(ids).logits
    pt.enable(one, **SPARSE)
    pt.enable(two, min_tokens=64, top_p=1.0, method="pbs")
    pt.disable(one)
    agree(two(ids).logits, others)
    assert pt.stats(two)[0].taken == 1
    pt.disable(two)
    assert two.config._attn_implementation == "eager"


def test_a_copy_of_an_enabled_model_is_enabled_by_itself():
    model = small("LlamaForCausalLM")
    ids = tokens(200)
    expected = model(ids).logits
    with pt.enable(model, min_tokens=64, top_p=1.0, method="pbs"):
        twin = copy.deepcopy(model)
        agree(twin(ids).logits, expected)
        assert pt.stats(twin)[0].taken == 1 and pt.stats(model) == []
    agree(twin(ids).logits, expected)
    assert pt.stats(twin)[0].taken == 1
    pt.disable(twin)
    assert twin.config._attn_implementation == "sdpa"
    agree(twin(ids).logits, expected)


def test_a_model_made_of_an_enabled_models_config_has_sdpa():
    model = small("LlamaForCausalLM")
    with pt.enable(model, **SPARSE):
        other = ready(transformers.LlamaForCausalLM(copy.deepcopy(model.config)))
        with pytest.raises(RuntimeError, match="not enabled"):
            pt.disable(other)
    ids = tokens(200)
    got = other(ids).logits
    with pt.enable(other, method="pbs"):
        pass
    assert other.config._attn_implementation == "sdpa"
    agree(other(ids).logits, got)


def test_nothing_of_it_is_saved(tmp_path):
    model = small("LlamaForCausalLM")
    with pt.enable(model, method="pbs"):
        model.save_pretrained(tmp_path)
        assert not any("pbsattn" in name for name in model.state_dict())
    assert "pbsattn" not in (tmp_path / "config.json").read_text()
    assert "pbsattn" not in json.dumps(model.config.to_dict())
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_state_goes_with_its_model():
    model = small("LlamaForCausalLM")
    pt.enable(model, **SPARSE)
    model(tokens(100))
    config, state = model.config, weakref.ref(model.model.layers[0].self_attn._pbsattn.state)
    del model
    gc.collect()
    assert state() is None
    again = ready(transformers.LlamaForCausalLM(config))
    with pt.enable(again, method="pbs"):
        pass
    assert config._attn_implementation == "sdpa"


def test_layers_without_an_index_are_listed_last():
    model, call = whisper()  # its encoder's
    with pt.enable(model, min_tokens=64, top_p=1.0, method="pbs"), pytest.warns(pt.FallbackWarning, match="not causal"):
        call(tokens(200))
        layers = pt.stats(model)
    assert [(each.layer, each.taken, each.left) for each in layers] == [
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 0),
        (1, 0, 1),
        (None, 0, 1),
        (None, 0, 1),
    ]
    assert layers[1].module == "model.decoder.layers.0.encoder_attn"
    assert layers[-1].module == "model.encoder.layers.1.self_attn"


def test_a_model_whose_layers_have_no_index():
    model = small("LlamaForCausalLM")
    ids = tokens(200)
    for layer in model.model.layers:
        layer.self_attn.layer_idx = None

    def call():
        return model(ids, use_cache=False).logits

    expected = call()
    with pt.enable(model, min_tokens=64, settings={"*": {"*": {"top_p": 1.0}}}, method="pbs"):
        agree(call(), expected)
        assert [(each.layer, each.taken) for each in pt.stats(model)] == [(None, 1), (None, 1)]
    with pytest.raises(ValueError, match=r"layers \[0\]: .* none with an index"):
        pt.enable(model, layers=[0], method="pbs")
