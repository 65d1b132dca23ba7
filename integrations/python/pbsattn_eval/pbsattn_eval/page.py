"""A results page of finished runs: tables between marks of a Markdown file, a plot, and the numbers as JSON."""

import json
import pathlib
import re

import numpy as np

from pbsattn.program import write_whole

from . import curves, folder, kind, summary
from .tables import show

PUBLISHED = "pbs:top_p=0.9"  # what other settings have to beat
MOST_COLUMNS = 16  # groups that a table of one metric has side by side


def write(runs, base, against=(), densities=curves.DENSITIES):
    """Puts the tables of every run into BASE.md, its curves into BASE-NAME.svg, and all rows into BASE.json.

    A run is a folder, or NAME=FOLDER,FOLDER,...: parts of one run. Its place in the page is between <!-- run NAME --> and
    <!-- /run -->, NAME its folder's; what isn't there yet is added at the end. The rest of the page, which people write,
    stays as it is. Runs are compared with each family of `against` too that they have.
    """
    page = pathlib.Path(f"{base}.md")
    text = page.read_text(encoding="utf-8") if page.exists() else "# Methods compared\n"
    rows = []
    for run in runs:
        name, header, records = _read(run)
        records = summary.over_whole_layers(records)
        the_kind = kind.load(header["kind"])
        made = summary.rows(records, the_kind.metrics, list(header["methods"]))
        rows += [dict(run=name, **row) for row in summary.as_json(made, header)]
        block = _block(header, records, made, the_kind, against, densities)
        if header["kind"] == "ppl" and plot(records, header, f"{base}-{name}.svg"):
            block += f"\n![Change of loss by density]({page.stem}-{name}.svg)\n"
        mark = f"<!-- run {name} -->\n{block}<!-- /run -->"
        found = re.compile(rf"<!-- run {re.escape(name)} -->\n.*?<!-- /run -->", re.DOTALL)
        before = found.search(text)
        text = text.replace(before[0], mark) if before else f"{text.rstrip()}\n\n{mark}\n"
    write_whole(page, text)
    write_whole(f"{base}.json", "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _read(run):
    """Name, header and records of a folder, or of a run's parts, NAME=FOLDER,FOLDER,...: what several measured counts once,
    as the first has it. The header names the commits and days of all.

    ValueError for parts that aren't of one kind, model, device and version, or give a method other options.
    """
    name, equals, parts = str(run).partition("=")
    if not equals:
        path = pathlib.Path(run)
        return path.name, folder.read_header(path), list(folder.read_items(path / "items.jsonl"))
    whole, records = {}, {}
    headers = {part: folder.read_header(part) for part in parts.split(",")}
    for part, header in headers.items():
        whole = whole or {**header, "methods": {}}
        for key in ("kind", "model", "device", "versions", "engine"):
            if header.get(key) != whole.get(key):
                raise ValueError(
                    f"{part}: {key} is not that of {name}'s first part; name runs that differ in items or methods alone"
                )
        for method, options in header["methods"].items():
            if whole["methods"].setdefault(method, options) != options:
                raise ValueError(
                    f"{part}: {method} has other options there than in {name}'s other parts; name runs of one version"
                )
        for record in folder.read_items(pathlib.Path(part) / "items.jsonl"):
            records.setdefault((record["item"], record["method"]), record)
    for key in ("commit", "date"):
        whole[key] = " and ".join(dict.fromkeys(str(header[key]) for header in headers.values()))
    return name, whole, list(records.values())


def markdown(header, lines):
    def cells(line):
        return "| " + " | ".join(line) + " |\n"

    return cells(header) + cells(["---"] * len(header)) + "".join(map(cells, lines))


def _block(header, records, made, the_kind, against, densities):
    where = f"{header['model']['name']}; {header['device']}, torch {header['versions']['torch']}"
    parts = [f"{where}; commit {header['commit']}, {header['date']}.\n"]
    families = curves.families(header["methods"]) if header["kind"] == "ppl" else {}
    for base in [None, *(each for each in against if each in families)] if families else []:
        equal = curves.by_density(records, header["methods"], the_kind.metrics[0].name, densities, base)
        if not equal:
            continue
        lines = [
            [group, f"`{name}`", *(f"{c[0]:+.4f} ±{c[1]:.4f}" if c else "" for c in cells)] for group, name, cells in equal
        ]
        told = f", against `{base}`" if base else ""
        parts.append(
            f"Change of the loss (nats a token, ± standard error) at equal density{told}:\n\n"
            + markdown(["texts", "method", *(f"{d:g}" for d in densities)], lines)
        )
    sparser = _against(records, list(header["methods"])) if header["kind"] == "ppl" else ([], [])
    if sparser[1]:
        parts.append(
            f"Sparser settings against `{PUBLISHED}`, text by text: change of the loss ± standard error, and density as a "
            "share of its:\n\n" + markdown(*sparser)
        )
    if len(the_kind.metrics) == 1:
        many = len({row.group for row in made}) > MOST_COLUMNS
        parts.append((_in_lines if many else _by_group)(made, the_kind.metrics[0]))
    else:
        parts.append("Every setting:\n\n" + markdown(*_settings(made, the_kind.metrics)))
    if header["kind"] != "ppl" and (told := the_kind.report(records, header["methods"])):
        title, _, rest = told.partition("\n")
        parts.append(f"<details><summary>{title.rstrip(':')}</summary>\n\n```text\n{rest}\n```\n\n</details>\n")
    return "\n".join(parts)


def _against(records, methods):
    """Header and lines of the table of settings that are sparser than the published one on every text."""
    by_item = {}
    for record in records:
        if "error" not in record:
            by_item.setdefault(record["item"], {})[record["method"]] = record
    lines = []
    for method in methods:
        cells = []
        for by_method in by_item.values():
            own, other = by_method.get(method), by_method.get(PUBLISHED)
            if own is None or other is None or own["density"] >= other["density"]:
                break
            change = np.subtract(curves.units(own, "nll"), curves.units(other, "nll"))
            error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else 0.0
            cells.append(f"{change.mean():+.4f} ±{error:.4f}, {own['density'] / other['density']:.2f}x")
        if len(cells) == len(by_item):
            lines.append([f"`{method}`", *cells])
    return ["method", *by_item], lines


def _by_group(made, metric):
    """What the table of one metric says and the table: a line for each method, a column for each group."""
    keyed = {(row.group, row.method): row for row in made}
    groups, methods = (list(dict.fromkeys(names)) for names in zip(*keyed))
    whole = groups[-1]  # all of them, where there are several
    lengths = {group.rpartition(" ")[2] for group in groups if group != "all"}
    of = lengths.pop() if len(lengths) == 1 else ""  # what every group's name ends in, as " 16384"

    def cell(row):
        return "" if row is None else metric.form.format(row.mean)

    lines = []
    for method in methods:
        row = keyed.get((whole, method))
        density = "" if row is None or row.density is None else f"{row.density:.3f}"
        change = "" if row is None else summary.change(row, metric)
        lines.append([f"`{method}`", density, *(cell(keyed.get((group, method))) for group in groups), change])
    items = max(row.items for row in made if row.group == whole)
    said = (
        f"{metric.name.capitalize()}{f' ({metric.unit})' if metric.unit else ''} in {items} prompts"
        f"{f' of {of} tokens' if of.isdigit() else ''}; change against full, 95 % interval:\n\n"
    )
    names = [group.removesuffix(f" {of}") for group in groups]
    return said + markdown(["method", "density", *names, "change"], lines)


def _in_lines(made, metric):
    """What the table of one metric says and the table: a line for each group, columns for each method."""
    keyed = {(row.group, row.method): row for row in made}
    groups, methods = (list(dict.fromkeys(names)) for names in zip(*keyed))
    header, lines = ["prompts", "number"], [[group, ""] for group in groups]
    for method in methods:
        of_method = [keyed.get((group, method)) for group in groups]
        compared = any(row and row.change is not None for row in of_method)
        header += [f"`{method}`", "density", "change"] if compared else [f"`{method}`"]
        for line, row in zip(lines, of_method):
            line[1] = line[1] or ("" if row is None else str(row.items))
            line.append("" if row is None else metric.form.format(row.mean))
            if compared:
                line.append("" if row is None or row.density is None else f"{row.density:.3f}")
                line.append("" if row is None else summary.change(row, metric))
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.name.capitalize()}{unit}; change against full, 95 % interval:\n\n" + markdown(header, lines)


