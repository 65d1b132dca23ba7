"""python -m pbsattn_eval report: one self-contained HTML page of runs, finished or not."""

import pathlib

import jinja2
import markupsafe

from pbsattn.program import write_whole

from .. import folder, kind, summary
from . import figures


def read(path):
    """The run in a folder."""
    header = folder.read_header(path)
    if header["kind"] not in kind.KINDS:
        raise folder.FolderError(f'{path}: kind "{header["kind"]}" is none of {", ".join(kind.KINDS)}')
    items = pathlib.Path(path) / "items.jsonl"
    records = list(folder.read_items(items)) if items.exists() else []
    unknown = next((r["method"] for r in records if r["method"] not in header["methods"]), None)
    if unknown:
        raise folder.FolderError(f'{items}: method "{unknown}" is not among those of run.json; delete its lines')
    if all("error" in record for record in records):
        raise folder.FolderError(f"{items}: nothing is measured yet; let the run finish an item first")
    return figures.Run(pathlib.Path(path).resolve().name, header, summary.over_whole_layers(records))


def render(runs):
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    parts = [
        {"run": run, "id": f"run{i}", "overview": run.overview(), "sections": figures.sections(run)}
        for i, run in enumerate(runs)
    ]
    return environment.get_template("page.html").render(parts=parts, svg=markupsafe.Markup)


def write(folders, to=None):
    """Makes the page `to`, by default report.html in the first run's folder, and prints where it is."""
    to = pathlib.Path(to or pathlib.Path(folders[0], "report.html"))
    write_whole(to, render([read(path) for path in folders]))
    print(to)
    return 0
