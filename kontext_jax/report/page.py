"""What all sections of the page are made from: the sweep, its colours, and small pieces of HTML."""

import itertools
import math
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from kontext_jax.evaluation.scores import METRICS
from kontext_jax.evaluation.summary import (
    HEADLINE,
    alike,
    estimate_of,
    finite,
    first_cell,
    found_on,
    goodness,
    loss_name,
)
from kontext_jax.report.gallery import Gallery

COLOURS = (
    *("#2a5db0", "#d9730d", "#2e8b57", "#b5348c", "#0d93a1", "#7a4fc4", "#b3872a", "#c03a3a"),
    *("#5b7f95", "#7d5a3c"),
)
GREYS = ("#8a8a8a", "#bdbdbd", "#606060")

MAX_BARS, MAX_LINES, MAX_NAMES, MAX_PICTURES, MAX_PAIRS, MAX_ROWS = 6, 8, 8, 8, 16, 16
"""Cells in a chart of bars, lines in a chart and names beside their points, cells in a sheet, cells
that can be put side by side, and cells in a table before it is folded."""

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
    """What the sections of the page are made from.

    Attributes:
      summary: what ``evaluate`` found.
      gallery: pictures, and scores of each.
      colours: of cells by name.
      sheet_rows: tasks whose pictures are shown.
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
        """Those that any cell is for."""
        return [of_set for of_set in self.summary["sets"] if self.found(of_set)]

    def found(self, of_set: str) -> dict[str, Mapping[str, Any]]:
        """What is known on a set of each cell that is for it."""
        return found_on(self.summary, of_set)

    def losses(self, of_set: str) -> dict[str, float | None]:
        """Mean loss of each cell that has one on a loss set; None if it is not finite."""
        losses = self.summary["losses"].get(of_set, {})
        names = {n: loss_name(about) for n, about in self.cells.items() if not about["baseline"]}
        return {n: finite(losses[loss]["mean"]) for n, loss in names.items() if loss in losses}

    def first(self, of_set: str) -> str:
        """The cell of a set, or of a loss set, that the headline is about."""
        known = self.found(of_set) or self.losses(of_set)
        return first_cell({name: self.cells[name] for name in known})

    def is_baseline(self, cell: str) -> bool:
        return bool(self.cells[cell]["baseline"])

    def ranked(self, of_set: str) -> list[str]:
        """The headline's cell, then the best by the headline's metric; baselines last.

        Cells that differ in their sampling steps alone take turns: the best of each of these
        families comes before the second best of any.
        """
        found, metric = self.found(of_set), self.headline(of_set)
        first = self.first(of_set)

        def worth(name: str) -> float:
            value = estimate_of(found[name], metric) if metric else None
            return goodness(metric, value.mean) if value else -math.inf

        turns = {}
        for family in alike({name: self.cells[name] for name in found}, "num_steps"):
            family.sort(key=lambda name: (name != first, -worth(name)))
            turns |= {name: turn for turn, name in enumerate(family)}

        def rank(name: str) -> tuple:
            return self.is_baseline(name), name != first, turns.get(name, 0), -worth(name)

        return sorted(found, key=rank)

    def some(self, of_set: str, number: int) -> list[str]:
        """A set's cells in order, baselines last; those that rank first if there are too many."""
        kept = self.ranked(of_set)[:number]
        return sorted(filter(kept.__contains__, self.cells), key=self.is_baseline)

    def note(self, of_set: str, shown: int) -> str:
        """What is said where not all of a set's cells are shown, baselines aside."""
        models = [name for name in self.found(of_set) if not self.is_baseline(name)]
        metric = self.headline(of_set)
        if len(models) <= shown or metric is None:
            return ""
        by = escape(METRICS[metric].title)
        return (
            f"<p class=quiet>Of {len(models)} cells, the headline's and the best by “{by}”; those "
            "that differ in their steps alone take turns.</p>"
        )

    def headline(self, of_set: str) -> str | None:
        """The metric that says best how good the headline's cell is; None if none is known."""
        first = self.found(of_set)[self.first(of_set)]
        return next((metric for metric in HEADLINE if estimate_of(first, metric)), None)


def colours_of(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each cell, greys for baselines."""
    colours, greys = itertools.cycle(COLOURS), itertools.cycle(GREYS)
    return {name: next(greys if about["baseline"] else colours) for name, about in cells.items()}


def distinct(colours: Mapping[str, str]) -> dict[str, str]:
    """Colours of one chart: as they are or, if two are alike, others; greys stay."""
    known = [colour for colour in colours.values() if colour not in GREYS]
    if len(set(known)) == len(known):
        return dict(colours)
    others = itertools.cycle(COLOURS)
    return {name: c if c in GREYS else next(others) for name, c in colours.items()}


def legend(colours: Mapping[str, str]) -> str:
    """Names, each beside its colour."""
    names = (f"<span class=name>{dot(c)}{escape(name)}</span>" for name, c in colours.items())
    return f"<div class=legend>{''.join(names)}</div>"


def dot(colour: str) -> str:
    """What stands before a name."""
    return f"<span class=dot style='background:{colour}'></span>"


def row_of(sweep: Sweep, cell: str, columns: str) -> str:
    """A row of a table: a cell's name, and what ``columns`` say of it."""
    css = " class=baseline" if sweep.is_baseline(cell) else ""
    return f"<tr{css}><td>{dot(sweep.colours[cell])}{escape(cell)}</td>{columns}</tr>"
