"""Attention backend of vLLM: pbsattn computes the prefills of long prompts, vLLM's FlashAttention all else.

    vllm serve MODEL --attention-backend CUSTOM

vLLM finds `register` by the entry point group vllm.general_plugins, and calls it in each of its processes.
"""

import logging

__version__ = "0.2.0"  # of the pbsattn that it goes with

TESTED = ("0.26.0",)  # versions of vLLM
log = logging.getLogger("vllm.pbsattn")  # below vLLM's own logger, whose handlers and level it has


def untested(version: str) -> str | None:
    """What is to be said of a version of vLLM that was not tested; None of one that was. A local or post part counts not."""
    import packaging.version

    try:
        release = packaging.version.parse(version)
        if release.base_version in TESTED and not release.is_prerelease:
            return None
    except packaging.version.InvalidVersion:
        pass
    return f"vLLM {version}: not tested with pbsattn-vllm {__version__}, which was with {', '.join(TESTED)}"


def register() -> None:
    """Registers the backend CUSTOM, and over FLASH_ATTN where PBSATTN_OVER_FLASH_ATTN says so; any number of times.

    Without the runtime, with settings that are wrong, or a vLLM that wasn't tested, it warns and leaves every layer to
    vLLM's FlashAttention; under PBSATTN_UNSUPPORTED=refuse it raises ValueError instead, which stops vLLM.
    """
    import os

    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    refuse = os.environ.get("PBSATTN_UNSUPPORTED") == "refuse"
    over = False
    try:
        from . import settings

        read = settings.read()
        refuse = read.unsupported == settings.REFUSE
        over = read.over_flash_attn
        reason = untested(vllm.__version__)
    except (ImportError, OSError, ValueError) as error:
        reason = str(error)
    if reason and refuse:
        raise ValueError(f"pbsattn: {reason}")
    if reason:
        log.warning("pbsattn: %s; every layer is left to FlashAttention", reason)
        register_backend(AttentionBackendEnum.CUSTOM, "pbsattn_vllm.left.LeftAlone")
        return
    register_backend(AttentionBackendEnum.CUSTOM, "pbsattn_vllm.backend.Backend")
    if over:
        register_backend(AttentionBackendEnum.FLASH_ATTN, "pbsattn_vllm.backend.OverFlashAttention")
