"""python -m pbsattn_eval bench, on a small random model."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from conftest import RECORD_KEYS, TEXT  # noqa: E402
from pbsattn_eval import models  # noqa: E402
from pbsattn_eval.attentions import Attention  # noqa: E402
from pbsattn_eval.bench import commands, op, prefill  # noqa: E402


def run(folder, *arguments):
    given = ["--model", str(folder), "--text", str(folder / "text.txt")]
    return commands.main(["prefill", *given, *"--device cpu --dtype float32 --runs 1".split(), *arguments])


def test_prefill(folder, tmp_path, capsys):
    results = run(
        folder,
        "--lengths",
        "600,1100",
        "--attn",
        "math,pbs:top_p=1.0,pbs:top_p=0.1",
        "--json",
        str(tmp_path / "out.json"),
        "--plot",
        str(tmp_path / "out"),
    )
    for base, whole, sparse in (results[:3], results[3:]):
        assert base.density is None and base.differing is None
        assert whole.density == 1.0 and whole.differing == 0.0 and whole.layers == 2
        assert whole.perplexity == pytest.approx(base.perplexity, rel=1e-4)
        assert sparse.density < 1.0 and sparse.perplexity != base.perplexity
        assert all(0 < each.attention_seconds for each in (base, whole, sparse))
    printed = capsys.readouterr()
    assert "pbs:top_p=0.1" in printed.out and "1100" in printed.out
    assert "run 1 of 1" in printed.err

    made = json.loads((tmp_path / "out.json").read_text())
    assert all(set(each) == RECORD_KEYS and each["suite"] == "prefill" for each in made)
    ttft = [each for each in made if each["metric"] == "time to first token" and each["params"]["n"] == 1100]
    assert [each["case"] for each in ttft] == ["math", "pbs:top_p=1.0", "pbs:top_p=0.1"]
    assert ttft[0]["peer"] is None and ttft[1]["peer"] == "math"
    assert ttft[1]["ratio"] == pytest.approx(ttft[0]["value"] / ttft[1]["value"])
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "out.svg").read_text()
    commands.main(["plot", str(tmp_path / "out.json"), "--to", str(tmp_path / "again"), "--attn", "math,pbs:top_p=0.1"])
    assert "pbs:top_p=1.0" not in (tmp_path / "again.svg").read_text()


def test_a_prompt_in_chunks_beside_the_whole(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    # Rows choose by themselves, the same in chunks; the prompt's last two are dense.
    method = "two-step:threshold=0.3:threshold_tokens=0:dense_last_rows=2:min_tokens=64"
    asked = ["--attn", f"math,{method}", "--chunk", "256", "--json", str(out)]
    results = run(folder, "--lengths", "250,896", *asked)
    named = [(each.tokens, each.attention, each.chunk) for each in results]
    assert named == [
        (250, "math", None),
        (250, method, None),
        (896, "math", None),
        (896, method, None),
        (896, f"{method}:chunk=256", 256),
    ]
    whole, chunks = results[3:]
    assert whole.density < 0.9 and chunks.layers == 2
    assert chunks.density == pytest.approx(whole.density), "no chunk but the last has a dense row"
    assert chunks.perplexity == pytest.approx(whole.perplexity, rel=1e-6) and chunks.differing == whole.differing
    assert chunks.attention_seconds > 0

    ratio = chunks.ttft / whole.ttft
    head, *lines = capsys.readouterr().out.splitlines()[-6:]
    assert head.split()[-1] == "chunks/whole" and lines[-1].split()[-1] == f"{ratio:.3f}"
    assert all("chunk=256" not in line and line.rstrip().endswith("%") for line in (lines[1], lines[3]))

    made = json.loads(out.read_text())
    assert all(set(each) == RECORD_KEYS for each in made)
    [record] = [each for each in made if each["metric"] == "chunks/whole"]
    assert record["case"] == f"{method}:chunk=256" and record["value"] == pytest.approx(ratio)
    assert record["params"]["chunk"] == 256 and record["params"]["n"] == 896
    assert all("chunk" not in each["params"] for each in made if each["case"] == method)


def test_a_method_that_names_its_chunk(folder):
    """Alone, or as what --chunk would add."""
    assert [each.chunk for each in run(folder, "--lengths", "600", "--attn", "math,full:chunk=300")] == [None, 300]
    with pytest.raises(ValueError, match="names one twice"):
        run(folder, "--attn", "full,full:chunk=300", "--chunk", "300")


def test_flash_attention_3_computes_the_models_attention(folder, monkeypatch):
    """By a stand-in that takes what the package's function takes: tokens before heads, and K and V not repeated."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention
        return attended(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    package = types.ModuleType("fa3_fwd_interface")
    package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None)
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, package.__name__, package)
    base, fa3 = run(folder, "--lengths", "600", "--attn", "math,fa3")
    assert fa3.differing == 0.0 and fa3.perplexity == pytest.approx(base.perplexity, rel=1e-4) and fa3.density is None
    assert fa3.attention_seconds > 0
    q, k, v = torch.randn(1, 4, 300, 64), torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64)
    torch.testing.assert_close(Attention.parse("fa3").compute(q, k, v), Attention.parse("math").compute(q, k, v))


