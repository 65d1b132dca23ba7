"""The plug-in in vLLM's engine: with every block kept, its tokens are those of vLLM's own attention."""

import functools
import re

import pytest
import torch
from vllm.model_executor.models import llama

from conftest import REQUESTS, run
from learned_files import save_learned

ALL_BLOCKS = {"PBSATTN_METHOD": "pbs:top_p=1"}
SINKS = torch.tensor([2.0, 4.0, -1.0, 3.0], dtype=torch.bfloat16)  # of each query head; what vLLM takes on the CPU
TIE = 1e-3  # of log-probabilities; far above what the order of sums makes of them


def compare(ran, dense, sets):
    for name in sets:
        for got, wanted in zip(ran.answers[name], dense.answers[name]):
            assert got.tokens == wanted.tokens, name
            assert got.best == pytest.approx(wanted.best, abs=TIE / 4)


def rows_of(ran, name, layer=0):
    return [(row.tokens, row.kv_len) for row in ran.rows[name][layer]]


def test_requests_are_no_near_ties(dense):
    """Else the tests below would hang on rounding: pick other requests then."""
    near = {
        (name, i): min(best - second for best, second in zip(answer.best, answer.second))
        for name, answers in dense.answers.items()
        for i, answer in enumerate(answers)
        if answer is not None
    }
    assert {which: gap for which, gap in near.items() if gap <= TIE} == {}
    assert all(len(set(answer.tokens)) > 1 for answers in dense.answers.values() for answer in answers if answer)


PAGES = {
    "pages16": (16, "NHD", True),
    "pages16_gathered": (16, "NHD", False),
    "pages64_HND": (64, "HND", True),
    "pages128": (128, "NHD", True),
}


@pytest.fixture(scope="session", params=PAGES.values(), ids=PAGES)
def ran(request, models):
    block_size, layout, in_place = request.param
    variables = {**ALL_BLOCKS, "PBSATTN_STATS": "1"}
    ran = run(models["llama"], block_size, variables=variables, layout=layout, in_place=in_place)
    assert f"their pages {'in place' if in_place else 'gathered'} ({block_size} tokens)" in "\n".join(ran.log)
    assert ran.layouts == {layout}
    return ran


def test_tokens_are_those_of_vllms_attention(ran, dense):
    compare(ran, dense, REQUESTS)


def test_rows(ran, dense):
    assert rows_of(ran, "chunks") == [(256, 256), (256, 512), (256, 768)]
    assert rows_of(ran, "whole") == [(200, 200)]
    (first, *others) = rows_of(ran, "prefix")
    assert first[1] - first[0] == 640 and sum(tokens for tokens, _ in [first, *others]) == 250
    assert rows_of(ran, "mixed") and ran.mixed_calls
    for name, rows in ran.rows.items():
        assert set(rows) == {0, 1, 2} and rows[0] == rows[1] == rows[2], name
    assert ran.preemptions["preempted"] and dense.preemptions["preempted"]


def test_rows_know_what_of_their_prompt_comes_after_them(ran):
    for name, requests in REQUESTS.items():
        for row in ran.rows[name][0]:
            assert row.after in {max(len(ids) - row.kv_len, 0) for ids, _ in requests}, name
    assert [row.after for row in ran.rows["chunks"][0]] == [544, 288, 32]
    assert all(row.after == 890 - row.kv_len for row in ran.rows["prefix"][0])
    assert [row.after for row in ran.rows["whole"][0]] == [0]


def test_only_a_prompts_last_rows_see_everything(models):
    """Of a chunk before others none does: of its two rows of four heads each sees its segment and the first block."""
    least = {"PBSATTN_METHOD": "pbs:keep=density:density=0:dense_last_rows=1", "PBSATTN_STATS": "1"}
    sets = {"chunks": REQUESTS["chunks"]}

    def densities(**others):
        ran = run(models["llama"], sets=sets, variables={**least, **others}, aborting=False)
        return re.findall(r"row of (\d+) tokens over (\d+): density ([.\d]+)", "\n".join(ran.log))

    assert densities() == [("256", "256", "1.000"), ("256", "512", "0.714"), ("256", "768", "0.727")], (
        "3 + 2 of 7, 2 + 6 of 11"
    )
    assert densities(PBSATTN_DENSE_LAST_ROWS="3") == [
        ("256", "256", "1.000"),
        ("256", "512", "0.857"),
        ("256", "768", "1.000"),
    ]


