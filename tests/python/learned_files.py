"""Files of learned orders, written for tests."""

import json
import struct

import torch

SIZES = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 64}


def save_learned(path, weights=None, settings=None, pairs="halves", sizes=SIZES, **metadata):
    """Writes a file of weights, by default random ones, for a model of these sizes. Returns the weights."""
    shape = (sizes["layers"], sizes["kv_heads"], sizes["head_dim"] * 3 // 2)
    weights = torch.randn(shape) if weights is None else weights
    texts = {"format": "pbsattn-learned-1", "pairs": pairs, "model": "tiny", "fitted_on": "noise"}
    texts |= {name: str(size) for name, size in sizes.items()}
    texts |= {"settings": json.dumps(settings or {}), **metadata}
    tensor = {"dtype": "F32", "shape": list(weights.shape), "data_offsets": [0, weights.nbytes]}
    header = json.dumps({"__metadata__": texts, "order_weights": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + weights.numpy().tobytes())
    return weights
