"""What the tests of the plug-in in vLLM share. `./dev check vllm` runs them, with the Python of `tools/venv.py vllm`."""

import contextlib
import dataclasses
import logging
import pathlib
import sys
import typing

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.extend(str(pathlib.Path(__file__).parents[1] / folder) for folder in ("python", "support"))

import engine
import pbsattn_vllm
import torch_flash
from pbsattn.serving import layers
from pbsattn_vllm import impl, memory, taking
from tiny_models import prompt, save_model

REQUESTS = {
    # Chunks of 256, of which the last is too short to be taken.
    "chunks": [(prompt(1, 800), 4)],
    # All but the end of the first prompt is in the prefix cache.
    "prefix": [(prompt(1, 800)[:640] + prompt(7, 250), 4)],
    "whole": [(prompt(2, 200), 4)],
    # Decodes beside prefills, and short prefills beside long ones.
    "mixed": [(prompt(3, 90), 20), (prompt(4, 500), 6), (prompt(5, 20), 12), (prompt(6, 333), 6)],
    # More tokens than the cache holds: somebody is preempted, and computed again.
    "preempted": [(prompt(10 + i, 380), 28) for i in range(3)],
}
ABORTED = [(prompt(20, 700), 4), (prompt(21, 300), 6), (prompt(22, 120), 6)]


@dataclasses.dataclass
class Ran:
    """What an engine answered, and what the plug-in did meanwhile."""

    answers: dict[str, list[typing.Any]] = dataclasses.field(default_factory=dict)
    # By set of requests, {layer: rows} that pbsattn computed, and how often somebody was preempted.
    rows: dict[str, dict[int, list[typing.Any]]] = dataclasses.field(default_factory=dict)
    preemptions: dict[str, int] = dataclasses.field(default_factory=dict)
    mixed_calls: int = 0  # of a layer, that computed rows by both
    layouts: set[str] = dataclasses.field(default_factory=set)  # of the cache's pages
    log: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of models by name."""
    return {
        "llama": save_model(tmp_path_factory.mktemp("llama")),
        "mistral": save_model(tmp_path_factory.mktemp("mistral"), sliding_window=300),
    }


@contextlib.contextmanager
def watched(ran, rows):
    """Sees to it that a layer computes every token once, and notes which rows pbsattn computes."""
    from vllm.v1.core.sched.scheduler import Scheduler

    forward, row, preempt = impl.RowsImpl.forward, impl.RowsImpl._row, Scheduler._preempt_request
    tokens = 0

    def watched_row(taken, which, *rest):
        nonlocal tokens
        row(taken, which, *rest)
        tokens += which.tokens
        rows.setdefault(taken.index, []).append(which)

    def watched_forward(self, layer, query, key, value, kv_cache, metadata, output, *rest, **named):
        nonlocal tokens
        if metadata is None:
            return forward(self, layer, query, key, value, kv_cache, metadata, output, *rest, **named)
        tokens, torch_flash.calls.tokens = 0, 0
        output.fill_(float("nan"))
        result = forward(self, layer, query, key, value, kv_cache, metadata, output, *rest, **named)
        count = int(metadata.query_start_loc[-1])
        assert tokens + torch_flash.calls.tokens == count, "a token was computed twice, or not at all"
        assert result is output and output[:count].isfinite().all()
        ran.mixed_calls += bool(tokens and torch_flash.calls.tokens)
        ran.layouts.add("HND" if kv_cache.is_contiguous() else "NHD")
        return result

    def watched_preempt(self, *given, **named):
        ran.preemptions["now"] = ran.preemptions.get("now", 0) + 1
        return preempt(self, *given, **named)

    impl.RowsImpl.forward, impl.RowsImpl._row = watched_forward, staticmethod(watched_row)
    Scheduler._preempt_request = watched_preempt
    try:
        yield
    finally:
        impl.RowsImpl.forward, impl.RowsImpl._row, Scheduler._preempt_request = forward, staticmethod(row), preempt


@contextlib.contextmanager
def logged(messages):
    """Appends what the plug-in logs."""
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    pbsattn_vllm.log.addHandler(handler)
    try:
        yield
    finally:
        pbsattn_vllm.log.removeHandler(handler)


def run(
    model, block_size=16, sets=REQUESTS, variables=None, layout="NHD", aborting=True, ranks=1, in_place=True, abort=None
):
    """What an engine made of sets of requests: with `variables` by the plug-in, else by vLLM's own attention on the CPU.

    in_place: the library reads pages; else as where it refuses them. abort: {set: {request: after so many steps}}.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import utils
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    ran = Ran()
    with pytest.MonkeyPatch.context() as patch, logged(ran.log):
        # As in a process of its own.
        for cached in (taking.settings, selector._cached_get_attn_backend, utils.get_kv_cache_layout):
            cached.cache_clear()
        patch.setattr(utils, "_KV_CACHE_LAYOUT_OVERRIDE", None)
        patch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
        patch.setattr(memory.buffer, "size", 0)
        patch.setattr(taking.recorder, "last_layer", -1)
        patch.setattr(taking.teller, "warned", set())
        if not in_place:
            patch.setattr(layers, "reads_pages", lambda _: False)
        own = AttentionBackendEnum.CPU_ATTN
        if variables is not None:
            torch_flash.install()
            for name, value in {"PBSATTN_MIN_TOKENS": str(engine.MIN_TOKENS), **variables}.items():
                patch.setenv(name, value)
            register_backend(own, "pbsattn_vllm.backend.Backend")
        try:
            served = engine.Engine(model, block_size, ranks)
            free = served.free_blocks
            for name, requests in sets.items():
                ran.rows[name] = {}
                with watched(ran, ran.rows[name]):
                    ran.answers[name] = served.serve(requests, (abort or {}).get(name))
                ran.preemptions[name] = ran.preemptions.pop("now", 0)
            if aborting:
                ran.answers["aborted"] = served.serve(ABORTED, abort={0: 2})
            assert served.free_blocks == free, "blocks of the cache are lost"
            served.close()
        finally:
            register_backend(own, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend")
    return ran


@pytest.fixture(scope="session")
def dense(models):
    """What vLLM's own attention answers."""
    return run(models["llama"])
