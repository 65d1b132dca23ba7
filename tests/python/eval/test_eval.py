"""python -m pbsattn_eval, on a small random model: what it measures, and that nothing finished is ever lost."""

import json
import os

import pytest
import torch

import pbsattn

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from conftest import RECORD_KEYS  # noqa: E402
from pbsattn_eval import caches, commands, folder as folders  # noqa: E402
from pbsattn_eval.kinds import ppl  # noqa: E402


def ppl_arguments(folder, out, *arguments):
    return [
        "ppl",
        "--model",
        str(folder),
        "--text",
        f"words={folder / 'text.txt'}",
        "--lengths",
        "800",
        "--judge",
        "all",
        "--methods",
        "pbs:top_p=0.1/1.0",
        "--device",
        "cpu",
        "--out",
        str(out),
        *arguments,
    ]


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
    assert all(RECORD_KEYS <= set(each) for each in made)
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


def test_a_prompt_in_chunks_is_scored_as_the_whole(folder, tmp_path):
    # Each row chooses by itself, the same in chunks; dense ones are the prompt's.
    methods = "two-step:threshold=0.3:threshold_tokens=0:dense_last_rows=1"
    assert commands.main(ppl_arguments(folder, tmp_path, "--methods", f"full:chunk=300,{methods},{methods}:chunk=640")) == 0
    full, in_chunks, whole, parts = items_of(tmp_path)
    assert (full["density"], in_chunks["density"]) == (1.0, pytest.approx(1.0)) and whole["density"] < 0.9
    assert in_chunks["metrics"]["nll"] == pytest.approx(full["metrics"]["nll"], abs=1e-5)
    assert parts["density"] == pytest.approx(whole["density"]) and parts["layers"] == pytest.approx(whole["layers"])
    assert parts["metrics"]["nll"] == pytest.approx(whole["metrics"]["nll"], abs=1e-5)
    header = json.loads((tmp_path / "run.json").read_text())
    assert header["methods"]["full:chunk=300"]["chunk"] == 300 and "chunk" not in header["methods"][methods]


