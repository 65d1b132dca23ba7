"""What a run's records show: sections of figures, each with the table of its numbers."""

import base64
import dataclasses

import numpy as np

from .. import curves, kind, summary
from . import draw


@dataclasses.dataclass
class Figure:
    title: str
    svg: str
    header: list[str]  # of the table
    rows: list[list[str]]


@dataclasses.dataclass
class Section:
    id: str
    title: str
    text: str  # how to read it
    figures: list[Figure]


@dataclasses.dataclass
class Run:
    """A finished or half finished run, as its folder holds it."""

    name: str
    header: dict
    records: list[dict]

    def __post_init__(self):
        self.metrics = kind.load(self.header["kind"]).metrics
        self.measured = [record for record in self.records if "error" not in record]
        self.methods = [name for name in self.header["methods"] if any(r["method"] == name for r in self.measured)]
        self.summary = summary.rows(self.records, self.metrics, list(self.header["methods"]))
        self.errors = summary.errors(self.records)

    def groups(self):
        return list(dict.fromkeys(record["group"] for record in self.measured))

    def overview(self):
        """Header and rows of the table that every run ends in."""
        header, lines = ["texts", "method", "density", "items"], {}
        for metric in self.metrics:
            header += [metric.name, f"change [{summary.LEVEL:.0%} interval]"] if metric.change else [metric.name]
        for row in self.summary:
            line = lines.setdefault(
                (row.group, row.method),
                [row.group, row.method, "" if row.density is None else f"{row.density:.3f}", str(row.items)]
                + [""] * (len(header) - 4),
            )
            metric = next(each for each in self.metrics if each.name == row.metric)
            at = header.index(metric.name, 4)
            line[at] = metric.form.format(row.mean)
            if metric.change:
                line[at + 1] = summary.change(row, metric)
        return header, list(lines.values())


def sections(run):
    """Those that the run has records for."""
    made = [
        _likelihood(run),
        *_recall(run),
        _needles(run),
        _scores(run),
        _layers(run),
        _heads(run),
        _masks(run),
        _times(run),
    ]
    return [section for section in made if section.figures]


def _texts(run, group):
    """A group by its name; those of texts end in a number of tokens."""
    return f"{group} tokens" if run.header["kind"] in ("ppl", "recall") else group


def _mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def _families(run):
    """{family: [method, ...]} of every method but full, in order."""
    found = {}
    for name in run.methods:
        if name != summary.BASELINE:
            found.setdefault(curves.family(name, run.header["methods"][name]), []).append(name)
    return found


def _curve(run, group, title, metric, y_name, change=False, **axes):
    """A metric of a group against density, a line for each family; None where nothing has both."""
    row_of = {row.method: row for row in run.summary if row.group == group and row.metric == metric and row.density}
    series, rows = [], []
    for family, methods in _families(run).items():
        line = []
        for method in methods:
            row = row_of.get(method)
            value = row and (row.change if change else row.mean)
            if row is not None and value is not None:
                error = row.standard_error if change else None
                line.append((row.density, value, error))
                rows.append(
                    [method, f"{row.density:.3f}", f"{value:+.4f}" if change else f"{value:.4f}"]
                    + ([f"{error:.4f}" if error else ""] if change else [])
                )
        if line:
            series.append((family, line))
    if not series:
        return None
    return Figure(
        title,
        draw.lines(f"{title}: {y_name} against density", series, y_name, **axes),
        ["method", "density", y_name] + (["standard error"] if change else []),
        rows,
    )


def _likelihood(run):
    made = []
    if run.header["kind"] == "ppl":
        made = [
            _curve(
                run,
                group,
                _texts(run, group),
                "nll",
                "change of loss, nats a token",
                change=True,
                scale=draw.symlog,
                ticks=draw.SYMLOG_TICKS,
            )
            for group in run.groups()
        ]
    return Section(
        "likelihood",
        "What sparsity costs in likelihood",
        "Change of the mean loss against full attention, paired on the same tokens; bars are standard errors. Lower "
        "is better, 0 is full attention. The vertical scale is logarithmic away from 0.",
        [f for f in made if f],
    )


