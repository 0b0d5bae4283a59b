"""Charts as inline SVG: small multiples of lines with confidence bands or bars, and bar charts.

Text stays text, in the font of the page. The page draws the legends, since it assigns the colours.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kontext_jax.evaluation.summary import Estimate
from kontext_jax.report.label_placement import Box, Label, Segments, leader_end, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation


STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kontext_jax",  # reproducible ids
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#999",
    "axes.labelcolor": "#555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#555",
    "ytick.color": "#555",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


class Line(NamedTuple):
    """A line of a chart, or the bars of one colour.

    Attributes:
      points: x -> value; for bars, x is the name of a group.
      colour: colour of the line, band or bars.
      dashed: whether the line is only a comparison, dashed and without a band.
      labels: x -> (label of that point, its colour).
    """

    points: Mapping[Any, Estimate]
    colour: str
    dashed: bool = False
    labels: Mapping[Any, tuple[str, str]] = {}


class Panel(NamedTuple):
    """A line chart.

    Attributes:
      title: title above the chart.
      xlabel: label of the x axis.
      lines: lines of the chart.
      percent: whether values are fractions, shown as percentages.
      log_x, log_y: whether an axis is logarithmic.
      ticks: ticks of the x axis; chosen automatically if empty.
      markers: whether points have markers.
      bars: whether lines are drawn as bars from 0, whose x are numbers.
      level: y of a dashed horizontal line, which is always in view; None for no line.
    """

    title: str
    xlabel: str
    lines: Sequence[Line]
    percent: bool = False
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] = ()
    markers: bool = True
    bars: bool = False
    level: float | None = None


def panels(items: Sequence[Panel], size: tuple[float, float] = (3.85, 2.4)) -> str:
    """Returns an ``<svg>`` element of ``size`` inches for each panel, in rows that wrap."""
    charts = (_svg(functools.partial(draw_panel, panel=panel), *size) for panel in items)
    return f"<div class=charts>{''.join(charts)}</div>"


def bars(
    groups: Mapping[str, str], lines: Sequence[Line], title: str, percent: bool = False
) -> str:
    """Returns a grouped bar chart with confidence intervals, as an ``<svg>`` element.

    Args:
      groups: label of each group, by the name that is its x in ``lines``.
      lines: the bars of each colour.
      title: title above the chart.
      percent: whether values are fractions, shown as percentages.
    """
    width = 0.8 / len(lines)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.set_title(title, parse_math=False)
        for i, line in enumerate(lines):
            known = {k: line.points[name] for k, name in enumerate(groups) if name in line.points}
            centres = [k + (i - (len(lines) - 1) / 2) * width for k in known]
            values = list(known.values())
            axes.bar(centres, [value.mean for value in values], width * 0.88, color=line.colour)
            _intervals(axes, centres, values, color="#333", linewidth=0.9)
        axes.set_xticks(range(len(groups)), list(groups.values()), parse_math=False)
        axes.tick_params(axis="x", length=0)
        _style_axes(axes, percent)
        if percent:
            axes.set_ylim(0, 1.03)

    chart = _svg(draw, min(11.5, 1.5 + len(groups) * max(0.9, 0.28 * len(lines))), 2.6)
    return f"<div class='wide bars'>{chart}</div>"


def draw_panel(figure: "Figure", panel: Panel) -> None:
    """Draws a panel in a figure of 72 dpi."""
    axes = figure.subplots()
    _draw_lines(axes, panel)
    figure.draw_without_rendering()  # lays out the axes; placing the labels depends on it
    _label_points(axes, panel)


def _draw_lines(axes: "Axes", panel: Panel) -> None:
    axes.set_title(panel.title, parse_math=False)
    axes.set_xlabel(panel.xlabel)
    for line in panel.lines:
        xs = sorted(line.points)
        values = [line.points[x] for x in xs]
        means, lows, highs = _columns(values)
        if panel.bars:
            axes.bar(xs, means, 0.8, color=line.colour)
            _intervals(axes, xs, values, color="#333", linewidth=0.9)
            continue
        dashes, marker = "--" if line.dashed else "-", "o" if panel.markers else ""
        axes.plot(xs, means, color=line.colour, linestyle=dashes, marker=marker)
        for x, (_, colour) in line.labels.items():
            axes.plot(x, line.points[x].mean, color=colour, marker="o")
        if len(xs) > 1 and not line.dashed:
            axes.fill_between(xs, lows, highs, color=line.colour, alpha=0.13, linewidth=0)
        elif not line.dashed:
            _intervals(axes, xs, values, color=line.colour, alpha=0.5)
    if panel.level is not None:
        axes.axhline(panel.level, color="#888", linestyle="--", linewidth=1)
    axes.margins(x=0.12 if any(line.labels for line in panel.lines) else 0.05)
    _style_axes(axes, panel.percent)
    if panel.log_x:
        _set_log_scale(axes.set_xscale, axes.xaxis)
    if panel.log_y:
        _set_log_scale(axes.set_yscale, axes.yaxis)
    else:
        axes.set_ylim(*_y_limits(panel))
    if panel.ticks:
        axes.set_xticks(panel.ticks, [f"{x:g}" for x in panel.ticks])
        axes.minorticks_off()
    elif not panel.log_x:
        axes.locator_params(axis="x", nbins=5)


def _y_limits(panel: Panel) -> tuple[float, float]:
    """Returns limits of the y axis that contain the level and the lines that are not dashed.

    Dashed lines do not count, because a distant baseline would flatten the others; they do count
    for percentages.
    """
    solid = [line for line in panel.lines if not line.dashed or panel.percent] or panel.lines
    values = [value for line in solid for value in line.points.values()]
    ends = [*_columns(values).flat, math.nan if panel.level is None else panel.level]
    ends = [end for end in ends if math.isfinite(end)] + [0.0] * panel.bars
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    middle, span = (low + high) / 2, max(high - low, 0.1 if panel.percent else 1e-3 * abs(high))
    low, high = middle - 0.62 * (span or 1.0), middle + 0.62 * (span or 1.0)
    if panel.percent:
        return max(low, -0.02), min(high, 1 + 0.04 * (1 - low))
    return low, high


def _columns(values: Sequence[Estimate]) -> Float[np.ndarray, "3 n"]:
    """Returns means, lower and upper ends; NaN where there is no interval."""
    return np.array(values, np.float64).reshape(-1, 3).T


def _intervals(axes: "Axes", xs: Sequence[Any], values: Sequence[Estimate], **style) -> None:
    """Draws confidence intervals as vertical lines."""
    _, lows, highs = _columns(values)
    known = np.isfinite(lows + highs)
    axes.vlines(np.asarray(xs)[known], lows[known], highs[known], **style)


def _style_axes(axes: "Axes", percent: bool) -> None:
    """Adds faint horizontal grid lines and formats y without powers of ten."""
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    show = "{:.0%}" if percent else "{:g}"
    axes.yaxis.set_major_formatter(
        lambda y, _: "" if percent and y > 1.001 else show.format(round(y, 10))
    )


def _set_log_scale(set_scale: Callable, axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _label_points(axes: "Axes", panel: Panel) -> None:
    """Writes labels beside their points or, in a crowd, further away with a leader line."""
    texts, labels = [], []
    for line in panel.lines:
        for x, (name, colour) in line.labels.items():
            text = _annotate(axes, name, (x, line.points[x].mean), (0, 0), color=colour, fontsize=8)
            extent, anchor = text.get_window_extent(), axes.transData.transform(text.xy)
            texts.append((text, extent, colour))
            labels.append(Label(tuple(anchor), extent.width, extent.height))
    boxes = place_labels(labels, Box(*axes.bbox.extents), _segments(axes))
    for (text, extent, colour), label, box in zip(texts, labels, boxes, strict=True):
        if box is None:
            text.remove()
            continue
        text.set_position((box.left - extent.x0, box.low - extent.y0))
        end = leader_end(box, label.anchor)
        if end is not None:
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0}
            _annotate(axes, "", text.xy, np.subtract(end, label.anchor), arrowprops=arrow)


def _annotate(
    axes: "Axes", name: str, point: tuple[Any, float], offset: Any, **style
) -> "Annotation":
    """Writes text at an offset from a point, in points (1/72 inch), without changing the layout."""
    text = axes.annotate(name, point, offset, textcoords="offset points", parse_math=False, **style)
    text.set_in_layout(False)
    return text


def _segments(axes: "Axes") -> Segments:
    """Returns all drawn lines and points, including the intervals of single points."""
    from matplotlib.collections import LineCollection

    paths = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    for collection in axes.collections:
        if isinstance(collection, LineCollection):
            paths += [axes.transData.transform(ends) for ends in collection.get_segments()]
    pairs = [np.stack([path[:-1], path[1:]], axis=1) for path in paths if len(path) > 1]
    pairs += [np.stack([path, path], axis=1) for path in paths]  # the points themselves
    pairs = np.concatenate([np.empty((0, 2, 2)), *pairs])
    return pairs[np.isfinite(pairs).all(axis=(1, 2))]


def _svg(draw: Callable[["Figure"], None], width: float, height: float) -> str:
    # Imported here because it is slow, and only the report draws charts.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")  # SVG's unit: 1/72"
        draw(figure)
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=no_metadata, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
