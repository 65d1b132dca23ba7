"""Which classes are swept, and what a tiny model of each needs beside tiny.SIZES."""

import dataclasses

import torch
import transformers
from transformers.models.auto import modeling_auto

import tiny

MAMBA = dict(mamba_n_heads=4, mamba_d_head=32, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=32, mamba_expand=2)
LINEAR = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}}
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE | {"mrope_section": [4, 4, 8]}),
}
M3 = dict(
    index_n_heads=1,
    index_block_size=16,
    index_topk_blocks=2,
    index_local_blocks=1,
    mlp_layer_types=["dense", "dense"],
    layer_types=["minimax_m3_sparse", "minimax_m3_sparse"],
)
QWEN4 = LINEAR | dict(
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=32,
    indexer_budget=64,
    indexer_compress_ratio=4,
    hc_lowrank=16,
    layer_types=["linear_attention", "qwen_sparse_attention"],
)
PER_LAYER_INPUTS = dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=tiny.TOKENS)
GEMMA4 = PER_LAYER_INPUTS | dict(head_dim=32, global_head_dim=32, num_kv_shared_layers=0)
GLOBAL = {"hidden_size_global": tiny.WIDTH}

# By class: what its config needs that tiny.SIZES doesn't say.
CHANGES = {
    **dict.fromkeys(("BambaForCausalLM", "GraniteMoeHybridForCausalLM"), MAMBA),
    "BltForCausalLM": {"encoder_config": GLOBAL, "decoder_config": GLOBAL, "encoder_hash_byte_group_vocab": 100},
    "CodeGenForCausalLM": dict(n_head=4),
    "CohereCompassForCausalLM": COMPASS,
    "CohereCompassForConditionalGeneration": {"text_config": COMPASS},
    **dict.fromkeys(
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
            "PaddleOCRVLForConditionalGeneration",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            "Glm46VForConditionalGeneration",
            "Glm4vForConditionalGeneration",
        ),
        {"text_config": MROPE},
    ),
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}}
    },
    "Mistral4ForCausalLM": {"head_dim": 32},
    "Glm5NextForConditionalGeneration": {"text_config": {"num_key_value_heads": 2}},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": {"moe_intermediate_size": [64, 64]}},
    "Qwen4ExpForConditionalGeneration": {"text_config": QWEN4},
    "MiniMaxM3VLForCausalLM": M3,
    "MiniMaxM3SparseForConditionalGeneration": {"text_config": M3},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "DiffLlamaForCausalLM": dict(num_key_value_heads=2),
    "FalconH1ForCausalLM": MAMBA | dict(mamba_d_ssm=128),
    "Gemma3nForCausalLM": PER_LAYER_INPUTS | dict(num_kv_shared_layers=0, laurel_rank=16),
    **dict.fromkeys(("Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM"), GEMMA4),
    **dict.fromkeys(("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"), {"text_config": GEMMA4}),
    "KimiLinearForCausalLM": dict(
        linear_head_dim=16,
        linear_num_heads=2,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
    ),
    "NemotronHForCausalLM": dict(mamba_num_heads=4, mamba_head_dim=32, n_groups=1, ssm_state_size=16, chunk_size=32),
    "XLMWithLMHeadModel": dict(emb_dim=tiny.WIDTH, causal=True),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "Mamba2ForCausalLM": dict(num_heads=4, n_groups=1),
    "Qwen4ExpForCausalLM": QWEN4,
    "ReformerModelWithLMHead": dict(axial_pos_embds=False, attn_layers=["local", "lsh"], hash_seed=0),
    "XmodForCausalLM": dict(default_language="en_XX"),
    "ZambaForCausalLM": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
    "ZayaForCausalLM": dict(num_experts=1, num_experts_per_tok=1),
}


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _attending(batch):
    return {"encoder_hidden_states": _random(batch, 300, tiny.WIDTH)}


def _attending_whisper(batch):
    return {"encoder_outputs": (_random(batch, 300, tiny.WIDTH),)}


def _pixels(batch):
    return {"pixel_values": _random(batch, 3, 28, 28)}


def _features(*shape):
    return lambda batch: {"input_features": _random(batch, *shape)}


def _samples(batch):
    return {"input_values": _random(batch, 16000)}


