"""Charts: label positions, unusual values and names, and what is not drawn."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from kontext_jax.evaluation.summary import Estimate
from kontext_jax.report import charts
from kontext_jax.report.charts import Line, Panel, bars, panels

WIDE = (5.6, 3.0)
NUMBERS = range(8)


def value(mean: float) -> Estimate:
    return Estimate(mean, mean - 0.02, mean + 0.02)


def separate(points, name="student {}") -> list[Line]:
    """Returns a line for each point."""
    return [
        Line({x: value(y)}, "#123456", labels={x: (name.format(i), "#654321")})
        for i, (x, y) in enumerate(points)
    ]


LONG = "student {} of the large teacher, guidance 2.5"
LAYOUTS = {
    "one place": separate([(4, 0.9)] * 8),
    "some pixels": separate([(4 + 0.01 * i, 0.9 + 0.001 * (i % 3)) for i in NUMBERS] + [(30, 0.6)]),
    "corners": separate([(x, y) for x in (1, 1.01, 49, 50) for y in (0.5, 0.95)]),
    "long in corners": separate([(x, y) for x in (1, 1.01, 49, 50) for y in (0.5, 0.95)], LONG),
    "long in a row": separate([(2**i, 0.9) for i in NUMBERS], LONG),
    "joined": [
        Line(
            {2**i: value(0.8 + 0.1 * (i % 2)) for i in NUMBERS},
            "#123456",
            labels={2**i: (f"student {i}", "#654321") for i in NUMBERS},
        )
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_stay_inside_and_do_not_overlap(layout):
    lines = LAYOUTS[layout]
    with matplotlib.rc_context(charts.STYLE):
        figure = Figure(figsize=WIDE, dpi=72, layout="constrained")
        charts.draw_panel(figure, Panel("a", "b", lines, percent=True, log_x=True))
        figure.draw_without_rendering()
    [axes] = figure.axes
    labels = [text for text in axes.texts if text.get_text()]
    assert {text.get_text() for text in labels} == {
        name for line in lines for name, _ in line.labels.values()
    }
    boxes = [Text.get_window_extent(text) for text in labels]
    for box in boxes:
        assert axes.bbox.x0 - 0.01 < box.x0 and box.x1 < axes.bbox.x1 + 0.01
        assert axes.bbox.y0 - 0.01 < box.y0 and box.y1 < axes.bbox.y1 + 0.01
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-0.01).overlaps(other)
    # Each label is near its point, or a leader line connects the two.
    anchors = [axes.transData.transform(text.xy) for text in labels]
    leaders = []
    for text in axes.texts:
        if not text.get_text():
            anchor = axes.transData.transform(text.xy)
            leaders.append((*anchor, *(anchor + text.get_position())))
    for (x, y), box in zip(anchors, boxes, strict=True):
        near = box.padded(10.01).contains(x, y)
        connected = any(
            (a, b) == pytest.approx((x, y)) and box.padded(0.01).contains(c, d)
            for a, b, c, d in leaders
        )
        assert near or connected
    assert len(leaders) < len(labels)
    if layout == "one place":
        assert leaders


def test_svg_labels_are_at_the_positions_that_were_computed():
    """Computed and written in the same unit: one label right of its point, one left."""
    svg = panels([Panel("a", "b", separate([(1, 0.5), (2, 0.6)]), percent=True)], WIDE)
    assert re.search(r"<svg[^>]* viewBox=\"0 0 403.2 216\"", svg)
    root = ElementTree.fromstring(svg.removeprefix("<div class=charts>").removesuffix("</div>"))
    space = "{http://www.w3.org/2000/svg}"
    texts = {text.text: text.attrib for text in root.iter(f"{space}text")}
    marks = [use.attrib for use in root.iter(f"{space}use")]
    points = [(float(mark["x"]), float(mark["y"])) for mark in marks]
    for name, (low, high) in {"student 0": (4, 6), "student 1": (-52, -40)}.items():
        x, y = float(texts[name]["x"]), float(texts[name]["y"])
        assert any(low < x - a < high and 3 < b - y < 6 for a, b in points)


def test_each_panel_is_a_separate_svg():
    line = Line({1: value(0.2), 2: value(0.3)}, "#123456")
    svg = panels([Panel("one", "x", [line]), Panel("two", "x", [line])])
    assert svg.count("<svg") == svg.count("</svg>") == 2
    assert svg.startswith("<div class=charts><svg") and svg.endswith("</div>")
    assert svg == panels([Panel("one", "x", [line]), Panel("two", "x", [line])])


def test_dashed_lines_have_no_band():
    points = {1: value(0.2), 2: value(0.3)}
    solid, dashed = Line(points, "#123456"), Line(points, "#abcdef", dashed=True)
    svg = panels([Panel("one", "x", [solid, dashed])])
    assert re.search(r"fill: #123456; fill-opacity: 0.13", svg)
    assert "fill-opacity: 0.13" in svg and not re.search(r"fill: #abcdef; [^m]*opacity: 0.13", svg)
    assert re.search(r"stroke-dasharray: [^;]*; [^\"]*stroke: #abcdef", svg)
    assert not re.search(r"stroke-dasharray: [^;]*; [^\"]*stroke: #123456", svg)


def test_the_x_axis_has_only_the_requested_ticks():
    line = Line({1: value(0.2), 50: value(0.3)}, "#123456")
    svg = panels([Panel("one", "x", [line], log_x=True, ticks=(1, 4, 50))])
    assert len(re.findall(r'id="xtick_\d+"', svg)) == 3
    assert all(f">{x}</text>" in svg for x in (1, 4, 50))


def test_charts_accept_unusual_values_and_names():
    middle, unknown = Estimate(0.5, 0.5 + 1e-17, 0.5 - 1e-17), Estimate(float("nan"))
    unusual = Line({2: unknown, 1: middle}, "#123456", labels={1: ("$x$ <&>", "#654321")})
    svg = panels([Panel("a $b$", "x", [unusual]), Panel("c", "x", [Line({}, "#000000")])])
    assert "$x$ &lt;&amp;&gt;</text>" in svg and "a $b$</text>" in svg
    assert "#123456" in svg and "#654321" in svg
    not_finite = Line({1: middle, 2: unknown}, "#123456", labels={2: ("gone", "#654321")})
    assert "gone" not in panels([Panel("a", "x", [not_finite]), Panel("no lines", "x", [])])
    outside = Line({"one_": Estimate(0.5, 0.6, 0.7)}, "#123456")  # a mean outside its interval
    groups = {"one_": "one", "two_": "t$w$o"}
    svg = bars(groups, [outside, Line({}, "#000000")], "title", percent=True)
    assert "t$w$o</text>" in svg and "100%</text>" in svg and "one_" not in svg


def test_values_without_an_interval_are_drawn_without_one():
    def chart(points) -> str:
        return panels([Panel("a", "x", [Line(points, "#123456")])])

    band, bar = "fill: #123456; fill-opacity: 0.13", "stroke: #123456; stroke-opacity: 0.5"
    pair, bare = {1: value(0.2), 2: value(0.3)}, {1: Estimate(0.2), 2: Estimate(0.3)}
    assert chart(pair | {3: Estimate(0.4)}).count(band) == 1 and band not in chart(bare)
    assert bar in chart({1: value(0.2)}) and bar not in chart({1: Estimate(0.2)})
    for values, number in ((pair, 2), (bare | {1: value(0.2)}, 1), (bare, 0)):
        points = {str(x): estimate for x, estimate in values.items()}
        svg = bars({"1": "one", "2": "two"}, [Line(points, "#123456")], "title")
        assert svg.count("stroke: #333333") == number


def test_a_level_is_drawn_and_in_view():
    points = {1: value(0.9), 2: value(0.8)}
    for level in (None, 0.586):
        with matplotlib.rc_context(charts.STYLE):
            figure = Figure(figsize=WIDE, dpi=72, layout="constrained")
            charts.draw_panel(figure, Panel("a", "b", [Line(points, "#123456")], level=level))
        [axes] = figure.axes
        dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert dashed == ([] if level is None else [level])
        assert (axes.get_ylim()[0] < 0.586) == (level is not None)
