"""The kind recall: what of the true attention blocks hold, and where a curve of settings crosses a density."""

import pytest
import torch

import pbsattn
from conftest import f32_tolerance

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

from pbsattn_eval import commands
from test_eval import items_of


def test_recall(folder, tmp_path, capsys):
    methods = "pbs:top_p=0.3/1.0,oracle:top_p=0.3/0.6/1.0"
    assert (
        commands.main(
            [
                "recall",
                "--model",
                str(folder),
                "--text",
                str(folder / "text.txt"),
                "--lengths",
                "900",
                "--methods",
                methods,
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
                "--layers",
                "1,",
            ]
        )
        == 0
    )
    records = {each["method"]: each for each in items_of(tmp_path)}
    for name in ("full", "pbs:top_p=1.0", "oracle:top_p=1.0"):
        metrics = records[name]["metrics"]
        assert (
            metrics["recall"] == pytest.approx(1, abs=1e-5)
            and metrics["error"] < f32_tolerance(1e-5, 1e-2)
            and records[name]["density"] == 1
        )
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
    out, trace = pbsattn.trace(q[None], k[None], v[None], top_p=0.4, method="pbs")
    mass, exact = masses.true_attention(q, k, v, 0.25)
    weights = (
        (q @ k.transpose(1, 2) * 0.25).masked_fill(torch.ones(700, 700, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    )
    torch.testing.assert_close(exact, weights @ v)
    torch.testing.assert_close(mass[:, 5], weights[:, 640:].mean(1))

    by_block = masses.block_masses(mass, trace.order[0], 256)
    for head in range(2):
        row, order = 4, trace.order[0, head].tolist()  # its own segment begins at block 4
        for block in range(6):
            keys = range(block * 128, min(block * 128 + 128, 700))
            keys = keys if block >= 4 else [order[slot] for slot in keys]
            assert float(by_block[head, row, block]) == pytest.approx(float(mass[head, row, keys].sum()), abs=1e-6)
    torch.testing.assert_close(
        masses.attend(q, k, v, 0.25, trace.kept[0], trace.order[0], 256), out[0], atol=f32_tolerance(1e-4, 2e-2), rtol=1e-3
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_p=0.5),
        dict(keep="threshold", threshold=0.15),
        dict(keep="density", density=0.6),
        dict(keep="top_k", top_k=2),
        dict(keep="relative", threshold=0.4),
        dict(top_p=0.2, sink_blocks=2, local_blocks=3, dense_last_rows=1),
    ],
)
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
    assert curves.families(
        {
            "pbs:top_p=.5:segment=512": {"keep": "top_p"},
            "pbs:top_p=.9:segment=512": {"keep": "top_p"},
            "full": {"keep": "all"},
        }
    ) == {"pbs:segment=512": ["pbs:top_p=.5:segment=512", "pbs:top_p=.9:segment=512"]}
