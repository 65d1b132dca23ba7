"""Random requests through vLLM's engine, more than its cache holds: by the plug-in, and by vLLM's own attention."""

import random

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from conftest import run
from pbsattn_vllm import impl
from tiny_models import prompt

COUNT, LONGEST, MAKE = 200, 600, 64
TIE = 1e-3  # of log-probabilities; far above what the order of sums makes of them


def requests():
    """(prompts and tokens to make, {request: after so many steps it is aborted}).

    Lengths are even in their logarithm; two in five begin with one of three prefixes, one in twenty is aborted.
    """
    draw = random.Random(0)
    prefixes = [prompt(1000 + i, tokens) for i, tokens in enumerate((64, 150, 400))]
    made, abort = [], {}
    for i in range(COUNT):
        ids = prompt(i, int(LONGEST ** draw.random()))
        if draw.random() < 0.4:
            ids = (draw.choice(prefixes) + ids)[:LONGEST]
        made.append((ids, draw.randint(1, MAKE)))
        if draw.random() < 0.05:
            abort[i] = draw.randint(1, 60)
    return made, abort


def margin_where_they_differ(got, wanted):
    """By how much the second of two answers preferred its own token, where they first differ; None where they don't."""
    places = zip(got.tokens, wanted.tokens, wanted.best, wanted.second, strict=True)
    return next((best - second for a, b, best, second in places if a != b), None)


@pytest.fixture
def scheduled(monkeypatch):
    """Sees to it that each row of a step is one that the scheduler made, and knows what of its prompt comes after it.

    Gives the rows that pbsattn computed in the first layer, as (tokens, keys, tokens after, whether of a preempted request).
    """
    step, rows = set(), []
    schedule, row = Scheduler.schedule, impl.RowsImpl._row

    def watched_schedule(scheduler, *given, **named):
        made = schedule(scheduler, *given, **named)
        step.clear()
        for name, tokens in made.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            kv_len = request.num_computed_tokens  # which this step is counted in
            step.add((tokens, kv_len, max(request.num_prompt_tokens - kv_len, 0), request.num_preemptions > 0))
        return made

    def watched_row(taken, which, *rest):
        of_step = [each for each in step if each[:3] == (which.tokens, which.kv_len, which.after)]
        assert of_step, f"{which}, of {step}"
        if taken.index == 0:
            rows.append(max(of_step, key=lambda each: each[3]))
        row(taken, which, *rest)

    monkeypatch.setattr(Scheduler, "schedule", watched_schedule)
    monkeypatch.setattr(impl.RowsImpl, "_row", staticmethod(watched_row))
    return rows


def test_random_requests(models, scheduled):
    sets, abort = {"random": requests()[0]}, {"random": requests()[1]}
    own = run(models["llama"], sets=sets, abort=abort, aborting=False)
    assert scheduled == []
    ran = run(models["llama"], sets=sets, abort=abort, aborting=False, variables={"PBSATTN_METHOD": "pbs:top_p=1"})
    assert own.preemptions["random"] == ran.preemptions["random"] >= 10
    assert len(scheduled) > 50 and any(again for *_, again in scheduled) and any(after for _, _, after, _ in scheduled)
    answers = list(zip(ran.answers["random"], own.answers["random"], strict=True))
    assert all((got is None) == (wanted is None) for got, wanted in answers)
    assert sum(got is None for got, _ in answers) >= 3
    margins = [margin_where_they_differ(got, wanted) for got, wanted in answers if got is not None]
    near = [margin for margin in margins if margin is not None]
    assert all(margin <= TIE for margin in near) and len(near) <= COUNT // 50
