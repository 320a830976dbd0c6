"""Charts as SVG inside a page: its style colours them, so they follow dark and light."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_LEFT, _TOP, _LINE = 170, 30, 20  # pixels: labels, room above, a row of text
_PLOT = 300  # pixels: what stands for 0 to 100 %
_HEIGHT = 200
_BEFORE = _LEFT - 8  # where labels end
_MARK = 9  # pixels: between the marks of a row
_PERCENTS = (0, 25, 50, 75, 100)
_COLOURS = 6  # in the style sheet
_DASHES = ("", "6 3", "2 3", "9 3 2 3", "12 4", "4 4")


class Score(NamedTuple):
    """A mean from 0 to 1 and the ends of its interval (None: unknown)."""

    mean: float
    ends: tuple[float, float] | None = None


Series = tuple[str, Sequence[Score | None]]
Point = tuple[float, float]


def intervals(title: str, labels: Sequence[str], series: Sequence[Series]) -> str:
    """Return a chart of scores with their intervals: a row a label, a mark for each of the series."""
    step = max(_LINE, _MARK * len(series) + 8)
    height = step * len(labels)
    parts = _upright_grid(height)
    for row, label in enumerate(labels):
        middle = _TOP + step * (row + 0.5)
        text = _text(_BEFORE, middle + 4, label, "end")
        parts.append(text)
    first = -_MARK * (len(series) - 1) / 2
    for number, (name, scores) in enumerate(series):
        marks: list[str] = []
        for row, score in enumerate(scores):
            middle = _TOP + step * (row + 0.5)
            y = middle + first + _MARK * number
            marks += _interval(score, y, name)
        group = _group(number, marks)
        parts.append(group)
    names = [name for name, _ in series]
    parts += _legend(names, height)
    return _svg(title, height, names, parts)


def over_edits(title: str, edits: Sequence[int], series: Sequence[Series]) -> str:
    """Return a chart of how scores go on with the number of edits, a line for each of the series."""
    parts = _level_grid(_HEIGHT)
    step = _PLOT / max(1, len(edits) - 1)
    below = _TOP + _HEIGHT + 16
    for place, number in enumerate(edits):
        x = _LEFT + step * place
        text = _text(x, below, f"{number:,}", "middle")
        parts.append(text)
    for number, (name, scores) in enumerate(series):
        dash = _dash(number)
        marks = _line_of(scores, step, name, dash)
        group = _group(number, marks)
        parts.append(group)
    names = [name for name, _ in series]
    parts += _legend(names, _HEIGHT)
    return _svg(title, _HEIGHT, names, parts)


def _interval(score: Score | None, y: float, name: str) -> list[str]:
    """Return the mark of a score in a row of a chart, and the line of its interval."""
    if score is None:
        return []
    marks = []
    if score.ends is not None:
        low, high = (_LEFT + _PLOT * end for end in score.ends)
        start = low, y
        end = high, y
        line = _line("s", start, end)
        marks.append(line)
    x = _LEFT + _PLOT * score.mean
    dot = _dot(x, y, _said(name, score))
    marks.append(dot)
    return marks


def _line_of(
    scores: Sequence[Score | None], step: float, name: str, dash: str
) -> list[str]:
    """Return scores that are `step` apart as a line, and a mark each."""
    dots = []
    path = ""
    for place, score in enumerate(scores):
        if score is None:
            continue
        x = _LEFT + step * place
        y = _TOP + _HEIGHT * (1 - score.mean)
        path += f"{x:.1f},{y:.1f} "
        dot = _dot(x, y, _said(name, score))
        dots.append(dot)
    points = path.rstrip()
    return [
        f'<polyline class="s" stroke-dasharray="{dash}" points="{points}"/>',
        *dots,
    ]


def _upright_grid(height: float) -> list[str]:
    """Return upright lines at 0, 25, ... 100 % with their labels."""
    parts = []
    for percent in _PERCENTS:
        x = _LEFT + _PLOT * percent / 100
        bottom = _TOP + height
        line = _line("grid", (x, _TOP), (x, bottom))
        parts.append(line)
        label = _text(x, bottom + 14, str(percent), "middle")
        parts.append(label)
    return parts


def _level_grid(height: float) -> list[str]:
    """Return level lines at 0, 25, ... 100 % with their labels."""
    parts = []
    for percent in _PERCENTS:
        y = _TOP + height * (1 - percent / 100)
        right = _LEFT + _PLOT
        line = _line("grid", (_LEFT, y), (right, y))
        parts.append(line)
        label = _text(_BEFORE, y + 4, str(percent), "end")
        parts.append(label)
    return parts


def _legend(names: Sequence[str], height: float) -> list[str]:
    """Return a line of each of the series and its name, where there are several."""
    if len(names) < 2:
        return []
    parts = []
    top = _TOP + height + 2 * _LINE + 4
    for number, name in enumerate(names):
        y = top + _LINE * number
        dash = _dash(number)
        mark = _line("s", (_LEFT, y), (_LEFT + 30, y), dash)
        group = _group(number, [mark])
        parts.append(group)
        label = _text(_LEFT + 38, y + 4, name)
        parts.append(label)
    return parts


def _dash(number: int) -> str:
    return _DASHES[number % len(_DASHES)]


def _said(name: str, score: Score) -> str:
    percent = 100 * score.mean
    return f"{name}: {percent:.1f}"


# -- elements -------------------------------------------------------------------------------------------------------


def _group(number: int, parts: Sequence[str]) -> str:
    colour = number % _COLOURS
    start = f'<g class="s{colour}">'
    inner = "".join(parts)
    end = "</g>"
    return start + inner + end


def _line(look: str, start: Point, end: Point, dash: str = "") -> str:
    x1, y1 = start
    x2, y2 = end
    first = f'x1="{x1:.1f}" y1="{y1:.1f}"'
    second = f'x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{look}" stroke-dasharray="{dash}" {first} {second}/>'


def _dot(x: float, y: float, said: str) -> str:
    title = escape(said)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{title}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    shown = escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>'


def _svg(title: str, height: float, names: Sequence[str], parts: Sequence[str]) -> str:
    """Return the whole chart, below its title, with room for its legend."""
    rows = 2
    if len(names) > 1:
        rows += len(names)
    width = _LEFT + _PLOT + 30
    high = round(_TOP + height + rows * _LINE)
    name = escape(title)
    heading = _text(0, 14, title)
    inner = "".join(parts)
    box = f'viewBox="0 0 {width} {high}"'
    size = f'{box} width="{width}" height="{high}"'
    return f'<svg role="img" aria-label="{name}" {size}>{heading}{inner}</svg>'
