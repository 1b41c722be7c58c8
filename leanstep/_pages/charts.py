"""Line charts and heat maps as inline SVG, and bar charts as SVG files, without scripts, fonts or other files.

``templates/chart.html``, ``templates/heat_map.html`` and ``templates/bars.svg`` have the markup.

Curves have the classes ``c0`` to ``c7``, whose colours ``templates/style.css`` defines.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from leanstep._pages.page import TEMPLATES, render

COLORS = 8

_LEAST = sys.float_info.min  # of a logarithmic axis
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 40
_HEAT_WIDTH = 940
_BARS_WIDTH, _BAR_HEIGHT, _NAME_LENGTH = 720, 22, 32


@dataclass(frozen=True)
class Series:
    """One curve: y over x, of equal length. A y that is None or not finite breaks the line.

    ``spread`` draws a bar of that half-length through each point; None draws none.
    ``look`` is ``line``, ``faint`` (raw values behind their smoothed line, without a legend entry) or ``dash``;
    ``dots`` marks each point and names its values on hover.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0
    look: str = "line"
    dots: bool = False
    spread: Sequence[float | None] = ()


@dataclass(frozen=True)
class Events:
    """Vertical lines at ``x``, each with its text on hover; ``name`` is their entry in the legend."""

    name: str
    x: Sequence[float]
    texts: Sequence[str]


@dataclass(frozen=True)
class Quantity:
    """One quantity of a bar chart: a value and its text for every name, at least 0."""

    title: str
    values: Sequence[float]
    texts: Sequence[str]


def smooth(values: Sequence[float | None], width: int) -> list[float | None]:
    """Compute the centred moving average over ``width`` neighbours on each side, fewer at the ends.

    Runs in linear time by running sums. Non-finite values become gaps, and so do values beyond 1e9, which would take
    digits from the sums.
    """
    known = [value if value is not None and abs(value) < 1e9 else None for value in values]  # NaN compares as false
    sums, counts = [0.0], [0]
    for value in known:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[float | None] = []
    for index, value in enumerate(known):
        reach = min(width, index, len(known) - 1 - index)
        low, high = index - reach, index + reach + 1
        result.append(None if value is None else (sums[high] - sums[low]) / (counts[high] - counts[low]))
    return result


def compact(value: float) -> str:
    """Write a number in few characters: 1250000 is 1.25M, 0.00004 is 4e-5."""
    size = abs(value)
    if not math.isfinite(value):
        return f"{value}"
    if size >= 1e4:
        for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
            if size >= unit:
                return f"{value / unit:.3g}{suffix}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _thin(points: list[tuple[float, float | None]], most: int) -> list[tuple[float, float | None]]:
    """Keep about ``most`` points: the minimum and maximum of each of ``most / 2`` intervals, and the breaks."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / max(1, most // 2))
    thinned = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        indices = {i for i, (_, y) in enumerate(stretch) if y is None and (i == 0 or stretch[i - 1][1] is not None)}
        usable = [i for i, (_, y) in enumerate(stretch) if y is not None]
        if usable:
            heights = {i: float(stretch[i][1] or 0.0) for i in usable}
            indices |= {min(usable, key=heights.__getitem__), max(usable, key=heights.__getitem__)}
        thinned += [stretch[i] for i in sorted(indices)]
    return thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]


def _ticks(low: float, high: float, wanted: int, whole: bool = False) -> list[float]:
    """Return about ``wanted`` round numbers from ``low`` to ``high``; ``whole``: without fractions."""
    raw = (high - low) / max(1, wanted)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next((unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999), unit * 10)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(ticks) >= 3:
            break
    every = math.ceil(len(ticks) / 7) if ticks else 1
    return ticks[::every]


def _limits(values: list[float], marks: list[float], log: bool) -> tuple[float, float]:
    """Return the range of the vertical axis, with a margin, without rare outliers that would flatten the curves."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 40:
        typical = ordered[math.ceil(len(ordered) * 0.98) - 1]
        if high - low > 3 * (typical - low) > 0:
            high = low + 1.2 * (typical - low)
    low, high = min([low, *marks]), max([high, *marks])
    if log:
        return low / 1.15, high * 1.15
    # a smaller range would need numbers of more than four digits beside the axis
    widening = 1e-3 * max(abs(low), abs(high)) - (high - low)
    if low < high and widening > 0:
        low, high = low - widening / 2, high + widening / 2
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = low - margin
    # the axis of a nonnegative quantity begins at 0
    return (0.0 if low >= 0 > bottom else bottom), high + margin


