"""python -m pbsattn_eval, on a small random model: what it measures, and that nothing finished is ever lost."""

import json
import os

import pytest
import torch

import pbsattn
from conftest import f32_tolerance

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval import commands, folder as folders, kind, summary  # noqa: E402
from pbsattn_eval.kinds import ppl  # noqa: E402


def ppl_arguments(folder, out, *arguments):
    return ["ppl", "--model", str(folder), "--text", f"words={folder / 'text.txt'}", "--lengths", "800", "--judge", "all", "--methods",
            "pbs:top_p=0.1/1.0", "--device", "cpu", "--out", str(out), *arguments]


def items_of(out):
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run")
    assert commands.main(ppl_arguments(folder, out)) == 0
    return out


# ------------------------------------------------------------------------------------------------------ ppl


def test_ppl_measures_likelihood_and_divergence(finished, folder):
    full, sparse, whole = items_of(finished)
    assert [full["method"], sparse["method"], whole["method"]] == ["full", "pbs:top_p=0.1", "pbs:top_p=1.0"]
    assert full["density"] == 1.0 and full["metrics"]["kl"] == 0 and full["metrics"]["top1"] == 1
    assert sparse["density"] < 1 and sparse["metrics"]["kl"] > 0 and len(sparse["units"]["nll"]) == 3
    assert whole["density"] == 1.0 and whole["metrics"]["kl"] < 1e-6
    assert whole["metrics"]["nll"] == pytest.approx(full["metrics"]["nll"], abs=1e-5)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer((folder / "text.txt").read_text()).input_ids[:800]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert full["metrics"]["nll"] == pytest.approx(float(losses[-768:].mean()), abs=1e-4)


