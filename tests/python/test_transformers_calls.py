"""Calls that aren't a decoder's plain causal attention: cross attention, encoders, sparse attention of a model's own."""

import warnings

import pytest
import torch

from conftest import f32_tolerance

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn.transformers as pt  # noqa: E402

VOCABULARY = 96
BASE = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
BART = dict(
    vocab_size=VOCABULARY,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
)
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
    return torch.randint(3, VOCABULARY - 1, (1, n))


def llama(**changes):
    return ready(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BASE, **changes})))


def agree(got, expected):
    assert float((got - expected).abs().max() / expected.abs().max()) < f32_tolerance(1e-4, 1e-1)


def check(model, call):
    """A call gives the same with every block kept as it does through SDPA; what became of its layers."""
    expected = call()
    with pt.enable(model, min_tokens=64, top_p=1.0), warnings.catch_warnings():
        warnings.simplefilter("ignore", pt.FallbackWarning)
        agree(call(), expected)
        return pt.stats(model)


# --------------------------------------------------------------------------------------- cross attention


def bart(kind="Bart"):
    config = getattr(transformers, f"{kind}Config")(**BART)
    model = ready(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    source = tokens(KEYS)
    return model, lambda ids: model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits


def t5gemma():
    part = dict(
        BASE,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention"] * 2,
    )
    model = ready(
        transformers.T5GemmaForConditionalGeneration(
            transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=VOCABULARY)
        )
    )
    source = tokens(KEYS)
    return model, lambda ids: model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits


def gpt2():
    model = ready(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=64,
                n_layer=2,
                n_head=2,
                n_positions=512,
                add_cross_attention=True,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    )
    states = torch.randn(1, KEYS, 64)
    return model, lambda ids: model(ids, encoder_hidden_states=states, use_cache=False).logits


def whisper_model():
    return ready(
        transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                **{
                    key: value
                    for key, value in BART.items()
                    if key not in ("max_position_embeddings", "forced_eos_token_id")
                },
                num_mel_bins=16,
                max_source_positions=FRAMES,
                max_target_positions=256,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        )
    )


def whisper():
    model, features = whisper_model(), torch.randn(1, 16, 2 * FRAMES)
    return model, lambda ids: model(input_features=features, decoder_input_ids=ids, use_cache=False).logits


def speech_to_text():
    """A model that transformers has no SDPA for: what isn't taken goes to its eager attention."""
    sizes = {key: value for key, value in BART.items() if key not in ("max_position_embeddings", "forced_eos_token_id")}
    model = ready(
        transformers.Speech2TextForConditionalGeneration(
            transformers.Speech2TextConfig(
                **sizes, max_source_positions=2 * KEYS, max_target_positions=256, input_feat_per_channel=16, conv_channels=32
            )
        )
    )
    features = torch.randn(1, 4 * KEYS, 16)
    return model, lambda ids: model(input_features=features, decoder_input_ids=ids, use_cache=False).logits


def mllama():
    text = {
        **BASE,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=1,
        image_size=56,
        patch_size=14,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )
    model = ready(
        transformers.MllamaForConditionalGeneration(
            transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=90)
        )
    )
    for name, weight in model.named_parameters():
        if "gate" in name:  # of cross attention, closed as it is drawn
            weight.fill_(1.0)
    text_model, states = model.model.language_model, torch.randn(1, KEYS, 64)
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
    model = ready(transformers.LlamaModel(transformers.LlamaConfig(**BASE)))
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
    model = transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(
            **BASE,
            query_pre_attn_scalar=32,
            layer_types=["sliding_attention", "full_attention"],
            use_bidirectional_attention=True,
        )
    )
    with pytest.raises(ValueError, match="Gemma3TextModel: has no causal attention"):
        pt.enable(model)


# ----------------------------------------------------------------------- arguments that pbsattn doesn't know


SPARSE = dict(
    moe_intermediate_size=32,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=2,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=32,
    index_topk=16,
    index_n_heads=2,
    index_head_dim=32,
    mlp_layer_types=["dense", "dense"],
)
INDEXERS = {
    "DeepseekV32": SPARSE,
    "GlmMoeDsa": SPARSE,
    "AXK2": SPARSE,
    "MiniMaxM3VL": dict(
        index_n_heads=1,
        index_head_dim=32,
        index_block_size=16,
        index_topk_blocks=2,
        index_local_blocks=1,
        mlp_layer_types=["dense", "dense"],
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["minimax_m3_sparse"] * 2,
    ),
}


@pytest.mark.parametrize("family", INDEXERS)
def test_models_with_an_indexer_are_refused_by_name(family):
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class(model_class.config_class(**{**BASE, **INDEXERS[family]}))
    with pytest.raises(ValueError, match=rf"{family}ForCausalLM: it is sparse already: its {family}\w*Indexer picks the"):
        pt.enable(model)
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("q_len", [200, 30, 1], ids=["long", "below-min-tokens", "decoding"])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_unknown_argument_raises(q_len, enabled):
    model = llama()
    module = model.model.layers[0].self_attn
    q, k, v = torch.randn(1, 2, q_len, 32), torch.randn(1, 1, 200, 32), torch.randn(1, 1, 200, 32)

    def call(**arguments):
        return INTERFACE["pbsattn"](module, q, k, v, None, scaling=0.2, **arguments)

    if enabled:
        pt.enable(model, min_tokens=64, top_p=1.0)
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