@dataclass(frozen=True)
class _Plane:
    """The area inside the axes: data ranges, and conversion to pixels."""

    width: int
    height: int
    left: float
    right: float
    bottom: float
    top: float
    log_y: bool

    @property
    def base(self) -> int:
        return self.height - _BOTTOM

    @property
    def edge(self) -> int:
        return self.width - _RIGHT

    def px(self, x: float) -> float:
        return _LEFT + (x - self.left) / (self.right - self.left) * (self.edge - _LEFT)

    def py(self, y: float) -> float:
        scale = math.log if self.log_y else float
        fraction = (scale(y) - scale(self.bottom)) / (scale(self.top) - scale(self.bottom))
        # clip points far outside the axes
        return self.base - max(-9.0, min(9.0, fraction)) * (self.base - _TOP)


def chart(
    series: Iterable[Series],
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str] = compact,
    log_y: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    events: Events | None = None,
    x_ticks: Sequence[tuple[float, str]] = (),
    wide: bool = False,
    most_points: int = 400,
) -> str:
    """Draw curves over one pair of axes and return an HTML ``<figure>``, or "" if there is nothing to draw.

    Args:
        series: the curves; a logarithmic axis leaves out values below the smallest normal number.
        title, x_label: texts. No two charts on a page may have the same title.
        y_format: formats a value in the legend and on hover.
        log_y: logarithmic vertical axis.
        marks: horizontal lines, each with its text.
        events: vertical lines; those beyond the curves are left out.
        x_ticks: positions and texts on the horizontal axis, also on hover; by default round numbers.
        wide: over the whole width of the page, with a second drawing for phones, of which a browser shows one.
        most_points: points per curve; longer curves are thinned, keeping minima and maxima.
    """
    lines = [(line, _points(line, log_y)) for line in series]
    lines = [(line, points) for line, points in lines if any(y is not None for _, y in points)]
    if not lines:
        return ""
    draw = partial(
        _figure, lines, title=title, x_label=x_label, y_format=y_format, log_y=log_y, marks=marks, events=events,
        x_ticks=x_ticks, most_points=most_points,
    )  # fmt: skip
    return draw(kind="wide") + draw(kind="phone") if wide else draw(kind="")


