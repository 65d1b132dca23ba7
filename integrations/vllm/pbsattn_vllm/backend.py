"""The backends that `register` names: vLLM's FlashAttention with pbsattn's rows before it."""

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

from .impl import RowsImpl
from .left import LeftAlone
from .metadata import RowsBuilder


class Builder(RowsBuilder, FlashAttentionMetadataBuilder):
    """vLLM's builder, which also says what of a batch is pbsattn's."""

    # A graph of a whole model step holds no batch but one of decodes: which rows are taken is decided on the host.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH


class Impl(RowsImpl, FlashAttentionImpl):
    """vLLM's layer, whose long rows are pbsattn's."""


class Backend(LeftAlone):
    """As `--attention-backend CUSTOM` chooses it."""

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Returns tokens of a page where no --block-size is given: as many as kernels load at once, for which a tile of keys
        that is read in place is one copy. vLLM's 16 make it eight."""
        return max(super().get_preferred_block_size(default_block_size), 128)

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class OverFlashAttention(Backend):
    """The same in the place of FLASH_ATTN."""

    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"
