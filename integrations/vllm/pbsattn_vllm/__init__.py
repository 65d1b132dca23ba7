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


def refuses() -> bool:
    """Whether vLLM is not to start where pbsattn can't be used: told without the runtime, and whatever else is wrong."""
    import json
    import os

    if given := os.environ.get("PBSATTN_UNSUPPORTED"):
        return given == "refuse"
    try:
        with open(os.environ["PBSATTN_CONFIG"], encoding="utf-8") as file:
            return json.load(file).get("unsupported") == "refuse"
    except (AttributeError, KeyError, OSError, RecursionError, ValueError):  # of which `settings.read` tells
        return False


def register() -> None:
    """Registers the backend CUSTOM, and over FLASH_ATTN where PBSATTN_OVER_FLASH_ATTN says so; any number of times.

    Without the runtime or with another version's, with settings that are wrong, or a vLLM that wasn't tested, it warns and
    leaves every layer to vLLM's FlashAttention; under PBSATTN_UNSUPPORTED=refuse it raises ValueError, which stops vLLM.
    No other error gets out: what a plug-in raises stops every process of vLLM's, also where nobody asked for the plug-in.
    """
    try:
        over = _over_flash_attn()
        backend = "pbsattn_vllm.backend.Backend"
    except Exception as error:
        if refuses():
            raise ValueError(f"pbsattn: {error}") from error
        log.warning("pbsattn: %s; every layer is left to FlashAttention", str(error) or type(error).__name__)
        over, backend = False, "pbsattn_vllm.left.LeftAlone"
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CUSTOM, backend)
        if over:
            register_backend(AttentionBackendEnum.FLASH_ATTN, "pbsattn_vllm.backend.OverFlashAttention")
    except Exception as error:
        if refuses():
            raise ValueError(f"pbsattn: {error}") from error
        log.warning("pbsattn: %s; there is no backend CUSTOM", str(error) or type(error).__name__)


def _over_flash_attn() -> bool:
    """Whether to stand over FLASH_ATTN too. Raises what tells why pbsattn can't be used."""
    import vllm

    import pbsattn
    from pbsattn.serving import settings

    over = settings.read().over_flash_attn
    if pbsattn.__version__ != __version__:
        raise ValueError(f"pbsattn {pbsattn.__version__}, pbsattn-vllm {__version__}: install both from one source tree")
    if reason := untested(vllm.__version__):
        raise ValueError(reason)
    return over