def _of_two(model_class, encoder, **changes):
    """The config of a model made of an encoder and BERT as decoder."""

    def made():
        encoder_config = tiny.config(encoder().config_class)
        decoder = tiny.config(transformers.BertConfig, dict(add_cross_attention=True))
        config_class = getattr(transformers, model_class).config_class
        return config_class.from_encoder_decoder_configs(encoder_config, decoder, **changes)

    return made


# By class: what a call is given beside the ids of a text (a function of the batch).
EXTRA = {
    "WhisperForConditionalGeneration": _features(16, 1024),
    "Speech2TextForConditionalGeneration": _features(600, 80),
    "Pop2PianoForConditionalGeneration": _features(300, tiny.WIDTH),
    **dict.fromkeys(("SeamlessM4TForSpeechToText", "SeamlessM4Tv2ForSpeechToText"), _features(300, 160)),
    **dict.fromkeys(
        (
            "MoonshineForConditionalGeneration",
            "SpeechT5ForSpeechToText",
            "SpeechEncoderDecoderModel",
            "MoonshineStreamingForConditionalGeneration",
        ),
        _samples,
    ),
    **dict.fromkeys(
        (
            "VisionEncoderDecoderModel",
            "Florence2ForConditionalGeneration",
            "CLIPVisionModel",
            "ViTModel",
            "DeiTModel",
            "Dinov2Model",
        ),
        _pixels,
    ),
}

# By class: how its config is made, where that takes more than changes.
CONFIGS = {
    "EncoderDecoderModel": _of_two("EncoderDecoderModel", lambda: transformers.BertModel),
    "VisionEncoderDecoderModel": _of_two("VisionEncoderDecoderModel", lambda: transformers.ViTModel),
    "SpeechEncoderDecoderModel": _of_two("SpeechEncoderDecoderModel", lambda: transformers.Wav2Vec2Model),
    "MusicgenForCausalLM": lambda: tiny.config(transformers.MusicgenDecoderConfig, dict(num_codebooks=1)),
    "MusicgenMelodyForCausalLM": lambda: tiny.config(transformers.MusicgenMelodyDecoderConfig, dict(num_codebooks=1)),
}


@dataclasses.dataclass
class Case:
    """One class to sweep. Nothing of transformers' modelling code is imported before it is asked for."""

    name: str  # the class, and what tells two uses of it apart
    class_name: str
    kind: str | None = None  # of trial.KINDS; None: as its config says
    changes: dict = dataclasses.field(default_factory=dict)
    given: object = None  # what a call is given beside the ids, a function of the batch

    def model_class(self):
        return getattr(transformers, self.class_name)

    def family(self):
        """Its folder in transformers."""
        return self.model_class().__module__.split(".")[2]

    def kind_of(self, config):
        """A class that takes more than text has an encoder for it, or makes it part of the text."""
        return self.kind or ("encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "multimodal")

    def config(self):
        if self.class_name in CONFIGS:
            return CONFIGS[self.class_name]()
        return tiny.config(self.model_class().config_class, {**CHANGES.get(self.class_name, {}), **self.changes})

    def extra(self):
        return self.given or EXTRA.get(self.class_name) or (lambda batch: {})


# Causal decoders given something else to attend to, in every one or in some of their layers.
CROSS = {
    "GPT2LMHeadModel": dict(add_cross_attention=True),
    "GPTBigCodeForCausalLM": dict(add_cross_attention=True),
    "BertLMHeadModel": dict(add_cross_attention=True),
    "RobertaForCausalLM": dict(add_cross_attention=True),
    "XGLMForCausalLM": dict(add_cross_attention=True),
    "BartForCausalLM": {},
    "BlenderbotForCausalLM": {},
    "PegasusForCausalLM": {},
    "MarianForCausalLM": {},
    "TrOCRForCausalLM": {},
    "WhisperForCausalLM": {},
}
# What a class shows only with other settings than its default, or other calls.
NO_CAP = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 32}
VARIANTS = {
    "T5GemmaForConditionalGeneration without soft-cap": (
        "T5GemmaForConditionalGeneration",
        None,
        {"encoder": NO_CAP, "decoder": NO_CAP},
        None,
    ),
    "MllamaForCausalLM + cross attention": (
        "MllamaForCausalLM",
        "cross",
        dict(num_hidden_layers=3, cross_attention_layers=[1]),
        lambda batch: {"cross_attention_states": _random(batch, 256, tiny.WIDTH)},
    ),
    "Phi3ForCausalLM with a window": ("Phi3ForCausalLM", "decoder", dict(sliding_window=64), None),
    "DeepseekV3ForCausalLM 192/128": (
        "DeepseekV3ForCausalLM",
        "decoder",
        dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, head_dim=64),
        None,
    ),
    "LlamaModel not causal": ("LlamaModel", "encoder", dict(is_causal=False), None),
    "Gemma3TextModel bidirectional": ("Gemma3TextModel", "encoder", dict(use_bidirectional_attention=True), None),
}

