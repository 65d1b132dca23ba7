"""eval needle, ruler and tasks, on a small random model: prompts, files, scores, and how answers come."""

import argparse
import json
import random

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval import commands, engines, kind  # noqa: E402
from pbsattn_eval.attentions import Attention  # noqa: E402
from pbsattn_eval.kinds import haystack, needle, ruler, ruler_tasks, scores, tasks  # noqa: E402


@pytest.fixture(scope="module")
def engine(folder):
    return engines.Engine(*engines.models.load(folder, torch.device("cpu"), torch.float32))


class Words:
    """An engine whose tokens are words."""

    def encode(self, text):
        return text.split()

    def chat(self, prompt, begun=""):
        return ["<user>", *prompt.split(), "<assistant>", *begun.split()]

    def decode(self, ids):
        return " ".join(ids)


def items_of(a_kind, engine, *arguments):
    parser = argparse.ArgumentParser()
    a_kind.add_arguments(parser)
    given = parser.parse_args(arguments)
    a_kind.check(given)
    return a_kind.items(given, engine)


def lines_of(out):
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


@pytest.fixture
def talkative(monkeypatch):
    """A random model never ends its turn, and each token is a word."""
    monkeypatch.setattr(engines.Engine, "_ends", lambda self: [10**6])
    monkeypatch.setattr(engines.Engine, "decode", lambda self, ids: " ".join(map(str, ids)))


@pytest.fixture
def canned(monkeypatch):
    """No model decodes: every answer is "fox A true"."""
    monkeypatch.setattr(
        engines.Engine,
        "answers_to",
        lambda self, asked: [
            {each.name: engines.Answer("fox A true", [1, 2, 3], 1.0, 0.1) for each in attentions}
            for _, attentions, _ in asked
        ],
    )


def run(folder, out, *arguments):
    return commands.run_main([*arguments, "--model", str(folder), "--device", "cpu", "--out", str(out)])


# ----------------------------------------------------------------------------------------------- answers


def test_answers_are_what_generate_gives(engine, folder, monkeypatch):
    monkeypatch.setattr(engines, "_CACHED_TOKENS", 1200)  # so that three attentions take two batches
    ids = engine.encode((folder / "text.txt").read_text())[:600]
    whole, sparse = Attention.parse("pbs:top_p=1.0"), Attention.parse("pbs:top_p=0.1")
    made = engine.answers(ids, [engine.FULL, whole, sparse], 8)
    expected = of_generate(engine, ids, 8)
    assert made["full"].tokens == made[whole.name].tokens == [each for each in expected if each not in engine._ends()]
    assert made["full"].text == engine.decode(expected)
    assert made[sparse.name].density < 1.0 and made["full"].density == 1.0


def of_generate(engine, ids, most):
    """What transformers answers a prompt with."""
    prompt = torch.tensor([ids])
    made = engine.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False, eos_token_id=engine._ends()
    )
    return made[0, len(ids) :].tolist()


# Tokens of prompts and of their answers at most: of several lengths, in no order.
SEVERAL = [(600, 5), (130, 9), (601, 1), (700, 9)]


def several(engine, folder, attentions):
    text = engine.encode((folder / "text.txt").read_text())
    return [(text[i : i + tokens], attentions, most) for i, (tokens, most) in enumerate(SEVERAL)]


@pytest.mark.parametrize("cached, batches", [(10**6, 1), (2200, 3), (1, 8)])
def test_prompts_together_are_answered_as_alone(engine, folder, monkeypatch, talkative, cached, batches):
    made, decoded = [], engines.decode.decode

    def decode(*given):
        made.append(given)
        return decoded(*given)

    monkeypatch.setattr(engines, "_CACHED_TOKENS", cached)
    monkeypatch.setattr(engines.decode, "decode", decode)
    sparse = Attention.parse("pbs:top_p=0.1")
    asked = several(engine, folder, [engine.FULL, sparse])
    together = engine.answers_to(asked)
    assert len(made) == batches
    assert [answers["full"].tokens for answers in together] == [of_generate(engine, ids, most) for ids, _, most in asked]
    alone = [engine.answers(*each) for each in asked]
    for answers, expected in zip(together, alone):
        assert answers[sparse.name].tokens == expected[sparse.name].tokens
        assert answers[sparse.name].density == expected[sparse.name].density
    assert together[0][sparse.name].density < 1.0
    assert len({tuple(answers["full"].tokens[:5]) for answers in together}) > 1


