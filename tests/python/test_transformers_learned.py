"""Learned orders in transformers models."""

import copy
import json

import pytest
import torch

from learned_files import SIZES, save_learned
from test_transformers import build, prompt

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn  # noqa: E402
import pbsattn.transformers as pt  # noqa: E402


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.pbs"


def enable(model, **settings):
    """By auto, which these prompts are too short for, without its fallback."""
    return pt.enable(model, **{"min_tokens": 64, "fallback": "never", **settings})


def options_of(model):
    return [module._pbsattn.options for module in model.modules() if getattr(module, "layer_idx", None) is not None]


class Calls:
    """Keeps what the op is given, layer after layer, while a model runs."""

    def __init__(self, monkeypatch):
        self.given = []
        real = pbsattn._transformers_calls.attention

        def seen(q, k, v, **options):
            self.given.append((q, k, v, options))
            return real(q, k, v, **options)

        monkeypatch.setattr(pbsattn._transformers_calls, "attention", seen)

    def orders(self):
        """The keys of each call [B, Hkv, S, D], and the order that they were in."""
        for q, k, v, options in self.given:
            given = {name: value for name, value in options.items() if name not in ("return_stats", "layout")}
            _, trace = pbsattn.trace(q, k, v, layout="bshd", **given)
            yield k.transpose(1, 2), trace.order[:, ::2].long()


def test_keys_of_a_model_move_by_the_files_weights(path, monkeypatch):
    weights = save_learned(path)
    model, calls = build("llama"), Calls(monkeypatch)
    with torch.no_grad(), enable(model, learned=path, threshold=0.2, threshold_tokens=0) as enabled:
        enabled(prompt())
        assert [layer.taken for layer in pt.stats(model)] == [1, 1]
    orders = list(calls.orders())
    assert len(orders) == 2
    for layer, (k, order) in enumerate(orders):
        assert _agree(order, k, weights[layer])
        assert not _agree(order, k, weights[1 - layer])


def test_one_file_gives_llama_cpps_keys_the_same_order(path, monkeypatch):
    """A model's keys, and the same as its GGUF file has them: llama.cpp's converter writes a head's two halves by turns."""
    weights = save_learned(path)
    model, calls = build("llama"), Calls(monkeypatch)
    with torch.no_grad(), enable(model, learned=path, threshold=0.2, threshold_tokens=0):
        model(prompt())
    converted = pbsattn.read_learned(path).in_pairs("neighbours")
    for layer, (q, k, v, options) in enumerate(calls.given):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k_gguf = (t.unflatten(-1, (2, 32)).swapaxes(-2, -1).flatten(-2) for t in (q, k))
        given = {name: value for name, value in options.items() if name not in ("return_stats", "layout")}
        given |= {"order_weights": converted.weights[layer], "rope_pairs": "neighbours"}
        _, trace = pbsattn.trace(q, k_gguf, v, **given)
        assert _agree(trace.order[:, ::2].long(), k, weights[layer])
        given |= {"order_weights": weights[layer], "rope_pairs": "halves"}
        _, unconverted = pbsattn.trace(q, k_gguf, v, **given)
        assert not _agree(unconverted.order[:, ::2].long(), k, weights[layer])


def _agree(order, k, weights, segment=256):
    """Whether keys stand in the order of their weights, but for scores that rounding makes equal."""
    half = k.shape[-1] // 2
    features = torch.cat([(k[..., :half] ** 2 + k[..., half:] ** 2).sqrt(), k], -1).double()
    score = (features * weights.double()[:, None]).sum(-1)
    whole = k.shape[2] // segment * segment
    moved = score.gather(-1, order)[..., :whole].unflatten(-1, (-1, segment))
    return bool((moved.diff(dim=-1) < 1e-4).all()) and not torch.equal(order, torch.arange(k.shape[2]).expand(order.shape))


def test_a_file_of_the_other_pairing_gives_the_same_weights(path):
    weights = save_learned(path)
    columns = weights[..., 32:].unflatten(-1, (2, 32)).transpose(-1, -2).flatten(-2)
    other = path.with_name("other.pbs")
    save_learned(other, torch.cat([weights[..., :32], columns], -1), pairs="neighbours")
    for each in (path, other):
        model = build("llama")
        with enable(model, learned=each):
            assert {options["rope_pairs"] for options in options_of(model)} == {"halves"}
            assert all(torch.equal(given["order_weights"], own) for given, own in zip(options_of(model), weights))


@pytest.mark.parametrize(
    "family, pairs",
    [("llama", "halves"), ("Cohere", "neighbours"), ("Glm", "neighbours"), ("Ernie4_5", "neighbours"), ("GptOss", "halves")],
)
def test_each_model_has_its_pairs(family, pairs, path, monkeypatch):
    save_learned(path)
    model = build(family)
    module = next(module for module in model.modules() if hasattr(module, "layer_idx"))
    assert pt.rope_pairs(module) == pairs
    with enable(model, learned=path):
        expected = pbsattn.read_learned(path).in_pairs(pairs).weights
        for given, own in zip(options_of(model), expected):
            assert given["rope_pairs"] == pairs
            assert torch.equal(given["order_weights"], own)
    # Keys tell the same: where all tokens are one, the first layer's differ by RoPE alone, which leaves lengths of pairs.
    calls = Calls(monkeypatch)
    with torch.no_grad(), enable(model, method="full"):
        model(torch.full((1, 200), 7))
    k = calls.given[0][1].transpose(1, 2)
    lengths = {
        "halves": (k[..., :32] ** 2 + k[..., 32:] ** 2).sqrt(),
        "neighbours": (k[..., ::2] ** 2 + k[..., 1::2] ** 2).sqrt(),
    }
    changes = {name: float((each - each[:, :, :1]).abs().max()) for name, each in lengths.items()}
    assert changes.pop(pairs) < 1e-4 < 1e-2 < changes.popitem()[1]


