"""Prompts in chunks, of which is known how long they are: their last rows are dense, not those of every chunk."""

import copy
import gc
import itertools
import pickle
import threading
import warnings
import weakref

import pytest
import torch

from learned_files import save_learned
from test_transformers import build, close, inference, prompt  # noqa: F401
from test_transformers_learned import Calls

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn  # noqa: E402
import pbsattn.transformers as pt  # noqa: E402

TOKENS = 1000
HEADS, LAYERS, BLOCK = 4, 2, 128
# Each row keeps its segment of two blocks and the first block: what it sees doesn't hang on the chunk that it is in.
SPARSE = {"method": "pbs-unpermuted", "keep": "none", "min_tokens": 64, "stats": True}


def enable(model, **settings):
    return pt.enable(model, **{**SPARSE, "dense_last_rows": 1, **settings})


def through(model, ids, sizes, cache=None):
    """Sends a prompt through a model in chunks of these sizes. Returns the logits of all, and the cache."""
    logits = []
    for chunk in ids.split(sizes, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def visited(model):
    """The blocks that the last prefill computed in each head, which are as many in all of them."""
    counts = {each.visited_blocks for each in pt.stats(model)}
    assert len(counts) == 1, counts
    return counts.pop() / HEADS


def reckoned(sizes, dense, before=0):
    """The same of chunks with so many dense last rows each, after so many tokens."""
    blocks, begin = 0, before
    for size, dense_rows in zip(sizes, dense, strict=True):
        rows = range(begin // BLOCK, -(-(begin + size) // BLOCK))
        begin += size
        for row in rows:
            own = row - row // 2 * 2 + 1
            blocks += row + 1 if row >= rows.stop - dense_rows else own + (row > 1)
    return blocks


@pytest.fixture
def quiet():
    """Fails where anything is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pt.FallbackWarning)
        yield


CHUNKS = [
    # sizes, a prompt's dense rows, and those of each chunk
    ([TOKENS], 2, [2]),
    ([384, 384, 232], 0, [0, 0, 0]),
    ([384, 384, 232], 1, [0, 0, 1]),
    ([512, 384, 104], 1, [0, 1, 1]),  # a row that is cut in two is dense in both
    ([512, 360, 128], 1, [0, 0, 1]),
    ([256, 256, 384, 104], 3, [0, 0, 3, 3]),
    ([256, 256, 232, 256], 3, [0, 0, 1, 3]),
    ([256, 256, 232, 256], 4, [0, 1, 2, 4]),
    ([500, 500], 40, [37, 40]),
]


@pytest.mark.parametrize(("sizes", "dense", "of_chunks"), CHUNKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_rows_are_those_of_the_prompt(sizes, dense, of_chunks, batch, device, quiet):
    model, ids = build("llama", device), prompt(device, TOKENS, batch)
    with enable(model, dense_last_rows=dense):
        without, _ = through(model, ids, sizes)
        assert visited(model) == batch * reckoned(sizes, [dense] * len(sizes))
        with pt.prompt(model, TOKENS):
            logits, _ = through(model, ids, sizes)
        assert visited(model) == batch * reckoned(sizes, of_chunks)
        if reckoned(sizes, of_chunks) == reckoned([TOKENS], [dense]):
            close(logits, model(ids).logits)
        again, _ = through(model, ids, sizes)
        assert torch.equal(again, without), "a prompt of which nothing is known"


def test_layers_and_heads_have_dense_rows_of_their_own(device, quiet):
    model, ids = build("llama", device), prompt(device, TOKENS)
    settings = {"0": {"2": {"dense_last_rows": 3}}, "1": {"*": {"dense_last_rows": 0}}}
    with enable(model, settings=settings), pt.prompt(model, TOKENS):
        through(model, ids, [512, 232, 256])
        of_layers = [each.visited_blocks for each in pt.stats(model)]
    of_heads = [reckoned([512, 232, 256], dense) for dense in ([0, 0, 1], [0, 1, 3], [0, 0, 0])]
    assert of_layers == [3 * of_heads[0] + of_heads[1], 4 * of_heads[2]]


def test_a_learned_order_goes_with_each_chunk(tmp_path, monkeypatch, quiet):
    weights = save_learned(tmp_path / "tiny.pbs")
    model, ids, calls = build("llama"), prompt(tokens=TOKENS), Calls(monkeypatch)
    settings = {"learned": tmp_path / "tiny.pbs", "settings": {"0": {"0": {"dense_last_rows": 2}}}}
    with pt.enable(model, min_tokens=64, fallback="never", **settings), pt.prompt(model, TOKENS):
        through(model, ids, [488, 512])
    rows = [options.get("dense_last_rows") for _, _, _, options in calls.given]
    assert rows == [0, 0, 2, None]
    for (_, _, _, options), layer in zip(calls.given, [0, 1, 0, 1]):
        assert torch.equal(options["order_weights"], weights[layer])


def test_what_is_cached_before_a_prompt_does_not_count(device, quiet):
    model, ids = build("llama", device), prompt(device, TOKENS)
    with enable(model):
        _, cache = through(model, ids[:, :300], [300])
        with pt.prompt(model, 700):
            through(model, ids[:, 300:], [340, 360], cache)
        assert visited(model) == reckoned([300], [1]) + reckoned([340, 360], [0, 1], before=300)


def test_windows_of_which_the_cache_drops_keys(device, quiet):
    model, ids = build("gemma3", device), prompt(device, TOKENS)
    sizes = [250, 500, 250]
    with enable(model):
        with pt.prompt(model, TOKENS):
            through(model, ids, sizes)
        assert [each.taken for each in pt.stats(model)] == [3, 3]
        assert pt.stats(model)[1].visited_blocks == HEADS * reckoned(sizes, [0, 0, 1])


def test_chunks_too_short_for_pbsattn_count(device, quiet):
    """A prompt's end in a chunk that goes to SDPA is dense there; what else of the last row there is, in the one before."""
    model, ids = build("llama", device), prompt(device, TOKENS)
    for sizes, dense in (([640, 320, 40], [0, 1]), ([40, 500, 460], [0, 1]), ([40, 480, 440, 40], [0, 1])):
        with enable(model), pt.prompt(model, TOKENS):
            through(model, ids, sizes)
            long = [size for size in sizes if size >= 64]
            taken = reckoned(long, dense, before=40 if sizes[0] == 40 else 0)
            assert visited(model) == taken


# ------------------------------------------------------------------------------- what was said doesn't hold


def told(model, message, work):
    """Runs what is told of once for each model, twice."""
    with pytest.warns(pt.FallbackWarning, match=message) as warned:
        work()
    assert len(warned) == 1 and str(warned[0].message).startswith("LlamaForCausalLM: ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work()


@pytest.mark.parametrize(("tokens", "dense"), [(512, [1, 1, 1]), (600, [0, 1, 1]), (999, [0, 0, 1])])
def test_a_chunk_beyond_the_prompt(tokens, dense, device):
    model, ids = build("llama", device), prompt(device, TOKENS)
    sizes = [400, 400, 200]

    def work():
        with pt.prompt(model, tokens):
            through(model, ids, sizes)
        assert visited(model) == reckoned(sizes, dense)

    with enable(model):
        end = {512: 800, 600: 800, 999: 1000}[tokens]
        told(model, f"ends at token {end} of a prompt that was said to have {tokens}; from here on .* dense", work)


@pytest.mark.parametrize("kept", [0, 300, 390])
def test_a_cache_of_other_keys(kept, device):
    """Which begins anew, or was cut, between two chunks."""
    model, ids = build("llama", device), prompt(device, TOKENS)
    counts = []

    def work():
        with pt.prompt(model, TOKENS):
            _, cache = through(model, ids[:, :400], [400])
            counts.append(visited(model))
            if kept:
                cache.crop(kept)
            through(model, ids[:, 400:], [300, 300], cache if kept else None)
        counts.append(visited(model))

    with enable(model):
        told(model, f"a chunk has {kept} keys before it, where 400 tokens came before of a prompt .* to have 1000", work)
    first = reckoned([400], [0])
    assert counts == [first, reckoned([300, 300], [1, 1], before=kept) + (first if kept else 0)] * 2


def test_a_prompt_whose_end_does_not_come(device):
    model, ids = build("llama", device), prompt(device, TOKENS)

    def work():
        with pt.prompt(model, TOKENS):
            through(model, ids[:, :800], [400, 400])
        assert visited(model) == reckoned([400, 400], [0, 0])

    with enable(model):
        told(model, "800 tokens came of a prompt that was said to have 1000; its last rows, .* not among them", work)


def test_an_exception_ends_a_prompt(device, quiet):
    model, ids = build("llama", device), prompt(device, TOKENS)

    def fails():
        with pt.prompt(model, TOKENS):
            model(ids[:, :400])
            assert visited(model) == reckoned([400], [0])
            raise ZeroDivisionError

    with enable(model):
        with pytest.raises(ZeroDivisionError):
            fails()
        model(ids[:, :400])
        assert visited(model) == reckoned([400], [1])


def test_wrong_values():
    model = build("llama")
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM: pbsattn is not enabled; call pbsattn.transformers.enable"):
        pt.prompt(model, TOKENS)
    with enable(model):
        for tokens in (0, -5, 1.5, "8192", None, True):
            with pytest.raises(ValueError, match=f"tokens {tokens!r}: not a whole number from 1 on"):
                pt.prompt(model, tokens)


# -------------------------------------------------------------------------------------- whose prompt it is


def test_prompts_inside_prompts(device, quiet):
    """The inner one counts while it lasts; the outer one has seen its tokens too. Other models' are their own."""
    model, other, ids = build("llama", device), build("llama", device), prompt(device, TOKENS)
    with enable(model), enable(other):
        with pt.prompt(model, TOKENS), pt.prompt(other, 5000):
            _, cache = through(model, ids[:, :400], [400])
            with pt.prompt(model, 300):
                _, cache = through(model, ids[:, 400:700], [150, 150], cache)
            through(model, ids[:, 700:], [172, 128], cache)
        assert visited(model) == reckoned([400, 150, 150, 172, 128], [0, 0, 1, 0, 1])


def test_a_part_of_an_enabled_model_will_do(device, quiet):
    model, ids = build("llama", device), prompt(device, TOKENS)
    with enable(model), pt.prompt(model.model, TOKENS):
        through(model, ids, [400, 600])
        assert visited(model) == reckoned([400, 600], [0, 1])


def test_another_threads_prompt_is_not_this_ones(device, quiet):
    model, ids = build("llama", device), prompt(device, TOKENS)
    counts = []

    def work():
        with torch.no_grad():
            _, cache = through(model, ids[:, :400], [400])
        counts.append(visited(model))
        return cache

    with enable(model), pt.prompt(model, TOKENS):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        through(model, ids[:, 400:], [600], work())
        assert counts == [reckoned([400], [1]), reckoned([400], [0])]


# ------------------------------------------------------------------------------------------------ generate


def generate(model, ids, **settings):
    more = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **{"prefill_chunk_size": 384, **more, **settings})


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_knows_its_prompt(batch, device, quiet):
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


def test_a_static_cache(device):
    """The first chunk alone is taken, and has no dense row; the others, which go to SDPA, count."""
    model, ids = build("llama", device), prompt(device, TOKENS)
    with enable(model), pytest.warns(pt.FallbackWarning) as warned:
        with pt.prompt(model, TOKENS):
            through(model, ids, [384, 384, 232], transformers.StaticCache(config=model.config, max_cache_len=TOKENS))
        assert [(each.taken, each.left) for each in pt.stats(model)] == [(1, 2), (1, 2)]
        assert visited(model) == reckoned([384], [0])
    assert all("goes to SDPA" in str(each.message) for each in warned)


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


def test_a_method_of_somebody_elses_stays(quiet):
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


def test_versions_without_the_method_or_with_another(monkeypatch, quiet):
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


def test_copies_watch_their_own_generate(quiet):
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