def _figure(
    lines: Sequence[tuple[Series, list[tuple[float, float | None]]]],
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str],
    log_y: bool,
    marks: Sequence[tuple[float, str]],
    events: Events | None,
    x_ticks: Sequence[tuple[float, str]],
    kind: str,
    most_points: int,
) -> str:
    """One drawing of :func:`chart`: ``wide``, its copy for a ``phone``, or "" for half of the page's width."""
    wide = kind == "wide"
    xs = [x for _, points in lines for x, _ in points]
    values = [y for _, points in lines for _, y in points if y is not None]
    bars = {id(line): _bars(line, log_y) for line, _ in lines}
    values += [end for pairs in bars.values() for _, *ends in pairs for end in ends]
    bottom, top = _limits(values, [value for value, _ in marks], log_y)
    width, height = (940, 330) if wide else (460, 250)
    # 1 is lost beside a large number
    right = max(xs) if max(xs) > min(xs) else min(xs) + max(1.0, 1e-9 * abs(min(xs)))
    plane = _Plane(width, height, min(xs), right, bottom, top, log_y)
    whole = all(x.is_integer() for x in xs)  # steps, tokens, blocks
    ticks = _ticks(plane.left, plane.right, 10 if wide else 5, whole)
    texts = dict(x_ticks) or dict(zip(ticks, _tick_texts(ticks), strict=True))
    y_ticks = _log_ticks(bottom, top) if log_y else _ticks(bottom, top, 6)
    y_texts = [compact(tick) for tick in y_ticks] if log_y else _tick_texts(y_ticks)
    curves = [
        {
            "name": line.name,
            "color": f"c{line.color % COLORS}",
            "look": line.look,
            "last": y_format(next(y for _, y in reversed(points) if y is not None)),
            "path": _path(_thin(points, most_points), plane),
            "dots": _dots(points, plane, line.name, y_format, dict(x_ticks)) if line.dots else (),
            "bars": "".join(
                f"M{plane.px(x):.1f} {plane.py(low):.1f}V{plane.py(high):.1f}" for x, low, high in bars[id(line)]
            ),
        }
        for line, points in lines
    ]
    return render(
        TEMPLATES / "chart.html",
        title=title,
        x_label=x_label,
        kind=kind,
        plane=plane,
        left=_LEFT,
        top=_TOP,
        px="{:.1f}".format,
        clip=f"clip{kind}-" + "".join(letter if letter.isalnum() else "-" for letter in title),
        x_ticks=[(plane.px(x), text) for x, text in texts.items()],
        y_ticks=list(zip(map(plane.py, y_ticks), y_texts, strict=True)),
        marks=[(plane.py(value), text) for value, text in marks],
        events_name=events.name if events else "",
        events=_inside(events, plane) if events else [],
        curves=curves,
    )


def heat_map(
    cells: Iterable[tuple[str, int, float]],
    *,
    title: str,
    x_label: str,
    text: Callable[[float], str] = compact,
    most_rows: int = 24,
    most_cells: int = 800,
) -> str:
    """Draw values over (row, column) as shades of one colour and return an HTML ``<figure>``. Each is named on hover.

    Args:
        cells: row, a name; column, a number such as a block's; and value. Rows stand in order of appearance. Values of
            one place, such as those of experts, are averaged. One that is not finite is left out.
        text: formats a value.
        most_rows, most_cells: a map with more is hard to read and takes 0.2 KB a cell: it is "", as is one with none.
    """
    places: dict[tuple[str, int], list[float]] = {}
    for row, column, value in cells:
        if math.isfinite(value):
            places.setdefault((row, column), []).append(value)
    finite = {place: fmean(values) for place, values in places.items()}
    rows, columns = list(dict.fromkeys(row for row, _ in finite)), sorted({column for _, column in finite})
    if not finite or len(rows) > most_rows or len(finite) > most_cells:
        return ""
    low, high = min(finite.values()), max(finite.values())
    left, height = 8 + 7 * min(24, max(map(len, rows))), 24
    size = (_HEAT_WIDTH - left) / len(columns)
    x_of = {column: left + index * size for index, column in enumerate(columns)}
    every = math.ceil(len(columns) / 24)
    return render(
        TEMPLATES / "heat_map.html",
        title=title,
        x_label=x_label,
        width=_HEAT_WIDTH,
        left=left,
        rows=[(row[:24], index * height) for index, row in enumerate(rows)],
        columns=[(column, x_of[column] + size / 2) for column in columns[::every]],
        size=(max(size - 1.5, 0.75 * size), height - 1.5),
        bottom=len(rows) * height,
        ends=(text(low), text(high)),
        cells=[
            (
                f"{x_of[column]:.1f}",
                rows.index(row) * height,
                f"{0.08 + 0.92 * (0.5 if text(low) == text(high) else (value - low) / (high - low)):.2f}",
                f"{row}, {x_label} {column}: {text(value)}",
            )
            for (row, column), value in finite.items()
        ],
    )


