"""Learned orders: their files, and the doors that take them."""

import pytest
import safetensors
import torch

import pbsattn
from learned_files import SIZES, save_learned


def test_a_file_says_what_is_in_it(tmp_path):
    path = tmp_path / "tiny.pbs"
    weights = save_learned(path, settings={"0": {"*": {"permutation": "none"}}}, pairs="neighbours", command="learn")
    learned = pbsattn.read_learned(path)
    assert (learned.name, learned.model, learned.fitted_on) == (str(path), "tiny", "noise")
    assert {name: getattr(learned, name) for name in SIZES} == SIZES
    assert learned.pairs == "neighbours"
    assert learned.settings == {"0": {"*": {"permutation": "none"}}}
    assert torch.equal(learned.weights, weights)
    with safetensors.safe_open(path, "pt") as file:  # what others see in it
        assert torch.equal(file.get_tensor("order_weights"), weights)


def test_pairs_are_converted_and_back(tmp_path):
    path = tmp_path / "tiny.pbs"
    weights = save_learned(path)
    learned = pbsattn.read_learned(path)
    converted = learned.in_pairs("neighbours")
    assert converted.pairs == "neighbours"
    assert torch.equal(converted.weights[..., :32], weights[..., :32])
    assert torch.equal(converted.weights[..., 32::2], weights[..., 32:64])
    assert torch.equal(converted.weights[..., 33::2], weights[..., 64:])
    assert torch.equal(converted.in_pairs("halves").weights, weights)
    assert torch.equal(learned.in_pairs("halves").weights, weights)
    with pytest.raises(ValueError, match='pairs "thirds"'):
        learned.in_pairs("thirds")


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "tiny.pbs"
    save_learned(path)
    learned = pbsattn.read_learned(path)
    learned.require_model(**SIZES)
    for name, what in zip(SIZES, ("layers", "query heads", "KV heads", "numbers in a head")):
        with pytest.raises(ValueError, match=rf"tiny.pbs: of tiny with {SIZES[name]} {what}.*the model has 6"):
            learned.require_model(**{**SIZES, name: 6})


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "tiny.pbs"
    with pytest.raises(FileNotFoundError):
        pbsattn.read_learned(path)
    with pytest.raises(IsADirectoryError):
        pbsattn.read_learned(tmp_path)
    for metadata, rule in (
        ({"format": "pbsattn-learned-9"}, 'format "pbsattn-learned-9"'),
        ({"pairs": "thirds"}, 'pairs "thirds"'),
        ({"weights": torch.full((2, 2, 96), torch.nan)}, "nan in layer 0"),
        ({"weights": torch.zeros(2, 2, 95)}, r"shape \[2,2,95\]"),
        ({"weights": torch.zeros(2, 2, 96, dtype=torch.float64)}, "data_offsets"),
    ):
        save_learned(path, **metadata)
        with pytest.raises(ValueError, match=f"tiny.pbs: .*{rule}"):
            pbsattn.read_learned(path)
    save_learned(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        pbsattn.read_learned(path)
