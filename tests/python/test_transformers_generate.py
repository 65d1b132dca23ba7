"""generate() of models whose prompts go through pbsattn in chunks, and compiled models: what they know of a prompt."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch

from test_transformers import build, close, inference, prompt  # noqa: F401
from test_transformers_prompts import LAYERS, TOKENS, enable, reckoned, through, visited

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn  # noqa: E402
import pbsattn.transformers as pt  # noqa: E402

quiet = pytest.mark.filterwarnings("error::pbsattn.transformers.FallbackWarning")


def generate(model, ids, **settings):
    more = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **{"prefill_chunk_size": 384, **more, **settings})


@quiet
@pytest.mark.parametrize("batch", [1, 2])
def test_generate_knows_its_prompt(batch, device):
    model, ids = build("llama", device), prompt(device, TOKENS, batch)
    sizes = [384, 384, 232]
    with enable(model):
        generate(model, ids)
        assert visited(model) == batch * reckoned(sizes, [0, 0, 1])
        generate(model, ids, num_beams=2)
        assert visited(model) == 2 * batch * reckoned(sizes, [0, 0, 1])
        generate(model, ids, prefill_chunk_size=None)
        assert visited(model) == batch * reckoned([TOKENS], [1])
        with pt.prompt(model, TOKENS):
            generate(model, ids)
        through(model, ids, sizes)
        assert visited(model) == batch * reckoned(sizes, [1, 1, 1])


@pytest.mark.filterwarnings("ignore:.*goes to SDPA")  # of masks that transformers cuts to the wrong length
def test_generate_over_a_cache_that_has_tokens_knows_nothing(monkeypatch):
    model, ids = build("llama"), prompt(tokens=TOKENS)
    known = []
    monkeypatch.setattr(pbsattn._transformers_prompts, "known", lambda *given: known.append(given))
    with enable(model):
        _, cache = through(model, ids[:, :300], [300])
        try:
            generate(model, ids, past_key_values=cache)
        except Exception as error:  # what becomes of it is transformers' affair
            assert "pbsattn" not in str(error)
    assert known == []


def hooks(model):
    return [name for name, module in model.named_modules() if "_prefill" in vars(module)]


def test_a_model_is_left_as_it_was():
    model, ids = build("llama"), prompt(tokens=TOKENS)
    method = transformers.LlamaForCausalLM._prefill
    expected = generate(model, ids)
    with enable(model):
        assert hooks(model) == [""] and transformers.LlamaForCausalLM._prefill is method
    assert hooks(model) == []
    assert torch.equal(generate(model, ids), expected)
    enable(model)
    pt.disable(model)
    assert hooks(model) == []


@quiet
def test_a_method_of_somebody_elses_stays():
    """Put there before enable(), and on top of its own."""
    model, ids, called = build("llama"), prompt(tokens=TOKENS), []

    def put(name):
        inner = model._prefill

        def outer(input_ids, generation_config, model_kwargs, **others):
            called.append(name)
            return inner(input_ids, generation_config, model_kwargs, **others)

        model._prefill = outer
        return outer

    before = put("before")
    with enable(model):
        generate(model, ids)
        assert called == ["before"] and visited(model) == reckoned([384, 384, 232], [0, 0, 1])
    assert model._prefill is before
    enable(model)
    above = put("above")
    pt.disable(model)
    assert model._prefill is above
    called.clear()
    generate(model, ids)
    assert called == ["above", "before"]
    with enable(model):
        generate(model, ids)
        assert visited(model) == reckoned([384, 384, 232], [0, 0, 1])


@quiet
def test_versions_without_the_method_or_with_another(monkeypatch):
    model, ids = build("llama"), prompt(tokens=TOKENS)
    real, mixin = transformers.GenerationMixin._prefill, transformers.GenerationMixin
    monkeypatch.setattr(mixin, "_prefill", lambda self, *given, **named: real(self, *given, **named))
    with enable(model):
        generate(model, ids)
        assert visited(model) == reckoned([384, 384, 232], [1, 1, 1]), "of arguments with other names nothing is known"
    monkeypatch.delattr(mixin, "_prefill")
    with enable(model):
        assert hooks(model) == []
        through(model, ids, [500, 500])
    assert hooks(model) == []


@quiet
def test_copies_watch_their_own_generate():
    model, ids = build("llama"), prompt(tokens=TOKENS)
    with enable(model):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            twin.model.layers[0].mlp.up_proj.weight.mul_(3.0)
            logits = twin(ids).logits[:, -1]
            out = generate(twin, ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
            close(out.logits[0], logits)
            assert visited(twin) == reckoned([384, 384, 232], [0, 0, 1])
    assert pt.stats(twins[0])
    for twin in twins:
        pt.disable(twin)
        assert hooks(twin) == []


def test_a_model_goes_at_once():
    """Without waiting for the collector: it may be gigabytes on a GPU."""
    model = build("llama")
    pt.enable(model)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------- compiled


class Graphs:
    """A backend that keeps the settings of our op's calls, graph after graph."""

    def __init__(self):
        self.settings = []

    def __call__(self, graph, inputs):
        ours = [node for node in graph.graph.nodes if node.target is torch.ops.pbsattn.attention.default]
        self.settings.append([node.kwargs["settings"] for node in ours])
        return graph.forward


@pytest.mark.parametrize("first", ["known", "unknown"])
def test_a_graph_keeps_nothing_of_a_prompt(first):
    """It is there for later prompts, too: its chunks have their dense rows, whatever is known while it is made or runs."""
    model, ids, graphs = build("llama"), prompt(tokens=TOKENS), Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    with enable(model):
        expected = model(ids[:, :400]).logits
        for how in itertools.islice(itertools.cycle(["known", "unknown"]), first == "unknown", 4):
            with pt.prompt(model, TOKENS) if how == "known" else torch.no_grad():
                close(compiled(ids[:, :400]).logits, expected)
    assert len(graphs.settings) == 1 and len(graphs.settings[0]) == LAYERS, "made anew for each prompt"
    assert all("dense_last_rows=1" in each for each in graphs.settings[0])


def test_the_method_that_is_watched_compiles():
    """In a graph it does what it did, and no more."""
    model, ids, graphs = build("llama"), prompt(tokens=TOKENS), Graphs()
    config = transformers.GenerationConfig(prefill_chunk_size=384)

    def prefill(ids):
        cache = transformers.DynamicCache(config=model.config)
        return model._prefill(
            ids, generation_config=config, model_kwargs={"past_key_values": cache, "use_cache": True}
        ).logits

    torch._dynamo.reset()
    with enable(model):
        expected = through(model, ids, [384, 384, 232])[0][:, -1]
        close(torch.compile(prefill, backend=graphs, fullgraph=True)(ids)[:, -1], expected)
    assert len(graphs.settings) == 1 and len(graphs.settings[0]) == 3 * LAYERS
    assert all("dense_last_rows=1" in each for each in graphs.settings[0])
