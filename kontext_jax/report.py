"""A sweep as one self-contained page: how well, how fast, what it looks like.

It needs no network. Every cell has one colour in all charts, baselines are grey.
"""

import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kontext_jax import charts, gallery
from kontext_jax.charts import Line, Panel
from kontext_jax.gallery import Gallery
from kontext_jax.scores import ALL, CONFIDENCE, DRAWS, METRICS
from kontext_jax.summary import (
    DISTANCES,
    HEADLINE,
    MAIN,
    OVER_TURNS,
    alike,
    describe,
    estimate_of,
    found_on,
    goodness,
    interval_of,
    is_percent,
    loss_name,
    metrics_of,
    points_of,
)
from kontext_jax.types import Task

COLOURS = (
    *("#2a5db0", "#d9730d", "#2e8b57", "#b5348c", "#0d93a1", "#7a4fc4", "#b3872a", "#c03a3a"),
    *("#5b7f95", "#7d5a3c"),
)
GREYS = ("#8a8a8a", "#bdbdbd")

MAX_BARS, MAX_LINES, MAX_PICTURES = 6, 8, 8
"""Cells in a chart of bars, in one of lines, and in a sheet."""

STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; color: #222;
  background: #fff; max-width: 1180px; margin: 2.5em auto 5em; padding: 0 20px; }