def _recall(run):
    kinds = (
        (
            "recall",
            "Attention that the kept blocks hold",
            "Mean share of the true attention mass. Higher is better; the oracle chooses by the true masses.",
        ),
        (
            "error",
            "Error of the output",
            "Norm of the difference to exact attention's output, as a share of its norm. "
            "Lower is better, but lower error is not yet better text.",
        ),
    )
    for name, title, text in kinds:
        made = []
        if run.header["kind"] == "recall":
            made = [_curve(run, group, _texts(run, group), name, name) for group in run.groups()]
        yield Section(name, title, text, [f for f in made if f])


def _grid(title, members, row_of, column_of, value_of, show, **how):
    """A heat map of the mean of records by two of their params, with its table."""
    rows, columns = (sorted({of(r) for r in members}) for of in (row_of, column_of))
    cells = {}
    for record in members:
        cells.setdefault((row_of(record), column_of(record)), []).append(value_of(record))
    values = [[_mean(cells.get((r, c), [])) for c in columns] for r in rows]
    return _map(title, rows, columns, values, show, **how)


def _map(title, rows, columns, values, show, table_of=None, **how):
    table = [[str(row), *("" if v is None else show(v) for v in line)] for row, line in zip(rows, values)]
    name = " / ".join(part for part in (how.get("row_name"), how.get("column_name")) if part)
    return Figure(
        title, draw.heat_map(f"{title}, a heat map", rows, columns, values, show, **how), [name, *map(str, columns)], table
    )


def _needles(run):
    made = []
    if run.header["kind"] == "needle":
        for place in dict.fromkeys(r["params"]["question"] for r in run.measured):
            for method in run.methods:
                members = [r for r in run.measured if r["method"] == method and r["params"]["question"] == place]
                if members:
                    found = sum(r["metrics"]["found"] for r in members) / len(members)
                    where = "long question" if place == "long" else f"question at the {place}"
                    made.append(
                        _grid(
                            f"{method}, {where}: {found:.0f} %",
                            members,
                            lambda r: round(100 * r["params"]["depth"]),
                            lambda r: r["params"]["tokens"],
                            lambda r: r["metrics"]["found"],
                            "{:.0f}".format,
                            most=100.0,
                            row_name="depth, %",
                            column_name="tokens",
                        )
                    )
    return Section(
        "needles",
        "Needles found, by depth and length",
        "Share of the hidden codes that the answer holds, in %, by where in the text the code stands (0 is its "
        "beginning) and how long the prompt is. The stronger the colour, the more were found.",
        made,
    )


def _scores(run):
    made = []
    if run.header["kind"] in ("ruler", "tasks"):
        groups = run.groups()
        for metric in run.metrics:
            mean = {(row.group, row.method): row.mean for row in run.summary if row.metric == metric.name}
            used = [group for group in groups if any((group, method) in mean for method in run.methods)]
            values = [[mean.get((group, method)) for group in used] for method in run.methods]
            if used:
                numbers = [str(i + 1) for i in range(len(used))]
                made.append(
                    _map(
                        metric.name,
                        run.methods,
                        numbers,
                        values,
                        metric.form.format,
                        labels_above=True,
                        most=max(v for line in values for v in line if v is not None) or 1.0,
                        column_name=", ".join(f"{n} {group}" for n, group in zip(numbers, used))
                        if len(used) < 5
                        else "task, by number in the table",
                    )
                )
                made[-1].header[1:] = [f"{n} {group}" for n, group in zip(numbers, used)]
    return Section(
        "scores",
        "Scores by task",
        "The mean score of each task under each method; the stronger the colour, the higher.",
        made,
    )


def _layers(run):
    """Density of each layer, of kinds that run the whole model."""
    made = []
    for group in run.groups():
        values = {}
        for method in run.methods:
            found = [r["layers"] for r in run.measured if r["method"] == method and r["group"] == group and r.get("layers")]
            if found and method != summary.BASELINE:
                values[method] = [_mean(column) for column in zip(*found)]
        if values:
            layers = range(max(map(len, values.values())))
            made.append(
                _map(
                    _texts(run, group),
                    list(values),
                    list(layers),
                    list(values.values()),
                    "{:.3f}".format,
                    column_name="layer",
                    labels_above=True,
                )
            )
    return Section(
        "layers",
        "Density by layer",
        "Share of the causal blocks that each layer computes; the stronger the colour, the more.",
        made,
    )


