"""NAME.pbs: a learned order and its settings, as the runtime reads it (docs/learned.md)."""

import dataclasses
import json

import safetensors
import safetensors.torch

from pbsattn.program import write_whole

FORMAT = "pbsattn-learned-1"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model, which its file names."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def weights(self):
        """Shape of the order's weights."""
        return (self.layers, self.kv_heads, 3 * self.head_dim // 2)


def write(path, sizes, pairs, weights, settings, model, fitted_on):
    """Writes the file, whole or not at all. weights: [layers, KV heads, 3 head_dim / 2]; settings: a dict."""
    weights = weights.detach().cpu().float().contiguous()
    if weights.shape != sizes.weights or not weights.isfinite().all():
        raise ValueError(f"weights {tuple(weights.shape)}: not {sizes.weights} finite numbers; fit on other texts")
    metadata = {
        "format": FORMAT,
        "pairs": pairs,
        **{name: str(value) for name, value in dataclasses.asdict(sizes).items()},
        "model": model,
        "fitted_on": fitted_on,
        "settings": json.dumps(settings),
    }
    write_whole(path, safetensors.torch.save({"order_weights": weights}, metadata))


def read(path):
    """Metadata and weights of such a file."""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), file.get_tensor("order_weights")


def write_tensors(path, tensors):
    """Writes a step's results, whole or not at all."""
    write_whole(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_tensors(path):
    return safetensors.torch.load_file(path)
