"""Shared by all sections of the report: the sweep, colours, styles and HTML helpers."""

import itertools
import math
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from kontext_jax.evaluation.scores import METRICS
from kontext_jax.evaluation.summary import (
    HEADLINE,
    RECONSTRUCTION,
    estimate_of,
    finite,
    goodness,
    groups_varying,
    is_reconstructed,
    loss_name,
    pick_headline_cell,
    results_on,
)
from kontext_jax.report.gallery import Gallery

COLOURS = (
    *("#2a5db0", "#d9730d", "#2e8b57", "#b5348c", "#0d93a1", "#7a4fc4", "#b3872a", "#c03a3a"),
    *("#5b7f95", "#7d5a3c"),
)
GREYS = ("#8a8a8a", "#bdbdbd", "#606060")

MAX_BARS = 6
"""Cells in a bar chart."""

MAX_LINES = 8
"""Lines in a chart."""

MAX_LABELS = 8
"""Points in a chart that are labelled with their cell's name."""

MAX_IMAGES = 8
"""Cells in a sheet of images."""

MAX_PAIRS = 16
"""Cells that can be compared side by side."""

MAX_ROWS = 16
"""Rows of a table; the rest is folded."""

STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; color: #222;
  background: #fff; max-width: 1180px; margin: 2.5em auto 5em; padding: 0 20px; }
