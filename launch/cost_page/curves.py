"""Small line charts on logarithmic axes as one SVG file, the same bytes for the same numbers.

A page that a test compares with the code has to be made without a browser, which Plotly's images need. Must not know
what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#111827", "#6b7280")
_COLUMNS = 2
_WIDTH, _HEIGHT = 430, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 34
_LEGEND = 30


@dataclass(frozen=True)
class Panel:
    """Lines over one dimension."""

    title: str
    at: Sequence[float]
    """Positive, ascending."""
    lines: Mapping[str, Sequence[float]]
    """Name -> positive values; 0 is left out. The same names in every panel."""


def figure(panels: Sequence[Panel], unit: str) -> str:
    """All panels, with one legend above them.

    Args:
        unit: of the values.
    """
    names = list(panels[0].lines)
    width, rows = _COLUMNS * _WIDTH, -(-len(panels) // _COLUMNS)
    height = _LEGEND + rows * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="#374151"><rect width="{width}" height="{height}" fill="#ffffff"/>'
    ]
    for number, name in enumerate(names):
        left = 16 + number * (width - 32) / len(names)
        parts.append(_line([(left, 16), (left + 22, 16)], number) + _text(left + 28, 20, name))
    for number, panel in enumerate(panels):
        row, column = divmod(number, _COLUMNS)
        parts.append(f'<g transform="translate({column * _WIDTH},{_LEGEND + row * _HEIGHT})">')
        parts += [*_panel(panel, unit), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, unit: str) -> Iterator[str]:
    values = [value for line in panel.lines.values() for value in line if value > 0]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(at: float) -> float:
        return _LEFT + across * math.log(at / panel.at[0]) / math.log(panel.at[-1] / panel.at[0])

    def y(value: float) -> float:
        return _TOP + down * (1 - math.log(value / low) / math.log(high / low))

    yield _text(_LEFT, 18, panel.title, "font-weight='bold'")
    power = low
    while power <= high:
        yield f'<path d="M{_LEFT} {y(power):.1f}H{_WIDTH - _RIGHT}" stroke="#e5e7eb"/>'
        yield _text(_LEFT - 6, y(power) + 4, f"{power:g} {unit}", "text-anchor='end'")
        power *= 10
    for at in panel.at:
        yield f'<path d="M{x(at):.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#f3f4f6"/>'
        yield _text(x(at), _HEIGHT - _BOTTOM + 16, f"{at:,g}", "text-anchor='middle'")
    for number, line in enumerate(panel.lines.values()):
        points = [(x(at), y(value)) for at, value in zip(panel.at, line, strict=True) if value > 0]
        if points:
            yield _line(points, number)


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{_COLOURS[number]}" stroke-width="2"/>'


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
