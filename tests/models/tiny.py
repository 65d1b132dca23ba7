"""Builds tiny random models of transformers' classes, in which attention matters."""

import re

import torch
import transformers

TOKENS = 96  # in the vocabulary
WIDTH = 64

# What a config is given of these, if it has an attribute of that name; cases.py overrides them by class.
SIZES = {
    "vocab_size": TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 2048,
    "n_positions": 2048,
    "max_source_positions": 512,
    "max_target_positions": 512,
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "embed_dim",
            "intermediate_size",
            "moe_intermediate_size",
            "n_inner",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "d_ff",
            "ffn_hidden_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "embedding_size",
            "expert_ffn_hidden_size",
            "dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "depth",
            "num_decoder_layers",
            "encoder_num_hidden_layers",
            "decoder_num_hidden_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "encoder_num_attention_heads",
            "decoder_num_attention_heads",
        ),
        2,
    ),
    "num_key_value_heads": 1,
    "head_dim": 32,
    "attention_head_dim": 32,
    "d_kv": 32,
    "rotary_dim": 8,
    # Every expert is used, so that no rounding changes which are.
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_num_experts",
            "moe_k",
            "moe_topk",
            "top_k_experts",
        ),
        2,
    ),
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "sliding_window": 64,
    "attention_chunk_size": 64,
    "attn_logit_softcapping": 0.25,  # of logits that are mostly larger
    "index_topk": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "num_mel_bins": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "forced_eos_token_id": None,
    "use_cache": True,
    "is_decoder": True,
}


_NONE_STAYS = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "q_lora_rank")


def _layers(config):
    return next(
        (
            getattr(config, name)
            for name in ("num_hidden_layers", "n_layer", "num_layers")
            if isinstance(getattr(config, name, None), int)
        ),
        None,
    )


def _by_layer(config):
    """The lists of a config that tell something of every layer."""
    count = _layers(config)
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple))
        and count
        and len(value) == count
        and not name.startswith("_")
        and name != "per_layer_config"
    }


def _picked(lists):
    """Layers that show every kind there is, in their order, and at least two."""
    kinds = list(zip(*(map(repr, value) for value in lists.values())))
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return sorted(set((first + [i for i in range(len(kinds)) if i not in first][: max(0, 2 - len(first))])[:4]))


def settings(config_class, changes=None):
    """What config_class is made of: SIZES, as far as it knows them, one layer of each kind, and `changes`."""
    default = config_class()
    has = vars(default)
    changes = dict(changes or {})
    known = {name: value for name, value in SIZES.items() if name in has and not (has[name] is None and name in _NONE_STAYS)}
    if (
        "kv_lora_rank" in has
    ):  # latent attention: as many heads of keys as of queries, and values narrower than keys where they are
        same = has["qk_nope_head_dim"] + has["qk_rope_head_dim"] == has["v_head_dim"]
        known |= {"num_key_value_heads": 2, "head_dim": 16, "v_head_dim": 32 if same else 16}
    if lists := _by_layer(default):
        picked = _picked(lists)
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in known:
                known[name] = len(picked)
        known |= {name: [value[i] for i in picked] for name, value in lists.items()}
    if "layer_types" in changes:
        known["num_hidden_layers"] = len(changes["layer_types"])
    for name in getattr(config_class, "sub_configs", {}):
        part = has.get(name)
        if isinstance(part, transformers.PreTrainedConfig):
            known[name] = settings(type(part), changes.pop(name, None)) | {"model_type": part.model_type}
    return known | changes


def config(config_class, changes=None):
    return config_class(**settings(config_class, changes))


@torch.no_grad()
def randomize(model, gain=1.0):
    """Gives every weight a size at which it matters, whatever the class's own initialization (which often adds zeros)."""
    torch.manual_seed(0)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    seen = set()
    for name, weight in model.named_parameters():
        if id(weight) in seen or not weight.is_floating_point() or re.search(r"A_log|dt_bias|\.D$", name):
            continue
        seen.add(id(weight))
        if id(weight) in embeddings:
            weight.normal_(std=gain)
        elif name.endswith("sinks"):
            weight.normal_()
        elif weight.dim() >= 2:
            weight.normal_(std=gain / max(1, weight[0].numel() if weight.dim() != 3 else weight.shape[-1]) ** 0.5)
        elif not weight.any():
            weight.normal_(std=0.3)
    return model.eval().float()


def build(model_class, made, gain=1.0):
    if sum(weight.numel() for weight in _on_meta(model_class, made).parameters()) > 60e6:
        raise ValueError("more than 60 million weights")
    torch.manual_seed(0)
    return randomize(model_class(made), gain)


def _on_meta(model_class, made):
    import copy

    with torch.device("meta"):
        return model_class(copy.deepcopy(made))
