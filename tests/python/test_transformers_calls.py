"""Calls that aren't a decoder's plain causal attention: cross attention, encoders, sparse attention of a model's own."""

import warnings

import pytest
import torch

from conftest import f32_tolerance

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import cases  # noqa: E402
import pbsattn.transformers as pt  # noqa: E402
import tiny  # noqa: E402

FRAMES = 300  # that Whisper's encoder sees
KEYS = 400  # of cross attention


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def ready(model):
    """Weights that make attention matter: as they are drawn, it is nearly uniform."""
    for weight in model.parameters():
        if weight.dim() >= 2:
            weight.mul_(4.0)
    return model.eval().float()


def tokens(n):
    return torch.randint(3, tiny.TOKENS - 1, (1, n))


def small(class_name, changes=None):
    """The model of that class that the sweep of all classes has, but for its weights."""
    return ready(made(class_name, changes))


def made(class_name, changes=None):
    model_class = getattr(transformers, class_name)
    return model_class(tiny.config(model_class.config_class, changes or cases.CHANGES.get(class_name)))


def agree(got, expected):
    assert float((got - expected).abs().max() / expected.abs().max()) < f32_tolerance(1e-4, 1e-1)


def check(model, call):
    """A call gives the same with every block kept as it does through SDPA; what became of its layers."""
    expected = call()
    with pt.enable(model, min_tokens=64, top_p=1.0, method="pbs"), warnings.catch_warnings():
        warnings.simplefilter("ignore", pt.FallbackWarning)
        agree(call(), expected)
        return pt.stats(model)


# --------------------------------------------------------------------------------------- cross attention


def bart(kind="Bart"):
    model, source = small(f"{kind}ForConditionalGeneration"), tokens(KEYS)
    return model, lambda ids: model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits


def t5gemma():
    part = {**cases.NO_CAP, "layer_types": ["full_attention"] * 2}
    model, source = small("T5GemmaForConditionalGeneration", {"encoder": part, "decoder": part}), tokens(KEYS)
    return model, lambda ids: model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits


def gpt2():
    model, states = small("GPT2LMHeadModel", {"add_cross_attention": True}), torch.randn(1, KEYS, tiny.WIDTH)
    return model, lambda ids: model(ids, encoder_hidden_states=states, use_cache=False).logits


def whisper_model():
    changes = dict(max_source_positions=FRAMES, max_target_positions=256, suppress_tokens=None, begin_suppress_tokens=None)
    return small("WhisperForConditionalGeneration", changes)


def whisper():
    model, features = whisper_model(), torch.randn(1, 16, 2 * FRAMES)
    return model, lambda ids: model(input_features=features, decoder_input_ids=ids, use_cache=False).logits


def speech_to_text():
    """A model that transformers has no SDPA for: what isn't taken goes to its eager attention."""
    sizes = dict(max_source_positions=2 * KEYS, input_feat_per_channel=16, conv_channels=32)
    model, features = small("Speech2TextForConditionalGeneration", sizes), torch.randn(1, 4 * KEYS, 16)
    return model, lambda ids: model(input_features=features, decoder_input_ids=ids, use_cache=False).logits


def mllama():
    text = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    model = small("MllamaForConditionalGeneration", {"text_config": text})
    for name, weight in model.named_parameters():
        if "gate" in name:  # of cross attention, closed as it is drawn
            weight.fill_(1.0)
    text_model, states = model.model.language_model, torch.randn(1, KEYS, tiny.WIDTH)
    return model, lambda ids: text_model(input_ids=ids, cross_attention_states=states, use_cache=False).last_hidden_state


@pytest.mark.parametrize("length", [200, 30], ids=["long", "below-min-tokens"])
@pytest.mark.parametrize(
    "build",
    [bart, lambda: bart("Blenderbot"), t5gemma, gpt2, whisper, speech_to_text, mllama],
    ids=["bart", "blenderbot", "t5gemma", "gpt2", "whisper", "speech-to-text", "mllama"],
)
def test_cross_attention_sees_all_of_its_keys(build, length):
    model, call = build()
    ids = tokens(length)
    layers = check(model, lambda: call(ids))
    if length == 200:  # self attention is still taken
        assert sum(layer.taken for layer in layers) >= 2
    else:
        assert not any(layer.taken for layer in layers)


