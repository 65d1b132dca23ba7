"""How many blocks a model keeps: the highest threshold at which held-back texts lose little against full attention."""

import numpy as np

import pbsattn

from .. import curves
from . import judge

MOST = 0.01  # nats a token that a text may lose: one per cent of its perplexity
PARTS = (1, 0.75, 0.5, 0.375, 0.25)  # of the method's own threshold, and of threshold_tokens, which are tried in turn


def options(part):
    """Returns the options by which two-step scores have a part of their own thresholds."""
    own = pbsattn.options(judge.METHOD)
    return {name: float(judge.share(part * own[name])) for name in ("threshold", "threshold_tokens")}


def attention(order, part, tokens):
    """Two-step scores on keys in an order, at a part of their own thresholds, on so many tokens."""
    given = options(part)
    if given["threshold_tokens"] >= given["threshold"] * tokens:  # no row is so long that it counts
        return judge.attention(order, given["threshold"])
    return judge.attention(order, **given)


def changes(records, name):
    """Returns of each text the change of an attention's loss against full attention, with its density. Raises ValueError
    where it can't be measured."""
    found = {(record["item"], record["method"]): record for record in records}
    differences, densities = {}, {}
    for (item, method), record in found.items():
        if "error" in record:
            raise ValueError(f"{method}: can't be measured: {record['error']}")
        if method == name:
            of_full = curves.units(found[item, judge.FULL.name], "nll")
            differences.setdefault(record["group"], []).append(np.subtract(curves.units(record, "nll"), of_full))
            densities.setdefault(record["group"], []).append([record["density"]])
    return {group: judge.change(differences[group], densities[group]) for group in differences}


def low_enough(by_text):
    """Returns whether every text loses little enough, with its standard error."""
    return all(each.mean + each.error <= MOST for each in by_text.values())


def line(part, by_text):
    """A part and what it loses, for people."""
    shown = ", ".join(
        f"{group} {each.mean:+.4f} ±{each.error:.4f} at density {each.densities[0]:.3f}" for group, each in by_text.items()
    )
    return f"change of nll (± standard error) against full attention at {part:g} of the threshold: {shown}"
