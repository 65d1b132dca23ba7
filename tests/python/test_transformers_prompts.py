"""Prompts in chunks, of which is known how long they are: their last rows are dense, not those of every chunk."""

import threading
import warnings

import pytest
import torch

from learned_files import save_learned
from test_transformers import build, close, inference, prompt  # noqa: F401
from test_transformers_learned import Calls

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn.transformers as pt  # noqa: E402
from pbsattn import _transformers_prompts  # noqa: E402

quiet = pytest.mark.filterwarnings("error::pbsattn.transformers.FallbackWarning")  # where anything is told

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


CHUNKS = [
    # sizes, a prompt's dense rows, and those of each chunk
    ([TOKENS], 2, [2]),
    ([384, 384, 232], 0, [0, 0, 0]),
    ([384, 384, 232], 1, [0, 0, 1]),
    ([512, 384, 104], 1, [0, 1, 1]),  # a row more than needed, where the prompt ends inside one
    ([512, 360, 128], 1, [0, 0, 1]),
    ([512, 400, 88], 1, [0, 1, 1]),  # a row that is cut is dense in both of its chunks
    ([256, 256, 384, 104], 3, [0, 0, 3, 3]),
    ([256, 256, 232, 256], 3, [0, 0, 1, 3]),
    ([256, 256, 232, 256], 4, [0, 1, 2, 4]),
    ([500, 500], 40, [37, 40]),
]


@quiet
@pytest.mark.parametrize(("sizes", "dense", "of_chunks"), CHUNKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_rows_are_those_of_the_prompt(sizes, dense, of_chunks, batch, device):
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


@quiet
def test_layers_and_heads_have_dense_rows_of_their_own(device):
    model, ids = build("llama", device), prompt(device, TOKENS)
    settings = {"0": {"2": {"dense_last_rows": 3}}, "1": {"*": {"dense_last_rows": 0}}}
    with enable(model, settings=settings), pt.prompt(model, TOKENS):
        through(model, ids, [512, 232, 256])
        of_layers = [each.visited_blocks for each in pt.stats(model)]
    of_heads = [reckoned([512, 232, 256], dense) for dense in ([0, 0, 1], [0, 1, 3], [0, 0, 0])]
    assert of_layers == [3 * of_heads[0] + of_heads[1], 4 * of_heads[2]]


@quiet
def test_a_learned_order_goes_with_each_chunk(tmp_path, monkeypatch):
    weights = save_learned(tmp_path / "tiny.pbs")
    model, ids, calls = build("llama"), prompt(tokens=TOKENS), Calls(monkeypatch)
    settings = {"learned": tmp_path / "tiny.pbs", "settings": {"0": {"0": {"dense_last_rows": 2}}}}
    with pt.enable(model, min_tokens=64, fallback="never", **settings), pt.prompt(model, TOKENS):
        through(model, ids, [488, 512])
    rows = [options.get("dense_last_rows") for _, _, _, options in calls.given]
    assert rows == [0, 0, 2, None]
    for (_, _, _, options), layer in zip(calls.given, [0, 1, 0, 1]):
        assert torch.equal(options["order_weights"], weights[layer])


@quiet
def test_what_is_cached_before_a_prompt_does_not_count(device):
    model, ids = build("llama", device), prompt(device, TOKENS)
    with enable(model):
        _, cache = through(model, ids[:, :300], [300])
        with pt.prompt(model, 700):
            through(model, ids[:, 300:], [340, 360], cache)
        assert visited(model) == reckoned([300], [1]) + reckoned([340, 360], [0, 1], before=300)


@quiet
def test_windows_of_which_the_cache_drops_keys(device):
    model, ids = build("gemma3", device), prompt(device, TOKENS)
    sizes = [250, 500, 250]
    with enable(model):
        with pt.prompt(model, TOKENS):
            through(model, ids, sizes)
        assert [each.taken for each in pt.stats(model)] == [3, 3]
        assert pt.stats(model)[1].visited_blocks == HEADS * reckoned(sizes, [0, 0, 1])


@quiet
def test_chunks_too_short_for_pbsattn_count(device):
    """A prompt's end in a chunk that goes to SDPA is dense there; what else of the last row there is, in the one before."""
    model, ids = build("llama", device), prompt(device, TOKENS)
    for sizes, dense in (([640, 320, 40], [0, 1]), ([40, 500, 460], [0, 1]), ([40, 480, 440, 40], [0, 1])):
        with enable(model), pt.prompt(model, TOKENS):
            through(model, ids, sizes)
            long = [size for size in sizes if size >= 64]
            taken = reckoned(long, dense, before=40 if sizes[0] == 40 else 0)
            assert visited(model) == taken


def test_a_static_cache(device):
    """The first chunk alone is taken, and has no dense row; the others, which go to SDPA, count."""
    model, ids = build("llama", device), prompt(device, TOKENS)
    with enable(model), pytest.warns(pt.FallbackWarning) as warned:
        with pt.prompt(model, TOKENS):
            through(model, ids, [384, 384, 232], transformers.StaticCache(config=model.config, max_cache_len=TOKENS))
        assert [(each.taken, each.left) for each in pt.stats(model)] == [(1, 2), (1, 2)]
        assert visited(model) == reckoned([384], [0])
    assert all("goes to SDPA" in str(each.message) for each in warned)


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


@quiet
def test_an_end_that_does_not_come_is_not_missed_where_none_is_dense(device):
    model, ids = build("llama", device), prompt(device, TOKENS)
    with enable(model, dense_last_rows=0), pt.prompt(model, TOKENS):
        through(model, ids[:, :800], [400, 400])


@quiet
def test_an_exception_ends_a_prompt(device):
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


@quiet
def test_prompts_inside_prompts(device):
    """The inner one counts while it lasts; the outer one has seen its tokens too. Other models' are their own."""
    model, other, ids = build("llama", device), build("llama", device), prompt(device, TOKENS)
    with enable(model), enable(other):
        with pt.prompt(model, TOKENS), pt.prompt(other, 5000):
            _, cache = through(model, ids[:, :400], [400])
            with pt.prompt(model, 300):
                _, cache = through(model, ids[:, 400:700], [150, 150], cache)
            through(model, ids[:, 700:], [172, 128], cache)
        assert visited(model) == reckoned([400, 150, 150, 172, 128], [0, 0, 1, 0, 1])


@quiet
def test_a_part_of_an_enabled_model_will_do(device):
    model, ids = build("llama", device), prompt(device, TOKENS)
    with enable(model), pt.prompt(model.model, TOKENS):
        through(model, ids, [400, 600])
        assert visited(model) == reckoned([400, 600], [0, 1])


@quiet
def test_a_module_that_runs_twice_in_a_forward(device):
    """Each time over keys of its own, as in models that go through their layers again."""
    model = build("llama", device)
    with enable(model), pt.prompt(model, TOKENS):
        layer = model.model.layers[0].self_attn._pbsattn
        begin = 0
        for size in (384, 384, 232):
            for _ in range(2):
                chunk = _transformers_prompts.chunk_of(layer, size)
                assert chunk is not None
                assert chunk.prompt.after(layer, begin, size) == TOKENS - begin - size
            begin += size


@quiet
def test_another_threads_prompt_is_not_this_ones(device):
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