def test_what_the_file_says_stands_under_what_the_caller_says(path):
    of_file = {
        "*": {"*": {"threshold": 0.25, "dense_last_rows": 0}},
        "1": {"*": {"permutation": "none"}, "3": {"keep": "all"}},
    }
    save_learned(path, settings=of_file)

    def made(**given):
        model = build("llama")
        with pt.enable(model, min_tokens=64, learned=path, **given):
            return [
                [
                    pbsattn.options(**head)
                    for head in (
                        json.loads(options["heads"]).values()
                        if "heads" in options
                        else [{name: each for name, each in options.items() if name not in ("order_weights", "rope_pairs")}]
                    )
                ]
                for options in options_of(model)
            ]

    first, second = made()
    assert len(first) == 1 and len(second) == 4
    assert first[0] == pbsattn.options(pbsattn._core.learned_method, threshold=0.25, dense_last_rows=0)
    assert second[0] == {**first[0], "permutation": "none"}
    assert second[3] == {**first[0], "permutation": "none", "keep": "all"}
    first, second = made(threshold=0.125, settings={"1": {"2": {"threshold": 0.5}}})
    assert [head["threshold"] for head in second] == [0.125, 0.125, 0.5, 0.125] and first[0]["threshold"] == 0.125
    assert second[3]["keep"] == "all" and second[0]["permutation"] == "none"
    assert made(method="auto") == made()
    assert made(method="auto:threshold=0.125", settings={"1": {"2": {"threshold": 0.5}}}) == [first, second]
    first, second = made(method="pbs:permutation=learned:order_scope=kv_head")  # which names all options
    assert first == second == [pbsattn.options("pbs", permutation="learned", order_scope="kv_head")]


def test_a_file_of_another_model_is_refused(path):
    for name, size, what in (
        ("layers", 3, "with 3 layers, the model has 2"),
        ("query_heads", 8, "with 8 query heads, the model has 4"),
        ("kv_heads", 4, "with 4 KV heads, the model has 2"),
        ("head_dim", 128, "with 128 numbers in a head, the model has 64"),
    ):
        save_learned(path, sizes={**SIZES, name: size})
        model = build("llama")
        with pytest.raises(ValueError, match=f"tiny.pbs: of tiny {what}"):
            enable(model, learned=path)
        assert not any(hasattr(module, "_pbsattn") for module in model.modules()), "refused, so nothing is left behind"
        assert model.config._attn_implementation != "pbsattn"
    save_learned(path, settings={"7": {"*": {"keep": "all"}}})
    with pytest.raises(ValueError, match=r"tiny.pbs: layer 7: no such layer; there are 0 .. 1"):
        enable(build("llama"), learned=path)
    save_learned(path, settings={"0": {"*": {"kept": "all"}}})
    with pytest.raises(TypeError, match=r"tiny.pbs: layer 0, head \*: option 'kept'"):
        enable(build("llama"), learned=path)
    with pytest.raises(FileNotFoundError):
        enable(build("llama"), learned=path.with_name("absent.pbs"))


def test_keys_of_mla_are_as_wide_as_both_their_parts(path):
    """Whatever head_dim its config names, which is the width of the part with RoPE."""
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_key_value_heads=4, head_dim=64)
    model, sizes = build("DeepseekV3", **widths), {**SIZES, "kv_heads": 4}
    save_learned(path, sizes=sizes)
    with pytest.raises(ValueError, match="tiny.pbs: of tiny with 64 numbers in a head, the model has 192"):
        enable(model, learned=path)
    save_learned(path, sizes={**sizes, "head_dim": 192})
    with torch.no_grad(), enable(model, learned=path):
        model(prompt())
        assert [(layer.taken, layer.left) for layer in pt.stats(model)] == [(1, 0)] * 2


def test_a_learned_order_needs_its_file():
    for given in (
        dict(method="pbs:permutation=learned:order_scope=kv_head"),
        dict(settings={"1": {"*": {"permutation": "learned", "order_scope": "kv_head"}}}),
    ):
        with pytest.raises(ValueError, match='permutation "learned": .*learned="model.pbs"'):
            enable(build("llama"), **given)


def test_columns_of_unknown_pairs_are_refused(path, monkeypatch):
    save_learned(path)
    model = build("llama")
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "rotate_half", lambda x: x)
    with pytest.raises(ValueError, match="LlamaAttention: its file has no function by which to tell the columns"):
        enable(model, learned=path)


def test_chunks_compiled_calls_and_copies_take_the_weights(path, monkeypatch):
    save_learned(path)
    model, tokens, calls = build("llama"), prompt(), Calls(monkeypatch)
    settings = dict(threshold=0.2, threshold_tokens=0, segment=256)
    with torch.no_grad(), enable(model, learned=pbsattn.read_learned(path), **settings):
        whole = model(tokens).logits
        of_copy = copy.deepcopy(model)(tokens).logits
        assert torch.equal(of_copy, whole)
        calls.given.clear()
        cache = model(tokens[:, :300], use_cache=True).past_key_values
        model(tokens[:, 300:], past_key_values=cache)
        assert len(calls.given) == 4
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(tokens).logits, whole)
    first, second = list(calls.orders())[:2], list(calls.orders())[2:]
    for (_, early), (_, late) in zip(first, second):
        assert torch.equal(early[..., :256], late[..., :256]), "a complete segment keeps its order"
