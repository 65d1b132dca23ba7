"""Methods compared at equal density: settings of one method are points of a curve, and between points it is interpolated."""

import dataclasses
import itertools
import math

import numpy as np

# The options that a keep rule is set by. Specs that differ in them alone are one family.
SETTINGS = {
    "top_p": ("top_p",),
    "coverage": ("top_p",),
    "threshold": ("threshold", "threshold_tokens"),
    "relative": ("threshold",),
    "top_k": ("top_k",),
    "density": ("density",),
    "vertical_slash": ("vertical", "slash"),
}
DENSITIES = (0.08, 0.12, 0.18, 0.27)  # at which families are compared


def family(spec, options):
    """A method's spec without its keep rule's number: the curve that it is a point of."""
    swept = SETTINGS.get(options.get("keep"), ())
    return ":".join(part for part in spec.split(":") if part.partition("=")[0] not in swept)


def families(methods):
    """{family: [spec, ...]} of run.json's methods, those with several settings."""
    found = {}
    for spec, options in methods.items():
        found.setdefault(family(spec, options), []).append(spec)
    return {name: specs for name, specs in found.items() if len(specs) > 1}


@dataclasses.dataclass
class Between:
    """Where a density lies among a curve's points: value = (1 - weight) * value[low] + weight * value[high]."""

    low: int
    high: int
    weight: float

    def of(self, values):
        low, high = np.asarray(values[self.low], float), np.asarray(values[self.high], float)
        return (1 - self.weight) * low + self.weight * high


def at(abscissae, wanted):
    """Where `wanted` lies among values above 0, on a logarithmic scale; None outside of them. Values in any order."""
    order = np.argsort(abscissae)
    if not abscissae[order[0]] <= wanted <= abscissae[order[-1]]:
        return None
    for low, high in itertools.pairwise(order):
        if wanted <= abscissae[high]:
            width = math.log(abscissae[high] / abscissae[low])
            return Between(int(low), int(high), math.log(wanted / abscissae[low]) / width if width else 0.0)
    return Between(int(order[-1]), int(order[-1]), 0.0)


def crossing(densities, values, wanted):
    """The least density from which on a falling curve stays at `wanted` or below; None if it never or always is there."""
    order = np.argsort(densities)
    points = [(densities[i], values[i]) for i in order]
    found = None
    for (d0, v0), (d1, v1) in itertools.pairwise(points):
        if v0 > wanted >= v1:
            found = math.exp(math.log(d0) + (v0 - wanted) / (v0 - v1) * math.log(d1 / d0))
    return found if points[-1][1] <= wanted else None


def by_density(records, methods, metric, densities=DENSITIES, base=None):
    """Changes at equal density, [(group, family, [None or (change, standard error), ...])], against the family `base`, by
    default against full.

    Each item is interpolated unit by unit, so that pairs stay pairs; a density counts that all items of a group reach.
    Against a base several groups are compared together as well, as "all".
    """
    groups = {}
    for record in records:
        if "error" not in record:
            groups.setdefault(record["group"], {}).setdefault(record["item"], {})[record["method"]] = record
    if base and len(groups) > 1:
        groups["all"] = {item: by_method for items in groups.values() for item, by_method in items.items()}
    named = families(methods)
    made = []
    for group, items in groups.items():
        for name, specs in named.items():
            if name != base:
                cells = [_change(items.values(), specs, named[base] if base else None, metric, each) for each in densities]
                if any(cells):
                    made.append((group, name, cells))
    return made


def standard_error(values):
    """Of the mean of an array's values, as though they were independent; None of fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _change(items, specs, base, metric, wanted):
    """Of settings at a density, over items, against those of another family, or full where `base` is None: its mean and
    standard error; None where an item doesn't reach that density."""
    differences = []
    for by_method in items:
        own = _at(by_method, specs, metric, wanted)
        other = _at(by_method, base, metric, wanted) if base else _full(by_method, metric)
        if own is None or other is None:
            return None
        differences.append(own - other)
    values = np.concatenate(differences)
    return float(values.mean()), standard_error(values) or 0.0


def _at(by_method, specs, metric, wanted):
    """An item's units at a density between settings."""
    points = [by_method[spec] for spec in specs if spec in by_method]
    place = at([point["density"] for point in points], wanted) if len(points) > 1 else None
    return None if place is None else place.of([units(point, metric) for point in points])


def _full(by_method, metric):
    return np.asarray(units(by_method["full"], metric), float) if "full" in by_method else None


def units(record, metric):
    """What a metric of a record is the mean of."""
    if "error" in record:
        return []
    parts = record.get("units", {}).get(metric)
    if parts is not None:
        return parts
    value = record["metrics"].get(metric)
    return [] if value is None else [value]
