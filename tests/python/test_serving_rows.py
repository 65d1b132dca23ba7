"""Which rows of a server's batch are pbsattn's: lists on the host, no server."""

import random

import pytest

from pbsattn.serving.rows import Row, runs_between, take


def starts_of(tokens):
    starts = [0]
    for each in tokens:
        starts.append(starts[-1] + each)
    return starts


def split(tokens, context=None, prefilling=None, min_tokens=100):
    """(rows taken, runs between) of a batch, by their tokens."""
    starts = starts_of(tokens)
    lens = [own + before for own, before in zip(tokens, context or [0] * len(tokens))]
    taken = take(starts, lens, prefilling or [True] * len(tokens), min_tokens)
    return taken, runs_between(starts, taken)


CASES = {
    "one long prefill": ([500], None, None, [0], []),
    "decodes before a prefill": ([1, 1, 500], [40, 9, 0], [False, False, True], [2], [(0, 2)]),
    "prefills before decodes": ([500, 1, 1], [0, 40, 9], [True, False, False], [0], [(1, 3)]),
    "a decode between": ([500, 1, 300], [0, 40, 64], [True, False, True], [0, 2], [(1, 2)]),
    "short and long mixed": ([99, 100, 99, 101], None, None, [1, 3], [(0, 1), (2, 3)]),
    "a chunk behind others": ([256], [1024], None, [0], []),
    "a prefix hit": ([120], [4096], None, [0], []),
    "the last short chunk": ([30], [1024], None, [], [(0, 1)]),
    "empty rows between and at the end": ([0, 300, 0, 1, 0, 0], None, None, [1], [(2, 6)]),
    "empty rows alone": ([0, 0], None, None, [], []),
    "drafts to verify are no prefill": ([120, 120], [500, 0], [False, True], [1], [(0, 1)]),
    "no row": ([], None, None, [], []),
}


@pytest.mark.parametrize(("tokens", "context", "prefilling", "taken", "runs"), CASES.values(), ids=CASES)
def test_rows(tokens, context, prefilling, taken, runs):
    rows, between = split(tokens, context, prefilling)
    assert [row.index for row in rows] == taken
    assert [(run.first, run.last) for run in between] == runs


def test_a_row_says_what_it_sees():
    (row,), _ = split([1, 300], [7, 64], [False, True])
    assert row == Row(index=1, begin=1, end=301, kv_len=364)
    assert row.tokens == 300 and row.has_context
    assert not split([300])[0][0].has_context


def test_a_row_says_what_of_its_prompt_comes_after_it():
    starts, lens, prefilling = [0, 1, 301, 601], [7, 300, 900], [False, True, True]
    assert [row.after for row in take(starts, lens, prefilling, 100, [0, 40, 0])] == [40, 0]
    assert [row.after for row in take(starts, lens, prefilling, 100)] == [0, 0]


def test_a_row_that_sees_less_than_itself_is_left():
    assert take([0, 300], [299], [True], 100) == []


@pytest.mark.parametrize("lens", [[300], [300, 1, 1]])
def test_lists_of_another_batch_are_told(lens):
    """As the batches of parts of rows are, that some of vLLM's builders make."""
    with pytest.raises(ValueError, match=f"2 rows has {len(lens)} lengths, and says of 2"):
        take([0, 300, 301], lens, [True, False], 100)
    with pytest.raises(ValueError, match=f"2 rows has 2 lengths, and says of {len(lens)}"):
        take([0, 300, 301], [300, 1], [True] * len(lens), 100)


def test_no_token_is_computed_twice_and_none_left_out():
    """Random batches, padded ones among them."""
    draw = random.Random(0)
    long_rows = 0
    for _ in range(2000):
        tokens = [draw.choice([0, 0, 1, 1, 1, 3, 99, 100, 250]) for _ in range(draw.randrange(9))]
        context = [draw.choice([0, 16, 300]) for _ in tokens]
        prefilling = [draw.random() < 0.7 for _ in tokens]
        rows, between = split(tokens, context, prefilling)
        long_rows += len(rows)
        computed = sorted([(row.begin, row.end) for row in rows] + [(run.begin, run.end) for run in between])
        assert [token for begin, end in computed for token in range(begin, end)] == list(range(sum(tokens)))
        whose = sorted([row.index for row in rows] + [i for run in between for i in range(run.first, run.last)])
        assert len(set(whose)) == len(whose)
        assert {i for i, own in enumerate(tokens) if own} <= set(whose)
        assert all(run.begin == sum(tokens[: run.first]) and run.end == sum(tokens[: run.last]) for run in between)
    assert long_rows > 500
