"""What is measured, part by part: each takes engine, records and options, and begins no case that is recorded."""

import statistics
import typing

import numpy as np
import prompts
import torch
from records import Records, say
from served import FLASH, Answer, Request, Served

Given = typing.Any


CODE_TOKENS = 10  # of an answer of `needles`


def quantile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share))


def every(given: Given, part: str) -> list[str]:
    """FlashAttention, then the methods of a part."""
    return [FLASH, *given.only.get(part, given.methods)]


def in_turns(methods: list[str], runs: int) -> typing.Iterator[tuple[int, str]]:
    """Runs 0 .. runs, of which 0 is a warm-up, with each method of each; another method is the first of each run."""
    for run in range(runs + 1):
        for i in range(len(methods)):
            yield run, methods[(run + i) % len(methods)]


def first(served: Served, records: Records, given: Given, ids: list[int]) -> None:
    """The time to the first token, of one prompt in an empty engine, in chunks and whole; methods take turns."""
    for tokens in given.lengths:
        for chunk in dict.fromkeys((min(given.chunk, tokens), min(tokens, given.most))):
            params = {"part": "first", "tokens": tokens, "chunk": chunk}
            if not records.left(**params):
                continue
            served.chunks(chunk)
            methods = every(given, "first")
            times: dict[str, list[float]] = {method: [] for method in methods}
            # The time of short prompts is the host's, which varies: four times the runs.
            for run, method in in_turns(methods, given.runs * (4 if tokens <= 8192 else 1)):
                served.attend(method)
                seconds = served.first_token(ids[: tokens - 32])
                if run:
                    times[method].append(seconds)
            records.in_turns(params, "time to first token", "s", times, FLASH)


def itl(served: Served, records: Records, given: Given, ids: list[int]) -> None:
    """The time between tokens of one long answer, and of several: decodes are FlashAttention's under every method."""
    for tokens, count in ((32_768, 1), (4096, 16)):
        params = {"part": "itl", "tokens": tokens, "requests": count}
        if tokens > given.most_len or not records.left(**params):
            continue
        served.chunks(given.chunk)
        requests = [Request(ids[64 * i : 64 * i + tokens - 256], 80) for i in range(count)]
        methods = every(given, "itl")
        times: dict[str, list[float]] = {method: [] for method in methods}
        for run, method in in_turns(methods, given.runs):
            served.attend(method)
            gaps = [gap for answer in served.serve(requests) for gap in answer.gaps[-48:]]  # all prefills are over
            if run:
                times[method].append(statistics.median(gaps))
        records.in_turns(params, "time between tokens", "s", times, FLASH)


def load(served: Served, records: Records, given: Given, ids: list[int]) -> None:
    """Long prompts among three times as many short ones, that come faster than FlashAttention serves them."""
    tokens = min(32_768, given.most_len)
    params = {"part": "load", "tokens": tokens, "long": given.long, "short": 3 * given.long}
    if not records.left(**params):
        return
    served.chunks(given.chunk)
    served.attend(FLASH)
    alone = min(served.first_token(ids[: tokens - 256]) for _ in range(2))
    rate = given.load / alone
    rng = np.random.default_rng(0)
    requests, at = [], 0.0
    for i in range(4 * given.long):
        size = tokens - 256 if i % 4 == 0 else int(rng.integers(64, 2048))
        begin = int(rng.integers(0, len(ids) - size))
        requests.append(Request(ids[begin : begin + size], given.make, at))
        at += float(rng.exponential(1 / (4 * rate)))
    params |= {"long_per_second": rate, "chunk": given.chunk}
    measured: dict[str, dict[str, float]] = {}
    for method in every(given, "load"):
        served.attend(method)
        answers = served.serve(requests)
        ttft, gaps = [answer.times[0] for answer in answers], [gap for answer in answers for gap in answer.gaps]
        long = ttft[::4]
        end = max(request.at + answer.times[-1] for request, answer in zip(requests, answers))
        total = sum(len(request.ids) + len(answer.tokens) for request, answer in zip(requests, answers))
        measured[method] = {
            "first token p50 s": quantile(ttft, 0.5),
            "first token p99 s": quantile(ttft, 0.99),
            "first token of long prompts p50 s": quantile(long, 0.5),
            "first token of long prompts p99 s": quantile(long, 0.99),
            "time between tokens p50 s": quantile(gaps, 0.5),
            "time between tokens p99 s": quantile(gaps, 0.99),
            "tokens 1/s": total / end,
        }
    for method, values in measured.items():
        for name, value in values.items():
            metric, unit = name.rsplit(" ", 1)
            against = {}
            if method != FLASH:
                theirs = measured[FLASH][name]
                against = {"peer_value": theirs, "ratio": value / theirs if unit == "1/s" else theirs / value}
            records.add(method, params, metric, value, unit, **against)


