"""python -m pbsattn_eval learn, on a small random model: from texts to a file that the runtime reads."""

import argparse
import copy
import hashlib
import json
import pathlib
import random
import re
import shutil
import signal

import pytest
import torch

import pbsattn
from conftest import RECORD_KEYS, TEXT, has_gpu, python

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval import commands, engines, models, runs
from pbsattn_eval.learn import command, file, judge, keep, order

TOKENS = 2048
PARTS = (0.008, 0.006, 0.004, 0.003, 0.002)  # thresholds that are tried for less loss
ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts of three parts each."""
    path = tmp_path_factory.mktemp("texts")
    drawn = random.Random(0)
    for name in ("one", "two"):
        (path / f"{name}.txt").write_text(" ".join(drawn.choices(TEXT.split(), k=3 * TOKENS + 20)))
    return path


def arguments(folder, texts, out, *more):
    given = [
        "--model",
        str(folder),
        "--to",
        str(out / "made.pbs"),
        "--out",
        str(out / "run"),
        "--device",
        "cpu",
        "--yarn",
        "1",
    ]
    of_texts = [word for name in ("one", "two") for word in ("--text", str(texts / f"{name}.txt"))]
    return ["learn", *given, *of_texts, "--tokens", str(TOKENS), "--thresholds", "0.03125,0.25", "--commit", "c", *more]


@pytest.fixture(scope="module")
def finished(folder, texts, tmp_path_factory):
    """A finished run's folder and file, in one folder."""
    out = tmp_path_factory.mktemp("learned")
    assert commands.main(arguments(folder, texts, out, "--json", str(out / "rows.json"))) == 0
    return out


def test_the_file_is_what_the_runtime_reads(finished):
    read = pbsattn.read_learned(finished / "made.pbs")
    assert (read.layers, read.query_heads, read.kv_heads, read.head_dim, read.pairs) == (2, 2, 1, 64, "halves")
    assert read.fitted_on.startswith(f"{TOKENS} tokens of one.txt (sha256 ") and "two.txt" in read.fitted_on
    metadata, weights = file.read(finished / "made.pbs")
    assert metadata["model"] == read.model and torch.equal(weights, read.weights)
    learned = pbsattn.read_learned(finished / "run" / "learned.pbs")
    assert learned.weights.shape == (2, 1, 96) and learned.weights.any(-1).all() and learned.settings == {}


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("smollm2-135m", dict(layers=30, query_heads=9, kv_heads=3, head_dim=64)),
        ("qwen2.5-coder-1.5b", dict(layers=28, query_heads=12, kv_heads=2, head_dim=128)),
    ],
)
def test_the_files_of_the_demo_models_are_read(name, sizes):
    read = pbsattn.read_learned(ROOT / f"integrations/learned/models/{name}.pbs")
    read.require_model(**sizes)
    assert "manual-600000.txt" in read.fitted_on and "code-600000.txt" in read.fitted_on


def test_the_table_says_what_was_taken(folder, texts, finished, capsys):
    assert commands.main(arguments(folder, texts, finished)) == 0  # everything is there already
    printed = capsys.readouterr().out
    rows = json.loads((finished / "rows.json").read_text())
    assert all(RECORD_KEYS <= set(row) for row in rows)
    assert rows == json.loads((finished / "run" / "orders.json").read_text())
    for name in ("none", "last_queries", "arrival", "learned"):
        [line] = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert (name == "none") != any(row["case"] == name for row in rows)
        if line.endswith("taken"):
            read = pbsattn.read_learned(finished / "made.pbs")
            assert printed.rstrip().endswith(f"made.pbs: {name}")
            assert read.settings == command.settings_of(name, read.weights) and read.weights.any() == (name == "learned")
    assert commands.main(["table", str(finished / "run")]) == 0
    assert "learned:threshold=0.03125" in capsys.readouterr().out


def test_settings_name_what_was_taken():
    weights = torch.ones(3, 2, 6)
    assert command.settings_of("learned", weights) == {}
    weights[1] = 0
    weights[2, 0] = 0
    assert command.settings_of(judge.PAYING, weights) == {"1": {"*": {"permutation": "none"}}}
    for name in ("none", "last_queries", "arrival"):
        made = command.settings_of(name, weights * 0)
        assert made["*"]["*"]["permutation"] == name
        options = pbsattn.options("two-step:permutation=learned:order_scope=kv_head", **made["*"]["*"])
        assert options["permutation"] == name


