"""Tables of runs: changes paired by unit, and methods compared at equal density."""

import pytest
import torch

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval import kind, summary


def test_changes_are_paired_by_unit():
    base = torch.randn(400).double()
    records = [
        {"item": "a", "group": "g", "method": "full", "params": {}, "metrics": {"nll": 0}, "units": {"nll": base.tolist()}},
        {
            "item": "a",
            "group": "g",
            "method": "pbs",
            "params": {},
            "density": 0.5,
            "metrics": {"nll": 0},
            "units": {"nll": (base + 0.1 + 0.01 * torch.randn(400)).tolist()},
        },
        {"item": "b", "group": "g", "method": "pbs", "params": {}, "error": "no"},
    ]
    full, pbs = summary.rows(records, [kind.Metric("nll")], ["full", "pbs"])
    assert full.change is None and pbs.items == 1 and pbs.errors == 1 and pbs.density == 0.5
    assert pbs.change == pytest.approx(0.1, abs=0.003)
    assert pbs.standard_error == pytest.approx(0.01 / 20, rel=0.2)
    assert pbs.low < pbs.change < pbs.high and pbs.high - pbs.low == pytest.approx(4 * pbs.standard_error, rel=0.2)


def test_several_groups_have_a_common_row():
    records = [
        {"item": g, "group": g, "method": "full", "params": {}, "metrics": {"score": x}} for g, x in (("a", 1), ("b", 0))
    ]
    made = summary.rows(records, [kind.Metric("score")], ["full"])
    assert [(row.group, row.mean) for row in made] == [("a", 1.0), ("b", 0.0), ("all", 0.5)]
    assert "all" in summary.table(made, [kind.Metric("score")])


def test_changes_at_equal_density():
    from pbsattn_eval import curves

    def record(item, method, density, *nll):
        return {
            "item": item,
            "group": "g",
            "method": method,
            "params": {},
            "density": density,
            "metrics": {"nll": 0},
            "units": {"nll": list(nll)},
        }

    methods = {"full": {"keep": "all"}, "pbs:top_p=.1": {"keep": "top_p"}, "pbs:top_p=.9": {"keep": "top_p"}}
    records = [
        record("a", "full", 1.0, 1, 2),
        record("a", "pbs:top_p=.1", 0.06, 2, 3),
        record("a", "pbs:top_p=.9", 0.24, 1, 2),
        record("b", "full", 1.0, 5),
        record("b", "pbs:top_p=.1", 0.12, 6),
        record("b", "pbs:top_p=.9", 0.2, 5),
    ]
    [(group, name, cells)] = curves.by_density(records, methods, "nll")
    assert (group, name) == ("g", "pbs")
    assert cells[0] is None and cells[3] is None, "b has no such density"
    assert cells[1][0] == pytest.approx((0.5 + 0.5 + 1) / 3) and cells[1][1] == pytest.approx(0.5 / 3)

    methods |= {f"other:top_p={p}": {"keep": "top_p"} for p in (".1", ".9")}
    records += [
        record(i, f"other:top_p=.{n}", d, *nll) for i, nll in (("a", (4, 4)), ("b", (9,))) for n, d in ((1, 0.1), (9, 0.2))
    ]
    against = {name: cells for _, name, cells in curves.by_density(records, methods, "nll", (0.12, 0.25), base="pbs")}
    assert list(against) == ["other"] and against["other"][1] is None, "a family isn't compared with itself"
    assert against["other"][0][0] == pytest.approx((4 - 1.5 + 4 - 2.5 + 9 - 6) / 3)
    for each in records[3:6] + records[8:]:
        each["group"] = "h"
    groups = [group for group, _, _ in curves.by_density(records, methods, "nll", (0.12,), base="pbs")]
    assert groups == ["g", "h", "all"]


def test_settings_against_the_published_one():
    from pbsattn_eval import page

    def record(item, method, density, *nll):
        return {"item": item, "method": method, "density": density, "metrics": {"nll": 0}, "units": {"nll": list(nll)}}

    records = [
        record("a", page.PUBLISHED, 0.4, 1, 2),
        record("a", "sparser", 0.2, 1.5, 2.5),
        record("a", "denser", 0.5, 1, 2),
        record("b", page.PUBLISHED, 0.4, 1, 2),
        record("b", "sparser", 0.1, 1, 3),
        record("b", "denser", 0.3, 1, 2),
    ]
    header, lines = page._against(records, [page.PUBLISHED, "sparser", "denser"])
    assert header == ["method", "a", "b"]
    assert lines == [["`sparser`", "+0.5000 ±0.0000, 0.50x", "+0.5000 ±0.5000, 0.25x"]]


def test_densities_are_of_the_layers_that_full_attention_computes_whole():
    """Of a window every method computes all: what it leaves out shows in the other layers."""
    from pbsattn_eval import page

    def record(item, method, *layers):
        density = sum(layers) / len(layers)
        shared = {"item": item, "group": "g", "method": method, "params": {}, "metrics": {"nll": 1.0}}
        return {**shared, "density": density, "layers": list(layers)}

    windowed = [record("a", "full", 0.25, 1.0, 1.0), record("a", "pbs", 0.25, 0.5, 0.75)]
    plain = [record("b", "full", 1.0, 1.0, 1.0), record("b", "pbs", 0.5, 0.5, 0.8)]
    failed = {"item": "a", "group": "g", "method": "pbs-sampled", "params": {}, "error": "no"}
    assert summary.over_whole_layers([*plain, failed]) == [*plain, failed]
    without_full = windowed[1:]
    assert summary.over_whole_layers(without_full) == without_full

    full, pbs = records = summary.over_whole_layers(windowed)
    assert (full["density"], full["density_all"]) == (1.0, 0.75) and (pbs["density"], pbs["density_all"]) == (0.625, 0.5)
    assert windowed[1]["density"] == 0.5, "what was measured stays"
    metrics = [kind.Metric("nll")]
    made = summary.rows(records, metrics, ["full", "pbs"])
    of_table, *lines = (line.split() for line in summary.table(made, metrics).splitlines())
    assert of_table[:5] == ["group", "method", "density", "all", "layers"] and lines[1][:4] == ["g", "pbs", "0.625", "0.500"]
    header, lines = page._settings(made, metrics)
    assert header[:4] == ["texts", "method", "density", "all layers"] and lines[1][:4] == ["g", "`pbs`", "0.625", "0.500"]
    run = {"kind": "ppl", "model": {"name": "m"}, "device": "d", "date": "2026-01-01"}
    assert [row["params"].get("density_all") for row in summary.as_json(made, run)] == [0.75, 0.5]
    others = summary.rows(plain, metrics, ["full", "pbs"])
    assert "all layers" not in summary.table(others, metrics)
    assert "density_all" not in summary.as_json(others, run)[0]["params"]
