"""What SGLang's layers are to the rules: facts, by an allow-list over its runner, backend, pool and layers."""

import typing

import torch

from pbsattn.serving.layers import Facts, Layer, index_of, layer_of
from pbsattn.serving.settings import Settings
from pbsattn.serving.telling import Teller

from . import log

teller = Teller(log)

POOLS = ("MHATokenToKVPool", "SWAKVPool", "HybridLinearKVPool")  # their keys lie a token's after another's


def most_tokens(runner: typing.Any) -> tuple[int, int]:
    """The most tokens that a row, and that its sequence, can have."""
    sequence, chunk = runner.model_config.context_len, runner.server_args.chunked_prefill_size
    return min(sequence, chunk) if chunk and chunk > 0 else sequence, sequence


def reason_for_all(runner: typing.Any, backend: typing.Any) -> str | None:
    """Why every layer of a model is left, of what its layers' facts don't say; None if there is no reason."""
    args, pool = runner.server_args, runner.token_to_kv_pool
    own = getattr(pool, "full_kv_pool", pool)  # of the layers without a window, or with attention at all
    rules = {
        "it is MLA": backend.use_mla,
        "the model has an encoder": backend.is_encoder_decoder,
        "attention is data-parallel": args.enable_dp_attention,
        "prefills and decodes share the GPU (PD multiplexing)": args.enable_pdmux,
        "whole prefills are CUDA graphs; take another --cuda-graph-backend-prefill": (
            args.cuda_graph_config.prefill.backend == "full"
        ),
        "windows follow the prompt's length": backend.is_prefill_aware_swa,
        "prefills don't go through the KV cache": backend.fa_skip_kv_cache,
        f"its KV cache is a {type(pool).__name__} of {type(own).__name__}": (
            type(pool).__name__ not in POOLS or type(own).__name__ != POOLS[0]
        ),
        "its KV cache is quantised": getattr(own, "is_quantized_kv_cache", False),
        f"its KV cache lies as {getattr(own, 'kv_cache_layout', None)}": getattr(own, "kv_cache_layout", "nhd") != "nhd",
    }
    return next((reason for reason, holds in rules.items() if holds), None)


def reason_for(layer: typing.Any, name: str, backend: typing.Any) -> str | None:
    """Why a layer is left, of what facts don't say; None if there is no reason."""
    windowed = layer.sliding_window_size > -1
    rules = {
        "it attends across to an encoder": layer.is_cross_attention,
        "it attends in chunks (iRoPE)": backend.has_local_attention and layer.use_irope,
        f"its positions are encoded as {layer.pos_encoding_mode}": layer.pos_encoding_mode != "NONE",
        f"its logits are capped by {layer.logit_capping_method}": bool(layer.logit_cap)
        and layer.logit_capping_method != "tanh",
        "its logits are scaled by length": layer.xai_temperature_len > 0,
        "its KV cache has scales": backend.kv_cache_dtype_str != "auto" and layer.k_scale is not None,
        "its keys are in the pool of sliding windows": windowed and backend.use_sliding_window_kv_pool,
        f"its layer_id is {layer.layer_id}": index_of(name) not in (None, layer.layer_id),
    }
    return next((reason for reason, holds in rules.items() if holds), None)


def facts_of(layer: typing.Any, name: str, runner: typing.Any, backend: typing.Any, other: str | None) -> Facts:
    """The facts of a layer of SGLang's, which is called so in its model. other: why all layers are left, if they are."""
    from sglang.srt.layers.radix_attention import RadixAttention

    args, model = runner.server_args, runner.model_config
    return Facts(
        name=name,
        kind="Attention" if type(layer) is RadixAttention else type(layer).__name__,
        attn_type=str(getattr(layer.attn_type, "value", layer.attn_type)),
        q_heads=layer.tp_q_head_num,
        kv_heads=layer.tp_k_head_num,
        head_dim=layer.head_dim,
        head_dim_v=layer.v_head_dim,
        scale=layer.scaling,
        dtype=str(runner.dtype).removeprefix("torch."),
        cache_dtype=str(backend.kv_cache_dtype).removeprefix("torch."),
        page_size=backend.page_size,
        window=layer.sliding_window_size + 1 if layer.sliding_window_size > -1 else None,  # SGLang counts those before
        softcap=float(layer.logit_cap or 0),
        draft=runner.is_draft_worker,
        other=other or reason_for(layer, name, backend),
        model_layers=model.num_hidden_layers,
        model_kv_heads=model.get_total_num_kv_heads(),
        rope_pairs=rope_pairs(),
        context_parallel=runner.ps.attn_cp_size > 1 or runner.ps.dcp_size > 1,
        micro_batches=args.enable_two_batch_overlap,
        batch_invariant=args.enable_deterministic_inference,
        rank=runner.ps.attn_tp_rank,
        ranks=runner.ps.attn_tp_size,
        device=torch.device(runner.device).type,
    )


def rope_pairs() -> str | None:
    """Which columns of their keys the process's models turn together, "halves" or "neighbours"; None if not all the same."""
    from sglang.srt.layers.rotary_embedding import factory

    styles = {bool(getattr(rope, "is_neox_style", None)) for rope in factory._ROPE_DICT.values()}
    return {True: "halves", False: "neighbours"}[styles.pop()] if len(styles) == 1 else None


def layers_of(runner: typing.Any, backend: typing.Any, settings: Settings) -> dict[str, tuple[typing.Any, Layer | str]]:
    """By name: the model's layers with attention, and each as pbsattn takes it, or why it is left. Raises Refused."""
    from sglang.srt.layers.radix_attention import RadixAttention

    other = reason_for_all(runner, backend)
    found: dict[str, tuple[typing.Any, Layer | str]] = {}
    for name, layer in runner.model.named_modules():
        if isinstance(layer, RadixAttention):
            taken = layer_of(facts_of(layer, name, runner, backend, other), settings, *most_tokens(runner))
            found[name] = layer, taken
    return found
