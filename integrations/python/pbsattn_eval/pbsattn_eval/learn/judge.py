"""Which order a model takes: the loss of held-back texts under each, at equal density."""

import dataclasses
import math
from itertools import chain

import numpy as np

from .. import curves, kind, summary
from ..attentions import Attention
from ..kinds import ppl
from ..tables import aligned

FULL = Attention.parse(summary.BASELINE)
METHOD = "two-step"  # whose blocks are judged
NONE, LEARNED, PAYING = "none", "learned", "learned where it pays"
# What each order changes of two-step scores.
_LEARNED = {"permutation": "learned", "order_scope": "kv_head"}
ORDERS = {
    NONE: {"permutation": "none"},
    "last_queries": {"permutation": "last_queries", "order_scope": "query_head"},
    "arrival": {"permutation": "arrival", "order_scope": "kv_head"},
    LEARNED: _LEARNED,
    PAYING: _LEARNED,
}
# Where orders are compared, on the way (logarithmic) from the least density that all reach to the greatest.
PLACES = (0.25, 0.75)


def share(threshold):
    """Returns a threshold as methods are told it, and named by it."""
    return f"{threshold:.6g}"


def attention(order, threshold, threshold_tokens=0):
    """Two-step scores on keys in an order, keeping blocks of at least this share of a row's attention."""
    changes = "".join(f":{name}={value}" for name, value in ORDERS[order].items())
    kept = f":threshold={share(threshold)}:threshold_tokens={share(threshold_tokens)}"
    return Attention(f"{order}{kept if threshold_tokens else kept.rpartition(':')[0]}", f"{METHOD}{changes}{kept}")


class Judged(ppl.Kind):
    """Likelihood of the last of a text's three parts, alone: divergences take a quarter more time."""

    PARTS = 3
    metrics = ppl.Kind.metrics[:1]

    def __init__(self):
        self.weights = {}  # {name of an attention with a learned order: sha256 of its weights}

    def outdated(self, record):
        """Returns whether a run that goes on measures a record again: it failed, or its order had other weights."""
        return "error" in record or record.get("weights") != self.weights.get(record["method"])

    def items(self, given, engine):
        """Also sets `parts`, {name: (first part, second part)} of every text."""
        made = []
        self.parts = {}
        for label, path, tokens in ppl.documents(given):
            ids = ppl.document(
                engine, path, self.PARTS * tokens, f"--tokens, of which it has to have {self.PARTS} times as many"
            )
            *self.parts[path.stem], judged = (ids[at : at + tokens] for at in range(0, self.PARTS * tokens, tokens))
            params = dict(text=path.stem, tokens=tokens, judged=self._judged(given, tokens), first=len(ids) - tokens)
            made.append(kind.Item(f"{path.stem}-{tokens}", label, params, judged))
        return made

    def prepare(self, engine, item, attentions):
        return None

    def measure(self, engine, item, attention, state):
        made = self.record(engine.score(item.data, item.params["judged"], attention))
        return made | ({"weights": self.weights[attention.name]} if attention.name in self.weights else {})


@dataclasses.dataclass(frozen=True)
class Change:
    """Of the loss at equal density, over some held-back texts."""

    mean: float
    error: float  # standard error of it, as though blocks were independent
    blocks: int  # that the mean is over
    texts: int
    densities: tuple  # at which it was compared, the mean over texts


@dataclasses.dataclass(frozen=True)
class Judgement:
    """An order against none, over held-back texts."""

    order: str
    whole: Change  # over all texts
    by_text: dict  # {group: Change}

    @property
    def pays(self):
        """Whether it is better than none by more than two standard errors, and on no text worse by more than one."""
        return self.whole.mean < -2 * self.whole.error and all(each.mean <= each.error for each in self.by_text.values())


def measured(records, names):
    """Of orders those that every record is there for, and a line for each of the others that says why not. Raises ValueError
    where none isn't there, or nothing else is."""
    reasons = {record["method"]: record["error"] for record in records if "error" in record}
    failed = {order: reasons[name] for order, of_order in names.items() for name in of_order if name in reasons}
    if NONE in failed:
        raise ValueError(f"order {NONE}: can't be measured: {failed[NONE]}")
    kept = {order: of_order for order, of_order in names.items() if order not in failed}
    lines = [f"{order}: not judged: {reason}" for order, reason in failed.items()]
    if len(kept) == 1:
        raise ValueError("; ".join(lines))
    return kept, lines


