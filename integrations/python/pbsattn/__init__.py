"""Permuted Block-Sparse Attention for the prefill of long prompts.

    import pbsattn
    out = pbsattn.attention(q, k, v, method="pbs", top_p=0.9)      # a torch op, on CPU and CUDA tensors

    import pbsattn.transformers
    pbsattn.transformers.enable(model)                             # prefill of a transformers model

`python -m pbsattn` shows the devices and methods of this installation. Evaluations and benchmarks are a distribution of
their own, pbsattn_eval.
Source of the method: "Sparser Block-Sparse Attention via Token Permutation", arXiv 2510.21270.
"""

import sys as _sys

from . import program

# First of all, and before our own module: another copy of the C++ library that it may bring must not be the process's first.
try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    _message = f"pbsattn: {program.missing(_error)}"
    if _sys.argv[:1] == ["-m"] and any(word.partition(".")[0] == __name__ for word in _sys.orig_argv):
        _sys.exit(_message)  # python -m pbsattn: a line for people, no traceback
    raise ImportError(_message, name=_error.name) from None

from ._cache import SegmentCache
from ._core import Stats, version as _version
from ._learned import LearnedOrder, read_learned
from ._op import attention
from ._plan import METHODS, Plan, describe_cpu, options, plan
from ._trace import Trace, trace

__version__ = _version()
__all__ = [
    "METHODS",
    "LearnedOrder",
    "Plan",
    "SegmentCache",
    "Stats",
    "Trace",
    "attention",
    "describe_cpu",
    "options",
    "plan",
    "read_learned",
    "trace",
]
