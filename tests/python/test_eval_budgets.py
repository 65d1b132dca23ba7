"""python -m pbsattn eval budgets: settings by layer and head, and what a search over patterns promises."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn.bench.attentions import Attention  # noqa: E402
from pbsattn.eval import budgets, program  # noqa: E402


def run(folder, to, *arguments):
    return program.main(["budgets", "--model", str(folder), "--text", str(folder / "text.txt"), "--device", "cpu",
                         "--lengths", "900", "--to", str(to), *arguments])


def test_settings_for_every_head_of_every_layer(folder, tmp_path, capsys):
    to = tmp_path / "settings.json"
    assert run(folder, to, "--density", "0.6") == 0
    settings = json.loads(to.read_text())
    assert settings.pop("*") == {"*": {"method": "minference"}}
    assert list(settings) == ["0", "1"] and all(list(heads) == ["0", "1"] for heads in settings.values())
    patterns = budgets.patterns(900, 0.6)
    assert all(options in [each for of_family in patterns.values() for each in of_family]
               for heads in settings.values() for options in heads.values())
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["heads", "error", "density"]
    own, alike = table[1].split(), table[-1].split()
    assert own[:5] == ["each", "head", "its", "own", "4"] and float(own[-1]) <= 0.6 and alike[:3] == ["one", "for", "all:"]


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
    captured = [(q[None], k[None], torch.randn(1, 2, tokens, width), width ** -0.5)]
    families = budgets.patterns(tokens, 0.85)
    del families["A-shape"]  # which at this density reaches as far
    costs = budgets._measure(captured, families, 0.85)
    chosen = []
    for head in range(2):
        family, place = budgets._best({pattern: of_heads[head] for pattern, of_heads in costs.items()}, 0.85)
        cost = costs[family, place][head]
        assert cost.density <= 0.85 and cost.error < 1e-4
        chosen.append(families[family][place])
        fitting = [of_heads[head] for of_heads in costs.values() if of_heads[head].density <= 0.85]
        assert any(each.error > 0.5 for each in fitting)  # as most patterns have
    assert chosen[0]["slash"] >= 128 and chosen[0]["vertical"] == 0
    assert chosen[1]["vertical"] >= 46 and chosen[1]["slash"] <= 64


def test_larger_budgets_are_denser_and_the_a_shape_fits():
    families = budgets.patterns(4000, 0.25)
    for of_family in families.values():
        sizes = [sum(value for name, value in options.items() if name in ("vertical", "slash")) for options in of_family]
        assert sizes == sorted(sizes)
    q, k, v = (torch.randn(1, 1, 4000, 32) for _ in range(3))
    (a_shape,) = families["A-shape"]
    _, density = Attention("a", "minference", a_shape).compute(q, k, v, return_stats=True)
    assert 0.2 < density.density <= 0.25


def test_where_nothing_fits_the_sparsest_is_taken():
    costs = {"a": budgets.Cost(0.1, 0.9), "b": budgets.Cost(0.5, 0.8)}
    assert budgets._best(costs, 0.25) == "b" and budgets._best(costs, 0.85) == "b" and budgets._best(costs, 0.9) == "a"


def test_bad_input(folder, tmp_path, capsys):
    to = tmp_path / "settings.json"
    for arguments, message in ((["--density", "0"], "--density 0.0: a share of blocks"),
                               (["--lengths", "9999"], "tokens, 9999 needed"),
                               (["--text", str(tmp_path / "none.txt")], "no such file")):
        assert program.run_main(["budgets", "--model", str(folder), "--text", str(folder / "text.txt"), "--device", "cpu",
                                 "--lengths", "900", "--to", str(to), *arguments]) == 1
        assert message in capsys.readouterr().err and not to.exists()
