"""The engine llama, with a stand-in for the program; tests/app/app_test.py tests the program itself."""

import json
import stat
import sys

import pytest

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval import commands, engines, kind, llama  # noqa: E402

PROGRAM = """#!{python}
import json, sys
if "--version" in sys.argv: sys.exit(0)
value = lambda name: sys.argv[sys.argv.index(name) + 1]
ids = open(value("--prompt-file")).read().split()
assert "--token-ids" in sys.argv and "--json" in sys.argv
names = [*(value("--compare").split(",") if value("--compare") != "none" else []), value("--method")]
if len(ids) > 5000: sys.exit("pbsattn: prompt of 6000 tokens: over the context of 5000; pass less")
if "pbs:segment=3" in names: sys.exit("pbsattn: segment 3: not a multiple of 128")
positions = list(range(0, len(ids) - 1, 2))
runs = [dict(name=name, density=dict(mean=0.5), layers=[dict(density=0.25), dict(density=0.75)], first_token_seconds=1.5,
             continuation=dict(tokens=[1, 2]),
             each=dict(position=positions, nll=[float(p) for p in positions],
                       kl=[] if name == "full" else [0.5] * len(positions),
                       same_top1=[] if name == "full" else [True, False] * (len(positions) // 2)))
        for name in names]
print(json.dumps(dict(left_to_ggml="" if "auto" not in names else "sliding windows", runs=runs)))
"""


@pytest.fixture
def stand_in(folder, tmp_path, monkeypatch):
    """A model file, a tokenizer for it, and a program."""
    path = tmp_path / "program"
    path.write_text(PROGRAM.replace("{python}", sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    (tmp_path / "model.gguf").write_text("weights")
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, gguf_file: load(folder))
    return tmp_path


@pytest.fixture
def engine(stand_in):
    return llama.LlamaEngine(stand_in / "model.gguf", str(stand_in / "program"))


def parsed(*names):
    return [engines.Attention.parse(name) for name in names]


def test_scores_are_of_the_judged_tokens(engine):
    full, pbs, flash = parsed("full", "pbs:top_p=0.5", "flash")
    score = engine.scorer(list(range(1001)), 500, [pbs, flash])
    assert score(full).nll[0] == 500 and score(full).at[:2] == [0, 2] and score(full).at[-1] == 498
    assert score(full).kl == [0] * 250 and score(full).same == [1] * 250
    assert score(pbs).kl == [0.5] * 250 and score(pbs).same[:2] == [1, 0]
    assert score(pbs).layers == [0.25, 0.75] and score(pbs).density == 0.5
    with pytest.raises(kind.Unsupported, match="PyTorch's"):
        score(flash)


def test_answers(engine):
    made = engine.answers(list(range(600)), parsed("pbs", "flash"), 8)
    assert made["pbs"].tokens == [1, 2] and made["pbs"].text and made["pbs"].seconds == 1.5
    assert "PyTorch's" in str(made["flash"])
    assert "over the context" in str(engine.answers(list(range(6000)), parsed("pbs"), 8)["pbs"])
    assert "left to ggml: sliding windows" in str(engine.answers(list(range(600)), parsed("auto"), 8)["auto"])


def test_what_is_wrong_with_the_program_ends_the_run(engine, stand_in):
    with pytest.raises(RuntimeError, match="program: segment 3: not a multiple of 128"):
        engine.answers(list(range(600)), parsed("pbs:segment=3"), 8)
    with pytest.raises(ValueError, match="nowhere: can't be run; `./dev build`"):
        llama.LlamaEngine(stand_in / "model.gguf", "nowhere")
    with pytest.raises(ValueError, match="takes a GGUF file"):
        llama.LlamaEngine(stand_in, "nowhere")


def test_ppl_runs_on_it(stand_in, folder):
    out = stand_in / "run"
    assert (
        commands.main(
            [
                "ppl",
                "--model",
                str(stand_in / "model.gguf"),
                "--engine",
                "llama",
                "--program",
                str(stand_in / "program"),
                "--text",
                str(folder / "text.txt"),
                "--lengths",
                "1024",
                "--out",
                str(out),
                "--methods",
                "pbs:top_p=0.5",
            ]
        )
        == 0
    )
    full, pbs = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert pbs["metrics"]["kl"] == 0.5 and len(pbs["units"]["nll"]) == 2 and full["metrics"]["top1"] == 1
    assert json.loads((out / "run.json").read_text())["engine"] == "llama"
