"""Who we are measured against, in the same process and on the same tensors.

A peer copies q, k and v [batch][head][token][width] into its own layout before the clock runs, and gives its output in ours.
One whose package can't be imported is left out, with a word on what to install; docs/dev/measuring.md lists them.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable

import torch
from block_lists import before_own, merge, padded
from library import BLOCK, SEGMENT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def as_they_are(q, k, v):
    return q, k, v


def tokens_first(q, k, v):
    """Returns copies with tokens before heads, as FlashAttention takes them."""
    return tuple(t.transpose(1, 2).contiguous() for t in (q, k, v))


@dataclasses.dataclass(frozen=True)
class Peer:
    """Attention by someone else: `call` takes what `prepare` makes of q, k and v."""

    name: str
    call: Callable
    prepare: Callable = as_they_are
    slow: bool = False  # so slow that the card cools: it takes turns with us alone

    def on(self, sets):
        """Returns a call for timing, of run i on set i of q, k and v."""
        prepared = [self.prepare(*tensors) for tensors in sets]
        return lambda i: self.call(*prepared[i % len(prepared)])


# -------------------------------------------------------------------------------------------- packages that may be missing


def find_cutlass():
    """Makes `cutlass` importable where its wheels lie in a folder of pip install --target, whose .pth files nobody reads."""
    if importlib.util.find_spec("cutlass") is None:
        package = importlib.util.find_spec("nvidia_cutlass_dsl")
        for folder in package.submodule_search_locations or () if package else ():
            sys.path.append(str(pathlib.Path(folder) / "dsl_packages"))


def flash_attention_3():
    from fa3_fwd_interface import flash_attn_func

    return flash_attn_func


def flash_attention_4():
    """Returns its function, the class of its block lists, and a mask that is causal."""
    find_cutlass()
    from cutlass import cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    @cute.jit
    def causal(batch, head, query, key, lengths, tensors):
        return key <= query

    return flash_attn_func, BlockSparseTensorsTorch, causal


def cudnn_block_sparse():
    find_cutlass()
    from cudnn.block_sparse_attention import block_sparse_attention_forward

    return block_sparse_attention_forward


CUTLASS = "nvidia-cutlass-dsl[cu13]==4.8.1"
PACKAGES = {
    "FlashAttention-3": (flash_attention_3, "fa3-fwd==0.0.3"),
    "FlashAttention-4": (flash_attention_4, f"flash-attn-4==4.0.0b36 {CUTLASS}"),
    "cuDNN, block-sparse": (cudnn_block_sparse, f"nvidia-cudnn-frontend==1.32.0 {CUTLASS}"),
}


@functools.cache
def load(name):
    """Returns what a peer's package gives; None, after a word, where it can't be imported."""
    importer, packages = PACKAGES[name]
    try:
        return importer()
    except Exception as error:  # packages that don't fit each other end otherwise than with ImportError, too
        print(f"without {name}: {first_line(error)}; pip install {packages}", flush=True)
        return None


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# ------------------------------------------------------------------------------------------------------------------- peers


def sdpa(backend):
    def call(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


cudnn = sdpa(SDPBackend.CUDNN_ATTENTION)


def dense():
    """Returns peers that compute causal attention without leaving anything out."""
    peers = [Peer("cuDNN", cudnn), Peer("FlashAttention-2", sdpa(SDPBackend.FLASH_ATTENTION), slow=True)]
    fa3 = load("FlashAttention-3")
    if fa3:
        peers.append(Peer("FlashAttention-3", lambda q, k, v: fa3(q, k, v, causal=True).transpose(1, 2), tokens_first))
    if load("FlashAttention-4"):
        fa4, _, _ = load("FlashAttention-4")
        peers.append(Peer("FlashAttention-4", lambda q, k, v: fa4(q, k, v, causal=True)[0].transpose(1, 2), tokens_first))
    return peers


def of_layer(softcap=0.0, window=None, sinks=None):
    """Returns peers whose causal attention takes what a layer carries: FlashAttention-3 no sinks, -4 all of it.

    fa3-fwd 0.0.3 is built without windows and refuses them when it is called, which leaves it out there with a word.
    """
    peers = []
    fa3 = load("FlashAttention-3") if sinks is None else None
    if fa3:
        more = {"softcap": softcap, "window_size": (-1, -1) if window is None else (window - 1, 0)}

        def call(q, k, v):
            return fa3(q, k, v, causal=True, **more).transpose(1, 2)

        peers.append(Peer("FlashAttention-3", call, tokens_first))
    if load("FlashAttention-4"):
        fa4, _, _ = load("FlashAttention-4")
        carried = {"softcap": softcap, "learnable_sink": None if sinks is None else sinks.bfloat16()}
        if window is not None:
            carried["window_size"] = (window - 1, 0)

        def call_4(q, k, v):
            return fa4(q, k, v, causal=True, **carried)[0].transpose(1, 2)

        peers.append(Peer("FlashAttention-4", call_4, tokens_first))
    return peers


def sparse(mask):
    """Returns peers that visit the blocks of a mask [batch][head][row][block], and of the diagonal what is causal.

    They take keys as they come, one K and V for all query heads of a group: no order of keys is theirs.
    """
    rows = torch.arange(mask.shape[2], device=mask.device)
    full = mask.clone()
    full[:, :, rows, rows] = False
    lists = (*padded(mask & ~full), *padded(full))
    peers = [Peer("FlexAttention", flex(lists), slow=True)]
    if load("FlashAttention-4"):
        fa4, Lists, causal = load("FlashAttention-4")
        blocks = Lists(*lists, block_size=(BLOCK, BLOCK))

        def fa4_lists(q, k, v):
            return fa4(q, k, v, mask_mod=causal, block_sparse_tensors=blocks)[0].transpose(1, 2)

        peers.append(Peer("FlashAttention-4, lists", fa4_lists, tokens_first))
    if load("cuDNN, block-sparse"):
        peers.append(Peer("cuDNN, lists", cudnn_lists(load("cuDNN, block-sparse"), mask), slow=True))
    return peers


def causal_pair(batch, head, query, key):  # one function, not one a mask: torch.compile compiles anew for each
    return query >= key


def flex(lists):
    """Returns FlexAttention over (count, index) of the blocks masked causally, then of those that aren't."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    block_mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=causal_pair, compute_q_blocks=False)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def cudnn_lists(forward, mask):
    """Returns cuDNN's kernel over the blocks before the own segment, which it can't mask: that part is dense, by
    FlashAttention-2, and both are merged. Sequences are whole segments, batches of one."""
    count, index = padded(before_own(mask, SEGMENT // BLOCK))
    merged = torch.compile(merge, dynamic=False)
    own_attention = torch.ops.aten._scaled_dot_product_flash_attention

    def by_segment(t):
        return t[0].unflatten(1, (-1, SEGMENT)).transpose(0, 1)

    def call(q, k, v):
        out, lse = forward(
            q, k, v, index, q2k_block_nums=count, sparse_block_size=BLOCK, allow_empty_block_nums=True
        ).values()
        own, own_lse = own_attention(by_segment(q), by_segment(k), by_segment(v), 0.0, True)[:2]
        return merged(out, lse, own, own_lse)

    return call


class Reference:
    """The published PBS-Attn code, from a checkout of its repository."""

    def __init__(self, path):
        if not (pathlib.Path(path) / "pbs_attn" / "src" / "pbs.py").exists():
            raise SystemExit(f"--reference {path}: no pbs_attn/src/pbs.py in it; name a checkout of the reference code")
        sys.path.insert(0, str(path))
        from pbs_attn.src import pbs

        self.forward = pbs.permuted_block_sparse_attn_fwd

    def __call__(self, q, k, v):
        """It takes as many KV heads as query heads, so repeating them is part of it."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return self.on_repeated(q, k, v)

    def on_repeated(self, q, k, v):
        return self.forward(q, k, v, block_size=BLOCK, segment_size=SEGMENT, threshold=0.9, causal=True)
