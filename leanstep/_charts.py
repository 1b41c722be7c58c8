"""Line charts as inline SVG, without scripts, fonts or other files.

Curves have the classes ``c0`` to ``c7``. The page defines their colours, the CSS variables ``--c0`` to ``--c7``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

# (light, dark): they differ in lightness as well as in hue, for colour blindness and grey print
PALETTE = (
    ("#2457d6", "#7aa8ff"),
    ("#d9660b", "#ffab5c"),
    ("#0b8a6a", "#4fd6b0"),
    ("#b3246f", "#ff8fc4"),
    ("#6b46c8", "#b79cff"),
    ("#7a6a00", "#e0cd4d"),
    ("#0a7f9c", "#5fd0ee"),
    ("#8a4b2d", "#d9a083"),
)

STYLE = """
figure{margin:0;padding:14px 14px 8px;background:var(--card);border:1px solid var(--line);border-radius:10px}
figure{break-inside:avoid}
figure h3{margin:0 0 2px;font-size:14px;font-weight:600}
figure.wide{grid-column:1/-1}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.5px;color:var(--muted);min-height:18px}
.legend b{font-weight:600;color:var(--text);font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:16px;height:0;border-top:2.5px solid;margin-right:6px;vertical-align:3px}
.legend i.dash{border-top-style:dashed}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--muted)}
svg .grid{stroke:var(--line);stroke-width:1}
svg .axis{stroke:var(--axis);stroke-width:1}
svg .mark{stroke:var(--axis);stroke-width:1;stroke-dasharray:2 3}
path{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
path.faint{stroke-width:1;opacity:.35}
path.dash{stroke-dasharray:6 4}
circle{stroke:var(--card);stroke-width:1}
""" + "".join(
    f"path.c{i}{{stroke:var(--c{i})}}circle.c{i}{{fill:var(--c{i})}}.legend i.c{i}{{border-color:var(--c{i})}}\n"
    for i in range(len(PALETTE))
)

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 40


@dataclass(frozen=True)
class Series:
    """One curve: y over x, of equal length. A y that is None or not finite breaks the line.

    ``look`` is ``line``, ``faint`` (raw values behind their smoothed line, without a legend entry) or ``dash``;
    ``dots`` marks each point and names its values on hover.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0
    look: str = "line"
    dots: bool = False


def smooth(values: Sequence[float | None], width: int) -> list[float | None]:
    """Centred moving average over ``width`` neighbours on each side, fewer at the ends.

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


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """About ``wanted`` round numbers from ``low`` to ``high``."""
    raw = (high - low) / max(1, wanted)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next((unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999), unit * 10)
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
    """Range of the vertical axis, with a margin. Leaves out rare outliers that would flatten the other values."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 40:
        typical = ordered[math.ceil(len(ordered) * 0.98) - 1]
        if high - low > 3 * (typical - low) > 0:
            high = low + 1.2 * (typical - low)
    low, high = min([low, *marks]), max([high, *marks])
    if log:
        return low / 1.15, high * 1.15
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
    wide: bool = False,
    most_points: int = 400,
) -> str:
    """Draw curves over one pair of axes and return an HTML ``<figure>``, or "" if there is nothing to draw.

    Args:
        series: the curves; a logarithmic axis leaves out what is not positive.
        title, x_label: texts, escaped here. No two charts on a page may have the same title.
        y_format: formats a value in the legend and on hover.
        log_y: logarithmic vertical axis.
        marks: horizontal lines, each with its text.
        wide: over the whole width of the page.
        most_points: points per curve; longer curves are thinned, keeping minima and maxima.
    """
    curves = [(line, _points(line, log_y)) for line in series]
    curves = [(line, points) for line, points in curves if any(y is not None for _, y in points)]
    if not curves:
        return ""
    xs = [x for _, points in curves for x, _ in points]
    values = [y for _, points in curves for _, y in points if y is not None]
    bottom, top = _limits(values, [value for value, _ in marks], log_y)
    width, height = (940, 330) if wide else (460, 250)
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    plane = _Plane(width, height, min(xs), right, bottom, top, log_y)
    name = "clip-" + "".join(letter if letter.isalnum() else "-" for letter in title)
    inside = f'x="{_LEFT - 4}" y="{_TOP - 4}" width="{plane.edge - _LEFT + 8}" height="{plane.base - _TOP + 5}"'
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        *_axes(plane, x_label, 10 if wide else 5),
        *_marks(plane, marks),
        f'<clipPath id="{name}"><rect {inside}/></clipPath><g clip-path="url(#{name})">',
    ]
    legend = []
    for line, points in curves:
        color = f"c{line.color % len(PALETTE)}"
        parts.append(f'<path class="{color} {line.look}" d="{_path(_thin(points, most_points), plane)}"/>')
        if line.dots:
            parts += _dots(points, plane, color, line.name, y_format)
        if line.look != "faint":
            last = next(y for _, y in reversed(points) if y is not None)
            swatch = f'<i class="{color} {line.look}"></i>'
            legend.append(f"<span>{swatch}{escape(line.name)} <b>{escape(y_format(last))}</b></span>")
    wide_class = ' class="wide"' if wide else ""
    caption = f'<div class="legend">{"".join(legend)}</div>'
    return f"<figure{wide_class}><h3>{escape(title)}</h3>{caption}{''.join(parts)}</g></svg></figure>"


def _points(one: Series, log_y: bool) -> list[tuple[float, float | None]]:
    pairs = zip(one.x, one.y, strict=True)
    return [(float(x), _height(y, log_y)) for x, y in pairs if math.isfinite(x)]


def _height(y: float | None, log_y: bool) -> float | None:
    return None if y is None or not math.isfinite(y) or (log_y and y <= 0) else float(y)


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


def _axes(plane: _Plane, x_label: str, x_ticks: int) -> list[str]:
    parts, base, edge = [], plane.base, plane.edge
    ticks = _log_ticks(plane.bottom, plane.top) if plane.log_y else _ticks(plane.bottom, plane.top, 6)
    texts = [compact(tick) for tick in ticks] if plane.log_y else _tick_texts(ticks)
    for tick, text in zip(ticks, texts, strict=True):
        y = plane.py(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    ticks = _ticks(plane.left, plane.right, x_ticks)
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        x = plane.px(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{edge}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text x="{(_LEFT + edge) // 2}" y="{plane.height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _marks(plane: _Plane, marks: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for value, text in marks:
        y = plane.py(value)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{plane.edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT + 6}" y="{y - 5:.1f}">{escape(text)}</text>')
    return parts


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
    points: list[tuple[float, float | None]], plane: _Plane, color: str, name: str, y_format: Callable[[float], str]
) -> list[str]:
    usable = [(x, y) for x, y in points if y is not None]
    every = math.ceil(len(usable) / 40)
    return [
        f'<circle class="{color}" cx="{plane.px(x):.1f}" cy="{plane.py(y):.1f}" r="3">'
        f"<title>{escape(f'{name}, {compact(x)}: {y_format(y)}')}</title></circle>"
        for x, y in usable[::-1][::every][::-1]
    ]
