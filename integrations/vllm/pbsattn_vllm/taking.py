"""What vLLM's layers are to the rules, what is reserved for them, and what is told at start."""

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping, Sequence

import torch

from pbsattn.serving.layers import Facts, Layer, index_of, layer_of
from pbsattn.serving.settings import Settings, read
from pbsattn.serving.stats import Recorder
from pbsattn.serving.telling import Teller

from . import log
from .memory import buffer

recorder = Recorder(log)
teller = Teller(log)

MTP = re.compile(r"(^|\.)mtp(\.|$)")  # in names of layers that predict tokens ahead


@functools.cache
def settings() -> Settings:
    """The settings of this process, which `register` checked."""
    return read()


def most_tokens(config: typing.Any) -> tuple[int, int]:
    """The most tokens that a row, and that its sequence, can have."""
    sequence, scheduler = config.model_config.max_model_len, config.scheduler_config
    bounds = (scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens, scheduler.long_prefill_token_threshold)
    return min(sequence, *(bound for bound in bounds if bound)), sequence


def least_tokens(config: typing.Any) -> int:
    """The least tokens of a row that is taken: more than a verified draft has.

    vLLM replays the CUDA graph of a step of decodes for every batch whose rows are as long as those, prefills or not.
    """
    return max(settings().min_tokens, 2 + config.num_speculative_tokens)


def facts_of(layer: typing.Any, config: typing.Any) -> Facts:
    """The facts of a layer of vLLM's, of the engine's configuration under which it was made."""
    import vllm.envs
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.attention import Attention

    impl, parallel, model = layer.impl, config.parallel_config, config.model_config
    facts = Facts(
        name=layer.layer_name,
        kind="Attention" if type(layer) is Attention else type(layer).__name__,
        attn_type=str(getattr(layer.attn_type, "value", layer.attn_type)),
        q_heads=layer.num_heads,
        kv_heads=layer.num_kv_heads,
        head_dim=layer.head_size,
        head_dim_v=layer.head_size_v,
        scale=impl.scale,
        dtype=str(layer.dtype).removeprefix("torch."),
        cache_dtype=str(layer.kv_cache_torch_dtype).removeprefix("torch."),
        window=layer.sliding_window,
        alibi=impl.alibi_slopes is not None,
        softcap=float(impl.logits_soft_cap or 0),
        sinks=layer.has_sink or impl.sinks is not None,
        shares_cache=layer.kv_sharing_target_layer_name is not None,
        bidirectional_ranges=layer.use_mm_prefix,
        model_layers=model.get_total_num_hidden_layers(),
        model_kv_heads=model.get_total_num_kv_heads(),
        rope_pairs=rope_pairs(),
        context_parallel=parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        micro_batches=parallel.use_ubatching,
        batch_invariant=bool(vllm.envs.VLLM_BATCH_INVARIANT),
        rank=get_tensor_model_parallel_rank(),
        ranks=parallel.tensor_parallel_size,
        device=torch.device(config.device_config.device).type,
        page_size=config.cache_config.block_size,
    )
    of_name = config.compilation_config.static_forward_context
    attention = [name for name, each in of_name.items() if isinstance(each, Attention)]
    return dataclasses.replace(facts, draft=is_draft(facts, config, attention))


def rope_pairs() -> str | None:
    """Which columns of their keys the process's models turn together, "halves" or "neighbours"; None if not all the same."""
    from vllm.model_executor.layers import rotary_embedding

    styles = {bool(getattr(rope, "is_neox_style", None)) for rope in rotary_embedding._ROPE_DICT.values()}
    return {True: "halves", False: "neighbours"}[styles.pop()] if len(styles) == 1 else None


def is_draft(facts: Facts, config: typing.Any, attention: Sequence[str]) -> bool:
    """Whether a layer is a draft model's, or can't be told from one; attention: names of all layers with attention.

    vLLM makes the layers of some drafts under the target's configuration, and numbers those of some from 0.
    """
    speculative, index = config.speculative_config, facts.index
    if speculative is None:
        return False
    if config.model_config is speculative.draft_model_config or MTP.search(facts.name):
        return True
    same = sum(index_of(name) == index for name in attention if not MTP.search(name))
    return index is not None and (index >= facts.model_layers or same > 1)


def left_or_taken(layer: typing.Any) -> Layer | str:
    """A layer of vLLM's as pbsattn takes it, or why it is left; found once. Raises Refused where settings say so."""
    found = getattr(layer.impl, "pbsattn_layer", None)
    if found is None:
        config = getattr(layer.impl, "pbsattn_config", None)
        if config is None:
            return f"its attention is {type(layer.impl).__name__}'s"
        found = layer_of(facts_of(layer, config), settings(), *most_tokens(config))
        layer.impl.pbsattn_layer = found
        if isinstance(found, Layer):
            recorder.last_layer = max(recorder.last_layer, found.index)
    return found


def reserve(layer: Layer, config: typing.Any, device: torch.device) -> None:
    """Reserves what the greatest row takes, up to the cap; warns where that isn't enough for it. Raises Refused."""
    if told := buffer.reserve_row(layer, *most_tokens(config), settings(), device):
        teller.warn_once("memory", told)


def tell(layers: Mapping[str, Layer | str], config: typing.Any) -> None:
    """Logs which layers of a KV cache group are taken and how, and which are left and why; the first of the ranks does.

    That nothing can be taken is said of all groups: of one of sliding layers alone it may hold where the others are taken.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() != 0:
        return
    import vllm

    least, most = least_tokens(config), most_tokens(config)
    bounds = "max_num_batched_tokens, long_prefill_token_threshold"
    of_name = config.compilation_config.static_forward_context
    rest = [left_or_taken(each) for name, each in of_name.items() if name not in layers and hasattr(each, "impl")]
    others = [layer for layer in rest if isinstance(layer, Layer)]
    teller.layers(layers, f"vLLM {vllm.__version__}", settings(), least, most, bounds, buffer.size, others)
