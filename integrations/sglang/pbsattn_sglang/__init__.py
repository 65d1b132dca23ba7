"""Attention backend of SGLang: pbsattn computes the prefills of long prompts, SGLang's FlashAttention all else.

    sglang serve MODEL --prefill-attention-backend pbs --decode-attention-backend fa3 --page-size 128

SGLang finds `register` by the entry point group sglang.srt.plugins, and calls it in each of its processes.
"""

import logging
import typing

__version__ = "0.2.0"  # of the pbsattn that it goes with

NAME = "pbs"  # of the backend
TESTED = ("0.5.17",)  # versions of SGLang
log = logging.getLogger("sglang.pbsattn")


def untested(version: str) -> str | None:
    """What is to be said of a version of SGLang that was not tested; None of one that was, local and post parts aside."""
    import packaging.version

    try:
        release = packaging.version.parse(version)
        if release.base_version in TESTED and not release.is_prerelease:
            return None
    except packaging.version.InvalidVersion:
        pass
    return f"SGLang {version}: not tested with pbsattn-sglang {__version__}, which was with {', '.join(TESTED)}"


def refuses() -> bool:
    """Whether SGLang is not to start where pbsattn can't be used: told without the runtime, and whatever else is wrong."""
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
    """Registers the backend and its name, any number of times.

    Without the runtime or with another version's, with settings that are wrong, or an SGLang that wasn't tested, it warns,
    and the backend is SGLang's fa3. Under PBSATTN_UNSUPPORTED=refuse it raises ValueError: SGLang logs what plug-ins raise
    and goes on, but has no backend of that name then, and refuses the flag that asks for it.
    """
    create = _create
    try:
        _check()
    except Exception as error:
        if refuses():
            raise ValueError(f"pbsattn: {error}") from error
        log.warning("pbsattn: %s; every layer is left to FlashAttention", str(error) or type(error).__name__)
        create = _left
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create)


def _check() -> None:
    """Raises what tells why pbsattn can't be used."""
    import sglang

    import pbsattn
    from pbsattn.serving import settings

    settings.read()
    if pbsattn.__version__ != __version__:
        raise ValueError(f"pbsattn {pbsattn.__version__}, pbsattn-sglang {__version__}: install both from one source tree")
    if reason := untested(sglang.__version__):
        raise ValueError(reason)


def _left(runner: typing.Any) -> typing.Any:
    """SGLang's FlashAttention."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return ATTENTION_BACKENDS["fa3"](runner)


def _create(runner: typing.Any) -> typing.Any:
    """The backend of a model, or SGLang's FlashAttention where none of its layers is taken. Raises Refused."""
    from .backend import create

    return create(_left(runner), runner)
