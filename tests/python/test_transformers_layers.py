"""What layers carry beside keys and values (sinks, soft-caps, windows, values of another width), and compiled models."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn.transformers as pt  # noqa: E402
from test_transformers import TOKENS, build, close, enable, falls_back, inference, prompt  # noqa: E402, F401

# Models whose layers carry more than keys and values: family, what its config has, and how it computes them itself.
ALTERNATING = dict(layer_types=["sliding_attention", "full_attention"])
CARRYING = {
    "gemma2": ("Gemma2", dict(sliding_window=128, query_pre_attn_scalar=64, attn_logit_softcapping=2.0, **ALTERNATING)),
    "gemma3": ("gemma3", dict(sliding_window=130)),
    # Of two experts both, and no experts, since a choice between them would turn rounding into another model.
    "gpt_oss": ("GptOss", dict(sliding_window=128, num_local_experts=2, num_experts_per_tok=2, **ALTERNATING)),
    "mistral": ("mistral", dict(sliding_window=200)),
    "deepseek": (
        "DeepseekV3",
        dict(
            **dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
            **dict(num_key_value_heads=4, head_dim=64, first_k_dense_replace=2),
        ),
    ),
}


def build_carrying(family, device):
    name, changes = CARRYING[family]
    model = build(name, device, **changes)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            parameter.data.normal_()
    model.set_attn_implementation("eager")
    return model


def takes_all(model):
    """Whether every layer of the last prefill was computed."""
    layers = pt.stats(model)
    return len(layers) == 2 and all(layer.taken and not layer.left for layer in layers)


@pytest.mark.parametrize("family", CARRYING)
def test_what_layers_carry_is_computed(family, device):
    model = build_carrying(family, device)
    ids = prompt(device)
    expected = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", pt.FallbackWarning)
        with enable(model, top_p=1.0):
            close(model(ids).logits, expected)
            assert takes_all(model)
            short = ids[:, :110]
            close(model(short).logits, expected[:, :110])
            assert takes_all(model)
            cache, logits = None, []
            for chunk in ids.split([100, 250, 129, 70, 51], dim=1):
                out = model(chunk, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
            close(torch.cat(logits, 1), expected)
    assert torch.equal(model(ids).logits, expected)


def test_a_windows_density_counts_the_keys_that_the_cache_dropped():
    """Over chunks it is that of the whole prompt: visited blocks among those that dense attention would compute."""
    model, ids = build_carrying("mistral", "cpu"), prompt(tokens=1280)
    with enable(model, top_p=1.0):
        model(ids)
        whole = pt.stats(model)[0]
        assert whole.causal_blocks == 4 * (10 * 11 // 2)
        cache = None
        for chunk in ids.split(256, dim=1):
            cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        assert cache.layers[0].keys.shape[2] == 199, "what a window of 200 needs"
        chunked = pt.stats(model)[0]
    assert chunked.taken == 5
    # From the second chunk on a layer is given 199 keys that the cache kept, and 256: three rows, which see 2, 3 and 4
    # blocks of those, and the blocks of the 57, 313, 569 and 825 keys before them.
    assert chunked.causal_blocks == 4 * (1 + 2 + 4 * (2 + 3 + 4) + 3 * (1 + 3 + 5 + 7))
    assert chunked.visited_blocks == 4 * (1 + 2 + 4 * (2 + 3 + 3))


@pytest.mark.parametrize("cap", [0.0, -2.0])
def test_a_cap_that_is_none_is_left_to_the_model(cap):
    """Of 0 eager attention makes logits that all are 0; no cap would be another thing."""
    model, ids = build("Gemma2", **{**CARRYING["gemma2"][1], "attn_logit_softcapping": cap}), prompt()
    model.set_attn_implementation("eager")

    def call():
        return model(ids).logits

    falls_back(model, f"its soft-cap is {cap}, not a finite, positive number", call, call())


@pytest.mark.parametrize("family", CARRYING)
def test_what_layers_carry_is_generated_with(family, device):
    model, ids = build_carrying(family, device), prompt(device, tokens=300)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)

    def logits():  # which generate() gives in float32, whatever the model's dtype
        return torch.stack(model.generate(ids, **options).logits).to(model.dtype)

    expected = logits()
    with enable(model, top_p=1.0), warnings.catch_warnings():
        warnings.simplefilter("error", pt.FallbackWarning)
        close(logits(), expected)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss", "mistral"])
def test_what_layers_carry_is_padded_elsewhere(family, device):
    """What pbsattn leaves of such layers the model computes as before."""
    model, ids = build_carrying(family, device), prompt(device, batch=2)
    mask = torch.ones(2, TOKENS, dtype=torch.long, device=device)
    mask[1, :100] = 0

    def call():
        return model(ids, attention_mask=mask).logits[mask.bool()]

    expected = call()
    with enable(model, top_p=1.0), warnings.catch_warnings():
        warnings.simplefilter("ignore", pt.FallbackWarning)
        close(call(), expected)
        assert not any(layer.taken for layer in pt.stats(model))


def test_only_the_window_is_computed():
    """A window is what it is, however few blocks the method would keep, and its density says how little that is."""
    model, ids = build_carrying("mistral", "cpu"), prompt()
    expected = model(ids).logits
    with enable(model, method="streaming"):
        close(model(ids).logits, expected)
        assert all(0 < layer.density < 1 for layer in pt.stats(model))


def test_a_compiled_model_has_no_graph_break(device):
    model = build("llama", device)
    ids = prompt(device)
    expected = model(ids).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with enable(model, top_p=1.0):
        close(compiled(ids).logits, expected)
        assert [layer.taken for layer in pt.stats(model)] == [1, 1]


def test_a_compiled_model_with_values_of_a_width_that_is_refused(device):
    """A call of the op in a graph can't be refused any more, so what it has is judged before."""
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=20, num_key_value_heads=4)
    model = build("DeepseekV3", device, first_k_dense_replace=2, **widths)
    ids = prompt(device)
    expected = model(ids).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with enable(model, top_p=1.0):
        close(compiled(ids).logits, expected)
        layers = pt.stats(model)
    assert [(layer.taken, layer.left) for layer in layers] == [(0, 1), (0, 1)]
    assert all("its values have head_dim 20" in layer.reason for layer in layers)


def test_compiled_chunks_over_a_cache(device):
    model = build("llama", device)
    ids = prompt(device)
    expected = model(ids).logits[:, -1]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with enable(model, top_p=1.0):
        first = compiled(ids[:, :400], use_cache=True)
        close(compiled(ids[:, 400:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1], expected)
        assert [layer.taken for layer in pt.stats(model)] == [2, 2]