h1 { font-size: 30px; font-weight: 650; line-height: 1.2; margin: 0 0 .4em; }
h2 { font-size: 21px; font-weight: 600; margin: 2.6em 0 .6em; padding-top: .5em;
  border-top: 1px solid #ddd; }
h3 { font-size: 16px; font-weight: 600; margin: 1.8em 0 .4em; }
p { max-width: 52em; margin: .5em 0; } .quiet { color: #666; font-size: 13px; }
nav { margin: 1.2em 0; } nav a { display: inline-block; margin-right: 1.1em;
  color: #2a5db0; text-decoration: none; }
code { font-size: 92%; } summary { cursor: pointer; color: #2a5db0; }
.wide { overflow-x: auto; margin: .8em 0; background:
  linear-gradient(to left, #fff 50%, #fff0) right / 40px 100% no-repeat local,
  linear-gradient(to left, #0002, #0000) right / 14px 100% no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 5px 9px; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 500; font-size: 13px; color: #555; border-bottom: 1px solid #999;
  vertical-align: bottom; white-space: normal; min-width: 5.6em; }
td { border-bottom: 1px solid #eee; }
td:first-child, th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: #fff; }
.text td, .text th { text-align: left; white-space: normal; }
td small { display: block; color: #888; font-size: 10.5px; font-weight: 400; }
.baseline, .baseline td { color: #888; } .first { border-left: 1px solid #ccc; }
.total td { font-weight: 600; border-top: 1px solid #999; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
.legend { font-size: 13px; margin: .6em 0; }
.legend span.name { margin-right: 18px; display: inline-block; }
.charts { display: flex; flex-wrap: wrap; } .charts svg { max-width: 100%; height: auto; }
svg { display: block; margin: .6em 0; } svg text { font-family: inherit !important; }
@media (max-width: 600px) {
  body { margin-top: 1.2em; padding: 0 14px; } h1 { font-size: 23px; }
  td:first-child { min-width: 7.6em; max-width: 9em; white-space: normal;
    overflow-wrap: anywhere; }
}
"""


class Sweep(NamedTuple):
    """The content of a report.

    Attributes:
      summary: content of the sweep's ``summary.json``.
      gallery: images and their scores.
      colours: colour of each cell, by name.
      sheet_rows: number of tasks of each set whose images are shown.
    """

    summary: Mapping[str, Any]
    gallery: Gallery
    colours: Mapping[str, str]
    sheet_rows: int

    @property
    def cells(self) -> Mapping[str, Mapping[str, Any]]:
        return self.summary["cells"]

    @property
    def sets(self) -> list[str]:
        """The sets on which any cell is evaluated."""
        return [name for name in self.summary["sets"] if self.results(name)]

    def results(self, set_name: str) -> dict[str, Mapping[str, Any]]:
        """Returns the results of each cell that is evaluated on a set."""
        return results_on(self.summary, set_name)

    def losses(self, set_name: str) -> dict[str, float | None]:
        """Returns each cell's mean loss on a loss set, if it has one; None if not finite."""
        losses = self.summary["losses"].get(set_name, {})
        names = {n: loss_name(cell) for n, cell in self.cells.items() if not cell["baseline"]}
        return {n: finite(losses[loss]["mean"]) for n, loss in names.items() if loss in losses}

    def headline_cell(self, set_name: str) -> str:
        """Returns the cell that is in the headline of a set or loss set."""
        evaluated = self.results(set_name) or self.losses(set_name)
        return pick_headline_cell({name: self.cells[name] for name in evaluated})

    def is_baseline(self, cell: str) -> bool:
        return bool(self.cells[cell]["baseline"])

    def is_reconstructed(self, set_name: str) -> bool:
        return is_reconstructed(self.summary, set_name)

    def ranked(self, set_name: str) -> list[str]:
        """Returns a set's cells: the headline cell, then by the headline metric; baselines last.

        Cells that differ only in their number of sampling steps form a family, and the best cell
        of each family comes before the second best of any.
        """
        results, metric = self.results(set_name), self.headline_metric(set_name)
        headline_cell = self.headline_cell(set_name)

        def quality(name: str) -> float:
            value = estimate_of(results[name], metric) if metric else None
            return goodness(metric, value.mean) if value else -math.inf

        rank_in_family = {}
        for family in groups_varying({name: self.cells[name] for name in results}, "num_steps"):
            family.sort(key=lambda name: (name != headline_cell, -quality(name)))
            rank_in_family |= {name: rank for rank, name in enumerate(family)}

        def key(name: str) -> tuple:
            rank = rank_in_family.get(name, 0)
            return self.is_baseline(name), name != headline_cell, rank, -quality(name)

        return sorted(results, key=key)

    def top(self, set_name: str, number: int) -> list[str]:
        """Returns the first ``number`` cells by rank, in the summary's order, baselines last."""
        top = self.ranked(set_name)[:number]
        return sorted(filter(top.__contains__, self.cells), key=self.is_baseline)

    def selection_note(self, set_name: str, number: int) -> str:
        """Returns how ``number`` cells are selected; empty if a set has no more than that."""
        models = [name for name in self.results(set_name) if not self.is_baseline(name)]
        metric = self.headline_metric(set_name)
        if len(models) <= number or metric is None:
            return ""
        title = escape(METRICS[metric].title)
        return (
            f"<p class=quiet>Shown of {len(models)} cells: the headline cell and the best by "
            f"“{title}”, first the best of each family of cells that differ only in sampling "
            "steps.</p>"
        )

    def headline_metric(self, set_name: str) -> str | None:
        """Returns the most telling metric that the headline cell has; None if it has none."""
        metrics = RECONSTRUCTION if self.is_reconstructed(set_name) else HEADLINE
        results = self.results(set_name)[self.headline_cell(set_name)]
        return next((metric for metric in metrics if estimate_of(results, metric)), None)


def colours_of(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns a colour for each cell, grey for baselines."""
    colours, greys = itertools.cycle(COLOURS), itertools.cycle(GREYS)
    return {name: next(greys if cell["baseline"] else colours) for name, cell in cells.items()}


def distinct_colours(colours: Mapping[str, str]) -> dict[str, str]:
    """Returns the colours of a chart, reassigned if two are equal; greys stay."""
    bright = [colour for colour in colours.values() if colour not in GREYS]
    if len(set(bright)) == len(bright):
        return dict(colours)
    new = itertools.cycle(COLOURS)
    return {name: c if c in GREYS else next(new) for name, c in colours.items()}


def legend(colours: Mapping[str, str]) -> str:
    """Returns a legend: each name beside its colour."""
    names = (f"<span class=name>{dot(c)}{escape(name)}</span>" for name, c in colours.items())
    return f"<div class=legend>{''.join(names)}</div>"


def dot(colour: str) -> str:
    """Returns the coloured dot in front of a name."""
    return f"<span class=dot style='background:{colour}'></span>"


def cell_row(sweep: Sweep, cell: str, columns: str) -> str:
    """Returns a table row with a cell's name, followed by ``columns``."""
    css = " class=baseline" if sweep.is_baseline(cell) else ""
    return f"<tr{css}><td>{dot(sweep.colours[cell])}{escape(cell)}</td>{columns}</tr>"
