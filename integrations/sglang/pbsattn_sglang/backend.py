"""The backend that `register` names: SGLang's FlashAttention with pbsattn's rows before it."""

import typing

import sglang
import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

from pbsattn.serving.layers import Layer
from pbsattn.serving.memory import Buffer
from pbsattn.serving.settings import read
from pbsattn.serving.stats import Recorder

from . import log
from .rows import RowsBackend
from .taking import layers_of, most_tokens, teller

buffer, recorder = Buffer(), Recorder(log)  # of the process, whose models and backends take turns


class Backend(RowsBackend, FlashAttentionBackend):
    """As `--prefill-attention-backend pbs` chooses it."""


def create(own: typing.Any, runner: typing.Any) -> typing.Any:
    """A backend for a model, beside SGLang's own, which is given back where no layer is taken. Raises Refused.

    Reserves memory for the greatest row.
    """
    if type(own) is not FlashAttentionBackend:
        log.warning("pbsattn: SGLang's fa3 is %s here; every layer is left to it", type(own).__name__)
        return own
    settings = read()
    found = layers_of(runner, own, settings)
    taken = {layer: each for layer, each in found.values() if isinstance(each, Layer)}
    tokens, kv_len = most_tokens(runner)
    for each in taken.values():
        recorder.last_layer = max(recorder.last_layer, each.index)
        if told := buffer.reserve_row(each, tokens, kv_len, settings, torch.device(runner.device)):
            teller.warn_once("memory", told)
    if runner.ps.tp_rank == 0:
        server = f"SGLang {sglang.__version__}"
        of_name = {name: each for name, (_, each) in found.items()}
        teller.layers(of_name, server, settings, settings.min_tokens, (tokens, kv_len), "chunked_prefill_size", buffer.size)
    return Backend(runner, taken, buffer, recorder, settings) if taken else own
