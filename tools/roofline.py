#!/usr/bin/env python3
"""Draws a roofline from the records of ./dev bench gpu or cpu: operations a second over operations a byte.

    tools/roofline.py results/gpu.json results/roofline.svg
    tools/roofline.py results/cpu.json results/roofline-cpu.svg

The roof is what the same run measured of the card or of one core: products and memory. Bytes are the fewest that
must move: Q, K, V and the output once.
"""

import dataclasses
import json
import math
import pathlib
import sys
import typing

from common import Failure, run_main, write_whole

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 500, 70, 250, 30, 60
COLORS = {
    "ours": "#0b6e4f",
    "cuDNN": "#d1495b",
    "FlashAttention-2": "#8d6a9f",
    "FlexAttention": "#c98f1a",
    "FlashAttention-3": "#1b9aaa",
    "FlashAttention-4": "#2d5d9f",
    "amx_bf16": "#0b6e4f",
    "avx512_bf16": "#1b9aaa",
    "avx512_f32": "#2d5d9f",
    "avx2_f32": "#8d6a9f",
    "ggml": "#d1495b",
    "PyTorch": "#c98f1a",
}


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a drawing of one suite's records is of."""

    what: str
    unit: str
    slope_unit: str
    x_range: tuple[int, int]
    y_range: tuple[int, int]
    ticks: tuple[int, ...]
    heads: int
    kv_heads: int
    bytes_of_query: int
    bytes_of_key: int
    roofs: typing.Callable  # of the records: [(name, height), ...], and the slope
    ours: typing.Callable  # who a record of ours is, by its params


def gpu_roofs(records):
    found = {record["metric"]: record["value"] for record in records if record["case"] == "ceiling"}
    if not found.keys() >= {"product", "copy"}:
        raise Failure("no ceilings among the records; run ./dev bench gpu without --only")
    return [("bf16 product", found["product"])], found["copy"]


def cpu_roofs(records):
    found = {record["params"]["path"]: record["value"] for record in records if record["case"] == "peak"}
    if "memory" not in found or len(found) < 2:
        raise Failure("no peaks among the records; run ./dev bench cpu with the case peak")
    return [(name, value) for name, value in found.items() if name != "memory"], found["memory"]