def test_layers_with_windows_are_answered_prompt_by_prompt(engine, folder, talkative):
    import transformers

    sizes = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    config = transformers.MistralConfig(vocab_size=len(engine.tokenizer), sliding_window=100, **sizes)
    windowed = engines.Engine(transformers.MistralForCausalLM(config).eval(), engine.tokenizer)
    asked = several(windowed, folder, [windowed.FULL, Attention.parse("sdpa")])
    for (ids, _, most), answers in zip(asked, windowed.answers_to(asked)):
        assert answers["full"].tokens == answers["sdpa"].tokens == of_generate(windowed, ids, most)


def test_a_method_without_an_answer_leaves_the_others_theirs(engine, folder, monkeypatch):
    ids = engine.encode((folder / "text.txt").read_text())[:600]
    sparse, densities = Attention.parse("pbs:top_p=0.1"), engine.densities

    def refuse(attention):
        if attention == sparse:
            raise kind.Unsupported("layer 0 went elsewhere")
        return densities(attention)

    monkeypatch.setattr(engine, "densities", refuse)
    made = engine.answers(ids, [sparse, engine.FULL], 4)
    with pytest.raises(kind.Unsupported, match="layer 0 went elsewhere"):
        kind.answered(made[sparse.name])
    assert len(made["full"].tokens) == 4


def test_an_answer_ends_with_the_turn(engine, folder, monkeypatch):
    ids = engine.encode((folder / "text.txt").read_text())[:600]
    tokens = engine.answers(ids, [engine.FULL], 8)["full"].tokens
    monkeypatch.setattr(engine, "_ends", lambda: [tokens[3]])
    assert engine.answers(ids, [engine.FULL], 8)["full"].tokens == tokens[: tokens.index(tokens[3])]
    monkeypatch.setattr(engine, "_ends", lambda: [tokens[0]])
    with pytest.raises(kind.Unsupported, match="without an answer"):
        kind.answered(engine.answers(ids, [engine.FULL], 8)["full"])


# ----------------------------------------------------------------------------------------------- prompts


