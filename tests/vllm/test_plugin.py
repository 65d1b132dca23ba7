"""The plug-in's pieces against vLLM's own classes, without an engine."""

import contextlib
import importlib.metadata
import sys
import types

import pytest
import torch
import vllm
from vllm.config import CacheConfig
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import workspace

import pbsattn
import pbsattn_vllm
from conftest import logged
from pbsattn.serving import settings
from pbsattn.serving.layers import Facts
from pbsattn_vllm import backend, left, taking
from pbsattn_vllm.memory import Buffer

CUSTOM, FLASH = AttentionBackendEnum.CUSTOM, AttentionBackendEnum.FLASH_ATTN


@pytest.fixture
def registered():
    """A function that registers the plug-in, until the end; it returns the classes of CUSTOM and FLASH_ATTN, and the log."""

    def register():
        log = []
        with logged(log):
            pbsattn_vllm.register()
        return CUSTOM.get_class(), FLASH.get_class(), log

    yield register
    register_backend(FLASH, "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend")


def test_vllm_finds_it():
    found = [each for each in importlib.metadata.entry_points(group="vllm.general_plugins") if each.name == "pbsattn"]
    assert [each.load() for each in found] == [pbsattn_vllm.register]


def test_registering(registered):
    for _ in range(2):
        custom, flash, log = registered()
        assert custom is backend.Backend and custom.get_name() == "CUSTOM"
        assert flash is flash_attn.FlashAttentionBackend and log == []


def test_over_flash_attention(registered, monkeypatch):
    monkeypatch.setenv("PBSATTN_OVER_FLASH_ATTN", "1")
    custom, flash, _ = registered()
    assert custom is backend.Backend and flash is backend.OverFlashAttention and flash.get_name() == "FLASH_ATTN"


@pytest.mark.parametrize(
    ("variable", "version", "told"),
    [
        (("PBSATTN_METHOD", "pbz"), "0.26.0", "PBSATTN_METHOD: .*no such method"),
        (("PBSATTN_CONFIG", "/no/such.json"), "0.26.0", "No such file.*/no/such.json"),
        (("PBSATTN_UNSUPPORTED", "stop"), "0.26.0", "PBSATTN_UNSUPPORTED"),
        (("PBSATTN_OVER_FLASH_ATTN", "1"), "0.27.0", "vLLM 0.27.0: not tested with pbsattn-vllm .*, which was with 0.26.0"),
    ],
)
def test_what_cannot_be_used_leaves_everything(registered, monkeypatch, variable, version, told):
    monkeypatch.setenv(*variable)
    monkeypatch.setattr(vllm, "__version__", version)
    custom, flash, log = registered()
    assert custom is left.LeftAlone and flash is flash_attn.FlashAttentionBackend
    assert custom.get_impl_cls() is flash_attn.FlashAttentionImpl
    assert custom.get_builder_cls() is flash_attn.FlashAttentionMetadataBuilder
    (line,) = log
    assert line.endswith("every layer is left to FlashAttention")
    if variable[0] != "PBSATTN_UNSUPPORTED":
        monkeypatch.setenv("PBSATTN_UNSUPPORTED", "refuse")
        with pytest.raises(ValueError, match=told):
            registered()


