#!/usr/bin/env python3
"""Draws docs/roofline.svg from the records of ./dev bench gpu: operations a second over operations a byte.

    tools/roofline.py docs/results/gpu.json docs/roofline.svg

The roof is what the same run measured of the card: a large bf16 product and a large copy. Bytes are the fewest that must
move: Q, K, V and the output once.
"""

import json
import math
import pathlib
import sys

from common import Failure, run_main

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 500, 70, 250, 30, 60
X_RANGE, Y_RANGE = (100, 200_000), (100, 1000)  # FLOP a byte, TFLOP/s
COLORS = {"ours": "#0b6e4f", "cuDNN": "#d1495b", "FlashAttention-2": "#8d6a9f", "FlexAttention": "#c98f1a"}
HEADS, KV_HEADS = 32, 8


def x_of(intensity):
    low, high = map(math.log10, X_RANGE)
    return LEFT + (math.log10(intensity) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def y_of(rate):
    low, high = map(math.log10, Y_RANGE)
    return HEIGHT - BOTTOM - (math.log10(rate) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def intensity(params):
    n, head_dim = params["n"], params["head_dim"]
    operations = 2 * HEADS * head_dim * n * n * params.get("density", 1)
    return operations / (2 * head_dim * n * (2 * HEADS + 2 * KV_HEADS))


def points(records):
    """(who, label, intensity, TFLOP/s), each once."""
    found = {}
    for record in records:
        if record["metric"] != "rate":
            continue
        params = record["params"]
        label = f"{params['n'] // 1024}K" + (f" at density {params['density']}" if "density" in params else "")
        label += " D=64" if params["head_dim"] == 64 else ""
        found["ours", label] = (intensity(params), record["value"])
        if record["peer"] in COLORS:
            found[record["peer"], label] = (intensity(params), record["peer_value"])
    return [(who, label, *point) for (who, label), point in found.items()]


def text(x, y, words, anchor="start", size=12, color="#333"):
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def draw(records):
    ceiling = {record["metric"]: record["value"] for record in records if record["case"] == "ceiling"}
    if not ceiling.keys() >= {"product", "copy"}:
        raise Failure("no ceilings among the records; run ./dev bench gpu without --only")
    roof, slope = ceiling["product"], ceiling["copy"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for rate in (100, 200, 300, 400, 500, 600, 700, 800, 1000):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(rate):.1f}" y2="{y_of(rate):.1f}" stroke="#e4e4e4"/>')
        parts.append(text(LEFT - 8, y_of(rate) + 4, rate, "end"))
    for power in range(2, 6):
        parts.append(f'<line x1="{x_of(10**power):.1f}" x2="{x_of(10**power):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
        parts.append(text(x_of(10**power), HEIGHT - BOTTOM + 18, f"{10**power:,}", "middle"))
    corner = roof / slope
    path = [(X_RANGE[0], X_RANGE[0] * slope), (corner, roof), (X_RANGE[1], roof)]
    parts.append('<polyline fill="none" stroke="#333" stroke-width="2" points="'
                 + " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in path) + '"/>')
    parts.append(text(WIDTH - RIGHT + 6, y_of(roof) + 4, f"bf16 product, {roof:.0f} TFLOP/s"))
    parts.append(text(x_of(corner) + 8, y_of(corner * slope * 0.72), f"copy, {slope:.1f} TB/s"))
    drawn = points(records)
    for who, label, x, y in drawn:
        parts.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="5" fill="{COLORS[who]}" fill-opacity="0.8">'
                     f'<title>{who}, {label}: {y:.0f} TFLOP/s</title></circle>')
        if who == "ours":
            parts.append(text(x_of(x), y_of(y) - 9, label, "middle", 10, COLORS[who]))
    for i, who in enumerate(who for who in COLORS if any(point[0] == who for point in drawn)):
        y = TOP + 130 + 22 * i
        parts.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{y}" r="5" fill="{COLORS[who]}"/>')
        parts.append(text(WIDTH - RIGHT + 26, y + 4, who))
    first = records[0]
    parts.append(text(LEFT, 18, f"{first['device']}, bf16, {HEADS} query and {KV_HEADS} KV heads, commit {first['commit']}, "
                                f"{first['date']}"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "operations a byte (Q, K, V and output once)", "middle"))
    parts.append(f'<text transform="translate(18 {HEIGHT / 2:.0f}) rotate(-90)" font-size="12" text-anchor="middle" '
                 'fill="#333">TFLOP/s of visited blocks</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main():
    if len(sys.argv) != 3:
        raise Failure("takes two arguments: the JSON that ./dev bench gpu wrote, and the SVG to write")
    pathlib.Path(sys.argv[2]).write_text(draw(json.loads(pathlib.Path(sys.argv[1]).read_text())))
    return 0


if __name__ == "__main__":
    run_main(main)
