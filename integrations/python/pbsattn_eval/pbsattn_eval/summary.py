"""The table of a run: means by group and method, with intervals paired against full."""

import dataclasses

import numpy as np

from . import curves
from .tables import aligned, show

BASELINE = "full"
RESAMPLES = 2000
LEVEL = 0.95


@dataclasses.dataclass
class Row:
    """One metric of one method in one group."""

    group: str
    method: str
    metric: str
    mean: float
    units: int  # that the mean is over
    change: float | None  # against full, over the units that both have
    low: float | None  # of the change
    high: float | None
    standard_error: float | None  # of the change
    density: float | None  # mean over items
    seconds: float | None  # of a prefill, mean over items
    items: int
    errors: int  # items not counted
    density_all: float | None = None  # over all layers, where `density` is over some: see over_whole_layers


def interval(differences, seed=0):
    """The mean's bootstrap interval (percentiles of resampled means) and the mean's standard error."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None, None, None
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    means = values[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), curves.standard_error(values)


def _mean(records, name):
    values = [r[name] for r in records if "error" not in r and r.get(name) is not None]
    return float(np.mean(values)) if values else None


def over_whole_layers(records):
    """Returns records whose density is the mean over the layers that full attention computes whole, and that over all layers
    as `density_all`, where a model has layers of other kinds too: of a sliding window every method computes all, which would
    hide what it leaves out elsewhere."""
    whole = {
        record["item"]: [layer for layer, density in enumerate(record["layers"]) if density == 1]
        for record in records
        if record["method"] == BASELINE and record.get("layers")
    }
    made = []
    for record in records:
        layers, those = record.get("layers"), whole.get(record["item"])
        if layers and those and len(those) < len(layers):
            over = {"density": float(np.mean([layers[layer] for layer in those])), "density_all": float(np.mean(layers))}
            record = {**record, **over}
        made.append(record)
    return made


def rows(records, metrics, methods):
    """Rows of every group, in the order in which groups appear, and of all groups together where there are several."""
    by_group = {}
    for record in records:
        by_group.setdefault(record["group"], []).append(record)
    if len(by_group) > 1:
        by_group["all"] = list(records)
    made = []
    for group, members in by_group.items():
        base = {r["item"]: r for r in members if r["method"] == BASELINE}
        for method in methods:
            own = [r for r in members if r["method"] == method]
            for metric in metrics:
                row = _row(group, method, own, base, metric)
                if row is not None:
                    made.append(row)
    return made


def _row(group, method, own, base, metric):
    units = [u for record in own for u in curves.units(record, metric.name)]
    errors = sum("error" in record for record in own)
    if not units:
        return None
    change = low = high = error = None
    if method != BASELINE and metric.change:
        pairs = [
            (u, b)
            for record in own
            if record["item"] in base
            for u, b in zip(curves.units(record, metric.name), curves.units(base[record["item"]], metric.name))
        ]
        if pairs:
            differences = [u - b for u, b in pairs]
            change = float(np.mean(differences))
            low, high, error = interval(differences)
    return Row(
        group,
        method,
        metric.name,
        float(np.mean(units)),
        len(units),
        change,
        low,
        high,
        error,
        _mean(own, "density"),
        _mean(own, "seconds"),
        len(own) - errors,
        errors,
        _mean(own, "density_all"),
    )


def table(made, metrics):
    """The rows as text: a line for each group and method."""
    all_layers = any(row.density_all is not None for row in made)
    lines = [["group", "method", "density", *["all layers"] * all_layers, "seconds", "items"]]
    for metric in metrics:
        lines[0].append(metric.name + (f" ({metric.unit})" if metric.unit else ""))
        if metric.change:
            lines[0].append(f"change [{LEVEL:.0%}]")
    keyed = {}
    for row in made:
        keyed.setdefault((row.group, row.method), {})[row.metric] = row
    for (group, method), by_metric in keyed.items():
        any_row = next(iter(by_metric.values()))
        count = f"{any_row.items}" + (f" (-{any_row.errors})" if any_row.errors else "")
        line = [group, method, show(any_row.density, "{:.3f}")]
        if all_layers:
            line.append(show(any_row.density_all, "{:.3f}"))
        line += [show(any_row.seconds, "{:.2f}"), count]
        for metric in metrics:
            row = by_metric.get(metric.name)
            line.append("" if row is None else metric.form.format(row.mean))
            if metric.change:
                line.append("" if row is None else change(row, metric))
        lines.append(line)
    return aligned(lines, left=lines[0][:2])


def change(row, metric):
    """A row's change against full with its interval, as tables write it."""
    if row.change is None:
        return ""
    signed = metric.form.replace("{:", "{:+")
    if row.low is None:
        return signed.format(row.change)
    return f"{signed.format(row.change)} [{signed.format(row.low)}, {signed.format(row.high)}]"


def errors(records):
    """One line for each reason that items weren't counted for."""
    reasons = {}
    for record in records:
        if "error" in record:
            reasons.setdefault((record["method"], record["error"]), []).append(record["item"])
    return [
        f"{method}: {len(items)} item(s) not counted, the first {items[0]}: {reason}"
        for (method, reason), items in reasons.items()
    ]


def as_json(made, header):
    """In the form of every benchmark of this project (docs/dev/measuring.md), with the interval beside."""
    device, commit, date = header["device"], header.get("commit"), header["date"]
    return [
        dict(
            suite=f"eval-{header['kind']}",
            case=row.method,
            params=dict(
                model=header["model"]["name"],
                group=row.group,
                items=row.items,
                errors=row.errors,
                density=row.density,
                **({} if row.density_all is None else {"density_all": row.density_all}),
                seconds=row.seconds,
            ),
            metric=row.metric,
            value=row.mean,
            unit="",
            peer=BASELINE if row.change is not None else None,
            peer_value=None if row.change is None else row.mean - row.change,
            ratio=None,
            change=row.change,
            low=row.low,
            high=row.high,
            runs=row.units,
            spread=row.standard_error,
            device=device,
            commit=commit,
            date=date,
        )
        for row in made
    ]