h1 { font-size: 30px; font-weight: 650; line-height: 1.2; margin: 0 0 .4em; }
h2 { font-size: 21px; font-weight: 600; margin: 2.6em 0 .6em; padding-top: .5em;
  border-top: 1px solid #ddd; }
h3 { font-size: 16px; font-weight: 600; margin: 1.8em 0 .4em; }
p { max-width: 52em; margin: .5em 0; } .quiet { color: #666; font-size: 13px; }
nav { margin: 1.2em 0; } nav a { margin-right: 1.1em; color: #2a5db0; text-decoration: none; }
code { font-size: 92%; } summary { cursor: pointer; color: #2a5db0; }
.wide { overflow-x: auto; margin: .8em 0; }
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
.legend { font-size: 13px; margin: .6em 0; } .legend span.name { margin-right: 18px;
  white-space: nowrap; display: inline-block; }
svg { max-width: 100%; height: auto; display: block; margin: .6em 0; }
svg text { font-family: inherit !important; }
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

    def some(self, cells: Iterable[str], number: int) -> list[str]:
        """The first of some cells; baselines only if there is room."""
        return sorted(cells, key=lambda name: bool(self.cells[name]["baseline"]))[:number]

    def headline(self, of_set: str) -> str | None:
        """The metric that says best how good the first cell is; None if nothing is known."""
        return next(iter(metrics_of([next(iter(self.found(of_set).values()))], HEADLINE)), None)


def write_report(
    workdir: Path,
    summary: Mapping[str, Any],
    tasks: Mapping[str, Sequence[Task]],
    *,
    sheet_rows: int = 24,
    curves: Mapping[str, str] | None = None,
) -> None:
    """Writes ``report.html``.

    Args:
      workdir: of the sweep, with the pictures and scores of its cells.
      summary: what ``evaluate`` found.
      tasks: of each set.
      sheet_rows: tasks of each set whose pictures are shown.
      curves: title -> workdir of the runs whose training losses are drawn.

    Raises:
      FileNotFoundError, ValueError: a picture or a file of scores is missing or damaged.
    """
    sweep = Sweep(summary, Gallery(workdir, tasks), colours_of(summary["cells"]), sheet_rows)
    sections = {
        "Results": _results(sweep),
        "By category": _categories(sweep),
        "Turn by turn": _turns(sweep),
        "Steps and time": _steps(sweep),
        "Checkpoints": _checkpoints(sweep),
        "Held-out loss": _losses(sweep),
        "Pictures": _sheets(sweep),
        "Side by side": _pairs(sweep),
        "Training": [_training(title, Path(run)) for title, run in (curves or {}).items()],
        "Time": [_times(summary.get("seconds", {}))],
    }
    sections = {title: parts for title, parts in sections.items() if any(parts)}
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    links = "".join(f"<a href='#{anchors[title]}'>{title}</a>" for title in sections)
    body = [*_head(sweep), f"<nav>{links}</nav>"]
    for title, parts in sections.items():
        body += [f"<h2 id={anchors[title]}>{title}</h2>", *parts]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>kontext_jax report</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}{gallery.STYLE}</style>"
        "<body>" + "\n".join([*body, sweep.gallery.data()]) + "</body></html>\n"
    )
    (workdir / "report.html").write_text(page, encoding="utf-8")


def table(summary: Mapping[str, Any]) -> str:
    """The main numbers of all cells on each set, as text."""
    parts = []
    for of_set, about in summary["sets"].items():
        found = found_on(summary, of_set)
        metrics = metrics_of(found.values(), MAIN)[:6]
        head = ["", *(METRICS[metric].title for metric in metrics), "seconds an image"]
        rows = [head]
        for name, numbers in found.items():
            values = [estimate_of(numbers, metric) for metric in metrics]
            shown = [
                METRICS[metric].show(value[0]) if value else "–"
                for metric, value in zip(metrics, values, strict=True)
            ]
            rows.append([name, *shown, _speed(numbers, "seconds_per_image")])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        parts.append("\n".join([f"{of_set}: {about['num_tasks']} tasks", *lines]))
    return "\n\n".join(parts)


def colours_of(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each cell, greys for baselines."""
    colours, greys = itertools.cycle(COLOURS), itertools.cycle(GREYS)
    return {name: next(greys if about["baseline"] else colours) for name, about in cells.items()}


def _head(sweep: Sweep) -> list[str]:
    rows = []
    for name, about in sweep.cells.items():
        said = "".join(f"<td>{_text(part)}</td>" for part in describe(about))
        rows.append(f"<tr{_css(sweep, name)}><td>{_name(sweep, name)}</td>{said}</tr>")
    cells = (
        "<details><summary>All cells</summary><div class=wide><table class=text><tr><th>cell</th>"
        "<th>networks</th><th>sampler</th><th>weights</th></tr>"
        f"{''.join(rows)}</table></div></details>"
    )
    if sweep.sets:
        return [*_headline(sweep), cells]
    of_set, losses = next(iter(sweep.summary["losses"].items()))
    name, loss = next(iter(losses.items()))
    title = f"Held-out loss {loss['mean']:.4f} over {loss['count']} losses of {of_set}"
    return [f"<h1>{_text(title)}</h1>", f"<p><b>{_text(name)}</b></p>", cells]


def _headline(sweep: Sweep) -> list[str]:
    of_set = sweep.sets[0]
    first = next(iter(sweep.found(of_set)))
    found, metric = sweep.found(of_set)[first], sweep.headline(of_set)
    value = estimate_of(found, metric) if metric else None
    what = "tasks" if "text_to_image" in found["count"] else "edits"
    if metric is None or value is None:
        title = f"{found['count'][ALL]} held-out {what}, and no judge that has a number for them"
    else:
        rows = sweep.gallery.scores(of_set, first).values()
        number = sum(row.get(metric) is not None for row in rows) or found["count"][ALL]
        shown, interval = METRICS[metric].show(value[0]), interval_of(found, metric)
        interval = f" ({interval})" if interval else ""
        if metric == "edit_success":
            title = f"{shown} of {number} held-out {what} carried out{interval}"
        else:
            title = f"{METRICS[metric].title} {shown}{interval} over {number} held-out {what}"
    networks, sampling, weights = describe(sweep.cells[first])
    said = "; ".join(filter(None, (networks, sampling, weights and f"weights {weights}")))
    return [
        f"<h1>{_text(title)}</h1>",
        f"<p><b>{_text(first)}</b> on <b>{_text(of_set)}</b>: {_text(said)}.</p>",
    ]


def _results(sweep: Sweep) -> list[str]:
    parts = []
    for of_set in sweep.sets:
        found = sweep.found(of_set)
        counts = next(iter(found.values()))["count"]
        kinds = ", ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if name != ALL
        )
        turns = max(task.turn for task in sweep.gallery.tasks[of_set].values())
        kinds += f"; sessions of up to {turns} turns" if turns > 1 else ""
        parts += [
            f"<h3>{_text(of_set)}</h3>",
            f"<p>{counts[ALL]} tasks: {_text(kinds)}.</p>",
            _set_table(sweep, found),
        ]
    known = [numbers for of_set in sweep.sets for numbers in sweep.found(of_set).values()]
    notes = [
        f"Small numbers, and those in brackets, are {CONFIDENCE:.0%} intervals by a bootstrap of "
        f"{DRAWS} draws of whole groups, for tasks that share an image or a session are not "
        "independent. Arrows say whether more (↑) or less (↓) is better; the best of each column "
        "is bold, baselines aside."
    ]
    if metrics_of(known, DISTANCES):
        notes.append(
            "Fréchet distances are of a set as a whole, and too large for few pictures: compare "
            "cells of one set, not sets of different numbers."
        )
    devices = {
        f"{numbers['speed']['chips']:g} × {numbers['speed']['device']}"
        for numbers in known
        if numbers["speed"]
    }
    if devices:
        notes.append(f"Times are of {', '.join(sorted(devices))}. {sweep.summary['timed']}")
    notes += [f"Left out: {name}. {why}" for name, why in sweep.summary["left_out"].items()]
    return parts + [f"<p class=quiet>{_text(note)}</p>" for note in notes]


SPEED = {
    "seconds_per_image": "seconds an image",
    "images_per_second_per_chip": "images a second and chip",
    "compile_seconds": "seconds to compile",
}


def _set_table(sweep: Sweep, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Cells by metrics, then their speed."""
    metrics = metrics_of(found.values(), METRICS)
    speeds = SPEED if any(numbers["speed"] for numbers in found.values()) else {}
    bold = {metric: _best(sweep, found, metric) for metric in metrics}
    arrows = {1: "\u00a0↑", -1: "\u00a0↓", 0: ""}
    heads = [METRICS[metric].title + arrows[METRICS[metric].better] for metric in metrics]
    head = "".join(f"<th>{_text(title)}</th>" for title in ("cell", *heads))
    head += "".join(f"<th{_first(i)}>{title}</th>" for i, title in enumerate(speeds.values()))
    rows = []
    for name, numbers in found.items():
        cells = [f"<td>{_name(sweep, name)}</td>"]
        for metric in metrics:
            cells.append(_cell(numbers, metric, name in bold[metric]))
        for i, speed in enumerate(speeds):
            cells.append(f"<td{_first(i)}>{_speed(numbers, speed)}</td>")
        rows.append(f"<tr{_css(sweep, name)}>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _cell(
    found: Mapping[str, Any], metric: str, is_best: bool = False, key: str = ALL, css: str = ""
) -> str:
    """A value and its interval."""
    value = estimate_of(found, metric, key=key)
    if value is None:
        return f"<td{css}>–</td>"
    shown = METRICS[metric].show(value[0])
    shown = f"<b>{shown}</b>" if is_best else shown
    interval = interval_of(found, metric, key)
    return f"<td{css}>{shown}{f'<small>{interval}</small>' if interval else ''}</td>"


def _best(sweep: Sweep, found: Mapping[str, Mapping[str, Any]], metric: str) -> set[str]:
    """The cells that are best; none where there are no two to compare, or none can be."""
    if not METRICS[metric].better:
        return set()
    worth = {
        name: goodness(metric, value[0])
        for name, numbers in found.items()
        if not sweep.cells[name]["baseline"] and (value := estimate_of(numbers, metric))
    }
    return {n for n, value in worth.items() if value == max(worth.values()) and len(worth) > 1}


def _categories(sweep: Sweep) -> list[str]:
    parts = []
    for of_set in sweep.sets:
        found, metric = sweep.found(of_set), sweep.headline(of_set)
        first = next(iter(found))
        categories = [name for name in found[first]["count"] if name != ALL]
        metrics = [m for m in metrics_of([found[first]], MAIN) if m in found[first]["metrics"]][:3]
        if len(categories) < 2 or not metrics:
            continue
        parts.append(f"<h3>{_text(of_set)}</h3>")
        if metric in found[first]["metrics"]:
            models = [name for name in found if not sweep.cells[name]["baseline"]]
            cells = (models or list(found))[:MAX_BARS]
            lines = [
                _line(sweep, name, points_of(found[name], metric, "category", categories))
                for name in cells
            ]
            lines = [line._replace(points=_spaced(line.points)) for line in lines]
            groups = [name.replace("_", " ") for name in categories]
            parts += [
                _legend({name: sweep.colours[name] for name in cells}),
                charts.bars(groups, lines, METRICS[metric].title, is_percent(metric)),
            ]
        beside = [name for name in found if name == first or sweep.cells[name]["baseline"]]
        parts.append(_category_table(sweep, found, [*categories, ALL], metrics, beside))
    return parts


def _category_table(
    sweep: Sweep,
    found: Mapping[str, Mapping[str, Any]],
    categories: Sequence[str],
    metrics: Sequence[str],
    cells: Sequence[str],
) -> str:
    head = "".join(
        f"<th class=first colspan={len(cells)} style='text-align:center'>"
        f"{_text(METRICS[metric].title)}</th>"
        for metric in metrics
    )
    names = "".join(f"<th{_first(i)}>{_text(name)}</th>" for i, name in enumerate(cells))
    rows = []
    for category in categories:
        values = []
        for metric in metrics:
            for i, name in enumerate(cells):
                words = ["first"] * (i == 0) + ["baseline"] * bool(sweep.cells[name]["baseline"])
                css = f" class='{' '.join(words)}'"
                values.append(_cell(found[name], metric, key=category, css=css))
        count = found[cells[0]]["count"][category]
        label = _text(category.replace("_", " "))
        css = " class=total" if category == ALL else ""
        rows.append(f"<tr{css}><td>{label}</td><td>{count}</td>{''.join(values)}</tr>")
    return (
        f"<div class=wide><table><tr><th></th><th></th>{head}</tr>"
        f"<tr><th>category</th><th>tasks</th>{names * len(metrics)}</tr>"
        f"{''.join(rows)}</table></div>"
    )


def _turns(sweep: Sweep) -> list[str]:
    parts = []
    for of_set in sweep.sets:
        found = sweep.found(of_set)
        turns = sorted({task.turn for task in sweep.gallery.tasks[of_set].values()})
        metrics = [
            metric
            for metric in metrics_of(found.values(), OVER_TURNS)
            if any(metric in numbers["metrics"] for numbers in found.values())
        ][:6]
        if len(turns) < 2 or not metrics:
            continue
        cells = sweep.some(found, MAX_LINES)
        items = []
        for metric in metrics:
            lines = [
                _line(sweep, name, points_of(found[name], metric, "turn", turns)) for name in cells
            ]
            items.append(_panel(metric, "turn", lines, ticks=turns))
        parts += [
            f"<h3>{_text(of_set)}</h3>",
            _legend({name: sweep.colours[name] for name in cells}),
            charts.panels(items),
        ]
    if parts:
        parts.append(
            f"<p class=quiet>Bands are {CONFIDENCE:.0%} intervals. Baselines are dashed, and left "
            "out where they are beyond the scale of the others.</p>"
        )
    return parts


def _steps(sweep: Sweep) -> list[str]:
    groups = alike(sweep.cells, "num_steps")
    if not any(len(names) > 1 for names in groups):
        return []
    parts = []
    for of_set in sweep.sets:
        found, metric = sweep.found(of_set), sweep.headline(of_set)
        if metric is None:
            continue
        by_steps, by_time, ticks = [], [], set()
        for names in groups:
            known = [name for name in names if name in found and estimate_of(found[name], metric)]
            steps = {name: sweep.cells[name]["sampler"]["num_steps"] for name in known}
            times = {
                name: found[name]["speed"]["seconds_per_image"]
                for name in known
                if found[name]["speed"]
            }
            ticks |= set(steps.values())
            for places, lines in ((steps, by_steps), (times, by_time)):
                points = {x: estimate_of(found[name], metric) for name, x in places.items()}
                labels = {x: (name, sweep.colours[name]) for name, x in places.items()}
                if points:
                    lines.append(_line(sweep, names[0], points)._replace(names=labels))
        items = [_panel(metric, "sampling steps", by_steps, log_x=True, ticks=sorted(ticks))]
        if by_time:
            items.append(_panel(metric, "seconds an image", by_time, log_x=True))
        parts += [f"<h3>{_text(of_set)}</h3>", charts.panels(items, 2, (5.6, 3.0))]
    return ["<p>Lines join cells that differ in the number of their steps only.</p>", *parts]


def _checkpoints(sweep: Sweep) -> list[str]:
    runs = {name: about for name, about in sweep.cells.items() if about["step"] is not None}
    groups = alike(runs, "step")
    groups = [names for names in groups if len({runs[name]["step"] for name in names}) > 1]
    if not groups:
        return []
    parts = []
    for of_set in sweep.sets:
        found, losses = sweep.found(of_set), sweep.summary["losses"].get(of_set, {})
        wanted = [sweep.headline(of_set), "l1", *DISTANCES]
        metrics = metrics_of(found.values(), filter(None, wanted))[:3]
        items = []
        for metric in metrics:
            lines = []
            for names in groups:
                known = [name for name in names if name in found]
                values = {sweep.cells[n]["step"]: estimate_of(found[n], metric) for n in known}
                points = {step: value for step, value in values.items() if value}
                lines += [_line(sweep, names[0], points)] if points else []
            items.append(_panel(metric, "training step", lines))
        lines = []
        for names in groups:
            cells = [sweep.cells[name] for name in names]
            means = {
                c["step"]: losses[loss_name(c)]["mean"] for c in cells if loss_name(c) in losses
            }
            if means:
                points = {step: (mean,) * 3 for step, mean in means.items()}
                lines.append(_line(sweep, names[0], points))
        if lines:
            items.append(Panel("held-out loss", "training step", lines))
        if items:
            firsts = [(sweep.cells[names[0]], sweep.colours[names[0]]) for names in groups]
            legend = {
                f"{about['checkpoint']}, {about['params']}: {describe(about)[1]}": colour
                for about, colour in firsts
            }
            parts += [f"<h3>{_text(of_set)}</h3>", _legend(legend), charts.panels(items)]
    return parts


def _losses(sweep: Sweep) -> list[str]:
    colours: dict[str, str] = {}
    for name, about in sweep.cells.items():
        if not about["baseline"]:
            colours.setdefault(loss_name(about), sweep.colours[name])
    parts = []
    for of_set, losses in sweep.summary["losses"].items():
        kinds = sorted({kind for one in losses.values() for kind in one.get("kinds", {})})
        views = kinds if len(kinds) > 1 else [ALL]
        items, rows = [], []
        for view in views:
            lines = []
            for name, one in losses.items():
                part = one if view == ALL else one["kinds"].get(view)
                if part:
                    points = {level["t"]: (level["mean"],) * 3 for level in part["levels"]}
                    lines.append(Line(points, colours.get(name, GREYS[0])))
            title = "all" if view == ALL else view.replace("_", " ")
            positive = all(p[0] > 0 for line in lines for p in line.points.values())
            items.append(Panel(title, "time t, from 0 (clean) to 1 (noise)", lines, log_y=positive))
        for name, one in losses.items():
            means = [one["kinds"][k]["mean"] if k in one.get("kinds", {}) else None for k in kinds]
            values = [one["mean"], *means] if len(kinds) > 1 else [one["mean"]]
            cells = "".join(f"<td>{'–' if v is None else f'{v:.4f}'}</td>" for v in values)
            dot = _dot(colours.get(name, GREYS[0]))
            rows.append(f"<tr><td>{dot}{_text(name)}</td><td>{one['count']}</td>{cells}</tr>")
        head = "".join(f"<th>{_text(k.replace('_', ' '))}</th>" for k in kinds if len(kinds) > 1)
        parts += [
            f"<h3>{_text(of_set)}</h3>",
            charts.panels(items, 2, (5.6, 3.0)),
            "<div class=wide><table><tr><th>checkpoint</th><th>losses</th><th>mean</th>"
            f"{head}</tr>{''.join(rows)}</table></div>",
        ]
    if parts:
        parts.insert(
            0,
            "<p>The flow-matching loss of examples held out, at fixed times and with fixed noise: "
            "two checkpoints differ by their weights alone.</p>",
        )
    return parts


def _sheets(sweep: Sweep) -> list[str]:
    parts = []
    for of_set in sweep.sets:
        first = next(iter(sweep.found(of_set)))
        cells = sweep.some(sweep.found(of_set), MAX_PICTURES)
        tasks = sweep.gallery.tasks[of_set].values()
        note = "The first tasks of each category in turn, not chosen by their results."
        if any(task.follows for task in tasks):
            note += (
                " In later turns each cell edits its own picture of the turn before; the context "
                "shown is the session's first."
            )
        parts += [
            f"<h3>{_text(of_set)}</h3>",
            f"<p class=quiet>{note}</p>",
            sweep.gallery.sheet(of_set, cells, sweep.sheet_rows),
        ]
        metric, known = sweep.headline(of_set), sweep.found(of_set)[first]["metrics"]
        if metric not in known:
            continue
        has_ties = "l1" in known and metric != "l1"
        ties = "; ties are broken by the L1 to the truth" if has_ties else ""
        truth = ", truth" if any(task.truth is not None for task in tasks) else ""
        for title, cards in sweep.gallery.extremes(of_set, first, metric):
            parts += [
                f"<h3>{title}: {_text(of_set)}, {_text(first)}</h3>",
                f"<p class=quiet>Context, result{truth}; by “{METRICS[metric].title}”{ties}.</p>",
                f"<div class=cards>{cards}</div>",
            ]
    return parts


def _pairs(sweep: Sweep) -> list[str]:
    if len(sweep.cells) < 2 or not sweep.sets:
        return []
    for of_set in sweep.sets:
        sweep.gallery.keep(of_set, list(sweep.found(of_set)), sweep.sheet_rows)

    def select(name: str, options: Sequence[str], chosen: int) -> str:
        lines = "".join(
            f"<option{' selected' if i == chosen else ''}>{_text(option)}</option>"
            for i, option in enumerate(options)
        )
        return f"<label class=choice>{name} <select id={name}>{lines}</select></label>"

    left, right = sweep.some(sweep.cells, 2)
    names = list(sweep.cells)
    return [
        "<p>"
        + select("set", sweep.sets, 0)
        + select("left", names, names.index(left))
        + select("right", names, names.index(right))
        + "</p><div class=wide><table class=sheet id=pair></table></div>"
    ]


def _training(title: str, run: Path) -> str:
    """Each player's loss by step, and what was measured on held-out examples meanwhile."""
    trained, held_out = (_log(run / f"{name}.jsonl") for name in ("metrics", "validation"))
    losses = [name for name in (trained[0] if trained else {}) if name.endswith("/loss")]
    if not losses:
        return f"<p>{_text(title)}: no losses in {_text(str(run / 'metrics.jsonl'))}.</p>"
    items = []
    for name in losses:
        points = {line["step"]: (line[name],) * 3 for line in trained if name in line}
        # It may fall by magnitudes.
        positive = all(value > 0 for value, _, _ in points.values())
        lines = [Line(points, COLOURS[0])]
        items.append(Panel(f"{title}: {name}", "step", lines, log_y=positive, markers=False))
    known = held_out[0] if held_out else {}
    judged = [name for name in HEADLINE if name in known][:1]
    for name in ["loss"] * ("loss" in known) + judged:
        points = {line["step"]: (line[name],) * 3 for line in held_out}
        shown = METRICS[name].title if name in METRICS else name
        percent = name in METRICS and is_percent(name)
        lines = [Line(points, COLOURS[0])]
        items.append(Panel(f"{title}, held out: {shown}", "step", lines, percent))
    return charts.panels(items, 3, (3.85, 2.4))


def _log(file: Path) -> list[dict[str, Any]]:
    """The lines that a run has told; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _times(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    rows = "".join(f"<tr><td>{_text(k)}</td><td>{v:.0f} s</td></tr>" for k, v in seconds.items())
    total = sum(seconds.values())
    return (
        f"<table><tr><th>stage</th><th></th></tr>{rows}"
        f"<tr class=total><td>together</td><td>{total:.0f} s</td></tr></table>"
    )


def _spaced(points: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): value for name, value in points.items()}


def _line(sweep: Sweep, cell: str, points: Mapping) -> Line:
    return Line(points, sweep.colours[cell], dashed=bool(sweep.cells[cell]["baseline"]))


def _panel(metric: str, xlabel: str, lines: Sequence[Line], **settings) -> Panel:
    return Panel(METRICS[metric].title, xlabel, lines, is_percent(metric), **settings)


def _speed(found: Mapping[str, Any], name: str) -> str:
    speed = found["speed"].get(name)
    return "–" if speed is None else f"{speed:.3g}"


def _legend(colours: Mapping[str, str]) -> str:
    names = (f"<span class=name>{_dot(c)}{_text(name)}</span>" for name, c in colours.items())
    return f"<div class=legend>{''.join(names)}</div>"


def _dot(colour: str) -> str:
    return f"<span class=dot style='background:{colour}'></span>"


def _name(sweep: Sweep, cell: str) -> str:
    return f"{_dot(sweep.colours[cell])}{_text(cell)}"


def _css(sweep: Sweep, cell: str) -> str:
    return " class=baseline" if sweep.cells[cell]["baseline"] else ""


def _first(i: int) -> str:
    return " class=first" if i == 0 else ""


def _text(text: str) -> str:
    return html.escape(text)
