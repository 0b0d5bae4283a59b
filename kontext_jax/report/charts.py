"""Charts as SVG that stands inside a page: lines with bands in small multiples, and bars.

Words stay text, in the page's own font. Legends are the page's: it knows the colours.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kontext_jax.evaluation.summary import Estimate
from kontext_jax.report.label_placement import Box, Name, Segments, lead_of, place_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation


STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kontext_jax",  # the same report has the same ids
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
    """Points of one colour.

    Attributes:
      points: x -> value; bars have groups for x.
      colour: of line, band or bars.
      dashed: for what is only there to compare with.
      names: x -> what is written at that point, and in which colour.
    """

    points: Mapping[Any, Estimate]
    colour: str
    dashed: bool = False
    names: Mapping[Any, tuple[str, str]] = {}


class Panel(NamedTuple):
    """One of several charts side by side.

    Attributes:
      title: over it.
      xlabel: under it.
      lines: what is drawn.
      percent: whether values are shares of 1.
      log_x, log_y: whether an axis is logarithmic.
      ticks: the only places that the x axis names; its own choice if empty.
      markers: whether points are marked.
      level: a value that is marked all across, and always in sight.
    """

    title: str
    xlabel: str
    lines: Sequence[Line]
    percent: bool = False
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] = ()
    markers: bool = True
    level: float | None = None


def panels(items: Sequence[Panel], size: tuple[float, float] = (3.85, 2.4)) -> str:
    """An ``<svg>`` element of ``size`` inches for each panel; as many a row as have room."""
    charts = (_svg(functools.partial(draw_panel, panel=panel), *size) for panel in items)
    return f"<div class=charts>{''.join(charts)}</div>"


def bars(
    groups: Mapping[str, str], lines: Sequence[Line], title: str, percent: bool = False
) -> str:
    """Bars side by side in groups, with their intervals, as one ``<svg>`` element.

    Args:
      groups: what is written under each, by the name that points have for x.
      lines: of each colour.
      title: over it.
      percent: whether values are shares of 1.
    """
    width = 0.8 / len(lines)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.set_title(title, parse_math=False)
        for i, line in enumerate(lines):
            here = [(k, line.points[name]) for k, name in enumerate(groups) if name in line.points]
            middles = [k + (i - (len(lines) - 1) / 2) * width for k, _ in here]
            axes.bar(middles, [v.mean for _, v in here], width * 0.88, color=line.colour)
            _intervals(axes, middles, [v for _, v in here], color="#333", linewidth=0.9)
        axes.set_xticks(range(len(groups)), list(groups.values()), parse_math=False)
        axes.tick_params(axis="x", length=0)
        _dress(axes, percent)
        if percent:
            axes.set_ylim(0, 1.03)

    chart = _svg(draw, min(11.5, 1.5 + len(groups) * max(0.9, 0.28 * len(lines))), 2.6)
    return f"<div class='wide bars'>{chart}</div>"


def draw_panel(figure: "Figure", panel: Panel) -> None:
    """Draws a panel in a figure of 72 dots an inch."""
    axes = figure.subplots()
    _draw_lines(axes, panel)
    figure.draw_without_rendering()  # places the axes, and names can keep clear of each other
    _name_points(axes, panel)


def _draw_lines(axes: "Axes", panel: Panel) -> None:
    axes.set_title(panel.title, parse_math=False)
    axes.set_xlabel(panel.xlabel)
    for line in panel.lines:
        places = sorted(line.points)
        values = [line.points[x] for x in places]
        means, lows, highs = _columns(values)
        dashes, marker = "--" if line.dashed else "-", "o" if panel.markers else ""
        axes.plot(places, means, color=line.colour, linestyle=dashes, marker=marker)
        for x, (_, colour) in line.names.items():
            axes.plot(x, line.points[x].mean, color=colour, marker="o")
        if len(places) > 1 and not line.dashed:
            axes.fill_between(places, lows, highs, color=line.colour, alpha=0.13, linewidth=0)
        elif not line.dashed:
            _intervals(axes, places, values, color=line.colour, alpha=0.5)
    if panel.level is not None:
        axes.axhline(panel.level, color="#888", linestyle="--", linewidth=1)
    axes.margins(x=0.12 if any(line.names for line in panel.lines) else 0.05)
    _dress(axes, panel.percent)
    if panel.log_x:
        _log(axes.set_xscale, axes.xaxis)
    if panel.log_y:
        _log(axes.set_yscale, axes.yaxis)
    else:
        axes.set_ylim(*_limits(panel))
    if panel.ticks:
        axes.set_xticks(panel.ticks, [f"{x:g}" for x in panel.ticks])
        axes.minorticks_off()
    elif not panel.log_x:
        axes.locator_params(axis="x", nbins=5)


def _limits(panel: Panel) -> tuple[float, float]:
    """Of the y axis: by what is not dashed, which could else be pressed into one line; and the
    level."""
    solid = [line for line in panel.lines if not line.dashed or panel.percent] or panel.lines
    values = [value for line in solid for value in line.points.values()]
    ends = [*_columns(values).flat, math.nan if panel.level is None else panel.level]
    ends = [end for end in ends if math.isfinite(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    middle, span = (low + high) / 2, max(high - low, 0.1 if panel.percent else 1e-3 * abs(high))
    low, high = middle - 0.62 * (span or 1.0), middle + 0.62 * (span or 1.0)
    if panel.percent:
        return max(low, -0.02), min(high, 1 + 0.04 * (1 - low))
    return low, high


def _columns(values: Sequence[Estimate]) -> Float[np.ndarray, "3 n"]:
    """Means, low and high ends; NaN where there is no interval."""
    return np.array(values, np.float64).reshape(-1, 3).T


def _intervals(axes: "Axes", places: Sequence[Any], values: Sequence[Estimate], **style) -> None:
    """Upright lines from low to high ends."""
    _, lows, highs = _columns(values)
    known = np.isfinite(lows + highs)
    axes.vlines(np.asarray(places)[known], lows[known], highs[known], **style)


def _dress(axes: "Axes", percent: bool) -> None:
    """Faint lines across, and numbers without powers of ten."""
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    show = "{:.0%}" if percent else "{:g}"
    axes.yaxis.set_major_formatter(
        lambda y, _: "" if percent and y > 1.001 else show.format(round(y, 10))
    )


def _log(set_scale: Callable, axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _name_points(axes: "Axes", panel: Panel) -> None:
    """Writes names beside points or, where it is crowded, further away with a line to the point."""
    named = [(line, x, *name) for line in panel.lines for x, name in line.names.items()]
    texts, names = [], []
    for line, x, name, colour in named:
        text = _annotate(axes, name, (x, line.points[x].mean), (0, 0), color=colour, fontsize=8)
        size, spot = text.get_window_extent(), axes.transData.transform(text.xy)
        texts.append((text, size, colour))
        names.append(Name(tuple(spot), size.width, size.height))
    places = place_names(names, Box(*axes.bbox.extents), _drawn(axes))
    for (text, size, colour), name, box in zip(texts, names, places, strict=True):
        if box is None:
            text.remove()
            continue
        text.set_position((box.left - size.x0, box.low - size.y0))
        end = lead_of(box, name.spot)
        if end is not None:
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0}
            _annotate(axes, "", text.xy, np.subtract(end, name.spot), arrowprops=arrow)


def _annotate(axes: "Axes", name: str, at: tuple[Any, float], place: Any, **style) -> "Annotation":
    """A name at a place, in points from what it is said of, which does not change the layout."""
    text = axes.annotate(name, at, place, textcoords="offset points", parse_math=False, **style)
    text.set_in_layout(False)
    return text


def _drawn(axes: "Axes") -> Segments:
    """All lines of a chart, and the lines of intervals of single points."""
    from matplotlib.collections import LineCollection

    paths = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            paths += [axes.transData.transform(ends) for ends in bars.get_segments()]
    pairs = [np.stack([path[:-1], path[1:]], axis=1) for path in paths if len(path) > 1]
    pairs += [np.stack([path, path], axis=1) for path in paths]  # points themselves
    pairs = np.concatenate([np.empty((0, 2, 2)), *pairs])
    return pairs[np.isfinite(pairs).all(axis=(1, 2))]


def _svg(draw: Callable[["Figure"], None], width: float, height: float) -> str:
    # Imported here: it is slow, and only the report draws.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")  # as SVG's points
        draw(figure)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