def needles(served: Served, records: Records, given: Given, ids: list[int]) -> None:
    """Codes hidden in long texts: how many of those that FlashAttention finds each method finds."""
    cells = {tokens: count for tokens, count in given.needles.items() if tokens + CODE_TOKENS <= given.most_len}
    if not all(records.left("needles", tokens=tokens) for tokens in cells):
        cells = {tokens: count for tokens, count in cells.items() if records.left("needles", tokens=tokens)}
    if not cells:
        return
    import transformers

    from pbsattn_eval.answers import Texts

    texts = Texts()
    texts.tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    made = prompts.needles(given.model, given.prompts, cells)
    served.chunks(given.chunk)
    for tokens in cells:
        if not records.left("needles", tokens=tokens):
            continue
        these = [each for each in made if each["tokens"] == tokens][: cells[tokens]]
        found: dict[str, list[bool]] = {}
        seconds: dict[str, list[float]] = {}
        for method in every(given, "needles"):
            served.attend(method)
            answers = served.serve([Request(each["ids"], CODE_TOKENS) for each in these])
            seconds[method] = [max(answer.times[-1] for answer in answers)]
            found[method] = [each["code"] in texts.decode(answer.tokens) for each, answer in zip(these, answers)]
            say(f"needles {tokens} {method}: {sum(found[method])} of {len(these)}")
        params = {"part": "needles", "tokens": tokens, "prompts": len(these), "chunk": given.chunk}
        records.in_turns(params, "time until all are answered", "s", seconds, FLASH)
        records.add(FLASH, params, "codes found", sum(found[FLASH]), f"of {len(these)}")
        for method in [each for each in found if each != FLASH]:
            kept = sum(own for own, theirs in zip(found[method], found[FLASH]) if theirs)
            records.add(method, params, "codes found", sum(found[method]), f"of {len(these)}")
            records.add(method, params, "codes found of those FlashAttention finds", kept, f"of {sum(found[FLASH])}")


def together(served: Served, records: Records, given: Given, ids: list[int]) -> None:
    """Four of the longest prompts at once; memory that is in use afterwards, and the plug-in's share of it."""
    tokens = given.most_len
    params = {"part": "together", "tokens": tokens, "requests": 4, "memory_utilization": given.memory, "chunk": given.chunk}
    if not records.left("together"):
        return
    served.chunks(given.chunk)
    requests = [Request((ids[i * 997 :] + ids[: i * 997])[: tokens - 256], 64) for i in range(4)]
    times: dict[str, list[float]] = {}
    for method in every(given, "together"):
        served.attend(method)
        answers = served.serve(requests)
        assert all(len(answer.tokens) == 64 for answer in answers)
        times[method] = [max(answer.times[-1] for answer in answers)]
    records.in_turns(params, "time until all are answered", "s", times, FLASH)
    records.add("all", params, "bytes the plug-in reserved", served.reserved, "B")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        records.add("all", params, "device memory in use", total - free, f"of {total} B")


def strays(got: list[Answer], wanted: list[Answer], requests: list[Request]) -> tuple[int, int, list[float]]:
    """Of answers that were not aborted: how many there are, how many differ, and by how much `wanted` preferred its own
    token where they first do, in nats; infinity where the other isn't one of its best two."""
    counted, gaps = 0, []
    for own, theirs, request in zip(got, wanted, requests):
        if request.abort is not None:
            continue
        counted += 1
        assert len(own.tokens) == len(theirs.tokens) == request.make, "a request lost tokens"
        for at, (a, b) in enumerate(zip(own.tokens, theirs.tokens)):
            if a != b:
                gaps.append(theirs.best[at][b] - theirs.best[at].get(a, -np.inf))
                break
    return counted, len(gaps), gaps


def random(served: Served, records: Records, given: Given, ids: list[int]) -> None:
    """Random requests with shared prefixes, aborts and a small cache, with every block kept: tokens beside FlashAttention's,
    and how far FlashAttention's own are apart where its chunks are others."""
    params = {
        "part": "random",
        "requests": given.requests,
        "longest": min(given.longest, given.most_len - given.answer),
        "cache_tokens": given.cache,
        "chunk": given.chunk,
        "longest_answer": given.answer,
    }
    if not records.left(**params):
        return
    drawn = prompts.random_requests(given.requests, params["longest"], given.answer, 0, given.vocabulary)
    requests = [Request(each, make, 0.0, abort) for each, make, abort in drawn]
    answers: dict[str, list[Answer]] = {}
    served.methods["every block"] = {"PBSATTN_METHOD": "pbs:top_p=1", "PBSATTN_MIN_TOKENS": str(given.least)}
    for case, method, chunk in (
        (FLASH, FLASH, given.chunk),
        ("every block", "every block", given.chunk),
        ("flash in other chunks", FLASH, given.chunk * 3 // 4),
    ):
        served.attend(method)
        served.chunks(chunk)
        free = served.pool.get_num_free_blocks()
        with served.small_cache(given.cache), served.preemptions() as preempted:
            answers[case] = served.serve(requests, logprobs=2)
        served.forget()
        assert served.pool.get_num_free_blocks() == free, "blocks of the cache are lost"
        say(f"random {case}: {len(preempted)} preempted, {sum(r.abort is not None for r in requests)} to abort")
        if not preempted:
            say(f"random {case}: shows nothing of preemption; try another --cache, or longer answers (--answer)")
        records.add(case, params, "preemptions", len(preempted), "")
        if case != FLASH:
            counted, differ, gaps = strays(answers[case], answers[FLASH], requests)
            records.add(case, params, "answers that differ from FlashAttention's", differ, f"of {counted}")
            near = [gap for gap in gaps if np.isfinite(gap)]
            records.add(case, params, "differing tokens that weren't FlashAttention's second", len(gaps) - len(near), "")
            records.add(case, params, "most that it preferred its own token by", max(near, default=0.0), "nats")
    del served.methods["every block"]


PARTS: dict[str, typing.Callable[[Served, Records, Given, list[int]], None]] = {
    "first": first,
    "itl": itl,
    "load": load,
    "together": together,
    "needles": needles,
    "random": random,
}
