"""What a wheel has to do where nothing but it and PyTorch is: run by tools/wheels.py with the
wheel's kind, cpu or cuda; prints a line."""

import sys

import torch

import pbsattn

assert "site-packages" in pbsattn.__file__, pbsattn.__file__
devices = ["cpu", "cuda"] if torch.cuda.is_available() and sys.argv[1] == "cuda" else ["cpu"]
for device in devices:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(1)
    q = torch.randn(1, 4, 1500, 64, dtype=dtype, device=device)
    k, v = (torch.randn(1, 2, 1500, 64, dtype=dtype, device=device) for _ in range(2))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(pbsattn.attention(q, k, v, method="full"), dense, atol=1e-2, rtol=2e-2)
    sparse, stats = pbsattn.attention(q, k, v, method="pbs", top_p=0.5, return_stats=True)
    assert 0 < stats.density < 1 and sparse.isfinite().all(), stats
print("attention on", " and ".join(devices))
