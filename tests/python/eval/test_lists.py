"""python -m pbsattn_eval bench lists, on stand-ins for public code: the definition of mean-pool, and wrong ones."""

import json
import subprocess

import pytest
import torch

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval.bench import commands, lists, public_code

# Functions of the names and arguments that the adapter calls, on the device that public code names.
STAND_IN = """
import no_such_module

def block_pooled_attn(q, k, size, mask):
    mean = lambda x: x.unflatten(2, (-1, size)).mean(3)
    scores = mean(q) @ mean(k).transpose(2, 3) / math.sqrt(q.shape[3])
    return scores.to("cuda").masked_fill(~mask, -torch.inf).softmax(-1, torch.float32)

@no_such_module.decorator
def select_blocks(scores, share):
    value, place = scores.sort(-1, descending=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, place, value.cumsum(-1) - value < share)
"""


@pytest.fixture
def public(tmp_path):
    path = tmp_path / "public/xinghaow99+pbs-attn/pbs_attn/src/utils.py"
    path.parent.mkdir(parents=True)
    path.write_text(STAND_IN)
    return tmp_path / "public"


def run(public, *arguments):
    options = "--method mean-pool --tokens 700 --seeds 2 --heads 2 --commit abc".split()
    return commands.main(["lists", "--public", str(public), *options, *arguments])


def test_agreement(public, tmp_path, capsys):
    made = run(public, "--json", str(tmp_path / "lists.json"))
    assert json.loads((tmp_path / "lists.json").read_text()) == made
    by_what = {each["params"]["what"]: each for each in made}
    assert set(by_what) == set(lists.COUNTS)
    for what in (lists.F32_REFERENCE, lists.F32_CPU, lists.BEYOND_TIES):
        assert by_what[what]["value"] == 1
    assert by_what[lists.F32_CPU]["params"]["decisions"] == 2 * 2 * (6 * 7 / 2)  # seeds, heads, causal pairs of 6 blocks
    assert by_what[lists.F32_CPU]["params"]["public_commit"] == "unknown"
    assert "100.000 %" in capsys.readouterr().out


def test_disagreement_fails(public, tmp_path):
    path = public / "xinghaow99+pbs-attn/pbs_attn/src/utils.py"
    path.write_text(STAND_IN.replace("< share", "< share / 2"))
    with pytest.raises(RuntimeError, match=r"fewer than 99.9% of decisions agree: mean-pool: float32, reference: \d"):
        run(public, "--json", str(tmp_path / "lists.json"))
    assert any(each["params"]["differ"] > 0 for each in json.loads((tmp_path / "lists.json").read_text()))


def test_model(public, folder, capsys):
    made = run(public, "--model", str(folder), "--text", str(folder / "text.txt"), "--layers", "1")
    of_model = [each["params"] for each in made if each["params"]["input"] == folder.name]
    assert len(of_model) == len(lists.COUNTS)
    assert of_model[0]["heads"] == 2 and of_model[0]["kv_heads"] == 1 and of_model[0]["head_dim"] == 64
    assert folder.name in capsys.readouterr().out


def test_what_is_missing_is_named(public, monkeypatch):
    with pytest.raises(ValueError, match="no such folder; docs/methods.md says what to clone"):
        run(public / "none")
    with pytest.raises(ValueError, match="streaming: no public code is known for it; there are pbs, "):
        run(public, "--method", "streaming")
    with pytest.raises(ValueError, match=r"prism: not compared: no xinghaow99\+prism in "):
        run(public, "--method", "prism")
    with pytest.raises(ValueError, match="--heads, --seeds and --layers: at least 1"):
        run(public, "--seeds", "0")
    path = public / "xinghaow99+pbs-attn/pbs_attn/src/utils.py"
    path.write_text(STAND_IN.replace("def select_blocks", "def renamed"))
    with pytest.raises(ValueError, match="has no function select_blocks; check out the commit"):
        run(public)
    (public / "FlashPrefillv2").mkdir()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
        run(public, "--method", "flashprefill")


def test_commit_of_a_checkout(tmp_path):
    def git(*command):
        return subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *command],
            check=True,
            capture_output=True,
            text=True,
        )

    assert public_code.commit_of(tmp_path / "none") is None
    git("init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    commit = public_code.commit_of(tmp_path)
    assert len(commit) == 9
    (tmp_path / "a.py").write_text("2\n")
    assert public_code.commit_of(tmp_path) == commit + "+"


def test_near_cut():
    def share(*values):
        return torch.tensor([[values]], dtype=torch.float64)

    exact = share(0.5, 0.3, 0.13, 0.07)
    assert not lists.near_cut(exact, exact, 0.9).any()  # no rounding, no ties
    # The cut is at .13, and rounding moved it by a tenth: the mass before it, .8, may be .02 more or less, which is not .9.
    moved = share(0.5, 0.3, 0.117, 0.07)
    assert lists.near_cut(moved / moved.sum(), exact, 0.9).flatten().tolist() == [False, False, True, False]
    # A neighbour within twice the rounding is a tie as well; what lies apart is not.
    close = share(0.5, 0.29, 0.11, 0.10)
    moved = share(0.5, 0.29, 0.10, 0.10)
    assert lists.near_cut(moved / moved.sum(), close, 0.85).flatten().tolist() == [False, False, True, True]
    # Rows with nothing to score have no cut.
    assert not lists.near_cut(share(*[float("nan")] * 4), share(*[float("nan")] * 4), 0.9).any()
