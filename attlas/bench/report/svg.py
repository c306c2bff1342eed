"""Line and scatter charts as SVG text: axes, error bars, bands, labels beside what they name.

Colours are CSS variables of the page, so that one picture serves light and dark; a mark carries what the
page shows on hover in `data-tip`. Lengths are in the picture's own units, about one pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from torch import Tensor

MARKERS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2z",
    "triangle": "M0-4.8L4.6 3.4H-4.6z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "drop": "M0 4.8L4.6-3.4H-4.6z",
    "plus": "M-1.7-4.8h3.4v3.1h3.1v3.4h-3.1v3.1h-3.4v-3.1h-3.1v-3.4h3.1z",
    "hexagon": "M-2.4-4.2h4.8L4.8 0L2.4 4.2h-4.8L-4.8 0z",
    "star": "M0-5.4L1.5-1.8L5.3-1.6L2.4 .9L3.3 4.6L0 2.6L-3.3 4.6L-2.4 .9L-5.3-1.6L-1.5-1.8z",
}
"""Outlines about the origin. The first is the baseline's."""

COLOURS = 8
"""Colours beside the baseline's, `--c1` to `--c8` in the page's style; `--c0` is the baseline's."""

DASHES = 3
"""Kinds of lines, `d0` to `d2` in the page's style."""

FONT = 12.0
ADVANCE = 0.58
"""Mean advance of a bold letter, in font sizes, on the safe side for the usual sans-serif fonts."""


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Style:
    """How one mechanism looks in every chart.

    Attributes:
        colour: 0 for the baseline, then 1 to COLOURS.
        marker: a name in MARKERS.
        dash: of the line; 0 is solid. Colours that come again are dashed.
        hollow: an outlined marker and a dashed line, for a second form of the same mechanism.
    """

    colour: int
    marker: str
    dash: int = 0
    hollow: bool = False

    @classmethod
    def number(cls, index: int) -> Style:
        """The look of the index-th mechanism after the baseline: 56 pairs of colour and marker, then again."""
        others = list(MARKERS)[1:]
        return cls(index % COLOURS + 1, others[index % len(others)], index // COLOURS % DASHES)


@dataclass(frozen=True)
class Point:
    """A value with its interval, and the text shown on hover."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Series:
    """The points of one mechanism.

    Attributes:
        name: shown beside the points, and what the page highlights and hides by.
        style: how they look.
        points: in the order in which they are joined.
        joined: draw a line through the points.
        marked: draw a marker at each point.
        band: (x, low, high) of a shaded range.
    """

    name: str
    style: Style
    points: Sequence[Point]
    joined: bool = True
    marked: bool = True
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Ring:
    """A circle around a place on a line, with a foot on the x axis."""

    name: str
    style: Style
    x: float
    y: float
    tip: str
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: what it measures.
        text: how a value of a logarithmic axis is written.
        unit: behind the values of a linear one, which all get the same decimals.
        log: logarithmic.
        ticks: where they stand; worked out where not given.
        base: 10, or 2 for bytes.
        ceiling: values above it leave the picture.
    """

    title: str
    text: Callable[[float], str] = "{:g}".format
    unit: str = ""
    log: bool = False
    base: int = 10
    ticks: Sequence[float] = ()
    ceiling: float | None = None


@dataclass
class _Scale:
    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: list[tuple[float, str]] = field(init=False)

    def __post_init__(self) -> None:
        span = abs(self.end - self.start)
        if self.axis.log:
            margin = (self.high / self.low) ** 0.05 if self.high > self.low else 1.5
            self.low, self.high = self.low / margin, self.high * margin
            ticks = list(self.axis.ticks) or _log_ticks(self.low, self.high, self.axis.base)
        else:
            margin = (self.high - self.low) * 0.06 or abs(self.high) * 0.1 or 1.0
            self.low, self.high = self.low - margin, self.high + margin
            ticks = list(self.axis.ticks) or _linear_ticks(self.low, self.high)
        inside = [tick for tick in ticks if self.low <= tick <= self.high]
        if self.axis.log:
            labels = [self.axis.text(tick) for tick in inside]
        else:
            step = min((b - a for a, b in pairwise(inside)), default=1.0)
            places = max(0, -math.floor(math.log10(step) + 1e-9))
            labels = [f"{tick:,.{places}f}{self.axis.unit}" for tick in inside]
        across = self.start < self.end
        room = max(map(_width, labels), default=0.0) + 8 if across else 26
        every = max(1, math.ceil(len(inside) * room / span))
        self.ticks = list(zip(inside, labels, strict=True))[::every]

    def __call__(self, value: float) -> float:
        if self.axis.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.axis.log)


