"""Blocks that methods keep, against those that their public code keeps: the same queries and keys through both."""

import dataclasses
import math
import pathlib

import torch
import torch.nn.functional as F

import pbsattn

from ..attentions import Attention
from ..tables import aligned
from . import records
from .public_code import CODES, commit_of

BAR = 0.999  # of decisions
_REFERENCE_TOKENS = 2048  # at most: the reference computes the attention that is not asked for here, naively


@dataclasses.dataclass
class Input:
    """Queries [1, Hq, N, D] and keys [1, Hkv, N, D]."""

    kind: str  # for the table: "random", or the model's name
    q: torch.Tensor
    k: torch.Tensor


def random_input(tokens, heads, width, seed):
    """Queries that share what draws them, topics of 97 tokens in queries and keys, and some keys that draw most queries."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    topics = normal(heads, 12, width)
    topic = torch.randint(12, (tokens // 97 + 1,), generator=generator).repeat_interleave(97)[:tokens]
    k = normal(heads, tokens, width) + topics[:, topic]
    q = normal(heads, tokens, width) + topics[:, topic.roll(31)]
    drawn = F.normalize(q.mean(1, keepdim=True) + 0.3 * normal(heads, 1, width), dim=-1)
    k[:, torch.randint(tokens, (tokens // 50,), generator=generator)] += 6 * drawn
    return Input("random", (q + 2 * drawn)[None], k[None])


def decide(attention, q, k, reference=False):
    """Blocks that the library keeps, bool [heads, rows, blocks], on the CPU or by the reference."""
    return pbsattn.trace(q, k, k, method=attention.method, reference=reference)[1].kept[0]


class Count:
    """Decisions of some kind, and those that agree."""

    def __init__(self):
        self.decisions = self.agree = 0

    def add(self, same, counted):
        self.decisions += int(counted.sum())
        self.agree += int((same & counted).sum())

    @property
    def share(self):
        return self.agree / self.decisions if self.decisions else None


# What is counted, by the words of the JSON's params.
F32_REFERENCE = "float32, reference"
F32_CPU = "float32, CPU"
BF16 = "bfloat16, CPU"
BF16_NUMBERS = "bfloat16, CPU; public code in float32 on the same numbers"
BEYOND_TIES = "bfloat16, CPU; beyond ties"
COUNTS = (F32_REFERENCE, F32_CPU, BF16, BF16_NUMBERS, BEYOND_TIES)
_BARRED = (F32_REFERENCE, F32_CPU)


def compare(code, folder, inputs, say):
    """Counts of one method over its cases and some inputs, {what: Count}, and the density of what it kept."""
    counts, kept, causal_pairs = {what: Count() for what in COUNTS}, 0, 0
    for case in code.cases:
        attention = Attention.parse(case)
        for each in inputs:
            say(f"{case}, {each.kind} {each.q.shape[2]} tokens")
            density = _compare_one(code, folder, attention, each, counts)
            kept, causal_pairs = kept + density[0], causal_pairs + density[1]
    return counts, kept / causal_pairs


def _compare_one(code, folder, attention, given, counts):
    options = pbsattn.options(attention.method)
    group = given.q.shape[1] // given.k.shape[1]

    def public(q, k):
        return code.choose(folder, q, k.repeat_interleave(group, 1), options)

    theirs = public(given.q, given.k)
    ours = decide(attention, given.q, given.k)
    counted = torch.ones_like(ours).tril()
    counted[:, : code.first_row] = False
    counts[F32_CPU].add(theirs.kept == ours, counted)
    if given.q.shape[2] <= _REFERENCE_TOKENS:
        counts[F32_REFERENCE].add(theirs.kept == decide(attention, given.q, given.k, reference=True), counted)

    q, k = given.q.bfloat16(), given.k.bfloat16()
    rounded = decide(attention, q, k)
    exact = public(q.float(), k.float())
    counts[BF16_NUMBERS].add(exact.kept == rounded, counted)
    if code.bf16:
        theirs = public(q, k)
        counts[BF16].add(theirs.kept == rounded, counted)
        if theirs.scores:
            ties = torch.zeros_like(counted)
            for score, true_score in zip(theirs.scores, exact.scores):
                ties |= near_cut(score, true_score, options["top_p"])
            counts[BEYOND_TIES].add(theirs.kept == rounded, counted & ~ties)
    return int((ours & counted).sum()), int(counted.sum())


def near_cut(rounded, exact, top_p):
    """Blocks whose place in a row's order is within rounding of the cut, [heads, rows, blocks].

    Both are the public code's scores, of a bf16 and of a float32 run on the same numbers. The rounding of a head is the
    largest change e between them of a share's logarithm, among blocks of at least half the score of their row's cut. Two
    shares that differ by less than 2 e in the logarithm may change places; shares that sum to M may sum to 2 e M (1 - M)
    more or less.
    """
    rounded, exact = (torch.nan_to_num(score.double()) for score in (rounded, exact))
    rounded, exact = (score / score.sum(-1, keepdim=True).clamp(min=1e-30) for score in (rounded, exact))
    share, order = exact.sort(dim=-1, descending=True, stable=True)
    before = torch.zeros_like(exact).scatter(-1, order, share.cumsum(-1) - share)
    cut = torch.where(before < top_p, exact, torch.inf).amin(-1, keepdim=True)  # the lowest share that is kept
    distance = (exact.clamp(min=1e-30) / cut).log().abs()
    change = (rounded.clamp(min=1e-30) / exact.clamp(min=1e-30)).log().abs()
    rounding = torch.where((exact > 0) & (exact >= cut / 2), change, 0).amax((-2, -1), keepdim=True)
    return (exact > 0) & ((distance < 2 * rounding) | ((before - top_p).abs() < 2 * rounding * top_p * (1 - top_p)))


def run(public, methods, inputs, say):
    """Records of the methods whose public code is below a folder, a table of them, and what is under the bar, as lines.

    inputs: by kind.
    """
    public = pathlib.Path(public)
    if not public.is_dir():
        raise ValueError(f"--public {public}: no such folder; docs/methods.md says what to clone into it")
    if unknown := [name for name in methods if name not in CODES]:
        raise ValueError(f"--method {','.join(unknown)}: no public code is known for it; there are {', '.join(CODES)}")
    made, rows, left, wrong = [], [_HEADER], [], []
    for name in methods:
        code = CODES[name]
        folder = code.checkout(public)
        if folder is None:
            left.append(f"{name}: not compared: no {code.repository.replace('/', '+')} in {public}")
            continue
        commit = commit_of(folder) or "unknown"
        try:
            for kind, of_kind in inputs.items():
                counts, density = compare(code, folder, of_kind, say)
                made += _records(name, code, commit, of_kind, counts, density)
                rows.append(_row(name, code, commit, kind, counts))
                wrong += [
                    f"{name}: {what}: {counts[what].share:.4%} of decisions agree on {kind} input"
                    for what in _BARRED
                    if counts[what].decisions and counts[what].share < BAR
                ]
        except ModuleNotFoundError as missing:
            left.append(f"{name}: not compared: its public code needs {missing.name}: pip install {missing.name}")
    if not made:
        raise ValueError("; ".join(left))
    table = aligned(rows, left=_HEADER[:3])
    return made, "\n".join([table, *(["", *left] if left else [])]), wrong


_HEADER = (
    "method",
    "public code",
    "input",
    "decisions",
    "f32 reference",
    "f32 CPU",
    "bf16",
    "bf16 numbers in f32",
    "beyond ties",
)


def _row(name, code, commit, kind, counts):
    def show(count):
        return "" if not count.decisions else f"{math.floor(count.share * 1e5) / 1e3:.3f} %"

    return (
        name,
        f"{code.repository} {commit}",
        kind,
        str(counts[F32_CPU].decisions),
        *(show(counts[what]) for what in COUNTS),
    )


def _records(name, code, commit, inputs, counts, density):
    params = dict(
        input=inputs[0].kind,
        tokens=sorted({each.q.shape[2] for each in inputs}),
        heads=inputs[0].q.shape[1],
        kv_heads=inputs[0].k.shape[1],
        head_dim=inputs[0].q.shape[3],
        inputs=len(inputs),
        cases=list(code.cases),
        function=code.function,
        public_commit=commit,
        rows_from=code.first_row,
        density=round(density, 4),
    )
    return [
        records.record(
            "lists",
            name,
            {**params, "what": what, "decisions": count.decisions, "differ": count.decisions - count.agree},
            "decisions that agree",
            count.share,
            "of decisions",
            code.repository,
        )
        for what, count in counts.items()
        if count.decisions
    ]