def _settings(made, metrics):
    """Header and lines of the table of settings."""
    keyed = {}
    for row in made:
        keyed.setdefault((row.group, row.method), {})[row.metric] = row
    all_layers = any(row.density_all is not None for row in made)
    lines = []
    for (group, method), by_metric in keyed.items():
        first = next(iter(by_metric.values()))
        densities = [first.density, first.density_all] if all_layers else [first.density]
        line = [group, f"`{method}`", *(show(density, "{:.3f}") for density in densities)]
        for metric in metrics:
            row = by_metric.get(metric.name)
            line.append("" if row is None else metric.form.format(row.mean))
            if metric.change:
                signed = metric.form.replace("{:", "{:+")
                line.append(
                    ""
                    if row is None or row.change is None
                    else f"{signed.format(row.change)} ±{metric.form.format(row.standard_error or 0)}"
                )
        lines.append(line)
    header = ["texts", "method", "density", *["all layers"] * all_layers]
    for metric in metrics:
        header += [metric.name, "change"] if metric.change else [metric.name]
    return header, lines


def plot(records, header, path):
    """Change of the mean loss against density, a panel for each group, a line for each family. False for no families, or
    more groups than a page is wide."""
    families = curves.families(header["methods"])
    rows = summary.rows(records, [kind.Metric("nll")], list(header["methods"]))
    groups = [group for group in dict.fromkeys(row.group for row in rows) if group != "all"]
    if not families or not 0 < len(groups) <= 4:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pbsattn"
    from matplotlib import pyplot

    value = {(row.group, row.method): row for row in rows if row.change is not None}
    figure, panels = pyplot.subplots(1, len(groups), figsize=(5.2 * len(groups) + 2.6, 4.4), squeeze=False)
    marks = "os^Dv<>PX*"
    for panel, group in zip(panels[0], groups):
        for i, (name, specs) in enumerate(families.items()):
            points = sorted((value[group, spec] for spec in specs if (group, spec) in value), key=lambda row: row.density)
            if points:
                panel.errorbar(
                    [p.density for p in points],
                    [p.change for p in points],
                    yerr=[p.standard_error or 0 for p in points],
                    label=name,
                    marker=marks[i % len(marks)],
                    markersize=4,
                    linewidth=1.2,
                    color=pyplot.get_cmap("tab20").colors[i % 20],
                )
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xscale("log")
        ticks = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_title(f"{group} tokens", fontsize=10)
        panel.set_xlabel("density")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("change of loss against full, nats a token")
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{header['model']['name']}, {header['device']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