def _linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float, base: int) -> list[float]:
    """Powers of the base, with round numbers between them where there are few."""
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    steps = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)) if base == 10 else ((1,),)
    for digits in steps:
        ticks = [digit * float(base) ** power for power in powers for digit in digits]
        if sum(low <= tick <= high for tick in ticks) >= 4:
            break
    return ticks


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    title: str,
    description: str,
    rings: Sequence[Ring] = (),
    width: int = 480,
    height: int = 330,
) -> str:
    """One chart.

    Args:
        series: what is drawn; points that a logarithmic axis cannot show (0, negative) are left out.
        x, y: the axes.
        title, description: the text alternative.
        rings: places to point out.
        width, height: the picture's own size; the page scales it.

    Returns:
        An `<svg>` element; everything that comes from data is escaped.
    """
    joined = any(each.joined for each in series)
    right = 20.0
    if joined:
        furthest = max((point.x for each in series for point in each.points), default=0.0)
        at_end = [each for each in series if each.points and each.points[-1].x == furthest]
        right = 14.0 + max((_width(each.name) for each in at_end), default=0.0)
    probe_x, probe_y = _extent(series, rings, x, y)
    top, bottom = 28.0, height - 42.0
    sy = _Scale(y, *probe_y, bottom, top)
    left = 10.0 + max((_width(label) for _, label in sy.ticks), default=0.0)
    sx = _Scale(x, *probe_x, left, width - right)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"{title}. {description}")}">',
        *_frame(sx, sy),
    ]
    for each in series:
        parts += _drawn(each, sx, sy)
    for ring in rings:
        parts += _ringed(ring, sx, sy)
    parts += _end_labels(series, sx, sy) if joined else _near_labels(series, sx, sy)
    return "".join(parts) + "</svg>"


def _extent(
    series: Sequence[Series], rings: Sequence[Ring], x: Axis, y: Axis
) -> tuple[tuple[float, float], tuple[float, float]]:
    def ends(values: Iterable[float], axis: Axis) -> tuple[float, float]:
        shown = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
        if axis.ceiling is not None:
            shown = [min(v, axis.ceiling) for v in shown]
        return (min(shown), max(shown)) if shown else (1.0, 10.0)

    points = [point for each in series for point in each.points]
    bands = [row for each in series for row in each.band]
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    heights += [v for _, low, high in bands for v in (low, high)] + [ring.y for ring in rings]
    return (
        ends([p.x for p in points] + [row[0] for row in bands] + [ring.x for ring in rings], x),
        ends(heights, y),
    )