def test_aborted(ran, dense):
    assert ran.answers["aborted"][0] is None and dense.answers["aborted"][0] is None
    for got, wanted in zip(ran.answers["aborted"][1:], dense.answers["aborted"][1:]):
        assert got.tokens == wanted.tokens


def test_what_is_told(ran):
    started = [line for line in ran.log if "takes 3 of 3 layers" in line]
    assert len(started) == 1 and "pbs:top_p=1" in started[0] and "64 tokens or more" in started[0]
    assert "pbsattn: row of 256 tokens over 768: density 1.000" in "\n".join(ran.log)
    assert not [line for line in ran.log if "goes to FlashAttention" in line]


def test_sparse_attention_is_another(models, dense):
    """That the comparison above can fail."""
    ran = run(models["llama"], variables={"PBSATTN_METHOD": "pbs:keep=density:density=0"}, aborting=False)
    differ = [
        abs(got - wanted) for name in REQUESTS for a, b in zip(ran.answers[name], dense.answers[name])
        for got, wanted in zip(a.best, b.best)
    ]  # fmt: skip
    assert max(differ) > 100 * TIE


def test_layers_and_memory(models, dense):
    """One layer is left by the user, and the memory holds no gathered pages of long rows, which go to FlashAttention."""
    variables = {**ALL_BLOCKS, "PBSATTN_LAYERS": "0,2", "PBSATTN_WORKSPACE_CAP_MIB": "1"}
    ran = run(models["llama"], variables=variables, in_place=False)
    compare(ran, dense, REQUESTS)
    assert set(ran.rows["chunks"]) == {0, 2}
    assert (256, 256) in rows_of(ran, "chunks") and (256, 768) not in rows_of(ran, "chunks")
    log = "\n".join(ran.log)
    assert "takes 2 of 3 layers" in log and "leaves 1 layers to FlashAttention (model.layers.1." in log
    told = re.findall(r"layers\.(\d)\.\S+: a row of 256 tokens over \d+ goes to FlashAttention: .* bytes", log)
    assert told == ["0", "2"]
    assert "rows of 256 tokens over 1024: its gathered pages alone take 1048576 bytes" in log
    assert "raise PBSATTN_WORKSPACE_CAP_MIB" in log


def test_a_window(models):
    """Rows over more than the window are FlashAttention's, the others pbsattn's."""
    sets = {name: REQUESTS[name] for name in ("chunks", "whole", "mixed")}  # the first batch is a row that is taken
    dense = run(models["mistral"], sets=sets, aborting=False)
    ran = run(models["mistral"], sets=sets, variables=ALL_BLOCKS, aborting=False)
    compare(ran, dense, sets)
    assert rows_of(ran, "chunks") == [(256, 256)] and rows_of(ran, "whole") == [(200, 200)]


@pytest.mark.parametrize("carried", [{"sinks": SINKS}, {"logits_soft_cap": 1.5}], ids=lambda each: next(iter(each)))
def test_what_layers_carry(models, dense, monkeypatch, carried):
    """Rows of layers with sinks (GPT-OSS) and with capped logits (Gemma 2): tokens are vLLM's own, by which these matter."""
    monkeypatch.setattr(llama, "Attention", functools.partial(llama.Attention, **carried))
    sets = {name: REQUESTS[name] for name in ("chunks", "whole", "mixed")}
    own = run(models["llama"], sets=sets, aborting=False)
    ran = run(models["llama"], sets=sets, variables=ALL_BLOCKS, aborting=False)
    compare(ran, own, sets)
    assert rows_of(ran, "chunks") == [(256, 256), (256, 512), (256, 768)] and rows_of(ran, "whole") == [(200, 200)]
    (a,), (b,) = own.answers["chunks"], dense.answers["chunks"]
    assert max(abs(x - y) for x, y in zip(a.best, b.best)) > 10 * TIE