def test_without_the_runtime(registered, monkeypatch):
    """As where only the plug-in is installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pbsattn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pbsattn", None)
    custom, _, (line,) = registered()
    assert custom is left.LeftAlone and "import of pbsattn" in line


def test_with_another_runtime(registered, monkeypatch):
    monkeypatch.setattr(pbsattn, "__version__", "0.1.0")
    custom, _, (line,) = registered()
    assert custom is left.LeftAlone and "pbsattn 0.1.0, pbsattn-vllm" in line


@pytest.mark.parametrize("error", [NotImplementedError, RecursionError, TypeError, AttributeError, RuntimeError])
def test_no_error_stops_vllm_but_one_that_was_asked_for(registered, monkeypatch, tmp_path, error):
    def read():
        raise error("what is wrong")

    monkeypatch.setattr(settings, "read", read)
    custom, _, (line,) = registered()
    assert custom is left.LeftAlone and line == "pbsattn: what is wrong; every layer is left to FlashAttention"
    (tmp_path / "c.json").write_text('{"unsupported": "refuse"}')
    monkeypatch.setenv("PBSATTN_CONFIG", str(tmp_path / "c.json"))
    with pytest.raises(ValueError, match="pbsattn: what is wrong"):
        registered()


def test_a_vllm_without_its_registry(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    log = []
    with logged(log):
        pbsattn_vllm.register()
    assert len(log) == 1 and log[0].endswith("there is no backend CUSTOM")
    monkeypatch.setenv("PBSATTN_UNSUPPORTED", "refuse")
    with pytest.raises(ValueError, match="pbsattn: import of vllm"):
        pbsattn_vllm.register()


@pytest.mark.parametrize(
    ("kind", "given", "made"),
    [
        (backend.Backend, None, 128),
        (backend.OverFlashAttention, None, 128),
        (left.LeftAlone, None, 16),
        (backend.Backend, 32, 32),
    ],
)
def test_pages_are_tiles_where_the_user_names_no_size(monkeypatch, kind, given, made):
    monkeypatch.setattr(Platform, "_find_non_ssm_backend", classmethod(lambda *_: kind))
    config = types.SimpleNamespace(
        cache_config=CacheConfig(block_size=given), model_config=types.SimpleNamespace(is_hybrid=False)
    )
    monkeypatch.setattr(vllm.config.vllm, "set_current_vllm_config", lambda _: contextlib.nullcontext())
    Platform.update_block_size_for_backend(config)
    assert config.cache_config.block_size == made


def test_graphs_hold_no_batch_with_a_prefill():
    assert backend.Builder._cudagraph_support == AttentionCGSupport.UNIFORM_BATCH
    assert not backend.Builder.supports_update_block_table


def test_memory_lies_in_vllms_workspace(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    device = torch.device("cpu")
    workspace.init_workspace_manager(device)
    try:
        buffer = Buffer()
        buffer.reserve(1000, device)
        buffer.reserve(4096, device)
        manager = workspace.current_workspace_manager()
        (whole,) = manager.get_simultaneous(((4096,), torch.uint8))
        first, second = buffer.take(1000, 3000, device)
        assert (first.numel(), second.numel()) == (1000, 3000) and buffer.left(1000) == 4096 - 1024
        assert first.data_ptr() == whole.data_ptr() and second.data_ptr() == whole.data_ptr() + 1024
        manager.lock()
        with pytest.raises(MemoryError, match="locked"):
            buffer.reserve(5000, device)
        with pytest.raises(MemoryError, match="4096 are reserved"):
            buffer.take(1000, 3500, device)
        assert buffer.take(1000, 3000, device)[0].data_ptr() == whole.data_ptr()
    finally:
        workspace.reset_workspace_manager()


NAMES = ["model.layers.0.attn", "model.layers.1.attn", "mtp.layers.0.attn", "draft.layers.1.attn", "model.layers.2.attn"]


@pytest.mark.parametrize(
    ("name", "own", "draft"),
    [
        ("model.layers.0.attn", False, False),
        ("model.layers.1.attn", False, True),
        ("draft.layers.1.attn", False, True),
        ("mtp.layers.0.attn", False, True),
        ("model.layers.2.attn", False, False),
        ("model.layers.2.attn", True, True),
        ("model.layers.3.attn", False, True),
    ],
)
def test_layers_of_drafts(name, own, draft):
    """Of a model of three layers; own: the draft model's configuration is the layer's."""
    model = object()
    speculative = types.SimpleNamespace(draft_model_config=model if own else object())
    config = types.SimpleNamespace(model_config=model, speculative_config=speculative)
    facts = Facts(name, "Attention", "decoder", 1, 1, 64, 64, 1.0, "float32", "float32", model_layers=3)
    assert taking.is_draft(facts, config, NAMES) is draft
    config.speculative_config = None
    assert taking.is_draft(facts, config, NAMES) is False


@pytest.mark.parametrize(
    ("batched", "scheduled", "threshold", "most"),
    [(256, None, 0, 256), (256, 200, 0, 200), (256, None, 40, 40), (256, 200, 300, 200), (4096, None, 0, 1024)],
)
def test_most_tokens_of_a_chunk(batched, scheduled, threshold, most):
    scheduler = types.SimpleNamespace(
        max_num_batched_tokens=batched, max_num_scheduled_tokens=scheduled, long_prefill_token_threshold=threshold
    )
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=1024), scheduler_config=scheduler)
    assert taking.most_tokens(config) == (most, 1024)
