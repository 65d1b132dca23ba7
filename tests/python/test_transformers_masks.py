"""Masks that travel as the lengths they consist of: static caches, and whatever a model does with a mask."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn.transformers as pt  # noqa: E402
from test_transformers_calls import FRAMES, agree, check, inference, small, whisper_model  # noqa: E402, F401


def static_call(model, features, length):
    cache = transformers.EncoderDecoderCache(
        transformers.StaticCache(config=model.config, max_cache_len=150), transformers.DynamicCache()
    )
    return model(input_features=features, decoder_input_ids=tokens_of(length), past_key_values=cache, use_cache=True).logits


def tokens_of(length):
    return torch.arange(length)[None] % 90 + 3


@pytest.mark.parametrize("length", [1, 4, 100])
def test_a_static_cache_leaves_cross_attention_alone(length):
    model, features = whisper_model(), torch.randn(1, 16, 2 * FRAMES)
    check(model, lambda: static_call(model, features, length))


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_static_cache_leaves_the_next_call_alone(fails):
    model, features = whisper_model(), torch.randn(1, 16, 2 * FRAMES)
    encoder = model.model.encoder
    expected = encoder(features).last_hidden_state
    with pt.enable(model, min_tokens=64, method="pbs"), warnings.catch_warnings():
        warnings.simplefilter("ignore", pt.FallbackWarning)
        if fails:
            hook = model.model.decoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                static_call(model, features, 4)
            hook.remove()
        else:
            static_call(model, features, 4)
        agree(encoder(features).last_hidden_state, expected)


def test_whisper_generates_the_same_over_a_static_cache():
    model, features = whisper_model(), torch.randn(1, 16, 2 * FRAMES)

    def call():
        made = model.generate(
            input_features=features,
            decoder_input_ids=tokens_of(4),
            max_new_tokens=8,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.cat(made.logits)

    check(model, call)


@pytest.mark.parametrize("length", [40, 150])
def test_full_and_sliding_layers_over_a_static_cache(length):
    model = small("Gemma3ForCausalLM")
    assert model.config.layer_types == ["sliding_attention", "full_attention"]

    def call():
        cache = transformers.StaticCache(config=model.config, max_cache_len=256)
        first = model(tokens_of(length), past_key_values=cache, use_cache=True).logits
        second = model(tokens_of(70), past_key_values=cache, use_cache=True).logits
        return torch.cat([first, second], 1)

    layers = check(model, call)
    assert [layer.taken for layer in layers if layer.layer == 1] == [1 if length == 150 else 0]


def test_a_mask_is_the_tensor_that_it_stands_for():
    from pbsattn._transformers_masks import CausalMask

    mask = CausalMask(2, 3, 7, 2, "cpu")
    tensor = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool().expand(2, 1, 3, 7)
    assert mask.shape == tensor.shape and mask.dtype == tensor.dtype and mask.size(3) == 7 and len(mask) == 2
    assert mask[:, :, :, :7] is mask and mask.to("cpu").fits(torch.ones(1, 1, 3), torch.ones(1, 1, 7))
    other = torch.rand(2, 1, 3, 7) < 0.5
    zeros = torch.zeros(2, 1, 3, 7)
    for op in (
        lambda m: ~m,
        lambda m: m & other,
        lambda m: other & m,
        lambda m: m[:, :, :, :4],
        lambda m: m[0],
        lambda m: m == 0,
        lambda m: torch.where(m, 1.0, 2.0),
        lambda m: zeros.masked_fill(m, 3.0),
        lambda m: m.sum(-1),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: 1.0 * m + 1,
        lambda m: torch.cat([m, other], -1),
    ):
        assert torch.equal(op(mask), op(tensor))
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(mask)


@pytest.mark.parametrize("window, q_offset", [(1, 0), (2, 2), (3, 4), (7, 2), (9, 4)])
def test_a_windows_mask_is_the_tensor_that_transformers_makes(window, q_offset):
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    from pbsattn._transformers_masks import CausalMask, causal_mask

    kv_offset = max(q_offset - window + 1, 0)
    sizes = dict(batch_size=2, q_length=5, kv_length=q_offset + 5 - kv_offset, q_offset=q_offset, kv_offset=kv_offset)
    given = dict(mask_function=sliding_window_causal_mask_function(window), local_size=window, **sizes)
    mask = causal_mask(**given)
    assert type(mask) is CausalMask and mask.window == (window if window < sizes["kv_length"] else None)
    assert torch.equal(mask.tensor(), sdpa_mask(**given, allow_is_causal_skip=False))
    padding = torch.ones(2, q_offset + 5, dtype=torch.bool)
    assert type(causal_mask(**given, attention_mask=padding)) is CausalMask
    padding[1, -3] = False
    assert type(causal_mask(**given, attention_mask=padding)) is torch.Tensor


def test_what_says_more_than_a_window_stays_a_tensor():
    from transformers.masking_utils import and_masks, causal_mask_function, or_masks, sliding_window_causal_mask_function

    from pbsattn._transformers_masks import causal_mask

    sizes = dict(batch_size=1, q_length=8, kv_length=8, local_size=3)
    window = sliding_window_causal_mask_function(3)
    every_other = lambda batch, head, q, k: (q + k) % 2 == 0  # noqa: E731
    for function in (
        and_masks(window, every_other),
        or_masks(window, every_other),
        and_masks(every_other, causal_mask_function),
    ):
        assert type(causal_mask(mask_function=function, use_vmap=True, **sizes)) is torch.Tensor
    assert type(causal_mask(mask_function=window, allow_is_causal_skip=False, **sizes)) is torch.Tensor