class Attention(torch.nn.Module):
    def __init__(self, is_causal=False):
        super().__init__()
        self.is_causal, self.config, self.training = is_causal, None, False


def random_call(q_len, kv_len):
    return torch.randn(1, 4, q_len, 64), torch.randn(1, 4, kv_len, 64), torch.randn(1, 4, kv_len, 64)


INTERFACE = transformers.AttentionInterface()


@pytest.mark.parametrize("arguments", [{}, {"is_causal": False}, {"is_causal": True}], ids=["module", "False", "True"])
@pytest.mark.parametrize("module", [Attention(False), Attention(True)], ids=["encoder", "decoder"])
@pytest.mark.parametrize("q_len", [1, 4, 200, 400])
def test_a_call_without_a_mask_means_what_it_means_to_sdpa(q_len, module, arguments):
    q, k, v = random_call(q_len, 400)
    expected, _ = INTERFACE["sdpa"](module, q, k, v, None, **arguments)
    agree(INTERFACE["pbsattn"](module, q, k, v, None, **arguments)[0], expected)


def bidirectional_llama(how):
    model = small("LlamaModel")
    if how == "config":
        model.config.is_causal = False
    arguments = {"is_causal": False} if how == "keyword" else {}
    return model, lambda ids: model(ids, use_cache=False, **arguments).last_hidden_state


@pytest.mark.parametrize("how", ["config", "keyword"])
@pytest.mark.parametrize("length", [200, 30])
def test_a_decoder_that_is_told_to_see_everything_does(how, length):
    model, call = bidirectional_llama(how)
    ids = tokens(length)
    assert not any(layer.taken for layer in check(model, lambda: call(ids)))


def test_bidirectional_gemma3_is_refused():
    model = made("Gemma3TextModel", {"use_bidirectional_attention": True})
    with pytest.raises(ValueError, match="Gemma3TextModel: has no causal attention"):
        pt.enable(model, method="pbs")


# ----------------------------------------------------------------------- arguments that pbsattn doesn't know


@pytest.mark.parametrize("family", ["DeepseekV32", "GlmMoeDsa", "AXK2", "MiniMaxM3VL"])
def test_models_with_an_indexer_are_refused_by_name(family):
    model = made(f"{family}ForCausalLM")
    with pytest.raises(ValueError, match=rf"{family}ForCausalLM: it is sparse already: its {family}\w*Indexer picks the"):
        pt.enable(model, method="pbs")
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("q_len", [200, 30, 1], ids=["long", "below-min-tokens", "decoding"])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_unknown_argument_raises(q_len, enabled):
    model = small("LlamaForCausalLM")
    module = model.model.layers[0].self_attn
    q, k, v = torch.randn(1, 2, q_len, 32), torch.randn(1, 1, 200, 32), torch.randn(1, 1, 200, 32)

    def call(**arguments):
        return INTERFACE["pbsattn"](module, q, k, v, None, scaling=0.2, **arguments)

    if enabled:
        pt.enable(model, min_tokens=64, top_p=1.0, method="pbs")
    call(position_ids=torch.arange(q_len), cu_seq_lens_q=None, block_indices=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pt.FallbackWarning)
        with pytest.raises(NotImplementedError, match='LlamaAttention: it is given "block_indices", .*disable'):
            call(block_indices=torch.zeros(1))


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tilt=None, **kwargs):
    """The eager attention of this file's modules, which knows an argument that nobody else does."""
    scores = query @ key.transpose(2, 3) * scaling + tilt
    if attention_mask is not None:
        scores = scores + attention_mask
    return (torch.softmax(scores, -1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("q_len", [200, 30, 1])
def test_the_models_own_attention_gets_what_only_it_knows(q_len):
    q, k, v = random_call(q_len, q_len)
    tilt = torch.randn(q_len, q_len)
    causal = torch.full((q_len, q_len), -torch.inf).triu(1)
    for module, mask in ((Attention(True), causal), (Attention(False), None)):
        expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.2, tilt=tilt)
        got, _ = INTERFACE["pbsattn"](module, q, k, v, None, scaling=0.2, tilt=tilt)
        agree(got, expected)