def test_settings_name_a_part_of_the_threshold():
    weights = torch.ones(3, 2, 6)
    half = {"threshold": 0.004, "threshold_tokens": 64}
    assert command.settings_of("learned", weights, 0.5) == {"*": {"*": half}}
    weights[1] = 0
    assert command.settings_of("learned", weights, 0.5) == {"*": {"*": half}, "1": {"*": {"permutation": "none"}}}
    made = command.settings_of("arrival", weights * 0, 0.5)
    assert made == {"*": {"*": {"permutation": "arrival", "order_scope": "kv_head", **half}}}
    short, long = keep.attention("none", 0.5, 8192), keep.attention("none", 0.5, 32768)
    assert (short.name, long.name) == ("none:threshold=0.004", "none:threshold=0.004:threshold_tokens=64")
    assert pbsattn.options(short.method)["threshold_tokens"] == 0 and pbsattn.options(long.method)["threshold_tokens"] == 64


def test_a_text_may_lose_one_per_cent_with_its_error():
    def records(losses, name):
        return [
            dict(item=f"{group}-1", group=group, method=name, density=0.25, metrics={}, units={"nll": each})
            for group, each in losses.items()
        ]

    full = records({"prose": [2.0, 3.0], "code": [1.0, 1.0]}, "full")
    made = keep.changes(full + records({"prose": [2.01, 3.003], "code": [1.0, 1.0]}, "none:threshold=1"), "none:threshold=1")
    assert (made["prose"].mean, made["prose"].error) == (pytest.approx(0.0065), pytest.approx(0.0035))
    assert made["prose"].densities == (0.25,) and made["prose"].blocks == 2
    assert keep.low_enough(made)
    for prose, code in (([2.0101, 3.003], [1.0, 1.0]), ([2.0, 3.0], [1.011, 1.011])):
        assert not keep.low_enough(keep.changes(full + records({"prose": prose, "code": code}, "x"), "x"))
    with pytest.raises(ValueError, match="x: can't be measured: no"):
        keep.changes([*full, {"item": "prose-1", "method": "x", "error": "no"}], "x")


def test_thresholds_go_down_until_little_is_lost(folder, texts, finished, tmp_path, monkeypatch, capsys):
    lost = iter((False, False, True))
    monkeypatch.setattr(keep, "low_enough", lambda by_text: next(lost))
    shutil.copytree(finished / "run", tmp_path / "run")
    assert commands.main(arguments(folder, texts, tmp_path)) == 0
    assert next(lost, None) is None
    taken = re.search(r"made.pbs: (.*), at 0.5 of two-step's threshold\n$", printed := capsys.readouterr().out)[1]
    told = [line for line in printed.splitlines() if "against full attention" in line]
    assert [float(re.search(r"at ([0-9.]+) of the threshold", line)[1]) for line in told] == [1, 0.75, 0.5]
    records = list(map(json.loads, (tmp_path / "run" / "items.jsonl").read_text().splitlines()))
    densities = [
        [r["density"] for r in records if r["method"] == f"{taken}:threshold={t}" and r["item"] == "one-2048"] for t in PARTS
    ]
    assert all(len(each) == 1 for each in densities[:3]) and not any(densities[3:])
    assert densities == sorted(densities[:3]) + densities[3:]
    read = pbsattn.read_learned(tmp_path / "made.pbs")
    assert read.settings["*"]["*"]["threshold"] == 0.004 and read.settings["*"]["*"]["threshold_tokens"] == 64


KILLED = """
import os, runpy, signal

from pbsattn_eval.learn import order

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

order.costs = killed
runpy.run_module("pbsattn_eval", run_name="__main__", alter_sys=True)
"""


def test_a_killed_run_goes_on_to_the_same_file(folder, texts, finished, tmp_path, monkeypatch):
    ran = python("-c", KILLED, *arguments(folder, texts, tmp_path))
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"fit-one.safetensors", "fit-two.safetensors", "run.json"} <= left and not (tmp_path / "made.pbs").exists()
    assert not any("partial" in name or name.startswith("heads") for name in left)

    def not_again(*_):
        raise AssertionError("what is finished is fitted again")

    monkeypatch.setattr(order, "equations", not_again)
    assert commands.main(arguments(folder, texts, tmp_path)) == 0
    for name in ("made.pbs", "run/learned.pbs"):
        (metadata, weights), whole = file.read(tmp_path / name), file.read(finished / name)
        assert metadata == whole[0] and torch.equal(weights, whole[1])


