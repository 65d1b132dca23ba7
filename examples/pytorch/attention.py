#!/usr/bin/env python3
"""Sparse attention from PyTorch: one call, dense and sparse, and a prompt that comes in chunks."""

import argparse

import torch

import pbsattn


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda on a Hopper GPU")
    given = parser.parse_args()

    torch.manual_seed(0)
    q = torch.randn(
        1, 8, given.tokens, 64, dtype=torch.bfloat16, device=given.device
    )  # [batch, query heads, tokens, head_dim]
    k = torch.randn(1, 2, given.tokens, 64, dtype=torch.bfloat16, device=given.device)  # fewer KV heads, never repeated
    v = torch.randn_like(k)
    k[:, :, ::16] += 0.5  # some keys that many queries like, as in real attention
    q += 0.5

    exact = pbsattn.attention(q, k, v, method="full")
    for options in ({"method": "pbs"}, {"method": "pbs", "top_p": 0.7}, {"method": "pbs-threshold", "threshold": 0.01}):
        out, stats = pbsattn.attention(q, k, v, return_stats=True, **options)
        error = (out - exact).float().norm() / exact.float().norm()
        print(f"{options}: density {stats.density:.3f}, {1e3 * stats.seconds:.2f} ms, relative error {error:.4f}")

    # The last half of the queries, as a chunk of a prefill behind a cache that holds the first.
    half = given.tokens // 2
    chunk = pbsattn.attention(q[:, :, half:], k, v, method="full")
    print(f"a chunk's largest difference from the whole: {(chunk - exact[:, :, half:]).abs().max():.4f}")


if __name__ == "__main__":
    main()