ENCODERS = (
    "BertModel",
    "RobertaModel",
    "ElectraModel",
    "ModernBertModel",
    "XLMRobertaModel",
    "CamembertModel",
    "NomicBertModel",
    "DistilBertModel",
    "MPNetModel",
    "DebertaV2Model",
    "EuroBertModel",
    "T5EncoderModel",
    "CLIPTextModel",
    "CLIPVisionModel",
    "SiglipTextModel",
    "ViTModel",
    "DeiTModel",
    "Dinov2Model",
    "ASTModel",
)


# Whose layers carry more than keys and values, all of which pbsattn computes; compared with eager attention, the only one
# of transformers that computes them all.
CARRYING = (
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM with a window",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForCausalLM 192/128",
)


def all_cases():
    """Every case by its name."""
    cases = {}

    def add(class_name, kind=None, model_type="", suffix="", **others):
        name = class_name + suffix
        if name in cases:
            name += f" ({model_type})"
        cases[name] = Case(name, class_name, kind, **others)

    for model_type, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        add(name, "decoder", model_type)
    for mapping in (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for name in mapping.values():
            if name not in cases:
                add(name)
    for name, changes in CROSS.items():
        given = _attending_whisper if name == "WhisperForCausalLM" else _attending
        add(name, "cross", suffix=" + cross attention", changes=changes, given=given)
    for name in ENCODERS:
        add(name, "encoder", changes={"is_decoder": False})
    for name, (class_name, kind, changes, given) in VARIANTS.items():
        cases[name] = Case(name, class_name, kind, changes, given)
    return cases


# What `--one-per-family` runs. Decoders are alike where their attention is given the same things, so there is one class for
# each of those; and every class that lost something before: cross attention, sparse attention of its own, encoders, caches
# of two kinds.
FAMILIES = {
    "LlamaForCausalLM": "grouped heads, rotary positions: what most decoders are",
    "GPT2LMHeadModel": "learned positions, one head of keys for each of queries",
    "Gemma3ForCausalLM": "sliding and full layers in turn",
    "Llama4ForCausalLM": "chunked and full layers",
    "MistralForCausalLM": "every layer slides",
    "Gemma2ForCausalLM": "soft-capped logits",
    "GptOssForCausalLM": "attention sinks",
    "DeepseekV3ForCausalLM": "latent attention: values narrower than keys",
    "DeepseekV3ForCausalLM 192/128": "the same, at its own widths",
    "Phi3ForCausalLM with a window": "a window that the class has only where it is set",
    "Qwen3NextForCausalLM": "linear and full layers",
    "InklingForCausalLM": "a position bias",
    "MoshiForCausalLM": "a config with a part that has no attention",
    "HrmTextForCausalLM": "a config that takes the name of an attention, no dict",
    "FalconForCausalLM": "attention that isn't transformers' interface's",
    "MambaForCausalLM": "no attention",
    "Qwen2VLForConditionalGeneration": "the text part of a model that sees",
    "DeepseekV32ForCausalLM": "sparse attention of its own, by an indexer",
    "GlmMoeDsaForCausalLM": "the same",
    "AXK2ForCausalLM": "the same",
    "MiniMaxM3VLForCausalLM": "sparse attention of its own, by blocks",
    "BartForConditionalGeneration": "an encoder and cross attention",
    "BlenderbotForConditionalGeneration": "the same",
    "T5GemmaForConditionalGeneration without soft-cap": "the same, with a mask function of its own",
    "WhisperForConditionalGeneration": "the same, over a recording",
    "MoonshineForConditionalGeneration": "the same, and causal by a mask alone where there is one",
    "GPT2LMHeadModel + cross attention": "a decoder with cross attention in every layer",
    "MllamaForCausalLM + cross attention": "a decoder with cross attention in some",
    "BertModel": "an encoder",
    "LlamaModel not causal": "a decoder made an encoder",
}