def test_failures_and_losses_of_other_weights_are_measured_again(folder, texts, finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "run", tmp_path / "run")
    items = tmp_path / "run" / "items.jsonl"
    whole = {(record["item"], record["method"]): record for record in map(json.loads, items.read_text().splitlines())}
    spoilt = copy.deepcopy(whole)
    failed, other = ("one-2048", "none:threshold=0.03125"), ("two-2048", "learned:threshold=0.25")
    spoilt[failed] = {name: spoilt[failed][name] for name in ("kind", "item", "group", "method", "params")} | {"error": "e"}
    spoilt[other]["weights"] = "0" * 64
    items.write_text("".join(json.dumps(record) + "\n" for record in spoilt.values()))
    measured = []
    measure = judge.Judged.measure

    def noted(self, engine, item, attention, state):
        measured.append((item.id, attention.name))
        return measure(self, engine, item, attention, state)

    monkeypatch.setattr(judge.Judged, "measure", noted)
    assert commands.main(arguments(folder, texts, tmp_path)) == 0
    assert measured == [failed, other]
    again = list(map(json.loads, items.read_text().splitlines()))
    assert len(again) == len(whole)
    for record in again:
        expected = whole[record["item"], record["method"]]
        assert record["units"]["nll"] == pytest.approx(expected["units"]["nll"], abs=1e-4)
    sha256 = hashlib.sha256(file.read(finished / "run" / "learned.pbs")[1].numpy().tobytes()).hexdigest()
    assert [whole[key].get("weights") for key in (other, failed)] == [sha256, None]


def test_a_run_of_another_fit_is_not_gone_on_with(folder, texts, finished, monkeypatch, capsys):
    monkeypatch.setattr(order, "VERSION", 0)
    assert commands.run_main(arguments(folder, texts, finished)) == 1
    assert f"belongs to another run: fit is {json.loads((finished / 'run' / 'run.json').read_text())['fit']} there" in (
        capsys.readouterr().err
    )


def test_a_run_of_another_model_of_the_same_name_is_not_gone_on_with(folder, texts, finished, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / folder.name)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert commands.run_main(arguments(other, texts, finished)) == 1
    assert "belongs to another run: model.sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize("at", [0, (8 << 20) - 1, (20 << 20) - 1, (40 << 20) - 1])
def test_a_models_identity_is_its_header_and_samples_of_its_data(tmp_path, at):
    path = tmp_path / "model.gguf"
    with open(path, "wb") as made:
        made.truncate(40 << 20)
    before = runs._model(path)
    assert before == runs._model(path) and before["bytes"] == 40 << 20
    with open(path, "r+b") as made:
        made.seek(at)
        made.write(b"x")
    assert runs._model(path)["sha256"] != before["sha256"]


