"""What the tests of the plug-in in SGLang share. `./dev check sglang` runs them, by the Python of `tools/venv.py sglang`."""

import contextlib
import logging
import pathlib
import sys
import types

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import engine  # noqa: F401 # SGLang's environment, and what stands for sgl_kernel

# isort: split
import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.distributed.parallel_state_wrapper import ParallelState
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers import scheduler
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.server_args import ServerArgs

import pbsattn_sglang
import torch_flash
from pbsattn_sglang import taking
from tiny_models import save_model

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 64, 2
REQUESTS, LONGEST = 6, 1024  # of the pools


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a model."""
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session", autouse=True)
def sglang_as_started(model):
    """SGLang's configuration, which its backends read, and its FlashAttention's kernels in PyTorch."""
    scheduler.publish(ServerArgs(model_path=model, device="cpu", skip_tokenizer_init=True), role="scheduler")
    torch_flash.install()


@pytest.fixture
def log(monkeypatch):
    """What the plug-in logs."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(taking.teller, "warned", set())
    monkeypatch.setattr(pbsattn_sglang.log, "level", logging.INFO)
    pbsattn_sglang.log.addHandler(handler)
    yield messages
    pbsattn_sglang.log.removeHandler(handler)


class Model(torch.nn.Module):
    """Layers with attention, called as those of a model."""

    def __init__(self, **layer):
        super().__init__()
        given = {"num_heads": HEADS, "head_dim": DIM, "scaling": DIM**-0.5, "num_kv_heads": KV_HEADS, **layer}
        self.layers = torch.nn.ModuleList(RadixAttention(layer_id=i, **given) for i in range(LAYERS))


def runner_of(page_size=16, window=None, args=None, **layer):
    """What SGLang's FlashAttention and the plug-in ask of a model runner, with pools of its own."""
    config = types.SimpleNamespace(
        is_encoder_decoder=False,
        context_len=LONGEST,
        attention_arch=AttentionArch.MHA,
        is_local_attention_model=False,
        head_dim=DIM,
        hf_text_config=types.SimpleNamespace(num_attention_heads=HEADS),
        get_num_kv_heads=lambda _: KV_HEADS,
        get_total_num_kv_heads=lambda: KV_HEADS,
        num_hidden_layers=LAYERS,
    )
    server = types.SimpleNamespace(
        speculative_eagle_topk=None,
        speculative_algorithm=None,
        enable_deterministic_inference=False,
        is_embedding=False,
        chunked_prefill_size=512,
        disable_radix_cache=False,
        enable_prefill_cp=False,
        enable_dp_attention=False,
        enable_two_batch_overlap=False,
        enable_pdmux=False,
        cuda_graph_config=types.SimpleNamespace(prefill=types.SimpleNamespace(backend="breakable")),
    )
    for name, value in (args or {}).items():
        setattr(server, name, value)
    pool = MHATokenToKVPool(
        size=REQUESTS * LONGEST,
        page_size=page_size,
        dtype=torch.float32,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    for each in (*pool.k_buffer, *pool.v_buffer):
        each.normal_()
    return types.SimpleNamespace(
        sliding_window_size=None if window is None else window - 1,
        model_config=config,
        device="cpu",
        dtype=torch.float32,
        req_to_token_pool=ReqToTokenPool(size=REQUESTS, max_context_len=LONGEST, device="cpu", enable_memory_saver=False),
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=object(),
        kv_cache_dtype=torch.float32,
        kv_cache_dtype_str="auto",
        page_size=page_size,
        ps=ParallelState.trivial(),
        is_draft_worker=False,
        server_args=server,
        attention_chunk_size=None,
        model=Model(sliding_window_size=-1 if window is None else window - 1, **layer),
    )


@pytest.fixture
def settings(monkeypatch):
    """A function that sets variables for the plug-in; rows of 64 tokens are taken, by all blocks."""

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"PBSATTN_{name.upper()}", value)

    set_variables(method="pbs:top_p=1", min_tokens="64")
    return set_variables


@contextlib.contextmanager
def attribute(of, name, value):
    """Sets an attribute that may not have been there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, name, value, raising=False)
        yield