def test_ppl_prints_a_table_and_writes_it_as_json(finished, capsys, tmp_path):
    assert commands.main(["table", str(finished), "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert "pbs:top_p=0.1" in printed and "nll (nats)" in printed and "words 800" in printed
    made = json.loads((tmp_path / "rows.json").read_text())
    assert made == json.loads((finished / "summary.json").read_text())
    keys = {"suite", "case", "params", "metric", "value", "unit", "peer", "peer_value", "ratio", "runs", "spread",
            "device", "commit", "date"}
    assert all(keys <= set(each) for each in made)
    [change] = [each for each in made if each["case"] == "pbs:top_p=0.1" and each["metric"] == "nll"]
    assert change["peer"] == "full" and change["low"] <= change["change"] <= change["high"]


def test_methods_with_settings_by_layer_and_head(folder, tmp_path):
    given = {"*": {"*": {"keep": "none"}}, "1": {"1": {"keep": "all"}}}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(given))
    name = f"pbs:settings={path}"
    assert commands.main(ppl_arguments(folder, tmp_path / "run", "--methods", f"{name},pbs:keep=none")) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["methods"][name]["settings"] == given
    density = {each["method"]: each["density"] for each in items_of(tmp_path / "run")}
    none = density["pbs:keep=none"]
    assert density[name] == pytest.approx(none + (1 - none) / 4)  # one head of two layers' two is dense


def test_losses_are_made_in_parts(folder, monkeypatch):
    from pbsattn_eval import engines

    engine = engines.Engine(*engines.models.load(folder, torch.device("cpu"), torch.float32))
    hidden, other = torch.randn(2, 300, 128)
    targets = torch.randint(0, 10, (300,))
    whole = engine.losses(hidden, targets, other)
    monkeypatch.setattr(engines, "_HEAD_ROWS", 128)
    for part, expected in zip(engine.losses(hidden, targets, other), whole):
        torch.testing.assert_close(part, expected)
    assert engine.losses(hidden, targets)[1] is None


# ------------------------------------------------------------------------------------------------ the folder


@pytest.mark.parametrize("lines, torn", [(0, ""), (1, ""), (2, '{"kind": "ppl", "it')])
def test_a_stopped_run_goes_on_to_the_same_end(finished, folder, tmp_path, lines, torn):
    kept = (finished / "items.jsonl").read_text().splitlines(keepends=True)[:lines]
    (tmp_path / "run.json").write_text((finished / "run.json").read_text())
    (tmp_path / "items.jsonl").write_text("".join(kept) + torn)
    assert commands.main(ppl_arguments(folder, tmp_path)) == 0
    assert items_of(tmp_path) == items_of(finished)
    assert (tmp_path / "items.jsonl").read_text().startswith("".join(kept))


def test_ctrl_c_keeps_what_is_done(folder, tmp_path, monkeypatch, capsys):
    measure = ppl.Kind.measure

    def interrupted(self, engine, item, attention, state):
        if attention.name == "pbs:top_p=1.0":
            raise KeyboardInterrupt
        return measure(self, engine, item, attention, state)

    monkeypatch.setattr(ppl.Kind, "measure", interrupted)
    assert commands.run_main(ppl_arguments(folder, tmp_path)) == 130
    assert "interrupted; 2 record(s) are kept" in capsys.readouterr().err
    monkeypatch.undo()
    assert commands.run_main(ppl_arguments(folder, tmp_path)) == 0
    assert len(items_of(tmp_path)) == 3


def test_another_run_in_the_folder_is_named(finished, folder, capsys):
    assert commands.run_main(ppl_arguments(folder, finished, "--judge", "256")) == 1
    assert 'options.judge is "all" there and "256" here' in capsys.readouterr().err
    assert len(items_of(finished)) == 3


HEADER = {"kind": "ppl", "date": "today"}
RECORD = {"kind": "ppl", "item": "a", "group": "g", "method": "full", "params": {}, "metrics": {"nll": 1.0}}


def test_two_runs_in_one_folder(tmp_path):
    writing = rf"another run \(process {os.getpid()}\) is writing"
    with folders.RunFolder(tmp_path, HEADER), pytest.raises(ValueError, match=writing):
        folders.RunFolder(tmp_path, HEADER)
    with folders.RunFolder(tmp_path, {**HEADER, "date": "tomorrow"}):
        pass


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    with folders.RunFolder(tmp_path, HEADER) as run:
        run.add(RECORD)
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError, match="the 1 finished records are kept; free some space"):
            run.add({**RECORD, "item": "b"})
        monkeypatch.undo()
        assert len(items_of(tmp_path)) == 1
        run.add({**RECORD, "item": "b"})
    assert [each["item"] for each in items_of(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("line, message", [
    ("{nonsense", "line 2: is not JSON"),
    ("[1]", "line 2: is not a JSON object"),
    (json.dumps({**RECORD, "method": 7}), 'line 2: field "method" is 7; it has to be of type str'),
    (json.dumps({k: v for k, v in RECORD.items() if k != "metrics"}), 'line 2: field "metrics" is missing'),
])
def test_damaged_items_are_named(tmp_path, line, message):
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, **HEADER}))
    (tmp_path / "items.jsonl").write_text(json.dumps(RECORD) + "\n" + line + "\n" + json.dumps(RECORD) + "\n")
    with pytest.raises(ValueError, match=message):
        folders.RunFolder(tmp_path, HEADER)