def compare(records, names):
    """A Judgement of each order but none.

    names: {order: [name of the method at each threshold]}. Pairs are blocks of tokens. Raises ValueError where the densities
    of orders don't meet.
    """
    items = {}
    for record in records:
        items.setdefault(record["item"], {})[record["method"]] = record
    differences = {order: {} for order in names if order != NONE}
    densities = {}
    for item, by_method in items.items():
        points = {order: [by_method[name] for name in of_order] for order, of_order in names.items()}
        ranges = [[point["density"] for point in of_order] for of_order in points.values()]
        low, high = max(map(min, ranges)), min(map(max, ranges))
        if low > high:
            raise ValueError(f"{item}: orders have no density in common; pass --thresholds further apart")
        at = [low * (high / low) ** place for place in PLACES]
        group = next(iter(by_method.values()))["group"]
        densities.setdefault(group, []).append(at)
        losses = {order: _losses(of_order, at) for order, of_order in points.items()}
        for order in differences:
            differences[order].setdefault(group, []).append(losses[order] - losses[NONE])
    made = []
    for order, by_group in differences.items():
        by_text = {group: change(each, densities[group]) for group, each in by_group.items()}
        made.append(Judgement(order, change(*(list(chain(*each.values())) for each in (by_group, densities))), by_text))
    return made


def _losses(points, at):
    """Of each block of tokens, the mean over densities, interpolated between settings."""
    densities = [point["density"] for point in points]
    places = [curves.at(densities, density) for density in at]
    return np.mean([place.of([curves.units(point, "nll") for point in points]) for place in places], 0)


def change(differences, densities):
    """Returns the Change of texts: of each the differences of its blocks, and the densities that they are at."""
    blocks = np.concatenate(differences)
    error = curves.standard_error(blocks) if len(blocks) > 1 else math.inf
    return Change(float(blocks.mean()), error, len(blocks), len(densities), tuple(np.mean(densities, 0).tolist()))


def choose(judgements):
    """The order taken: of those that pay the one that lowers the loss most, else none."""
    paying = [each for each in judgements if each.pays]
    return min(paying, key=lambda each: each.whole.mean).order if paying else NONE


def table(judgements, heads, taken):
    """The judgements for people. heads: {order: the KV heads whose keys it moves}."""
    groups = list(judgements[0].by_text)
    lines = [["order", "KV heads", *groups, *(["all"] if len(groups) > 1 else []), ""]]
    lines.append([NONE, str(heads[NONE]), *[""] * (len(lines[0]) - 3), "taken" if taken == NONE else ""])
    for each in judgements:
        cells = [each.by_text[group] for group in groups] + ([each.whole] if len(groups) > 1 else [])
        shown = [f"{cell.mean:+.4f} ±{cell.error:.4f}" for cell in cells]
        lines.append([each.order, str(heads[each.order]), *shown, "taken" if each.order == taken else ""])
    between = " and ".join(f"{density:.3f}" for density in judgements[0].whole.densities)
    return f"change of nll (± standard error) against no order, at density {between}:\n" + aligned(lines, left=lines[0][:1])


def rows(judgements, header):
    """The judgements in the form of every benchmark of this project."""
    metric = kind.Metric("nll at equal density", "nats")
    made = [
        summary.Row(
            group=group,
            method=each.order,
            metric=metric.name,
            mean=change.mean,
            units=change.blocks,
            change=change.mean,
            low=None,
            high=None,
            standard_error=change.error,
            density=float(np.mean(change.densities)),
            seconds=None,
            items=change.texts,
            errors=0,
        )
        for each in judgements
        for group, change in [*each.by_text.items(), ("all", each.whole)]
    ]
    return [{**row, "suite": "learn", "peer": NONE, "peer_value": 0.0} for row in summary.as_json(made, header)]