def bars(names: Sequence[str], quantities: Sequence[Quantity], *, title: str, notes: Sequence[str] = ()) -> str:
    """Draw bars of several quantities and return an SVG file, in light or dark colours as the reader's screen is.

    Args:
        names: what is compared; each has a colour. Longer ones keep their last 32 characters and are whole on hover.
        quantities: one block of bars each; the longest bar of a block fills its width.
        title: the first line.
        notes: lines below the bars.
    """
    shown = [name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}" for name in names]
    left = 24 + 7.5 * max(map(len, shown), default=0)
    widest = _BARS_WIDTH - left - 110  # room for the value's text
    blocks, y = [], 52.0
    for quantity in quantities:
        largest = max(quantity.values, default=0.0) or 1.0
        lengths = [max(1.0, widest * value / largest) for value in quantity.values]
        tops = [y + 12 + _BAR_HEIGHT * index for index in range(len(names))]
        blocks.append((quantity.title, y, list(zip(names, shown, tops, lengths, quantity.texts, strict=True))))
        y += 12 + _BAR_HEIGHT * len(names) + 28
    return render(
        TEMPLATES / "bars.svg",
        title=title,
        notes=[(y + 18 * index, text) for index, text in enumerate(notes)],
        width=_BARS_WIDTH,
        height=y + 18 * len(notes),
        left=left,
        bar=_BAR_HEIGHT - 6,
        blocks=blocks,
        colors=COLORS,
        px="{:.1f}".format,
    )


def _inside(events: Events, plane: _Plane) -> list[tuple[float, str]]:
    """Return pixel and text of the events between the ends of the horizontal axis."""
    pairs = zip(events.x, events.texts, strict=True)
    return [(plane.px(x), text) for x, text in pairs if plane.left <= x <= plane.right]


def _points(line: Series, log_y: bool) -> list[tuple[float, float | None]]:
    """Return the points with a finite x; a y that cannot be drawn is None."""

    def drawable(y: float | None) -> bool:
        return y is not None and math.isfinite(y) and (y >= _LEAST or not log_y)

    pairs = zip(line.x, line.y, strict=True)
    return [(float(x), float(y or 0.0) if drawable(y) else None) for x, y in pairs if math.isfinite(x)]


def _bars(line: Series, log_y: bool) -> list[tuple[float, float, float]]:
    """Return x, low and high end of the bars that can be drawn."""
    bars = []
    for (x, y), spread in zip(_points(line, log_y), line.spread, strict=False):
        if y is not None and spread is not None and 0 < spread < math.inf and (y - spread >= _LEAST or not log_y):
            bars.append((x, y - spread, y + spread))
    return bars


def _tick_texts(ticks: list[float]) -> list[str]:
    """Format ticks with the same number of decimals, as few as possible."""
    if not ticks or max(map(abs, ticks)) >= 1e4:
        return [compact(tick) for tick in ticks]
    for digits in range(5):
        texts = [f"{tick:.{digits}f}" for tick in ticks]
        if all(
            math.isclose(float(text), tick, rel_tol=1e-6, abs_tol=1e-9) for text, tick in zip(texts, ticks, strict=True)
        ):
            return texts
    return [compact(tick) for tick in ticks]


def _path(points: list[tuple[float, float | None]], plane: _Plane) -> str:
    stretches: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append(f"{plane.px(x):.1f} {plane.py(y):.1f}")
    # a single point needs a length, which the round line cap draws as a dot
    return "".join(f"M{'L'.join(stretch)}" + ("h.1" if len(stretch) == 1 else "") for stretch in stretches if stretch)


def _dots(
    points: list[tuple[float, float | None]],
    plane: _Plane,
    name: str,
    y_format: Callable[[float], str],
    x_texts: dict[float, str],
) -> list[tuple[float, float, str]]:
    """Return pixels and text of about 40 points, including the last one."""
    usable = [(x, y) for x, y in points if y is not None]
    every = math.ceil(len(usable) / 40)
    shown = usable[::-1][::every][::-1]
    return [(plane.px(x), plane.py(y), f"{name}, {x_texts.get(x) or compact(x)}: {y_format(y)}") for x, y in shown]