def test_prompts_are_as_long_as_asked():
    pieces = [f"{'word ' * (i % 7)}end" for i in range(5000)]
    for tokens in (100, 101, 102, 3000):
        ids, n = haystack.fit(lambda n: f"five words around the text {' '.join(pieces[:n])}", tokens, str.split)
        assert tokens - max(15, tokens // 100) <= len(ids) <= tokens and n > 10
    with pytest.raises(ValueError, match="3 tokens: the question alone takes 4"):
        haystack.fit(lambda n: "more than is asked", 3, str.split)


@pytest.mark.parametrize("place", needle.PLACES)
def test_needles_lie_where_asked(place):
    a_kind = needle.Kind()
    items = items_of(a_kind, Words(), "--lengths", "2000,4000", "--depths", "3", "--question", place, "--needles", "5")
    assert len(items) == 6 and len({each.id for each in items}) == 6
    made = [a_kind.prompt(Words(), item) for item in items]
    assert [a_kind.prompt(Words(), item) for item in reversed(items)] == made[::-1]  # whatever was made before
    for item, (code, ids, begun) in zip(items, made):
        assert 0 <= item.params["tokens"] - len(ids) <= 40
        text = " ".join(ids)
        assert text.count("The code of the ") == 5 and text.count(code) == 1 and text.endswith(begun)
        ask, at = ids.index("What"), next(i for i, word in enumerate(ids) if word.startswith(code))
        body = (0, len(ids)) if place != "long" else (0, ask)
        assert at == pytest.approx(body[0] + item.params["depth"] * (body[1] - body[0]), abs=60)
        assert {"start": ask < 30, "end": len(ids) - ask < 30, "long": 480 < len(ids) - ask < 520}[place]


def test_needles_in_a_text_of_ones_own(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Sentence {i} of the book. " for i in range(50)))
    a_kind = needle.Kind()
    [item] = items_of(
        a_kind, Words(), "--lengths", "900", "--depths", "1", "--question", "end", "--filler", str(tmp_path / "book.txt")
    )
    assert "Sentence 49 of the book." in " ".join(a_kind.prompt(Words(), item)[1])


@pytest.mark.parametrize("task", ruler_tasks.TASKS)
def test_ruler_prompts_hold_their_answers(task):
    a_kind = ruler.Kind()
    items = items_of(a_kind, Words(), "--lengths", "2500", "--tasks", task, "--samples", "2")
    texts = []
    for item in items:
        prompt, ids = a_kind.prompt(Words(), item)
        texts.append(" ".join(ids))
        assert 2300 < len(ids) <= 2500
        assert all(each in texts[-1] for each in prompt.expected) and texts[-1].endswith(prompt.begun)
        assert len(prompt.expected) == {
            "niah_multivalue": 4,
            "niah_multiquery": 4,
            "variable_tracking": 5,
            "common_words": 10,
            "frequent_words": 3,
        }.get(task, 1)
    assert texts[0] != texts[1] and " ".join(a_kind.prompt(Words(), items[1])[1]) == texts[1]


def test_parts_of_a_ruler_run_have_other_prompts_of_every_task():
    whole = items_of(ruler.Kind(), Words(), "--samples", "4", "--lengths", "1024,2048")
    parts = [items_of(ruler.Kind(), Words(), "--samples", "2", "--first", first, "--lengths", "1024,2048") for first in "02"]
    apart = [each.id for part in parts for each in part]
    assert sorted(each.id for each in whole) == sorted(apart) and len(set(apart)) == 4 * 2 * 13
    assert [each.params["task"] for each in whole[:13]] == list(ruler_tasks.TASKS)


def test_word_lists_have_the_most_common_words():
    for task, rarest in ((ruler_tasks.common_words, 30), (ruler_tasks.frequent_words, 10)):
        prompt = task(random.Random(1), None)
        words = prompt.build(300).split()
        counts = {each: words.count(each) for each in prompt.expected}
        others = max(words.count(each) for each in set(words) - set(counts) - {"..."})
        assert min(counts.values()) >= rarest and others < min(counts.values())


# ------------------------------------------------------------------------------------------------- runs


def test_needle_runs_and_reports(folder, tmp_path, capsys, talkative):
    arguments = ["needle", "--lengths", "700", "--depths", "2", "--question", "end", "--methods", "pbs:top_p=0.5"]
    assert run(folder, tmp_path, *arguments) == 0
    lines = lines_of(tmp_path)
    assert [(each["item"], each["method"]) for each in lines] == [
        (f"end-700-{i}of2-0", method) for i in (0, 1) for method in ("full", "pbs:top_p=0.5")
    ]
    assert all(
        each["metrics"]["found"] in (0, 100) and len(each["answer"].split()) == needle.ANSWER_TOKENS for each in lines
    )
    assert "found by depth" in capsys.readouterr().out


def test_the_report_counts_what_full_finds():
    finds = (("full", (100, 100, 100, 0)), ("pbs", (100, 0, 100, 100)))
    made = [
        dict(item=str(i), group="end 1", method=method, params=dict(depth=i / 3), metrics=dict(found=found))
        for method, all_found in finds
        for i, found in enumerate(all_found)
    ]
    text = needle.Kind().report(made, {})
    assert "full: 3 of 3 (100.0%)" in text and "pbs: 2 of 3 (66.7%)" in text
    assert "end 1  full  ***0" in text and "end 1  pbs   *0**" in text


def test_ruler_runs(folder, tmp_path, capsys, canned):
    assert (
        run(folder, tmp_path, "ruler", "--lengths", "1500", "--samples", "1", "--tasks", "niah_single_2,common_words") == 0
    )
    assert len(lines_of(tmp_path)) == 4 and "niah_single_2 1500" in capsys.readouterr().out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


LEVAL = {
    "input": "the quick brown fox",
    "instructions": ["Who? A. fox B. dog", "Is it quick, True or False?", "What?", "Why?"],
    "outputs": ["A", "True [fact: False]", "a brown fox", "because"],
    "evaluation": "exam",
}
LONGBENCH = {
    "input": "Who jumps?",
    "context": "the fox jumps",
    "answers": ["the fox", "fox"],
    "dataset": "hotpotqa",
    "_id": "1",
    "all_classes": None,
    "length": 3,
    "language": "en",
}


def test_tasks_run_on_both_formats(folder, tmp_path, capsys, canned):
    write(tmp_path / "first.jsonl", [LEVAL, {**LEVAL, "evaluation": "LLM"}])
    write(
        tmp_path / "trec.jsonl",
        [
            {**LONGBENCH, "dataset": "trec", "all_classes": ["fox", "dog"], "context": "fox " * 900},
            {**LONGBENCH, "dataset": "samsum_e"},
        ],
    )
    assert run(folder, tmp_path / "out", "tasks", "--data", str(tmp_path), "--most-tokens", "600") == 0
    lines = lines_of(tmp_path / "out")
    assert [each["item"] for each in lines if each["method"] == "full"] == [
        *[f"first-{line}-{i}" for line in (1, 2) for i in range(4)],
        "trec-1-0",
        "trec-2-0",
    ]
    assert all(
        "needs a judge" in each["error"] for each in lines if each["params"]["line"] == 2 and each["group"] == "first"
    )
    scores = {each["item"]: each["metrics"]["score"] for each in lines if "metrics" in each and each["method"] == "full"}
    assert scores == {
        "first-1-0": 100,
        "first-1-1": 100,
        "first-1-2": 0,
        "first-1-3": 0,
        "trec-1-0": 100,
        "trec-2-0": pytest.approx(50),
    }
    assert "full: 4 item(s) not counted, the first first-2-0" in capsys.readouterr().out


def test_a_long_document_loses_its_middle():
    a_kind = tasks.Kind()
    question = tasks.Question("first " + "middle " * 3000 + "last", "What?", ["x"], tasks.LONGBENCH_SETS["qasper"])
    ids = a_kind.prompt(Words(), kind.Item("a", "a", {"most_tokens": 700}, question))
    assert 650 < len(ids) <= 700 and "first" in ids and "last" in ids
    assert len(a_kind.prompt(Words(), kind.Item("a", "a", {"most_tokens": 9000}, question))) > 3000


def test_rules_of_leval():
    def rule(evaluation, answer):
        return getattr(tasks._leval_rule(evaluation, answer), "score", None)

    assert rule("exam", "(B) Because it rained") == rule("exam", "BD") == "choice"
    assert rule("exam", "False [fact: True]") == "truth" and rule("exam", "The role of art") == "exact"
    assert rule("f1", "1924") == "f1" and rule("rouge", "A report") == "rouge_l" and rule("LLM", "x") is None


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "x.jsonl: is empty"),
        ([{"text": 1}], 'line 1: has neither field "instructions" (L-Eval) nor "context" (LongBench), but text'),
        ([LEVAL, {**LEVAL, "outputs": ["a"]}], 'line 2: field "outputs" has 1 texts for 4 instructions'),
        ([LEVAL, {**LEVAL, "instructions": 5}], 'line 2: field "instructions" is 5; it has to be of type list'),
        ([{**LEVAL, "outputs": [1, 2, 3, 4]}], 'line 1: field "outputs" has to be a list of texts'),
        ([{k: v for k, v in LEVAL.items() if k != "input"}], 'line 1: field "input" is missing'),
        ([LONGBENCH, {**LONGBENCH, "dataset": "none"}], 'line 2: field "dataset" is "none", none of narrativeqa'),
        ([{**LONGBENCH, "answers": []}], 'line 1: field "answers" has to be a list of texts'),
        ([{**LONGBENCH, "dataset": "trec"}], 'line 1: field "all_classes" is missing'),
    ],
)
def test_wrong_files_are_named(tmp_path, rows, message):
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError) as told:
        list(tasks.read(tmp_path / "x.jsonl"))
    assert message in str(told.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["needle", "--lengths", "8k"], "--lengths 8k: not whole numbers"),
        (["needle", "--lengths", "100"], "100 is not within 512"),
        (["needle", "--lengths", "600,600"], "names a value twice"),
        (["needle", "--question", "middle"], '"middle" is none of end, start, long'),
        (["needle", "--depths", "0"], "--depths 0: at least 1"),
        (["needle", "--filler", "nowhere.txt"], "nowhere.txt: no such file"),
        (["ruler", "--tasks", "qa_3"], '"qa_3" is none of niah_single_1'),
        (["ruler", "--samples", "0"], "--samples 0: at least 1"),
        (["ruler", "--first", "-1"], "--first -1: at least 0"),
        (["tasks", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["tasks", "--data", ".", "--most", "0"], "has no .jsonl files"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(folder, tmp_path / "run", *arguments) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    "score, arguments, value",
    [
        (scores.held, ("It is Fox and 12.", ["fox", "13"]), 0.5),
        (scores.held, ("It is Fox and 12.", ["fox", "13"], True), 1.0),
        (scores.exact, ("The Fox.", ["dog", "a fox"]), 1.0),
        (scores.exact, ("The foxes", ["a fox"]), 0.0),
        (scores.f1, ("a red fox", ["the quick fox", "cat"]), 0.5),
        (scores.rouge_l, ("the fox runs home", ["the dog runs home"]), 0.75),
        (scores.rouge_l, ("...", ["the dog"]), 0.0),
        (scores.choice, ("B. since it rained", ["(B) It rained"]), 1.0),
        (scores.choice, ("A, C and D", ["ACD"]), 1.0),
        (scores.choice, ("The answer is BD", ["B"]), 0.0),
        (scores.choice, ("none of them", ["A"]), 0.0),
        (scores.truth, ("That is false.", ["False [fact: True]"]), 1.0),
        (scores.truth, ("Who knows", ["True"]), 0.0),
        (scores.classes, ("a red fox", ["red fox"], ["fox", "red fox", "dog"]), 1.0),
        (scores.classes, ("dog or cat", ["dog"], ["dog", "cat"]), 0.5),
        (scores.numbers, ("Paragraph 7, or 8", ["Paragraph 7"]), 0.5),
        (scores.code, ("# first\nreturn x\n", ["return x"]), 1.0),
    ],
)
def test_scores(score, arguments, value):
    assert score(*arguments) == pytest.approx(value, abs=1e-6)
