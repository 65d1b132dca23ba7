"""Figures as SVG text. They are WIDTH units wide, about as many pixels, so that their words stay readable on a phone;
colours are the page's (page.html), so that they follow its light or dark."""

import base64
import html
import math
import struct
import zlib

import numpy as np

WIDTH = 360
_LETTER = 6.3  # width of a letter of 11 units, about
MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-4,-4H4V4H-4z",
    "M0,-5L5,4H-5z",
    "M0,5L5,-4H-5z",
    "M0,-5L5,0L0,5L-5,0z",
    "M-5,-2H-2V-5H2V-2H5V2H2V5H-2V2H-5z",
)
COLOURS = 8  # --c0 .. of the page's style


def _text(x, y, words, anchor="start", kind="label"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(str(words))}</text>'


def _svg(height, title, parts):
    """`title` is what a screen reader says of the figure; the numbers are in the table that goes with it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}">' + "".join(parts) + "</svg>"
    )


def _step(count, room, least):
    """Every how many of `count` labels are written where each has `room` and needs `least`."""
    return max(1, math.ceil(least / room)) if count else 1


def heat_map(title, rows, columns, values, show, most=1.0, row_name="", column_name="", labels_above=False):
    """A cell for each of values[row][column], the stronger the nearer to `most`; None is an empty cell. Labels of rows stand
    left of them, or above where they are long."""
    left = 4 if labels_above else 10 + _LETTER * max(map(len, map(str, rows)), default=0) + (14 if row_name else 0)
    wide = (WIDTH - left - 4) / max(len(columns), 1)
    high = min(max(wide, 11), 26) if not labels_above else 12
    pitch = high + (17 if labels_above else 1)
    top = 6
    parts = []
    for r, row in enumerate(rows):
        y = top + r * pitch + (14 if labels_above else 0)
        if labels_above:
            parts.append(_text(left, y - 4, row))
        elif r % _step(len(rows), pitch, 11) == 0:
            parts.append(_text(left - 5, y + high / 2 + 4, row, "end"))
        for c, column in enumerate(columns):
            value = values[r][c]
            share = None if value is None else min(max(value / most, 0), 1)
            words = "nothing measured" if value is None else show(value)
            style = 'class="none"' if share is None else f'class="heat" fill-opacity="{0.06 + 0.94 * share:.2f}"'
            x = left + c * wide
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(wide - 1, wide * 0.8):.1f}" height="{high:.1f}" {style}>'
                f"<title>{html.escape(f'{row_name} {row}, {column_name} {column}: {words}'.strip())}</title></rect>"
            )
            if share is not None and wide > _LETTER * len(words) + 4 and not labels_above:
                parts.append(
                    _text(x + (wide - 1) / 2, y + high / 2 + 4, words, "middle", "label on" if share > 0.5 else "label")
                )
    bottom = top + len(rows) * pitch + 10
    widest = _LETTER * max(map(len, map(str, columns)), default=1) + 6
    for c in range(0, len(columns), _step(len(columns), wide, widest)):
        parts.append(_text(left + (c + 0.5) * wide, bottom, columns[c], "middle", "tick"))
    if column_name:
        bottom += 15
        parts.append(_text((left + WIDTH) / 2, bottom, column_name, "middle", "axis"))
    if row_name and not labels_above:
        middle = top + len(rows) * pitch / 2
        parts.append(
            f'<text transform="translate(11,{middle:.0f}) rotate(-90)" text-anchor="middle" class="axis">'
            f"{html.escape(row_name)}</text>"
        )
    return _svg(bottom + 6, title, parts)


def bars(title, rows):
    """A bar for each (label, value, words), its label above it."""
    most = max((value for _, value, _ in rows), default=1) or 1
    parts = []
    for i, (label, value, words) in enumerate(rows):
        y = 14 + i * 32
        length = max(value / most * (WIDTH - 8 - _LETTER * len(words)), 1)
        parts += [
            _text(2, y, label),
            f'<rect x="2" y="{y + 4}" width="{length:.1f}" height="11" class="bar"></rect>',
            _text(length + 7, y + 14, words),
        ]
    return _svg(14 + len(rows) * 32, title, parts)


def _identity(value):
    return value


def _nice(low, high):
    """Round numbers between two, four to seven of them."""
    raw = (high - low or abs(high) or 1) / 5
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def symlog(value, linear=0.02):
    """Logarithmic on both sides of 0, linear near it."""
    return math.copysign(math.log10(1 + abs(value) / linear), value)


SYMLOG_TICKS = (-1, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
DENSITY_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)


def lines(title, series, y_name, x_name="density", scale=_identity, ticks=None):
    """A line for each (name, [(x, y, error or None), ...]) of series, in their order; x is on a logarithmic scale."""
    points = [(x, y, error or 0) for _, line in series for x, y, error in line]
    left, top, right, bottom = 46, 20, WIDTH - 8, 230
    x_low, x_high = math.log(min(x for x, _, _ in points) / 1.15), math.log(max(x for x, _, _ in points) * 1.15)
    y_low, y_high = min(scale(y - e) for _, y, e in points), max(scale(y + e) for _, y, e in points)
    margin = (y_high - y_low or abs(y_high) or 1) * 0.06
    y_low, y_high = y_low - margin, y_high + margin

    def at_x(x):
        return left + (math.log(x) - x_low) / (x_high - x_low) * (right - left)

    def at_y(y):
        return bottom - (scale(y) - y_low) / (y_high - y_low) * (bottom - top)

    parts = [_text(2, 11, y_name, kind="axis")]
    for tick in ticks or _nice(y_low, y_high):
        if y_low <= scale(tick) <= y_high:
            parts += [
                f'<path d="M{left},{at_y(tick):.1f}H{right}" class="{"zero" if tick == 0 else "grid"}"/>',
                _text(left - 5, at_y(tick) + 4, f"{tick:g}", "end", "tick"),
            ]
    for tick in DENSITY_TICKS:
        if x_low <= math.log(tick) <= x_high:
            parts += [
                f'<path d="M{at_x(tick):.1f},{top}V{bottom}" class="grid"/>',
                _text(at_x(tick), bottom + 14, f"{tick:g}", "middle", "tick"),
            ]
    parts.append(_text((left + right) / 2, bottom + 29, x_name, "middle", "axis"))
    for i, (name, line) in enumerate(series):
        line = sorted(line)
        colour = f"c{i % COLOURS}"
        way = "L".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y, _ in line)
        parts.append(f'<path d="M{way}" class="line {colour}{" dashed" if i >= COLOURS else ""}"/>')
        for x, y, error in line:
            if error:
                parts.append(f'<path d="M{at_x(x):.1f},{at_y(y - error):.1f}V{at_y(y + error):.1f}" class="line {colour}"/>')
            words = f"{name}: {x_name} {x:.3f}, {y_name} {y:.4g}"
            parts.append(
                f'<path d="{MARKS[i % len(MARKS)]}" transform="translate({at_x(x):.1f},{at_y(y):.1f})" '
                f'class="mark {colour}"><title>{html.escape(words)}</title></path>'
            )
    return _svg(bottom + 36, title, parts) + _legend([name for name, _ in series])


def _legend(names):
    keys = "".join(
        '<li><svg viewBox="-6 -6 12 12" aria-hidden="true">'
        f'<path d="{MARKS[i % len(MARKS)]}" class="mark c{i % COLOURS}"/></svg>{html.escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{keys}</ul>'


_LEVELS = 16  # of a mask's mass
KEPT, DROPPED = (37, 99, 235), (232, 113, 20)  # read on white and on black


def mask(title, kept, mass):
    """Rows x blocks: kept ones in one colour, the others that a row could see in another, the stronger the more of the row's
    attention they hold. `kept` [rows, blocks], bool; `mass`, 0 to 1 each."""
    rows, blocks = kept.shape
    level = 1 + np.rint(np.clip(mass, 0, 1) * (_LEVELS - 1)).astype(np.uint8)
    pixels = np.where(kept, level, level + _LEVELS)
    pixels[np.arange(blocks)[None, :] > np.arange(rows)[:, None] + blocks - rows] = 0  # what causality hides

    def alpha(weakest):
        return [round(255 * (weakest + (1 - weakest) * i / (_LEVELS - 1))) for i in range(_LEVELS)]

    palette = [(0, 0, 0, 0), *((*KEPT, a) for a in alpha(0.35)), *((*DROPPED, a) for a in alpha(0.06))]
    data = base64.b64encode(_png(pixels.astype(np.uint8), palette)).decode("ascii")
    side = WIDTH - 34
    parts = [
        f'<rect x="20" y="2" width="{side}" height="{side}" class="frame"/>',
        f'<image x="20" y="2" width="{side}" height="{side}" preserveAspectRatio="none" class="pixels" '
        f'href="data:image/png;base64,{data}"/>',
        _text(20 + side / 2, side + 17, "blocks of keys", "middle", "axis"),
        f'<text transform="translate(13,{side / 2:.0f}) rotate(-90)" text-anchor="middle" class="axis">'
        "rows of queries</text>",
    ]
    return _svg(side + 24, title, parts)


def _png(pixels, palette):
    """An image of palette indices."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = pixels.shape
    raw = np.concatenate([np.zeros((rows, 1), np.uint8), pixels], axis=1).tobytes()  # each row begins with its filter: none
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", bytes(x for colour in palette for x in colour[:3])),
            chunk(b"tRNS", bytes(colour[3] for colour in palette)),
            chunk(b"IDAT", zlib.compress(raw, 9)),
            chunk(b"IEND", b""),
        ]
    )
