"""What CUSTOM is where pbsattn can't be used: by itself, since an untested vLLM may have no more than this."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend


class LeftAlone(FlashAttentionBackend):
    """vLLM's FlashAttention under the name CUSTOM."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"