SUITES = {
    "gpu": Suite(
        "bf16, 32 query and 8 KV heads",
        "TFLOP/s",
        "TB/s",
        (100, 200_000),
        (100, 1000),
        (100, 200, 300, 400, 500, 600, 700, 800, 1000),
        32,
        8,
        2,
        2,
        gpu_roofs,
        lambda params: "ours",
    ),
    "cpu": Suite(
        "one core, 2 query heads (float32) and 1 KV head (float16)",
        "GFLOP/s",
        "GB/s",
        (50, 5000),
        (10, 5000),
        (10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
        2,
        1,
        4,
        2,
        cpu_roofs,
        lambda params: params["path"],
    ),
}


def x_of(suite, intensity):
    low, high = map(math.log10, suite.x_range)
    return LEFT + (math.log10(intensity) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def y_of(suite, rate):
    low, high = map(math.log10, suite.y_range)
    return HEIGHT - BOTTOM - (math.log10(rate) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def operations(suite, params):
    """Of the pairs of visited blocks, half of N x N at density 1."""
    return suite.heads * both_widths(params) * params["n"] ** 2 * params.get("density", 1)


def both_widths(params):
    """Of a key and a value, or of a query and an output."""
    return params["head_dim"] + params.get("head_dim_v", params["head_dim"])


def intensity(suite, params):
    elements = suite.heads * suite.bytes_of_query + suite.kv_heads * suite.bytes_of_key
    return operations(suite, params) / (both_widths(params) * params["n"] * elements)


def points(suite, records):
    """(who, label, intensity, rate), each once, on as many threads as the roof has."""
    found = {}
    for record in records:
        params = record["params"]
        if record["case"] in ("ceiling", "peak", "stages", "lists", "threads") or params.get("threads", 1) != 1:
            continue
        label = f"{params['n'] // 1024}K" + (f" at density {params['density']}" if "density" in params else "")
        label += f" D={params['head_dim']}" if params["head_dim"] != 128 else ""
        label += f", an order per {params['order']}" if "order" in params else ""
        if record["metric"] == "rate":
            found[suite.ours(params), label] = (intensity(suite, params), record["value"])
            if record["peer"] in COLORS:
                found[record["peer"], label] = (intensity(suite, params), record["peer_value"])
        elif record["peer"] == "dense":
            seconds = record["peer_value"] / record["ratio"]
            found[suite.ours(params), label] = (intensity(suite, params), 1e-9 * operations(suite, params) / seconds)
    return [(who, label, *point) for (who, label), point in found.items()]


def text(x, y, words, anchor="start", size=12, color="#333"):
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def draw(records):
    if records[0]["suite"] not in SUITES:
        raise Failure(f'suite "{records[0]["suite"]}": no roofline is drawn of it; there are {" and ".join(SUITES)}')
    suite = SUITES[records[0]["suite"]]
    roofs, slope = suite.roofs(records)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for rate in suite.ticks:
        y = y_of(suite, rate)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(text(LEFT - 8, y + 4, rate, "end"))
    for power in range(math.ceil(math.log10(suite.x_range[0])), math.floor(math.log10(suite.x_range[1])) + 1):
        x = x_of(suite, 10**power)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
        parts.append(text(x, HEIGHT - BOTTOM + 18, f"{10**power:,}", "middle"))
    for name, roof in roofs:
        corner = max(roof / slope, suite.x_range[0])
        path = [(corner, roof), (suite.x_range[1], roof)]
        if roof == max(height for _, height in roofs) and suite.x_range[0] < roof / slope:
            path.insert(0, (suite.x_range[0], suite.x_range[0] * slope))
            parts.append(
                text(x_of(suite, corner) + 8, y_of(suite, corner * slope * 0.72), f"memory, {slope:.1f} {suite.slope_unit}")
            )
        parts.append(
            '<polyline fill="none" stroke="#333" stroke-width="2" points="'
            + " ".join(f"{x_of(suite, x):.1f},{y_of(suite, y):.1f}" for x, y in path)
            + '"/>'
        )
        parts.append(text(WIDTH - RIGHT + 6, y_of(suite, roof) + 4, f"{name}, {roof:.0f} {suite.unit}"))
    drawn = points(suite, records)
    for who, label, x, y in drawn:
        parts.append(
            f'<circle cx="{x_of(suite, x):.1f}" cy="{y_of(suite, y):.1f}" r="5" fill="{COLORS[who]}" '
            f'fill-opacity="0.8"><title>{who}, {label}: {y:.0f} {suite.unit}</title></circle>'
        )
        if who == "ours":
            parts.append(text(x_of(suite, x), y_of(suite, y) - 9, label, "middle", 10, COLORS[who]))
    named = [who for who in COLORS if any(point[0] == who for point in drawn)]
    for i, who in enumerate(named):  # from below, where no roof is
        y = HEIGHT - BOTTOM - 22 * (len(named) - i)
        parts.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{y}" r="5" fill="{COLORS[who]}"/>')
        parts.append(text(WIDTH - RIGHT + 26, y + 4, who))
    first = records[0]
    parts.append(text(LEFT, 18, f"{first['device']}, {suite.what}, commit {first['commit']}, {first['date']}"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "operations a byte (Q, K, V and output once)", "middle"))
    parts.append(
        f'<text transform="translate(18 {HEIGHT / 2:.0f}) rotate(-90)" font-size="12" text-anchor="middle" '
        f'fill="#333">{suite.unit} of visited blocks</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main():
    if len(sys.argv) != 3:
        raise Failure("takes two arguments: the JSON that ./dev bench gpu or cpu wrote, and the SVG to write")
    write_whole(sys.argv[2], draw(json.loads(pathlib.Path(sys.argv[1]).read_text())))
    return 0


if __name__ == "__main__":
    run_main(main)
