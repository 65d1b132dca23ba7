"""Imported by the worker processes of several ranks before they make a model: the plug-in on the CPU."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import torch_flash

torch_flash.install()
register_backend(AttentionBackendEnum.CPU_ATTN, "pbsattn_vllm.backend.Backend")


class Extension:
    """Adds nothing to vLLM's worker."""
