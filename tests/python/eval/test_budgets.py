"""python -m pbsattn_eval budgets: settings by layer and head, and what a search over patterns promises."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import pbsattn.transformers
from pbsattn_eval import budgets, commands, models


def command(folder, to, *arguments):
    given = ["--model", str(folder), "--text", str(folder / "text.txt"), "--to", str(to)]
    return ["budgets", *given, "--device", "cpu", "--lengths", "900", *arguments]


def run(folder, to, *arguments):
    return commands.main(command(folder, to, *arguments))


def test_settings_for_every_head_of_every_layer(folder, tmp_path, capsys):
    to = tmp_path / "settings.json"
    assert run(folder, to, "--density", "0.6") == 0
    settings = json.loads(to.read_text())
    assert settings.pop("*") == {"*": {"method": "minference"}}
    assert list(settings) == ["0", "1"] and all(list(heads) == ["0", "1"] for heads in settings.values())
    patterns = budgets.patterns(900, 0.6)
    assert all(
        options in [each for of_family in patterns.values() for each in of_family]
        for heads in settings.values()
        for options in heads.values()
    )
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["heads", "error", "density"]
    own, alike = table[1].split(), table[-1].split()
    assert own[:5] == ["each", "head", "its", "own", "4"] and float(own[-1]) <= 0.6 and alike[:3] == ["one", "for", "all:"]

    # The model takes the file, and computes what the table says, but for the second layer: the first one changes its inputs.
    model, tokenizer = models.load(folder, "cpu", torch.float32)
    ids = models.tokens(tokenizer, (folder / "text.txt").read_text(), 900, "cpu")
    with torch.no_grad(), pbsattn.transformers.enable(model, settings=str(to)):
        model(ids)
        densities = [layer.density for layer in pbsattn.transformers.stats(model)]
    assert sum(densities) / 2 == pytest.approx(float(own[-1]), abs=0.05)


def test_each_head_has_the_pattern_of_least_error():
    """A head that looks at distances and one that looks at some keys, at the same density."""
    torch.manual_seed(0)
    tokens, width = 1500, 64
    position = torch.arange(tokens)[:, None] * torch.exp(-torch.arange(width // 2) / 8)
    turning = torch.cat([position.cos(), position.sin()], 1)  # q . k is highest where positions are alike
    k = torch.stack([turning, torch.randn(tokens, width)])
    seen = torch.arange(tokens)
    seen[300:] -= 300  # the key that each query of the first head looks at
    q = torch.stack([turning[seen] * 12, torch.randn(tokens, width) * 0.1])
    k[1, [200, 210, 700]] = 6.0
    q[1] += 6.0
    captured = [(q[None], k[None], torch.randn(1, 2, tokens, width), width**-0.5)]
    families = budgets.patterns(tokens, 0.75)
    del families["A-shape"]  # which at this density reaches as far
    measured = budgets._measure(captured, families, 0.75)
    costs = [{pattern: of_heads[head] for pattern, of_heads in measured.items()} for head in range(2)]
    first, second = budgets.choose(costs, 0.75)
    # The first needs more than its half of the blocks, the second less.
    assert costs[0][first].density > 0.75 > costs[1][second].density
    assert costs[0][first].density + costs[1][second].density <= 2 * 0.75
    assert costs[0][first].error < 1e-4 and costs[1][second].error < 1e-4

    def options(pattern):
        return families[pattern[0]][pattern[1]]

    assert options(first)["slash"] >= 128 and options(first)["vertical"] == 0
    assert options(second)["vertical"] >= 46 and options(second)["slash"] <= 64


def test_larger_budgets_are_denser_and_the_a_shape_fits():
    families = budgets.patterns(4000, 0.25)
    for of_family in families.values():
        sizes = [sum(value for name, value in options.items() if name in ("vertical", "slash")) for options in of_family]
        assert sizes == sorted(sizes)
    q, k, v = (torch.randn(1, 1, 4000, 32) for _ in range(3))
    shapes = families["A-shape"]
    assert shapes[0]["local_blocks"] == 1 and [each["local_blocks"] for each in shapes] == sorted(
        {each["local_blocks"] for each in shapes}
    )
    _, stats = pbsattn.attention(q, k, v, method="minference", return_stats=True, **shapes[-1])
    assert 0.25 < stats.density <= budgets.TOO_DENSE * 0.25


def test_heads_share_a_budget():
    cost = budgets.Cost
    hungry = {"sparse": cost(0.9, 0.1), "dense": cost(0.1, 0.5)}
    content = {"sparse": cost(0.02, 0.1), "dense": cost(0.01, 0.5)}
    assert budgets.choose([hungry, content], 0.5) == ["dense", "dense"]
    assert budgets.choose([hungry, content], 0.3) == ["dense", "sparse"]
    assert budgets.choose([hungry, content], 0.2) == ["sparse", "sparse"]
    assert budgets.choose([hungry, content], 0.05) == ["sparse", "sparse"], "nothing fits: the sparsest"


def test_one_pattern_for_all():
    costs = {"a": budgets.Cost(0.1, 0.9), "b": budgets.Cost(0.5, 0.8)}
    assert budgets.best(costs, 0.25) == "b" and budgets.best(costs, 0.85) == "b" and budgets.best(costs, 0.9) == "a"


def test_bad_input(folder, tmp_path, capsys):
    to = tmp_path / "settings.json"
    for arguments, message in (
        (["--density", "0"], "--density 0.0: a share of blocks"),
        (["--lengths", "9999"], "tokens, 9999 needed"),
        (["--text", str(tmp_path / "none.txt")], "no such file"),
    ):
        assert commands.run_main(command(folder, to, *arguments)) == 1
        assert message in capsys.readouterr().err and not to.exists()
