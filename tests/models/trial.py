"""What becomes of one class: each way to run it, before and with pbsattn, compared."""

import contextlib
import sys
import traceback
import warnings

import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

import cases
import pbsattn.transformers as pt
import tiny

TOLERANCE = 1e-4  # of the largest logit
MATTERS = 10 * TOLERANCE  # what a wrong attention must change at least, or a class isn't tested at all
PROMPT, SOURCE, CHUNKS, CAPACITY, PADDING = 200, 300, (90, 80, 29, 1), 256, 70
DENSE = {"min_tokens": 64, "top_p": 1.0}
SPARSE = {"min_tokens": 64, "top_p": 0.05, "block": 32, "segment": 32}
WORKS = "the model itself works"  # what a case prints before pbsattn is enabled: what fails from then on is wrong
RUNS = ("whole", "padded", "chunks", "static", "shared")


def _wrong(module, query, key, value, attention_mask=None, scaling=None, softcap=None, **kwargs):
    """A wrong attention on purpose: its logits aren't capped where they should be, and halved elsewhere."""
    if module.config._attn_implementation == "sweep_wrong_eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = sdpa_attention_forward
    if softcap is None:
        scaling = (scaling or query.shape[-1] ** -0.5) / 2
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


for name, mask in (("sweep_wrong", sdpa_mask), ("sweep_wrong_eager", eager_mask)):
    transformers.AttentionInterface.register(name, _wrong)
    transformers.AttentionMaskInterface.register(name, mask)


def _logits(out):
    for field in ("logits", "last_hidden_state"):
        if getattr(out, field, None) is not None:
            return getattr(out, field)
    raise AttributeError(f"{type(out).__name__} has neither logits nor a last_hidden_state")


def _typed(model, extra):
    """What a call is given beside the ids, in the model's type."""

    def typed(value):
        return tuple(map(typed, value)) if isinstance(value, tuple) else value.to(model.dtype)

    return lambda batch: {name: typed(value) for name, value in extra(batch).items()}


def _ids(batch, tokens):
    return torch.randint(3, tiny.TOKENS - 6, (batch, tokens), generator=torch.Generator().manual_seed(1))


class Decoder:
    """A model that continues a text, alone or with something to attend to."""

    def __init__(self, model, extra):
        self.model, self.extra = model, extra

    def whole(self):
        return _logits(self.model(input_ids=_ids(1, PROMPT), use_cache=False, **self.extra(1)))

    def padded(self):
        mask = torch.ones(2, PROMPT, dtype=torch.long)
        mask[1, :PADDING] = 0
        logits = _logits(self.model(input_ids=_ids(2, PROMPT), attention_mask=mask, use_cache=False, **self.extra(2)))
        return logits[mask.bool()]

    def _over(self, cache, parts):
        logits, extra = [], self.extra(1)
        for part in _ids(1, PROMPT).split(parts, 1):
            out = self.model(input_ids=part, past_key_values=cache, use_cache=True, **extra)
            extra.pop("cross_attention_states", None)  # which only the first call may be given: the cache keeps them
            cache = out.past_key_values
            logits.append(_logits(out))
        return torch.cat(logits, 1)

    def chunks(self):
        return self._over(None, CHUNKS)

    def static(self):
        return self._over(
            transformers.StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=CAPACITY),
            (150, 49, 1),
        )


class EncoderDecoder(Decoder):
    """A model that continues a text while it attends to an encoded one, or to a recording."""

    def _source(self, batch):
        return self.extra(batch) or {"input_ids": _ids(batch, SOURCE)}

    def whole(self):
        return _logits(self.model(**self._source(1), decoder_input_ids=_ids(1, PROMPT), use_cache=False))

    def padded(self):
        source = self._source(2)
        if "input_ids" not in source:
            raise NotImplementedError("its source takes no padding here")
        mask = torch.ones_like(source["input_ids"])
        mask[1, :PADDING] = 0
        return _logits(self.model(**source, attention_mask=mask, decoder_input_ids=_ids(2, PROMPT), use_cache=False))

    def _over(self, cache, parts):
        logits, encoded, source = [], None, self._source(1)
        for part in _ids(1, PROMPT).split(parts, 1):
            out = self.model(
                **({} if encoded else source),
                encoder_outputs=encoded,
                decoder_input_ids=part,
                past_key_values=cache,
                use_cache=True,
            )
            cache, encoded = out.past_key_values, BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
            encoded.attention_mask = None  # which Moonshine's own kind of output has
            logits.append(_logits(out))
        return torch.cat(logits, 1)

    def static(self):
        config = self.model.config.get_text_config(decoder=True)
        return self._over(
            transformers.EncoderDecoderCache(
                transformers.StaticCache(config=config, max_cache_len=CAPACITY), transformers.DynamicCache()
            ),
            (150, 49, 1),
        )