def test_flash_attention_3_is_refused_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)
    with pytest.raises(ValueError, match='attention "fa3": its package is missing; pip install fa3-fwd'):
        Attention.parse("fa3")
    with pytest.raises(ValueError, match="have no settings"):
        Attention.parse("fa3:top_p=0.5")


def test_op(tmp_path, capsys):
    sparse = "pbs:keep=density:density=0.3"
    made = commands.main(
        [
            "op",
            "--device",
            "cpu",
            "--lengths",
            "700,1500",
            "--head-dims",
            "64",
            "--heads",
            "2",
            "--kv-heads",
            "1",
            "--runs",
            "1",
            "--attn",
            f"sdpa,full,{sparse}",
            "--json",
            str(tmp_path / "op.json"),
            "--commit",
            "abc",
        ]
    )
    assert json.loads((tmp_path / "op.json").read_text()) == made
    assert [(each["case"], each["params"]["n"]) for each in made] == [
        (case, n) for n in (700, 1500) for case in ("sdpa", "full", sparse)
    ]
    sdpa, full, some = made[3:]
    assert sdpa["peer"] is None and full["ratio"] == pytest.approx(sdpa["value"] / full["value"])
    assert full["params"]["density"] == 1.0 and full["params"]["error"] < 1e-2
    assert some["params"]["density"] < 0.6 and some["params"]["error"] is None
    assert all(each["commit"] == "abc" and each["runs"] == 1 for each in made)
    assert "GFLOP/s" in capsys.readouterr().out


def test_op_times_nothing_that_is_wrong(monkeypatch):
    monkeypatch.setattr(op.pbsattn, "attention", lambda q, k, v, **_: (q, types.SimpleNamespace(density=1.0)))
    with pytest.raises(RuntimeError, match="full, 300 tokens: its first rows are off by"):
        commands.main(["op", "--device", "cpu", "--lengths", "300", "--attn", "sdpa,full"])


def test_overhead(device, capsys):
    made = commands.main(["overhead", "--device", device, "--tokens", "64", "--attn", "sdpa,full,pbs", "--runs", "2"])
    got = {(each["case"], each["metric"]): each["value"] for each in made}
    assert 0 < got["full", "first call"]
    assert got["pbs", "host time of the Python path"] == pytest.approx(
        got["pbs", "host time of a call"] - got["pbs", "host time in the library"]
    )
    assert 0 < got["pbs", "host time of a new plan"]
    assert ("sdpa", "host time of a call") in got and ("sdpa", "host time in the library") not in got
    assert "Python path" in capsys.readouterr().out


def test_longer_than_the_model_takes_yarn(folder):
    model, _ = models.load(folder, torch.device("cpu"), torch.float32)
    before = model.model.rotary_emb.inv_freq.clone()
    models.set_yarn(model, 4)
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    models.set_yarn(model, 1)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_perplexity_is_the_models_own(folder):
    model, tokenizer = models.load(folder, torch.device("cpu"), torch.float32)
    ids = models.tokens(tokenizer, TEXT, 700, "cpu")
    [result] = prefill.measure(model, ids, [Attention.parse("sdpa")], 1, True, lambda _: None)
    with torch.no_grad():
        assert result.perplexity == pytest.approx(float(model(ids, labels=ids).loss.exp()), rel=1e-4)


def test_shape_has_random_weights(monkeypatch, capsys):
    monkeypatch.setitem(
        models.SHAPES,
        "tiny",
        lambda: transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
        ),
    )
    [result] = commands.main(
        ["prefill", "--shape", "tiny", "--lengths", "520", "--attn", "pbs", "--runs", "1", "--device", "cpu"]
    )
    assert result.perplexity is None and result.density <= 1.0
    assert "tiny, random weights; random tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("no such attention; there are sdpa, flash", ["--attn", "flush"]),
        ("have no settings", ["--attn", "flash:top_p=1"]),
        ('"top_p" is no OPTION=VALUE', ["--attn", "pbs:top_p"]),
        (
            'attention "pbs:min_tokens=a": min_tokens "a": not a whole number of tokens; write, say, min_tokens=512',
            ["--attn", "pbs:min_tokens=a"],
        ),
        ("names one twice", ["--attn", "pbs,pbs"]),
        ("at least 2 tokens", ["--lengths", "1"]),
        ("write whole numbers above 0", ["--lengths", "8k"]),
        ("need at least 1", ["--runs", "0"]),
        ("chunk 1: 2 tokens is the least", ["--chunk", "1"]),
        ("--chunk 300: --attn math,sdpa names no method", ["--chunk", "300", "--attn", "math,sdpa"]),
        ("--chunk 600: no prompt of --lengths 300,600 has more tokens", ["--chunk", "600", "--lengths", "300,600"]),
        ("tokens, 100000 needed", ["--lengths", "100000"]),
    ],
)
def test_errors(folder, message, arguments):
    with pytest.raises(ValueError, match=message):
        run(folder, *arguments)


def test_a_model_that_is_not_there():
    with pytest.raises(ValueError, match="nowhere.gguf: no such file"):
        commands.main(["prefill", "--model", "nowhere.gguf", "--device", "cpu"])