def _heads(run):
    """Density of each head of each layer, of runs of the kind recall."""
    made = []
    for method in run.methods:
        members = [r for r in run.measured if r["method"] == method and "density" in r.get("heads", {})]
        if not members or method == summary.BASELINE:
            continue
        layers = sorted({r["params"]["layer"] for r in members})
        heads = range(max(len(r["heads"]["density"]) for r in members))
        values = [
            [_mean([r["heads"]["density"][h] for r in members if r["params"]["layer"] == layer]) for h in heads]
            for layer in layers
        ]
        made.append(_map(method, layers, list(heads), values, "{:.3f}".format, row_name="layer", column_name="head"))
    return Section(
        "heads",
        "Density by layer and head",
        "Share of the causal blocks that each head computes, the mean over texts; the stronger the colour, the more.",
        made,
    )


def _masks(run):
    """One document's pictures: full attention's, then each family at its middle setting."""
    made = []
    members = [r for r in run.measured if r.get("picture")]
    if members:
        first = members[0]["params"]
        members = [r for r in members if (r["params"]["text"], r["params"]["tokens"]) == (first["text"], first["tokens"])]
        shown = [
            summary.BASELINE,
            *(sorted(methods, key=lambda m: _density(members, m))[len(methods) // 2] for methods in _families(run).values()),
        ]
        shown.sort(key=lambda m: run.header["methods"][m].get("permutation", "none") != "none")  # before, then after
        for layer in sorted({r["params"]["layer"] for r in members}):
            for method in shown:
                made += [_mask(run, r) for r in members if r["method"] == method and r["params"]["layer"] == layer]
    return Section(
        "masks",
        "One head's blocks, before and after permutation",
        "Each point is a block of keys (to the right) that a row of queries (downwards) may see. Blue ones are computed, "
        "orange ones are left out; the stronger, the more of the row's attention they hold (logarithmic, from 0.001 % "
        "on). Permutation gathers heavy keys in few blocks, so that fewer need computing.",
        made,
    )


def _density(records, method):
    return _mean([r["density"] for r in records if r["method"] == method]) or 0


def _mask(run, record):
    picture, method = record["picture"], record["method"]
    rows, blocks = picture["rows"], picture["blocks"]

    def read(name):
        return np.frombuffer(base64.b64decode(picture[name]), np.uint8)

    kept = np.unpackbits(read("kept"))[: rows * blocks].reshape(rows, blocks).astype(bool)
    level = read("mass").reshape(rows, blocks) / 255
    mass = np.where(level > 0, 10.0 ** (5 * (level - 1)), 0)
    permuted = run.header["methods"][method].get("permutation", "none") != "none"
    when = "after" if permuted else "before"
    title = f"layer {record['params']['layer']}, head {picture['head']}, {when} permutation: {method}"
    visible = np.minimum(np.arange(rows) + blocks - rows + 1, blocks)
    table = []
    for part in np.array_split(np.arange(rows), min(8, rows)):
        share = kept[part].sum() / visible[part].sum()
        table.append([f"{part[0]} to {part[-1]}", f"{share:.3f}", f"{(mass * kept)[part].sum() / len(part):.2f}"])
    return Figure(title, draw.mask(title, kept, level), ["rows", "blocks computed", "attention that they hold"], table)


def _faster(base, seconds):
    """How many times faster than full attention's seconds, where those are known."""
    return f"{base / seconds:.2f}x" if base else ""


def _times(run):
    made = []
    groups = run.groups()
    if run.header["kind"] in ("ruler", "tasks") and len(groups) > 1:
        groups = ["all"]  # tasks of one length take the same time
    for group in groups:
        seconds = {row.method: row.seconds for row in run.summary if row.group == group and row.seconds}
        if seconds:
            base = seconds.get(summary.BASELINE)
            rows = [(method, s, f"{s:.3g} s {_faster(base, s)}".rstrip()) for method, s in seconds.items()]
            made.append(
                Figure(
                    _texts(run, group),
                    draw.bars(f"Time by method, {_texts(run, group)}", rows),
                    ["method", "seconds", "full attention's time over it"],
                    [[method, f"{s:.3g}", _faster(base, s)] for method, s in seconds.items()],
                )
            )
    what = "of one layer's attention and the choice of its blocks" if run.header["kind"] == "recall" else "of a prefill"
    return Section(
        "times",
        "Time",
        f"Mean time {what}, as it was while the evaluation ran; the factor is full attention's time "
        "over it. Benchmarks measure time with more care.",
        made,
    )
