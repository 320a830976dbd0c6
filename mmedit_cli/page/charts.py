"""Charts as SVG inside a page: its style colours them, so they follow dark and light."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_LEFT, _TOP, _LINE = 170, 30, 20  # pixels: labels, room above, a row of text
_PLOT = 300  # pixels: what stands for 0 to 100 %
_HEIGHT = 200
_STYLES = 6  # colours in the style sheet
_DASHES = ("", "6 3", "2 3", "9 3 2 3", "12 4", "4 4")


class Score(NamedTuple):
    """A mean from 0 to 1 and the ends of its interval (None: unknown)."""

    mean: float
    ends: tuple[float, float] | None = None


Series = tuple[str, Sequence[Score | None]]


def intervals(title: str, labels: Sequence[str], series: Sequence[Series]) -> str:
    """Return a chart of scores with their intervals: a row a label, a mark for each of the series."""
    step = max(_LINE, 9 * len(series) + 8)
    height = step * len(labels)
    parts = _grid(height, upright=True)
    for row, label in enumerate(labels):
        middle = _TOP + step * row + step / 2
        parts.append(_text(_LEFT - 8, middle + 4, label, anchor="end"))
    for number, (name, scores) in enumerate(series):
        marks = []
        for row, score in enumerate(scores):
            if score is None:
                continue
            start = _TOP + step * row + step / 2 - 4.5 * (len(series) - 1)
            marks += _interval(score, start + 9 * number, name)
        parts.append(_group(number, marks))
    parts += _legend([name for name, _ in series], _TOP + height + 2 * _LINE)
    rows = len(series) if len(series) > 1 else 0
    return _svg(title, _TOP + height + (2 + rows) * _LINE, parts)


def over_edits(title: str, edits: Sequence[int], series: Sequence[Series]) -> str:
    """Return a chart of how scores go on with the number of edits, a line for each of the series."""
    parts = _grid(_HEIGHT, upright=False)
    step = _PLOT / max(1, len(edits) - 1)
    places = [_LEFT + step * i for i in range(len(edits))]
    for place, number in zip(places, edits, strict=True):
        below = _TOP + _HEIGHT + 16
        parts.append(_text(place, below, f"{number:,}", anchor="middle"))
    for number, (name, scores) in enumerate(series):
        points = []
        for place, score in zip(places, scores, strict=True):
            if score is not None:
                points.append((place, _TOP + _HEIGHT * (1 - score.mean)))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = _DASHES[number % len(_DASHES)]
        line = f'<polyline class="s" stroke-dasharray="{dash}" points="{path}"/>'
        dots = [_dot(x, y, name) for x, y in points]
        parts.append(_group(number, [line, *dots]))
    parts += _legend([name for name, _ in series], _TOP + _HEIGHT + 2 * _LINE)
    return _svg(title, _TOP + _HEIGHT + (2 + len(series)) * _LINE, parts)


def _interval(score: Score, y: float, name: str) -> list[str]:
    marks = []
    if score.ends is not None:
        low, high = (_LEFT + _PLOT * end for end in score.ends)
        marks.append(
            f'<line class="s" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        )
    said = f"{name}: {100 * score.mean:.1f}"
    marks.append(_dot(_LEFT + _PLOT * score.mean, y, said))
    return marks


def _grid(height: float, *, upright: bool) -> list[str]:
    """Return lines at 0, 25, ... 100 % with their labels."""
    parts = []
    for percent in range(0, 101, 25):
        if upright:
            x = _LEFT + _PLOT * percent / 100
            ends = f'x1="{x}" x2="{x}" y1="{_TOP}" y2="{_TOP + height}"'
            label = _text(x, _TOP + height + 14, str(percent), anchor="middle")
        else:
            y = _TOP + height * (1 - percent / 100)
            ends = f'x1="{_LEFT}" x2="{_LEFT + _PLOT}" y1="{y}" y2="{y}"'
            label = _text(_LEFT - 8, y + 4, str(percent), anchor="end")
        parts += [f'<line class="grid" {ends}/>', label]
    return parts


def _legend(names: Sequence[str], top: float) -> list[str]:
    if len(names) < 2:
        return []
    parts = []
    for number, name in enumerate(names):
        y = top + _LINE * number + 4
        dash = _DASHES[number % len(_DASHES)]
        ends = f'x1="{_LEFT}" x2="{_LEFT + 30}" y1="{y}" y2="{y}"'
        mark = f'<line class="s" stroke-dasharray="{dash}" {ends}/>'
        parts.append(_group(number, [mark]))
        parts.append(_text(_LEFT + 38, y + 4, name))
    return parts


def _group(number: int, parts: Sequence[str]) -> str:
    return f'<g class="s{number % _STYLES}">{"".join(parts)}</g>'


def _dot(x: float, y: float, said: str) -> str:
    title = f"<title>{escape(said)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    width = _LEFT + _PLOT + 30
    name = escape(title)
    inner = "".join([_text(0, 14, title), *parts])
    size = f'viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}"'
    return f'<svg role="img" aria-label="{name}" {size}>{inner}</svg>'