@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
def test_caches_round_as_ggml_does(cache):
    quants = pytest.importorskip("gguf.quants", reason="comes with transformers' GGUF files; ./dev test installs it")
    kind = quants.GGMLQuantizationType[cache.upper()]
    numbers = torch.randn(2, 3, 50, 64).mul_(torch.logspace(-3, 3, 50)[:, None])
    numbers[0, 0, 0] = 0
    expected = quants.dequantize(quants.quantize(numbers.numpy(), kind), kind)
    assert torch.allclose(caches.rounded(numbers, cache), torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert caches.rounded(numbers.bfloat16(), cache).dtype == torch.bfloat16


def test_a_cache_of_fewer_bits_changes_the_likelihood(folder, tmp_path):
    methods = ",".join(f"full:cache={cache}" for cache in ("f16", "q8_0", "q4_0"))
    assert commands.main(ppl_arguments(folder, tmp_path, "--methods", f"{methods},full:cache=q4_0:chunk=300")) == 0
    f16, q8, q4, in_chunks = (each["metrics"] for each in items_of(tmp_path)[1:])
    assert 0 <= f16["kl"] < q8["kl"] < q4["kl"] and in_chunks["kl"] == pytest.approx(q4["kl"], rel=1e-2)
    header = json.loads((tmp_path / "run.json").read_text())["methods"]
    assert header["full:cache=q8_0"]["cache"] == "q8_0" and "cache" not in header["full"]


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


@pytest.mark.parametrize(
    "line, message",
    [
        ("{nonsense", "line 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        (json.dumps({**RECORD, "method": 7}), 'line 2: field "method" is 7; it has to be of type str'),
        (json.dumps({k: v for k, v in RECORD.items() if k != "metrics"}), 'line 2: field "metrics" is missing'),
    ],
)
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

    monkeypatch.setattr(pbsattn._transformers_calls, "attention", attention)
    assert commands.main([*ppl_arguments(folder, tmp_path), "--methods", "pbs-threshold,pbs"]) == 0
    records = {each["method"]: each for each in items_of(tmp_path)}
    told = "layer 0 went to SDPA or eager attention: score per_query: not on this device"
    assert records["pbs-threshold"]["error"] == told
    assert "metrics" in records["pbs"]
    assert "pbs-threshold: 1 item(s) not counted, the first text-800" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, specs",
    [
        ("pbs", ["full", "pbs"]),
        ("full,pbs:top_p=.5/.9:segment=512", ["full", "pbs:top_p=.5:segment=512", "pbs:top_p=.9:segment=512"]),
        ("a:x=1/2:y=3/4", ["full", "a:x=1:y=3", "a:x=1:y=4", "a:x=2:y=3", "a:x=2:y=4"]),
        ("pbs:file=a/b.json", ["full", "pbs:file=a/b.json"]),
    ],
)
def test_sweeps(text, specs):
    assert commands.expand(text) == specs


def test_every_method_can_be_swept():
    from pbsattn_eval import curves, engines

    attentions = [engines.Attention.parse(spec) for spec in commands.expand("every")]
    families = curves.families({each.name: engines.options_of(each) for each in attentions})
    assert all(len(specs) >= 4 for specs in families.values())
    assert {each.method.partition(":")[0] for each in attentions} == set(pbsattn.METHODS) - {"auto"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "pbs,,full"], "names an empty method"),
        (["--methods", "pbss"], "no such attention"),
        (["--methods", "pbs:top_p=2"], "top_p"),
        (["--methods", "pbs:cache=q3"], 'cache "q3": none of f16, q8_0, q4_0'),
        (["--methods", "pbs:chunk=1"], "chunk 1: 2 tokens is the least"),
        (["--lengths", "100"], "under 512 tokens"),
        (["--lengths", "many"], "not numbers"),
        (["--lengths", "100000"], "tokens, 100000 needed"),
        (["--judge", "10"], "under 256 tokens"),
        (["--judge", "most"], "neither a number nor half nor all"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--text", "a=text.txt", "--text", "b=text.txt"], "two files of one name"),
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, arguments, message):
    assert commands.run_main([*ppl_arguments(folder, tmp_path / "run"), *arguments]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("pbsattn_eval: ") and message in told


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


HEADER = {
    "format": 1,
    "kind": "needle",
    "model": {"name": "m"},
    "device": "d",
    "versions": {"torch": "2"},
    "commit": "c",
    "date": "today",
    "methods": {"full": {}, "pbs": {}},
}


def write_run(run, places, header=HEADER):
    """A run of needles, of which pbs finds those at depth 0."""
    run.mkdir()
    (run / "run.json").write_text(json.dumps(header))
    lines = [
        {
            "kind": "needle",
            "item": f"{place}-{depth}",
            "group": f"{place} 4096",
            "method": method,
            "density": 0.5,
            "params": {"depth": depth},
            "metrics": {"found": 100 * (method == "full" or depth == 0)},
        }
        for place in places
        for depth in (0, 1)
        for method in header["methods"]
    ]
    (run / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_has_a_column_for_each_group_of_prompts(tmp_path):
    write_run(tmp_path / "run", ("end", "start"))
    commands.main(["page", str(tmp_path / "run"), "--to", str(tmp_path / "found")])
    text = (tmp_path / "found.md").read_text()
    assert "Found (%) in 4 prompts of 4096 tokens; change against full, 95 % interval:" in text
    assert "| method | density | end | start | all | change |" in text
    assert "| `full` | 0.500 | 100.0 | 100.0 | 100.0 |  |" in text
    assert "| `pbs` | 0.500 | 50.0 | 50.0 | 50.0 | -50.0 [-100.0, +0.0] |" in text
    assert "<summary>found by depth" in text and "  end 4096  pbs     *0" in text and "  pbs: 2 of 4 (50.0%)" in text


def test_a_page_has_a_line_for_each_of_many_groups(tmp_path):
    places = [f"place{number}" for number in range(17)]
    write_run(tmp_path / "run", places)
    commands.main(["page", str(tmp_path / "run"), "--to", str(tmp_path / "found")])
    text = (tmp_path / "found.md").read_text()
    assert "Found (%); change against full, 95 % interval:" in text
    assert "| prompts | number | `full` | `pbs` | density | change |" in text
    assert all(f"| {place} 4096 | 2 | 100.0 | 50.0 | 0.500 | -50.0 [-100.0, +0.0] |" in text for place in places)
    assert "| all | 34 | 100.0 | 50.0 | 0.500 | -50.0 [" in text


def test_parts_of_several_commits_are_named(tmp_path):
    write_run(tmp_path / "one", ("end",), HEADER | {"commit": "aaaaaaa"})
    write_run(tmp_path / "two", ("start",), HEADER | {"commit": "bbbbbbb"})
    commands.main(["page", f"run={tmp_path / 'one'},{tmp_path / 'two'}", "--to", str(tmp_path / "page")])
    assert f"; commit aaaaaaa and bbbbbbb, {HEADER['date']}.\n" in (tmp_path / "page.md").read_text()
    rows = json.loads((tmp_path / "page.json").read_text())
    assert {row["commit"] for row in rows} == {"aaaaaaa and bbbbbbb"}


def test_parts_of_a_run_make_one_table(tmp_path):
    for name, places in (("whole", ("end", "start")), ("one", ("end",)), ("two", ("start",))):
        write_run(tmp_path / name, places)
    write_run(tmp_path / "more", ("start",), HEADER | {"methods": {"full": {}, "streaming": {}}})
    commands.main(["page", f"run={tmp_path / 'whole'}", "--to", str(tmp_path / "a")])
    commands.main(["page", f"run={tmp_path / 'one'},{tmp_path / 'two'},{tmp_path / 'one'}", "--to", str(tmp_path / "b")])
    assert (tmp_path / "a.md").read_text() == (tmp_path / "b.md").read_text()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    commands.main(["page", f"run={tmp_path / 'whole'},{tmp_path / 'more'}", "--to", str(tmp_path / "c")])
    assert "| `streaming` | 0.500 |  | 50.0 | 50.0 | -50.0 [-100.0, +0.0] |" in (tmp_path / "c.md").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"device": "e"}, "two: device is not that of run's first part"),
        ({"methods": {"full": {}, "pbs": {"top_p": 0.5}}}, "two: pbs has other options there"),
    ],
)
def test_parts_of_another_run_are_refused(tmp_path, capsys, change, message):
    write_run(tmp_path / "one", ("end",))
    write_run(tmp_path / "two", ("start",), HEADER | change)
    arguments = ["page", f"run={tmp_path / 'one'},{tmp_path / 'two'}", "--to", str(tmp_path / "page")]
    assert commands.run_main(arguments) == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
