"""Permuted Block-Sparse Attention for the prefill of long prompts.

    import pbsattn
    out = pbsattn.attention(q, k, v, method="pbs", top_p=0.9)      # a torch op, on CPU and CUDA tensors

    import pbsattn.transformers
    pbsattn.transformers.enable(model)                             # prefill of a transformers model

`python -m pbsattn` shows the devices and methods of this installation, `python -m pbsattn.bench` measures time,
`python -m pbsattn eval` quality.
Source of the method: "Sparser Block-Sparse Attention via Token Permutation", arXiv 2510.21270.
"""

from ._core import Stats, version as _version
from ._op import Trace, attention, trace
from ._plan import METHODS, Plan, plan

__version__ = _version()
__all__ = ["METHODS", "Plan", "Stats", "Trace", "attention", "plan", "trace"]