class Encoder:
    """A model that reads a text, a picture or a recording at once."""

    def __init__(self, model, extra):
        self.model, self.extra = model, extra

    def whole(self):
        return _logits(self.model(**(self.extra(1) or {"input_ids": _ids(1, PROMPT)})))

    def padded(self):
        if self.extra(2):
            raise NotImplementedError("its input takes no padding here")
        mask = torch.ones(2, PROMPT, dtype=torch.long)
        mask[1, -PADDING:] = 0
        return _logits(self.model(input_ids=_ids(2, PROMPT), attention_mask=mask))[mask.bool()]

    def chunks(self):
        raise NotImplementedError("an encoder takes no chunks")

    static = chunks


KINDS = {"decoder": Decoder, "cross": Decoder, "multimodal": Decoder, "encoder-decoder": EncoderDecoder, "encoder": Encoder}


def _relative(got, expected):
    """The largest error, as a share of the largest value: infinite where either isn't a number."""
    error = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    return error if error == error else float("inf")


def _brief(error):
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:160]}"


def _handled(model):
    """What pbsattn says became of the calls."""
    records = pt.stats(model)
    return {
        "taken": sum(record.taken for record in records),
        "left": sum(record.left for record in records),
        "layers": sum(record.taken > 0 for record in records),
        "reasons": sorted({record.reason for record in records if record.reason}),
    }


def _own(call):
    """What a model gives by itself, or why it can't."""
    try:
        expected = call()
    except Exception as error:
        return None, _brief(error)
    if not torch.isfinite(expected).all():
        return None, "its own logits aren't finite"
    return expected, None


def _under(model, settings, *calls):
    """What calls give with pbsattn enabled and what it says of the first, or what was raised."""
    handle = pt.enable(model, **settings)
    gave, result, step = [], {}, ""
    try:
        for call in calls:
            gave.append(call())
        step = "stats: "
        result = _handled(model)
    except Exception as error:
        result = {"raises": step + _brief(error)}
    try:
        handle.__exit__(None, None, None)
    except Exception as error:
        result = {"raises": "disable: " + _brief(error)}
    return gave, result


def _compare(model, call):
    expected, unable = _own(call)
    if unable:
        return {"unable": unable}
    gave, result = _under(model, DENSE, call)
    if "raises" in result:
        return result
    return result | {"error": _relative(gave[0], expected), "after": _relative(call(), expected)}


def _compare_shared(model, other, kind, extra):
    """Whether a model changes when another, made of the same config object, is sparse."""
    own, others = kind(model, extra).whole, kind(other, extra).whole
    expected, unable = _own(others)
    if unable:
        return {"unable": unable}
    gave, result = _under(model, SPARSE, own, others)
    if "raises" in result:
        return result
    return result | {"error": _relative(gave[1], expected), "after": _relative(others(), expected)}


def _matters(model, call, expected):
    """How much a wrong attention changes: that this class would show a fault."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("sweep_wrong_eager" if previous == "eager" else "sweep_wrong")
    try:
        return _relative(call(), expected)
    finally:
        model.set_attn_implementation(previous)


def _noise(model, call, expected):
    """What rounding alone costs this model: its own logits against those in float64 or with its eager attention, or None."""
    with contextlib.suppress(Exception):  # a model that mixes types
        try:
            return _relative(model.double() and call(), expected)
        finally:
            model.float()
    previous = model.config._attn_implementation
    with contextlib.suppress(Exception):
        try:
            model.set_attn_implementation("eager")
            return _relative(call(), expected)
        finally:
            model.set_attn_implementation(previous)
    return None


def _is_capped(model):
    """Whether its logits are soft-capped, which transformers' SDPA ignores."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return any(getattr(config, "attn_logit_softcapping", None) is not None for config in configs)


def _sweep(case, made):
    model = tiny.build(case.model_class(), made)
    if case.name in cases.CARRYING or _is_capped(model):
        model.set_attn_implementation("eager")
    kind, extra = KINDS[case.kind_of(made)], _typed(model, case.extra())
    runs = kind(model, extra)
    expected, unable = _own(runs.whole)
    if unable:
        raise RuntimeError(unable)
    print(WORKS, flush=True)
    result = {"again": _relative(runs.whole(), expected), "noise": _noise(model, runs.whole, expected)}
    try:
        pt.enable(model, **DENSE)
    except ValueError as refusal:
        return result | {"refused": " ".join(str(refusal).split()), "after": _relative(runs.whole(), expected)}
    try:
        pt.disable(model)
    except Exception as error:
        return result | {"matters": None, "runs": {"whole": {"raises": "disable: " + _brief(error)}}}
    result["matters"] = _matters(model, runs.whole, expected)
    result["runs"] = {name: _compare(model, getattr(runs, name)) for name in RUNS[:-1]}
    result["runs"]["shared"] = _compare_shared(model, tiny.build(case.model_class(), model.config), kind, extra)
    return result


@torch.no_grad()
def trial(case):
    """The answer of one case, as JSON holds it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answer = {"name": case.name, "family": "", "kind": case.kind or ""}
    try:
        answer["family"] = case.family()
        made = case.config()
        answer["kind"] = case.kind_of(made)
        return answer | _sweep(case, made)
    except Exception:
        traceback.print_exc()
        return answer | {"failed": _brief(sys.exc_info()[1])}
