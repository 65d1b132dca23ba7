"""The plug-in's pieces against vLLM's own classes, without an engine."""

import importlib.metadata
import sys

import pytest
import torch
import vllm
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import workspace

import pbsattn_vllm
from conftest import logged
from pbsattn_vllm import backend, left
from pbsattn_vllm.memory import Buffer
from pbsattn_vllm.metadata import slice_batch
from pbsattn_vllm.rows import runs_between, take

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
    for name in [name for name in sys.modules if name.split(".")[0] == "pbsattn" or name == "pbsattn_vllm.settings"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pbsattn_vllm, "settings")
    monkeypatch.setitem(sys.modules, "pbsattn", None)
    custom, _, (line,) = registered()
    assert custom is left.LeftAlone and "import of pbsattn" in line


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


def test_runs_are_batches_of_their_own():
    """As vLLM's second model runner hands them over: decodes first, tensors longer than the batch."""
    tokens, lens = [1, 1, 5, 300, 400], [90, 7, 5, 300, 900]
    starts = torch.tensor([0, *tokens]).cumsum(0).int()
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu_upper_bound=torch.tensor(lens),
        num_reqs=5,
        num_actual_tokens=707,
        max_query_len=400,
        max_seq_len=900,
        block_table_tensor=torch.arange(8 * 60).view(8, 60).int(),
        slot_mapping=torch.arange(1024),
        positions=torch.arange(1024),
        is_prefilling=torch.tensor([False, False, True, True, True]),
    )
    rows = take(starts.tolist(), lens, common.is_prefilling.tolist(), 256)
    assert [row.index for row in rows] == [3, 4]
    (run,) = runs_between(starts.tolist(), rows)
    part = slice_batch(common, run)
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len, part.max_seq_len) == (3, 7, 5, 90)
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist() == [0, 1, 2, 7]
    assert part.seq_lens.tolist() == part.seq_lens_cpu_upper_bound.tolist() == lens[:3]
    assert part.slot_mapping.tolist() == part.positions.tolist() == list(range(7))
    last = slice_batch(common, run._replace(first=4, last=5, begin=307, end=707))
    assert last.query_start_loc.tolist() == [0, 400] and last.slot_mapping.tolist() == list(range(307, 707))
    assert torch.equal(last.block_table_tensor, common.block_table_tensor[4:5]) and last.is_prefilling.tolist() == [True]
    assert common.num_reqs == 5 and common.query_start_loc.tolist() == starts.tolist()
