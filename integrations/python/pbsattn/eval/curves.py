"""Methods compared at equal density: settings of one method are points of a curve, and between points it is interpolated."""

import dataclasses
import math

import numpy as np

# The option that a keep rule is set by. Specs that differ in it alone are one family.
SETTING = {"top_p": "top_p", "threshold": "threshold", "relative": "threshold", "top_k": "top_k", "density": "density"}


def family(spec, options):
    """A method's spec without its keep rule's number: the curve that it is a point of."""
    swept = SETTING.get(options.get("keep"))
    return ":".join(part for part in spec.split(":") if part.partition("=")[0] != swept)


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
    for low, high in zip(order, order[1:]):
        if wanted <= abscissae[high]:
            width = math.log(abscissae[high] / abscissae[low])
            return Between(int(low), int(high), math.log(wanted / abscissae[low]) / width if width else 0.0)
    return Between(int(order[-1]), int(order[-1]), 0.0)


def crossing(densities, values, wanted):
    """The least density from which on a falling curve stays at `wanted` or below; None if it doesn't get there, or starts there."""
    order = np.argsort(densities)
    points = [(densities[i], values[i]) for i in order]
    found = None
    for (d0, v0), (d1, v1) in zip(points, points[1:]):
        if v0 > wanted >= v1:
            found = math.exp(math.log(d0) + (v0 - wanted) / (v0 - v1) * math.log(d1 / d0))
    return found if points[-1][1] <= wanted else None


def plain_table(header, lines):
    """Rows of cells as text: the first column to the left, the others to the right."""
    lines = [header, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     .rstrip() for line in lines)