def test_items_of_nobody(tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(RECORD) + "\n")
    with pytest.raises(ValueError, match="no run.json"):
        folders.RunFolder(tmp_path, HEADER)
    with pytest.raises(ValueError, match="no such file"):
        folders.read_header(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------- methods


def test_a_method_that_the_device_lacks_is_told_and_not_counted(folder, tmp_path, monkeypatch, capsys):
    def attention(*tensors, method, **settings):
        if method == "pbs-threshold":
            raise NotImplementedError("score per_query: not on this device")
        return pbsattn.attention(*tensors, method=method, **settings)

    monkeypatch.setattr(pbsattn.transformers, "attention", attention)
    assert commands.main([*ppl_arguments(folder, tmp_path), "--methods", "pbs-threshold,pbs"]) == 0
    records = {each["method"]: each for each in items_of(tmp_path)}
    assert records["pbs-threshold"]["error"] == "layer 0 went to SDPA: score per_query: not on this device"
    assert "metrics" in records["pbs"]
    assert "pbs-threshold: 1 item(s) not counted, the first text-800" in capsys.readouterr().out


@pytest.mark.parametrize("text, specs", [
    ("pbs", ["full", "pbs"]),
    ("full,pbs:top_p=.5/.9:segment=512", ["full", "pbs:top_p=.5:segment=512", "pbs:top_p=.9:segment=512"]),
    ("a:x=1/2:y=3/4", ["full", "a:x=1:y=3", "a:x=1:y=4", "a:x=2:y=3", "a:x=2:y=4"]),
    ("pbs:file=a/b.json", ["full", "pbs:file=a/b.json"]),
])
def test_sweeps(text, specs):
    assert commands.expand(text) == specs


def test_every_method_can_be_swept():
    from pbsattn_eval import curves, engines

    attentions = [engines.Attention.parse(spec) for spec in commands.expand("every")]
    families = curves.families({each.name: engines.options_of(each) for each in attentions})
    assert all(len(specs) >= 4 for specs in families.values())
    assert {each.method for each in attentions} == set(pbsattn.METHODS) - {"auto"}


@pytest.mark.parametrize("arguments, message", [
    (["--methods", "pbs,,full"], "names an empty method"),
    (["--methods", "pbss"], "no such attention"),
    (["--methods", "pbs:top_p=2"], "top_p"),
    (["--lengths", "100"], "under 512 tokens"),
    (["--lengths", "many"], "not numbers"),
    (["--lengths", "100000"], "tokens, 100000 needed"),
    (["--judge", "10"], "under 256 tokens"),
    (["--judge", "most"], "neither a number nor half nor all"),
    (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--text", "a=text.txt", "--text", "b=text.txt"], "two files of one name"),
    (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
])
def test_bad_input(folder, tmp_path, capsys, arguments, message):
    assert commands.run_main([*ppl_arguments(folder, tmp_path / "run"), *arguments]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("pbsattn_eval: ") and message in told


# -------------------------------------------------------------------------------------------------- summary


def test_changes_are_paired_by_unit():
    base = torch.randn(400).double()
    records = [
        {"item": "a", "group": "g", "method": "full", "params": {}, "metrics": {"nll": 0}, "units": {"nll": base.tolist()}},
        {"item": "a", "group": "g", "method": "pbs", "params": {}, "density": 0.5, "metrics": {"nll": 0},
         "units": {"nll": (base + 0.1 + 0.01 * torch.randn(400)).tolist()}},
        {"item": "b", "group": "g", "method": "pbs", "params": {}, "error": "no"},
    ]
    full, pbs = summary.rows(records, [kind.Metric("nll")], ["full", "pbs"])
    assert full.change is None and pbs.items == 1 and pbs.errors == 1 and pbs.density == 0.5
    assert pbs.change == pytest.approx(0.1, abs=0.003)
    assert pbs.standard_error == pytest.approx(0.01 / 20, rel=0.2)
    assert pbs.low < pbs.change < pbs.high and pbs.high - pbs.low == pytest.approx(4 * pbs.standard_error, rel=0.2)


def test_several_groups_have_a_common_row():
    records = [{"item": g, "group": g, "method": "full", "params": {}, "metrics": {"score": x}} for g, x in (("a", 1), ("b", 0))]
    made = summary.rows(records, [kind.Metric("score")], ["full"])
    assert [(row.group, row.mean) for row in made] == [("a", 1.0), ("b", 0.0), ("all", 0.5)]
    assert "all" in summary.table(made, [kind.Metric("score")])


# --------------------------------------------------------------------------------------------------- recall


def test_recall(folder, tmp_path, capsys):
    methods = "pbs:top_p=0.3/1.0,oracle:top_p=0.3/0.6/1.0"
    assert commands.main(["recall", "--model", str(folder), "--text", str(folder / "text.txt"), "--lengths", "900", "--methods",
                         methods, "--device", "cpu", "--out", str(tmp_path), "--layers", "1,"]) == 0
    records = {each["method"]: each for each in items_of(tmp_path)}
    for name in ("full", "pbs:top_p=1.0", "oracle:top_p=1.0"):
        metrics = records[name]["metrics"]
        assert metrics["recall"] == pytest.approx(1, abs=1e-5) and metrics["error"] < f32_tolerance(1e-5, 1e-2) and records[name]["density"] == 1
    sparse, best = records["pbs:top_p=0.3"], records["oracle:top_p=0.3"]
    assert sparse["params"] == {"text": "text", "tokens": 900, "layer": 1} and len(sparse["heads"]["recall"]) == 2
    assert sparse["density"] < 1 and 0 < sparse["metrics"]["recall"] < 1 and sparse["metrics"]["error"] > 1e-3
    assert best["metrics"]["recall"] > 0.3
    assert records["full"]["picture"]["rows"] == 8
    assert "at equal density" in capsys.readouterr().out


def test_recall_is_the_mass_of_the_kept_keys():
    """Against the definition: weights of the keys that may be seen, summed one by one."""
    from pbsattn_eval.kinds import masses

    q, k, v = torch.randn(2, 700, 16), torch.randn(1, 700, 16), torch.randn(1, 700, 16)
    out, trace = pbsattn.trace(q[None], k[None], v[None], top_p=0.4)
    mass, exact = masses.true_attention(q, k, v, 0.25)
    weights = (q @ k.transpose(1, 2) * 0.25).masked_fill(torch.ones(700, 700, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(exact, weights @ v)
    torch.testing.assert_close(mass[:, 5], weights[:, 640:].mean(1))

    by_block = masses.block_masses(mass, trace.order[0], 256)
    for head in range(2):
        row, order = 4, trace.order[0, head].tolist()  # its own segment begins at block 4
        for block in range(6):
            keys = range(block * 128, min(block * 128 + 128, 700))
            keys = keys if block >= 4 else [order[slot] for slot in keys]
            assert float(by_block[head, row, block]) == pytest.approx(float(mass[head, row, keys].sum()), abs=1e-6)
    torch.testing.assert_close(masses.attend(q, k, v, 0.25, trace.kept[0], trace.order[0], 256), out[0], atol=f32_tolerance(1e-4, 2e-2), rtol=1e-3)


@pytest.mark.parametrize("settings", [dict(top_p=0.5), dict(keep="threshold", threshold=0.15), dict(keep="density", density=0.6),
                                      dict(keep="top_k", top_k=2), dict(keep="relative", threshold=0.4),
                                      dict(top_p=0.2, sink_blocks=2, local_blocks=3, dense_last_rows=1)])
def test_the_oracle_is_the_references(settings):
    from pbsattn_eval.kinds import masses

    q, k, v = torch.randn(1, 2, 1600, 16), torch.randn(1, 1, 1600, 16), torch.randn(1, 1, 1600, 16)
    _, decided = pbsattn.trace(q, k, v, method="oracle", reference=True, scale=1.5, **settings)
    order, expected = decided.order[0], decided.kept[0]
    mass, _ = masses.true_attention(q[0], k[0], v[0], 1.5)
    kept = masses.oracle_choice(masses.block_masses(mass, order, 256), order, pbsattn.options("oracle", **settings))
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("wanted, expected", [(0.1, 10.0), (0.2, 15.0), (0.4, 20.0), (0.05, None), (0.5, None)])
def test_values_between_settings(wanted, expected):
    from pbsattn_eval import curves

    place = curves.at([0.4, 0.1], wanted)
    assert (place and float(place.of([20.0, 10.0]))) == (expected and pytest.approx(expected))


def test_where_a_curve_crosses():
    from pbsattn_eval import curves

    assert curves.crossing([0.4, 0.1], [0.0, 1.0], 0.5) == pytest.approx(0.2)
    assert curves.crossing([0.1, 0.4], [1.0, 0.6], 0.5) is None
    assert curves.crossing([0.1, 0.4], [0.3, 0.1], 0.5) is None
    assert curves.families({"pbs:top_p=.5:segment=512": {"keep": "top_p"}, "pbs:top_p=.9:segment=512": {"keep": "top_p"},
                            "full": {"keep": "all"}}) == {"pbs:segment=512": ["pbs:top_p=.5:segment=512", "pbs:top_p=.9:segment=512"]}


# --------------------------------------------------------------------------------------------------- a page


def test_a_page_of_results(finished, tmp_path, capsys):
    base = tmp_path / "methods"
    assert not commands.main(["page", str(finished), "--to", str(base)])
    page = (tmp_path / "methods.md").read_text()
    name = finished.name
    assert f"<!-- run {name} -->" in page and "`pbs:top_p=0.1`" in page and f"(methods-{name}.svg)" in page
    assert "<svg" in (tmp_path / f"methods-{name}.svg").read_text()
    assert len(json.loads((tmp_path / "methods.json").read_text())) == 9
    (tmp_path / "methods.md").write_text("before\n" + page.replace("`pbs:top_p=0.1`", "stale") + "after\n")
    commands.main(["page", str(finished), "--to", str(base)])
    again = (tmp_path / "methods.md").read_text()
    assert again == "before\n" + page + "after\n", "what people wrote stays, tables are new"


def test_a_page_has_a_column_for_each_group_of_prompts(tmp_path):
    header = {"format": 1, "kind": "needle", "model": {"name": "m"}, "device": "d", "versions": {"torch": "2"}, "commit": "c",
              "date": "today", "methods": {"full": {}, "pbs": {}}}
    def record(place, depth, method, found):
        return json.dumps({
            "kind": "needle", "item": f"{place}-{depth}", "group": f"{place} 4096", "method": method, "density": 0.5,
            "params": {"depth": depth}, "metrics": {"found": found}}) + "\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(header))
    (tmp_path / "run" / "items.jsonl").write_text("".join(
        record(place, depth, method, 100 * (method == "full" or depth == 0))
        for place in ("end", "start") for depth in (0, 1) for method in ("full", "pbs")))
    commands.main(["page", str(tmp_path / "run"), "--to", str(tmp_path / "found")])
    text = (tmp_path / "found.md").read_text()
    assert "Found (%) in 4 prompts of 4096 tokens; change against full, 95 % interval:" in text
    assert "| method | density | end | start | all | change |" in text
    assert "| `full` | 0.500 | 100.0 | 100.0 | 100.0 |  |" in text
    assert "| `pbs` | 0.500 | 50.0 | 50.0 | 50.0 | -50.0 [-100.0, +0.0] |" in text
    assert "<summary>found by depth" in text and "  end 4096  pbs     *0" in text and "  pbs: 2 of 4 (50.0%)" in text


def test_changes_at_equal_density():
    from pbsattn_eval import curves

    def record(item, method, density, *nll):
        return {"item": item, "group": "g", "method": method, "params": {}, "density": density, "metrics": {"nll": 0},
                "units": {"nll": list(nll)}}

    methods = {"full": {"keep": "all"}, "pbs:top_p=.1": {"keep": "top_p"}, "pbs:top_p=.9": {"keep": "top_p"}}
    records = [record("a", "full", 1.0, 1, 2), record("a", "pbs:top_p=.1", 0.06, 2, 3), record("a", "pbs:top_p=.9", 0.24, 1, 2),
               record("b", "full", 1.0, 5), record("b", "pbs:top_p=.1", 0.12, 6), record("b", "pbs:top_p=.9", 0.2, 5)]
    [(group, name, cells)] = curves.by_density(records, methods, "nll")
    assert (group, name) == ("g", "pbs")
    assert cells[0] is None and cells[3] is None, "b has no such density"
    assert cells[1][0] == pytest.approx((0.5 + 0.5 + 1) / 3) and cells[1][1] == pytest.approx(0.5 / 3)


def test_settings_against_the_published_one():
    from pbsattn_eval import page

    def record(item, method, density, *nll):
        return {"item": item, "method": method, "density": density, "metrics": {"nll": 0}, "units": {"nll": list(nll)}}

    records = [record("a", page.PUBLISHED, 0.4, 1, 2), record("a", "sparser", 0.2, 1.5, 2.5), record("a", "denser", 0.5, 1, 2),
               record("b", page.PUBLISHED, 0.4, 1, 2), record("b", "sparser", 0.1, 1, 3), record("b", "denser", 0.3, 1, 2)]
    header, lines = page._against(records, [page.PUBLISHED, "sparser", "denser"])
    assert header == ["method", "a", "b"]
    assert lines == [["`sparser`", "+0.5000 ±0.0000, 0.50x", "+0.5000 ±0.5000, 0.25x"]]