def _frame(sx: _Scale, sy: _Scale) -> Iterable[str]:
    left, right, bottom = sx.start, sx.end, sy.start
    for tick, label in sy.ticks:
        at = sy(tick)
        yield f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>'
        yield (f'<text class="tick" x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for tick, label in sx.ticks:
        at = sx(tick)
        yield f'<path class="axis" d="M{at:.1f} {bottom:.1f}v4"/>'
        yield (f'<text class="tick" x="{at:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{escape(label)}</text>')
    yield f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>'
    yield f'<text class="name" x="0" y="11">{escape(sy.axis.title)}</text>'
    yield (f'<text class="name" x="{right:.1f}" y="{bottom + 35:.1f}" text-anchor="end">{escape(sx.axis.title)}</text>')


def _open(name: str, style: Style, kind: str) -> str:
    hollow = " hollow" if style.hollow else ""
    return f'<g class="{kind} c{style.colour} d{style.dash}{hollow}" data-name="{escape(name)}">'


def _shown(each: Series, sx: _Scale, sy: _Scale) -> list[Point]:
    return [p for p in each.points if sx.shows(p.x) and sy.shows(p.y)]


def _drawn(each: Series, sx: _Scale, sy: _Scale) -> Iterable[str]:
    points = _shown(each, sx, sy)
    yield _open(each.name, each.style, "series")
    x, y, width, height = sx.start, sy.end - 6, sx.end - sx.start + 6, sy.start - sy.end + 8
    window = f"{x:.1f} {y:.1f} {width:.1f} {height:.1f}"  # what leaves the plot is cut off
    yield f'<svg x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" viewBox="{window}">'
    band = [row for row in each.band if sx.shows(row[0]) and sy.shows(row[1]) and sy.shows(row[2])]
    if band:
        edge = [(sx(at), sy(high)) for at, _, high in band]
        edge += [(sx(at), sy(low)) for at, low, _ in reversed(band)]
        yield f'<path class="band" d="{_path(edge)}z"/>'
    if each.joined and len(points) > 1:
        line = _path([(sx(p.x), sy(p.y)) for p in points])
        yield f'<path class="line" d="{line}"/>'
    yield "</svg>"
    for p in points if each.marked else ():
        at, height = sx(p.x), sy(p.y)
        if p.low is not None and p.high is not None and sy.shows(p.low) and sy(p.low) - sy(p.high) > 1:
            yield (
                f'<path class="error" d="M{at:.1f} {sy(p.low):.1f}V{sy(p.high):.1f}'
                f'M{at - 3:.1f} {sy(p.low):.1f}h6M{at - 3:.1f} {sy(p.high):.1f}h6"/>'
            )
        yield (
            f'<use class="mark" href="#marker-{each.style.marker}" x="{at:.1f}" y="{height:.1f}" '
            f'data-tip="{escape(p.tip)}"/>'
        )
    yield "</g>"


def _ringed(ring: Ring, sx: _Scale, sy: _Scale) -> Iterable[str]:
    if not (sx.shows(ring.x) and sy.shows(ring.y)):
        return
    at, height, foot = sx(ring.x), sy(ring.y), sy.start
    dashed = " dashed" if ring.dashed else ""
    yield _open(ring.name, ring.style, "ring")
    yield f'<path class="foot{dashed}" d="M{at:.1f} {height + 7:.1f}V{foot:.1f}"/>'
    yield (f'<circle class="around{dashed}" cx="{at:.1f}" cy="{height:.1f}" r="7" data-tip="{escape(ring.tip)}"/></g>')


def _end_labels(series: Sequence[Series], sx: _Scale, sy: _Scale) -> Iterable[str]:
    """Names at the right ends of the lines, pushed apart, with a leader where one had to move.

    A line that ends early has its name before its last point.
    """
    ends: list[tuple[float, float, Series]] = []
    for each in series:
        points = _shown(each, sx, sy)
        if points:
            last = points[-1]
            ends.append((min(max(sy(last.y), sy.end), sy.start), sx(last.x), each))
    furthest = max((at for _, at, _ in ends), default=0.0)
    for height, at, each in ends:
        if at < furthest:
            before = _shown(each, sx, sy)[-2:][0]
            flat = abs(sy(before.y) - height) < FONT
            yield _label(each, at, height - 10, "end") if flat else _label(each, at - 8, height + 4, "end")
    ends = sorted((end for end in ends if end[1] == furthest), key=lambda end: end[0])
    places = _apart([end[0] for end in ends], FONT + 2.5, sy.end, sy.start)
    for (height, at, each), place in zip(ends, places, strict=True):
        edge = sx.end + 9
        if abs(place - height) > 3:
            yield _leader(each, f"M{at + 6:.1f} {height:.1f}L{edge - 2:.1f} {place:.1f}")
        yield _label(each, edge, place + 4, "start")


def _label(each: Series, x: float, y: float, anchor: str) -> str:
    return (
        f'{_open(each.name, each.style, "label")}<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(each.name)}</text></g>"
    )


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The sorted places moved as little as need be to stand `gap` apart, inside [low, high] if they fit.

    Neighbours that are too close form a block around the mean of where its members want to be.
    """
    blocks: list[tuple[float, int]] = []  # (sum of wanted first places, members)
    for place in places:
        total, count = place, 1
        while blocks:
            before, members = blocks[-1]
            first = _inside(before / members, members, gap, low, high)
            if first + members * gap <= _inside(total / count, count, gap, low, high):
                break
            blocks.pop()
            total, count = before + total - count * members * gap, members + count
        blocks.append((total, count))
    return [_inside(total / count, count, gap, low, high) + n * gap for total, count in blocks for n in range(count)]


def _inside(first: float, count: int, gap: float, low: float, high: float) -> float:
    return max(low, min(first, high - (count - 1) * gap))


def _near_labels(series: Sequence[Series], sx: _Scale, sy: _Scale) -> Iterable[str]:
    """Names beside single points, as near as they hit no other name and no mark, with a leader where that is far."""
    ends = [(each, p, sx(p.x), sy(p.y)) for each in series for p in _shown(each, sx, sy)[-1:]]
    places = [(sx(p.x), sy(p.y)) for each in series for p in _shown(each, sx, sy)]
    marks: list[Box] = [(at - 6, height - 6, at + 6, height + 6) for at, height in places]
    for _, p, at, _ in ends:
        if p.low is not None and p.high is not None and sy.shows(p.low):
            marks.append((at - 3, sy(p.high), at + 3, sy(p.low)))
    names: list[Box] = []

    def cost(place: tuple[Box, float]) -> float:
        box, far = place
        hits = 3 * sum(_overlap(box, name) for name in names) + sum(_overlap(box, mark) for mark in marks)
        return hits + _outside(box, sx, sy) + far

    for each, _, at, height in ends:
        wide, beside = _width(each.name), {}
        for side, anchor in ((1, "start"), (-1, "end")):
            left = at + 9 if side > 0 else at - 9 - wide
            for dy in (0, -11, 11, -20, 20, -32, 32, -44, 44, -56, 56, -70, 70):
                y = height + dy
                beside[side, dy, anchor] = ((left, y - 6, left + wide, y + 6), abs(dy))
        (side, dy, anchor), (box, _) = min(beside.items(), key=lambda item: cost(item[1]))
        names.append(box)
        if abs(dy) > 20:
            tip = f"{at + 8 * side:.1f} {height + dy - math.copysign(4, dy):.1f}"
            yield _leader(each, f"M{at:.1f} {height + math.copysign(6, dy):.1f}L{tip}")
        yield _label(each, at + 9 * side, height + dy + 4, anchor)


def _leader(each: Series, path: str) -> str:
    return f'<path class="leader c{each.style.colour}" data-name="{escape(each.name)}" d="{path}"/>'


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, sx: _Scale, sy: _Scale) -> float:
    """The area of a box that leaves the plot, counted tenfold."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 10 * (area - _overlap(box, (sx.start, sy.end - 8, sx.end + 8, sy.start)))


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _width(text: str) -> float:
    return ADVANCE * FONT * len(text)


def definitions() -> str:
    """The markers, once a page."""
    symbols = "".join(f'<path id="marker-{name}" d="{path}"/>' for name, path in MARKERS.items())
    return f'<svg class="definitions" aria-hidden="true"><defs>{symbols}</defs></svg>'


def marker(style: Style) -> str:
    """One marker, for legends and tables."""
    hollow = " hollow" if style.hollow else ""
    return (
        f'<svg class="swatch c{style.colour}{hollow}" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<use class="mark" href="#marker-{style.marker}"/></svg>'
    )


def matrix(share_NM: Tensor, *, title: str) -> str:
    """A picture of shares in [0, 1]: rows run down, columns across, darker is more.

    Runs of equal shade along a row become one rectangle, five shades in all.
    """
    rows, columns = share_NM.shape
    paths: dict[int, list[str]] = {}
    for n, row in enumerate(share_NM.tolist()):
        shades = [math.ceil(share * 5 - 1e-6) for share in row]
        start = 0
        for m in range(1, columns + 1):
            if m == columns or shades[m] != shades[start]:
                paths.setdefault(shades[start], []).append(f"M{start} {n}h{m - start}v1h-{m - start}z")
                start = m
    paths.pop(0, None)
    cells = "".join(
        f'<path fill-opacity="{shade / 5:g}" d="{"".join(runs)}"/>' for shade, runs in sorted(paths.items())
    )
    return (
        f'<svg class="matrix" viewBox="0 0 {columns} {rows}" role="img" aria-label="{escape(title)}" '
        f'shape-rendering="crispEdges"><rect width="{columns}" height="{rows}"/>{cells}</svg>'
    )


def forest(
    value: float,
    low: float | None,
    high: float | None,
    *,
    span: tuple[float, float],
    noise: tuple[float, float] | None,
    style: Style,
    tip: str,
) -> str:
    """One row of a forest plot: a value and its interval on a scale that all rows of a table share.

    Args:
        value, low, high: the value and its interval.
        span: the ends of the scale.
        noise: a range to shade.
        style: of the mark.
        tip: shown on hover.
    """
    width, middle = 128.0, 10.0

    def at(x: float) -> float:
        share = (x - span[0]) / ((span[1] - span[0]) or 1.0)
        return 6 + min(max(share, 0.0), 1.0) * (width - 12)

    parts = [f'<svg class="forest c{style.colour}" viewBox="0 0 {width:g} 20" aria-hidden="true">']
    if noise is not None:
        left, right = map(at, noise)
        parts.append(f'<rect class="noise" x="{left:.1f}" y="-20" width="{right - left:.1f}" height="60"/>')
    if low is not None and high is not None:
        parts.append(f'<path class="error" d="M{at(low):.1f} {middle:g}H{at(high):.1f}"/>')
    hollow = " hollow" if style.hollow else ""
    parts.append(
        f'<g class="series{hollow}"><use class="mark" href="#marker-{style.marker}" x="{at(value):.1f}" '
        f'y="{middle:g}" data-tip="{escape(tip)}"/></g></svg>'
    )
    return "".join(parts)
