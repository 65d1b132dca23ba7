"""python -m pbsattn_eval report: what the figures say is what the records hold, and the page needs nothing but itself."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval import commands, report
from pbsattn_eval.report import draw, figures

METHODS = {
    "full": {"keep": "all", "permutation": "none"},
    "pbs:top_p=0.5": {"keep": "top_p", "permutation": "segment", "top_p": 0.5},
    "pbs:top_p=0.9": {"keep": "top_p", "permutation": "segment", "top_p": 0.9},
    "pbs-unpermuted": {"keep": "top_p", "permutation": "none", "top_p": 0.9},
}
DENSITY = {"full": 1.0, "pbs:top_p=0.5": 0.25, "pbs:top_p=0.9": 0.5, "pbs-unpermuted": 0.6}


def write_run(path, kind, records, methods=METHODS, model="small.gguf"):
    path.mkdir()
    header = {
        "format": 1,
        "kind": kind,
        "command": "python -m pbsattn_eval",
        "commit": "abc1234",
        "date": "2026-01-01",
        "model": {"name": model, "bytes": 1},
        "engine": "transformers",
        "options": {},
        "methods": methods,
        "versions": {"pbsattn": "0.1.0", "torch": "2", "transformers": "5", "python": "3"},
        "device": "some processor",
    }
    (path / "run.json").write_text(json.dumps(header))
    (path / "items.jsonl").write_text("".join(json.dumps({"kind": kind, **record}) + "\n" for record in records))
    return path


def record(method, group="prose 1024", params=None, **more):
    return {
        "item": f"{group}-{params}",
        "group": group,
        "method": method,
        "params": params or {},
        "density": DENSITY[method],
        "seconds": DENSITY[method] * 2,
        **more,
    }


def ppl_run(path):
    losses = {method: [2.0 + 0.1 / DENSITY[method] + 0.01 * i for i in range(4)] for method in METHODS}
    return write_run(
        path,
        "ppl",
        [
            record(
                m,
                metrics={"nll": sum(losses[m]) / 4, "kl": 0.1, "top1": 0.9},
                units={"nll": losses[m]},
                layers=[DENSITY[m] / 2, DENSITY[m]],
            )
            for m in METHODS
        ]
        + [record("full", "code 1024", {"text": "b"}, error="no memory for it") | {"density": None}],
    )


def picture(kept, mass):
    """As docs/eval.md says."""

    def encode(array):
        return base64.b64encode(array.tobytes()).decode()

    level = np.round(255 * (1 + np.log10(np.clip(mass, 1e-5, 1)) / 5)).astype(np.uint8)
    return {
        "head": 0,
        "rows": kept.shape[0],
        "blocks": kept.shape[1],
        "kept": encode(np.packbits(kept)),
        "mass": encode(level),
    }


KEPT = np.tril(np.ones((9, 9), bool))
KEPT[4:, 1] = False
MASS = np.tril(np.full((9, 9), 0.1)) + 0.1 * np.eye(9)


def recall_run(path):
    def heads(d, layer):
        return {"recall": [0.9, 0.8], "error": [0.1, 0.3], "density": [d, d / (layer + 1)]}

    return write_run(
        path,
        "recall",
        [
            record(
                m,
                params={"text": "prose", "tokens": 1024, "layer": layer},
                metrics={"recall": 0.5 + DENSITY[m] / 2, "error": 0.2},
                heads=heads(DENSITY[m], layer),
                picture=picture(KEPT, MASS),
            )
            for layer in (0, 7)
            for m in METHODS
        ],
    )


def needle_run(path):
    return write_run(
        path,
        "needle",
        [
            record(
                m,
                f"end {tokens}",
                {"question": "end", "tokens": tokens, "depth": depth, "needles": 3, "repeat": repeat},
                metrics={"found": 100.0 * (m == "full" or depth > 0.5 or repeat == 0)},
                answer="4",
                expected="4",
            )
            for tokens in (4096, 8192)
            for depth in (0.0, 0.25, 1.0)
            for repeat in range(4)
            for m in ("full", "pbs:top_p=0.5")
        ],
    )


def ruler_run(path):
    return write_run(
        path,
        "ruler",
        [
            record(m, f"{task} 4096", {"task": task}, metrics={"score": 100 * DENSITY[m]})
            for task in ("vt", "qa_1")
            for m in METHODS
        ],
    )


RUNS = {"ppl": ppl_run, "recall": recall_run, "needle": needle_run, "ruler": ruler_run}


def sections_of(path):
    return {section.id: section for section in figures.sections(report.read(path))}


def test_every_kind_has_its_figures(tmp_path):
    ids = {name: list(sections_of(make(tmp_path / name))) for name, make in RUNS.items()}
    assert ids == {
        "ppl": ["likelihood", "layers", "times"],
        "recall": ["recall", "error", "heads", "masks", "times"],
        "needle": ["needles", "times"],
        "ruler": ["scores", "times"],
    }


def test_likelihood_is_the_change_against_full(tmp_path):
    [figure] = sections_of(ppl_run(tmp_path / "run"))["likelihood"].figures
    assert figure.header == ["method", "density", "change of loss, nats a token", "standard error"]
    assert figure.rows == [
        ["pbs:top_p=0.5", "0.250", "+0.3000", ""],
        ["pbs:top_p=0.9", "0.500", "+0.1000", ""],
        ["pbs-unpermuted", "0.600", "+0.0667", ""],
    ]
    assert figure.svg.count('class="line') == 2  # pbs, a family, and pbs-unpermuted


def test_layers_and_heads(tmp_path):
    [figure] = sections_of(ppl_run(tmp_path / "ppl"))["layers"].figures
    assert figure.rows[0] == ["pbs:top_p=0.5", "0.125", "0.250"]
    first = sections_of(recall_run(tmp_path / "recall"))["heads"].figures[0]
    assert (first.title, first.rows) == ("pbs:top_p=0.5", [["0", "0.250", "0.250"], ["7", "0.250", "0.031"]])


def test_needles_by_depth_and_length(tmp_path):
    full, sparse = sections_of(needle_run(tmp_path / "run"))["needles"].figures
    assert sparse.header == ["depth, % / tokens", "4096", "8192"]
    assert sparse.rows == [["0", "25", "25"], ["25", "25", "25"], ["100", "100", "100"]]
    assert "50 %" in sparse.title and full.title.endswith("100 %")


def test_masks_show_what_is_kept(tmp_path):
    from PIL import Image

    shown = sections_of(recall_run(tmp_path / "run"))["masks"].figures
    assert [figure.title.partition(", head 0, ")[2] for figure in shown[:3]] == [
        "before permutation: full",
        "before permutation: pbs-unpermuted",
        "after permutation: pbs:top_p=0.9",
    ]
    data = re.search(r"base64,([^\"]+)", shown[2].svg).group(1)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
    assert (pixels[..., 3] == 0).sum() == 36, "what causality hides is not painted"
    assert tuple(pixels[8, 1, :3]) == draw.DROPPED and tuple(pixels[8, 2, :3]) == draw.KEPT
    assert pixels[8, 8, 3] > pixels[8, 2, 3], "a heavier block is stronger"
    assert shown[2].rows[-1] == ["8 to 8", "0.889", "0.90"]


def test_times_are_against_full(tmp_path):
    [figure] = sections_of(ppl_run(tmp_path / "run"))["times"].figures
    assert figure.rows[:2] == [["full", "2", "1.00x"], ["pbs:top_p=0.5", "0.5", "4.00x"]]


class Reader(html.parser.HTMLParser):
    """Counts what a page has, and where it points to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.unnamed = {}, [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.unnamed += attributes.get("role") == "img" and not attributes.get("aria-label")


def test_a_page_of_several_runs_stands_alone(tmp_path, capsys):
    folders = [str(make(tmp_path / name)) for name, make in RUNS.items()]
    assert commands.main(["report", *folders]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "ppl/report.html")
    text = (tmp_path / "ppl/report.html").read_text()
    page = Reader(text)
    assert all(link.startswith(("#", "data:")) for link in page.links) and "@import" not in text and "url(" not in text
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)) and page.unnamed == 0 and "script" not in page.tags
    assert page.tags["table"] == page.tags["figure"] + len(folders), "each figure has a table, each run another"
    assert "full: 1 item(s) not counted" in text and "no memory for it" in text


def test_names_are_no_markup(tmp_path):
    folder = write_run(
        tmp_path / "run",
        "ppl",
        [record("full", "<b>&", metrics={"nll": 1.0}, layers=[1.0])],
        model="<script>alert(1)</script>",
    )
    assert report.write([folder], tmp_path / "page.html") == 0
    page = Reader((tmp_path / "page.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda run: (run / "run.json").unlink(), ["no such file", "name the folder of a run"]),
        (lambda run: (run / "items.jsonl").unlink(), ["nothing is measured yet"]),
        (lambda run: (run / "items.jsonl").write_text("{]\n"), ["line 1", "not JSON"]),
        (
            lambda run: (run / "items.jsonl").write_text((run / "items.jsonl").read_text().replace('"full"', '"fool"')),
            ["fool", "run.json"],
        ),
    ],
)
def test_bad_runs_are_named(tmp_path, capsys, change, says):
    run = ppl_run(tmp_path / "run")
    change(run)
    assert commands.run_main(["report", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in says)
    assert not (run / "report.html").exists()
