"""The attentions that a benchmark compares, by name."""

import contextlib
import dataclasses
import importlib.util
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import flash_attention_mask

import pbsattn.transformers

from . import caches

SDPA = {
    "sdpa": None,  # whichever backend PyTorch takes
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FA3 = "fa3"  # FlashAttention-3, of the package fa3-fwd; also its name among transformers' attentions


# What a spec may say beside a method's options: how pbsattn.transformers.enable() takes the method.
_OF_ENABLE = {"min_tokens": int, "settings": str, "learned": str}
# And what becomes of a prompt: tokens that go through the model at a time, the type that keys and values are rounded to.
_OF_PROMPT = {"chunk": int, "cache": str}


def _flash_attention_3(q, k, v, scale=None):
    """The causal attention of q [B, Hq, S, D] over k, v [B, Hkv, S, D], as [B, S, Hq, D]."""
    from fa3_fwd_interface import flash_attn_func

    return flash_attn_func(*(each.transpose(1, 2) for each in (q, k, v)), softmax_scale=scale, causal=True)


def _register_fa3():
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        raise ValueError(f'attention "{FA3}": its package is missing; pip install fa3-fwd, on a machine with a Hopper GPU')

    def forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return _flash_attention_3(query, key, value, scaling), None

    AttentionInterface.register(FA3, forward)
    AttentionMaskInterface.register(FA3, flash_attention_mask)


@dataclasses.dataclass
class Attention:
    """One way to compute a model's attention: a backend of SDPA, FlashAttention-3, or a method of pbsattn."""

    name: str
    method: str | None = None  # with its options, as "pbs:top_p=0.8"
    settings: dict = dataclasses.field(default_factory=dict)  # of enable()
    chunk: int | None = None  # tokens of a prompt that go through a model at a time; None: all
    cache: str | None = None  # the type that keys and values are rounded to, of caches.ROUNDED; None: their own

    @classmethod
    def parse(cls, text):
        """From "cudnn", "pbs" or "pbs:top_p=0.8:dense_last_rows=1". Raises ValueError for what is none of those."""
        head, *parts = text.split(":")
        others = [*SDPA, FA3]
        if head in others:
            if parts:
                raise ValueError(f'attention "{text}": PyTorch\'s backends and FlashAttention-3 have no settings')
            if head == FA3:
                _register_fa3()
            return cls(text)
        if head not in pbsattn.METHODS:
            raise ValueError(f'attention "{text}": no such attention; there are {", ".join([*others, *pbsattn.METHODS])}')
        settings, method, known = {}, [head], {**_OF_ENABLE, **_OF_PROMPT}
        for part in parts:
            name, equals, value = part.partition("=")
            if equals and name in known:
                try:
                    settings[name] = known[name](value)
                except ValueError:
                    raise ValueError(
                        f'attention "{text}": {name} "{value}": not a whole number of tokens; write, say, {name}=512'
                    ) from None
            else:
                method.append(part)
        pbsattn.options(":".join(method))
        chunk, cache = (settings.pop(name, None) for name in _OF_PROMPT)
        if chunk is not None and chunk < 2:
            raise ValueError(f'attention "{text}": chunk {chunk}: 2 tokens is the least')
        if cache is not None and cache not in caches.ROUNDED:
            raise ValueError(f'attention "{text}": cache "{cache}": none of {", ".join(caches.ROUNDED)}')
        return cls(text, ":".join(method), settings, chunk, cache)

    @property
    def whole(self):
        """The name of the same over a whole prompt, where this takes it in chunks; else None."""
        parts = self.name.split(":")
        return None if self.chunk is None else ":".join(part for part in parts if not part.startswith("chunk="))

    @contextlib.contextmanager
    def on(self, model, stats=False):
        """Gives the attention to a model for the length of a `with` block."""
        if self.method is not None:
            settings = self.settings if self.chunk is None else {"min_tokens": 2, **self.settings}  # short chunks count
            enabled = pbsattn.transformers.enable(model, method=self.method, stats=stats, **settings)
            with enabled, self._rounding():
                yield
            return
        model.set_attn_implementation(self.implementation)
        backend = SDPA.get(self.name)
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            yield

    def run(self, model, ids, **options):
        """Runs a prompt, [1, tokens], through a model under on(), or a part of it, in the attention's chunks. Returns what
        came of each."""
        parts = ids.split(self.chunk or ids.shape[1], dim=1)
        if len(parts) == 1:
            return [model(ids, **options)]
        options |= {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
        known = contextlib.nullcontext() if self.method is None else pbsattn.transformers.prompt(model, ids.shape[1])
        with known:
            return [model(part, **options) for part in parts]

    @contextlib.contextmanager
    def _rounding(self):
        """Lets the calls of a `with` block see keys and values as the cache has them."""
        if self.cache is None:
            yield
            return
        inner = AttentionInterface._global_mapping[self.implementation]

        def outer(module, query, key, value, *args, **kwargs):
            key, value = (caches.rounded(each, self.cache) for each in (key, value))
            return inner(module, query, key, value, *args, **kwargs)

        AttentionInterface.register(self.implementation, outer)
        try:
            yield
        finally:
            AttentionInterface.register(self.implementation, inner)

    def compute(self, q, k, v, **kwargs):
        """The attention of q [B, Hq, S, D] over k, v [B, Hkv, S, D]."""
        if self.method is not None:
            return pbsattn.attention(q, k, v, method=self.method, **kwargs)
        if self.name == FA3:
            return _flash_attention_3(q, k, v, kwargs.get("scale")).transpose(1, 2)
        backend = SDPA[self.name]
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1], **kwargs)

    @property
    def implementation(self):
        """Its name among transformers' attentions."""
        if self.method is not None:
            return pbsattn.transformers.NAME
        return FA3 if self.name == FA3 else "sdpa"


@contextlib.contextmanager
def timed(attention, device):
    """Measures the seconds inside a model's attention calls; yields a function that gives them after the block."""
    marks = []

    def mark():
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    inner = AttentionInterface._global_mapping[attention.implementation]

    def outer(*args, **kwargs):
        start = mark()
        out = inner(*args, **kwargs)
        marks.append((start, mark()))
        return out

    def seconds():
        if device.type != "cuda":
            return sum(end - start for start, end in marks)
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(end) for start, end in marks) * 1e-3

    AttentionInterface.register(attention.implementation, outer)
    try:
        yield seconds
    finally:
        AttentionInterface.register(attention.implementation, inner)