def test_heads_that_pay_are_an_order_of_their_own(folder, texts, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.setattr(order, "paying", lambda gains: torch.tensor([[False], [True]]))
    assert commands.main(arguments(folder, texts, tmp_path)) == 0
    assert f"\n{judge.PAYING}         1 " in capsys.readouterr().out
    read = pbsattn.read_learned(tmp_path / "run" / "learned-where-it-pays.pbs")
    assert not read.weights[0].any() and torch.equal(read.weights[1], file.read(finished / "run" / "learned.pbs")[1][1])
    losses = {}
    for line in (tmp_path / "run" / "items.jsonl").read_text().splitlines():
        record = json.loads(line)
        losses.setdefault(record["method"], record["metrics"]["nll"])
    assert len({losses[f"{name}:threshold=0.25"] for name in ("none", judge.PAYING, "learned")}) == 3


def test_a_file_is_an_attention_of_every_kind(folder, texts, finished, tmp_path):
    """Named with its file, it computes what it did when it was judged, and run.json says which file it was."""
    learned = finished / "run" / "learned.pbs"
    method = f"two-step:permutation=learned:order_scope=kv_head:threshold=0.25:threshold_tokens=0:learned={learned}"
    given = ["--model", str(folder), "--text", str(texts / "one.txt"), "--lengths", str(TOKENS), "--yarn", "1"]
    assert commands.main(["ppl", *given, "--methods", method, "--out", str(tmp_path), "--device", "cpu"]) == 0
    digest = json.loads((tmp_path / "run.json").read_text())["methods"][method]["learned"]
    assert digest == hashlib.sha256(learned.read_bytes()).hexdigest()[:16]
    full, sparse = (json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines())
    assert full["density"] == 1 and sparse["density"] < 0.9


@pytest.mark.parametrize("tokens, expected", [(8192, [0.008, 0.016]), (32768, [1 / 256, 1 / 128])])
def test_thresholds_are_the_methods_own(tokens, expected):
    assert command._thresholds(argparse.Namespace(tokens=tokens, thresholds=None)) == pytest.approx(expected)


def test_ctrl_c_keeps_what_is_finished(folder, texts, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(order, "equations", interrupted)
    assert commands.run_main(arguments(folder, texts, tmp_path)) == 130
    assert "interrupted; what is finished is kept in" in capsys.readouterr().err
    assert not (tmp_path / "made.pbs").exists() and not list((tmp_path / "run").glob("*.safetensors*"))


def test_bad_input(folder, texts, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text(TEXT)
    words = len(TEXT.split())
    for more, message in (
        (
            ["--text", str(short)],
            f"text {short}: {words} tokens, {3 * TOKENS} needed; pass a longer text or smaller --tokens",
        ),
        (["--text", str(tmp_path / "none.txt")], "no such file"),
        (["--tokens", "2047"], "--tokens 2047: too few to fit on; 2048 is the least"),
        (["--thresholds", "0.1"], "--thresholds 0.1: pass two shares or more"),
        (["--thresholds", "0.1,x"], "--thresholds 0.1,x: not numbers"),
        (["--thresholds", "0,0.1"], "--thresholds 0,0.1: pass two shares or more, above 0"),
        (["--thresholds", "0.1,2"], "--thresholds 0.1,2: pass two shares or more, above 0 and up to 1"),
        (["--thresholds", "nan,0.1,0.2"], "--thresholds nan,0.1,0.2: pass two shares or more, above 0 and up to 1"),
        (["--thresholds", "0.1,0.2,0.10000001"], "two are the same in six digits"),
        (["--device", "meta"], "device meta: pbsattn computes on cpu and cuda"),
        (["--device", "cuda", "--dtype", "float32"], "--dtype float32: --device cuda has products of 16 bits alone; pass"),
        (["--to", str(tmp_path / "none" / "made.pbs")], "made.pbs: its folder isn't there"),
        (["--json", str(tmp_path / "none" / "rows.json")], "rows.json: its folder isn't there"),
    ):
        assert commands.run_main(arguments(folder, texts, tmp_path, *more)) == 1
        err = capsys.readouterr().err
        assert message in err and not (tmp_path / "made.pbs").exists()
        assert "loading" not in err or "--tokens" in message


def without_device(given):
    at = given.index("--device")
    return given[:at] + given[at + 2 :]


def test_it_runs_on_the_cpu_where_there_is_no_gpu(folder, texts, finished, monkeypatch, capsys):
    """What is finished there is taken for its own. What isn't in the rows is told beside."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert commands.main(without_device(arguments(folder, texts, finished, "--json", "-"))) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((finished / "rows.json").read_text())
    assert any(said.err.rstrip().endswith(f"made.pbs: {name}") for name in judge.ORDERS)


def test_a_gpu_is_the_default_and_needs_the_backend(folder, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pbsattn._core, "has_cuda", False)
    assert commands.run_main(without_device(arguments(folder, texts, tmp_path))) == 1
    err = capsys.readouterr().err
    assert "device cuda: this build of pbsattn has no CUDA backend" in err and "loading" not in err


@pytest.mark.parametrize("more", [["--dtype", "bfloat16"], *([["--device", "cuda"]] if has_gpu() else [])], ids=" ".join)
def test_it_learns_in_bfloat16_and_on_a_gpu(folder, texts, finished, tmp_path, more):
    """The same weights, but for what rounding of keys and queries makes of them."""
    assert commands.main(arguments(folder, texts, tmp_path, *more)) == 0
    made, whole = (file.read(out / "run" / "learned.pbs")[1] for out in (tmp_path, finished))
    assert torch.nn.functional.cosine_similarity(made, whole, dim=-1).min() > 0.99
    records = list(map(json.loads, (tmp_path / "run" / "items.jsonl").read_text().splitlines()))
    assert records and not [record["error"] for record in records if "error" in record]


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("Mistral", {"sliding_window": 1024}, "layer 0 has a sliding window of 1024 tokens"),
        ("Gemma2", {"attn_logit_softcapping": 9.0, "sliding_window": 4096}, "layer 0 has soft-capped logits (softcap 9.0)"),
        ("Mistral", {"sliding_window": TOKENS}, None),
    ],
)
def test_attention_that_the_fit_does_not_know_is_refused(name, more, message):
    import transformers

    config = getattr(transformers, f"{name}Config")
    sizes = dict(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes, **heads, **more)).eval()
    engine, seen = engines.Engine(model, None), []

    def run():
        engine.each_layer([1] * TOKENS, lambda layer, *_: seen.append(layer))

    if message is None:
        run()
        assert seen == [0]
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        run()
    assert not seen


def test_sinks_are_refused_too():
    assert models.beyond_causal(TOKENS, {"s_aux": torch.zeros(2)}) == "sinks (s_aux)"
    assert models.beyond_causal(TOKENS, {"s_aux": None, "softcap": None, "sliding_window": None}) is None


def test_help_teaches():
    ran = python("-m", "pbsattn_eval", "learn", "--help")
    assert ran.returncode == 0 and ran.stderr == ""
    for words in ("the first part   to fit", "the third part   to judge", "--tokens N", "goes on where it was"):
        assert words in ran.stdout