def test_settings_of_another_model(models, dense, tmp_path):
    """Every layer is left, or the engine doesn't start."""
    path = tmp_path / "settings.json"
    path.write_text('{"7": {"*": {"keep": "all"}}}')
    variables = {**ALL_BLOCKS, "PBSATTN_SETTINGS": str(path)}
    sets = {"whole": REQUESTS["whole"]}
    ran = run(models["llama"], sets=sets, variables=variables, aborting=False)
    compare(ran, dense, sets)
    assert ran.rows == {"whole": {}} and any("settings of layer 7: the model has 3" in line for line in ran.log)
    with pytest.raises(ValueError, match="settings of layer 7"):
        run(models["llama"], sets=sets, variables={**variables, "PBSATTN_UNSUPPORTED": "refuse"}, aborting=False)


def test_ranks_take_settings_by_global_head(models, dense, tmp_path):
    """Two processes with two heads each make what one does, where a head of the second one sees less than it would."""
    path = tmp_path / "settings.json"
    path.write_text('{"1": {"3": {"keep": "none"}}}')
    sets, variables = {"chunks": REQUESTS["chunks"]}, {**ALL_BLOCKS, "PBSATTN_SETTINGS": str(path)}
    one, two = (run(models["llama"], sets=sets, variables=variables, aborting=False, ranks=ranks) for ranks in (1, 2))
    compare(two, one, sets)
    (a,), (b,) = one.answers["chunks"], dense.answers["chunks"]
    assert max(abs(x - y) for x, y in zip(a.best, b.best)) > 10 * TIE


def test_ranks_take_weights_by_global_head(models, dense, tmp_path):
    """A learned order's KV heads are each in the process that has them: weights of another would move keys otherwise."""
    weights = torch.randn(3, 2, 96, generator=torch.Generator().manual_seed(0))
    save_learned(tmp_path / "tiny.pbs", weights, sizes={"layers": 3, "query_heads": 4, "kv_heads": 2, "head_dim": 64})
    variables = {
        "PBSATTN_LEARNED": str(tmp_path / "tiny.pbs"),
        "PBSATTN_METHOD": "pbs:permutation=learned:order_scope=kv_head:keep=density:density=0.3",
    }
    sets = {"chunks": REQUESTS["chunks"]}
    one, two = (run(models["llama"], sets=sets, variables=variables, aborting=False, ranks=ranks) for ranks in (1, 2))
    compare(two, one, sets)
    assert any("with the learned order" in line and "tiny.pbs" in line for line in one.log)
    (a,), (b,) = one.answers["chunks"], dense.answers["chunks"]
    assert max(abs(x - y) for x, y in zip(a.best, b.best)) > 10 * TIE


def test_keys_that_stay_are_gathered_from_small_pages(models, dense):
    sets = {"chunks": REQUESTS["chunks"]}
    variables = {"PBSATTN_METHOD": "pbs:top_p=1:permutation=none"}
    for block_size, layout, told in ((64, "HND", "gathered (64 tokens)"), (128, "NHD", "in place (128 tokens)")):
        ran = run(models["llama"], block_size, sets=sets, variables=variables, aborting=False, layout=layout)
        compare(ran, dense, sets)
        assert ran.rows["chunks"] and any(told in line for line in ran.log)


def test_rows_that_auto_leaves_to_flash_attention(models, dense):
    """Where it would be dense anyway, as for prompts this short; FlashAttention reads pages in place."""
    sets = {"chunks": REQUESTS["chunks"], "mixed": REQUESTS["mixed"]}
    ran = run(models["llama"], sets=sets, variables={"PBSATTN_METHOD": "auto"}, aborting=False)
    compare(ran, dense, sets)
    assert any("takes 3 of 3 layers" in line for line in ran.log) and ran.rows == {name: {} for name in sets}
    assert any("takes nothing: by auto every chunk there can be, of at most 256 tokens" in line for line in ran.log)


def test_a_learned_order_of_another_model(models, tmp_path):
    save_learned(tmp_path / "tiny.pbs", sizes={"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 64})
    ran = run(models["llama"], sets={}, variables={"PBSATTN_LEARNED": str(tmp_path / "tiny.pbs")}, aborting=False)
    assert any("leaves 3 layers" in line and "tiny.pbs" in line for line in ran.log)


def test_chunks_below_min_tokens_are_told(models):
    ran = run(models["llama"], sets={}, variables={"PBSATTN_MIN_TOKENS": "2560"}, aborting=False)
    assert any("takes nothing" in line for line in ran.log)
