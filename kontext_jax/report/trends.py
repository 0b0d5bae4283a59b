"""The sections of the page about what grows: turns, sampling steps, training, and noise."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kontext_jax.evaluation.cell_folder import read_lines
from kontext_jax.evaluation.scores import ALL, CONFIDENCE, METRICS, MIN_GROUPS
from kontext_jax.evaluation.summary import (
    DISTANCES,
    HEADLINE,
    OVER_TURNS,
    PARAMETER_NAMES,
    Estimate,
    alike,
    describe,
    estimate_of,
    finite,
    is_percent,
    loss_name,
    metrics_of,
    points_of,
    target_of,
)
from kontext_jax.report import charts
from kontext_jax.report.charts import Line, Panel
from kontext_jax.report.page import (
    COLOURS,
    GREYS,
    MAX_LINES,
    MAX_NAMES,
    Sweep,
    distinct,
    legend,
)
from kontext_jax.report.tables import losses_table

WIDE = (5.6, 3.0)
"""Inches of a chart of which two stand side by side."""


def turns(sweep: Sweep) -> list[str]:
    """How quality changes from turn to turn of sessions."""
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
        colours = distinct({name: sweep.colours[name] for name in sweep.some(of_set, MAX_LINES)})
        items = []
        for metric in metrics:
            lines = []
            for name, colour in colours.items():
                points = points_of(found[name], metric, "turn", turns)
                lines.append(Line(points, colour, sweep.is_baseline(name)))
            items.append(_panel(metric, "turn", lines, ticks=turns))
        parts += [
            f"<h3>{escape(of_set)}</h3>",
            sweep.note(of_set, MAX_LINES),
            legend(colours),
            charts.panels(items),
        ]
    if parts:
        parts.append(
            f"<p class=quiet>Of sessions that have all turns. Bands are {CONFIDENCE:.0%} "
            f"intervals; there are none of fewer than {MIN_GROUPS} sessions, or of equal ones. "
            "Baselines are dashed, without them, and left out where they are beyond the scale of "
            "the others.</p>"
        )
    return parts


def steps(sweep: Sweep) -> list[str]:
    """Quality against sampling steps, and against time."""
    alikes = alike(sweep.cells, "num_steps")
    if not any(len(names) > 1 for names in alikes):
        return []
    parts = []
    for of_set in sweep.sets:
        found, metric = sweep.found(of_set), sweep.headline(of_set)
        if metric is None:
            continue
        known = {name for name in found if estimate_of(found[name], metric)}
        groups = [[name for name in names if name in known] for names in alikes]
        shown = _best(sweep, of_set, groups)
        crowded = sum(map(len, shown)) > MAX_NAMES
        by_steps, by_time, ticks = [], [], set()
        for names, colour in zip(shown, _colours(sweep, shown), strict=True):
            steps = {name: sweep.cells[name]["sampler"]["num_steps"] for name in names}
            times = {name: finite(found[name]["speed"].get("seconds_per_image")) for name in names}
            times = {name: seconds for name, seconds in times.items() if seconds is not None}
            ticks |= set(steps.values())
            for places, lines in ((steps, by_steps), (times, by_time)):
                points = {x: estimate_of(found[name], metric) for name, x in places.items()}
                labels = {x: (name, sweep.colours[name]) for name, x in places.items()}
                if points:
                    lines.append(Line(points, colour, names={} if crowded else labels))
        items = [_panel(metric, "sampling steps", by_steps, log_x=True, ticks=sorted(ticks))]
        if by_time:
            items.append(_panel(metric, "seconds an image", by_time, log_x=True))
        parts.append(f"<h3>{escape(of_set)}</h3>")
        parts += [_note(sweep, of_set, groups), _legend(sweep, shown)] if crowded else []
        parts.append(charts.panels(items, WIDE))
    return ["<p>Lines join cells that differ in the number of their steps only.</p>", *parts]


def checkpoints(sweep: Sweep) -> list[str]:
    """Quality and held-out loss against the step of training."""
    parts = []
    for of_set in dict.fromkeys([*sweep.sets, *sweep.summary["losses"]]):
        here = _quality_by_step(sweep, of_set) if of_set in sweep.sets else []
        here += _loss_by_step(sweep, of_set)
        parts += [f"<h3>{escape(of_set)}</h3>", *here] if here else []
    return parts


def _quality_by_step(sweep: Sweep, of_set: str) -> list[str]:
    found = sweep.found(of_set)
    runs = {name: sweep.cells[name] for name in found if sweep.cells[name]["step"] is not None}
    groups = [names for names in alike(runs, "step") if len(names) > 1]
    wanted = [sweep.headline(of_set), "l1", *DISTANCES]
    shown = _best(sweep, of_set, groups)
    items = []
    for metric in metrics_of(found.values(), filter(None, wanted))[:3]:
        lines = []
        for names, colour in zip(shown, _colours(sweep, shown), strict=True):
            values = {runs[name]["step"]: estimate_of(found[name], metric) for name in names}
            points = {step: value for step, value in values.items() if value}
            lines += [Line(points, colour)] if points else []
        items += [_panel(metric, "training step", lines)] if lines else []
    if not items:
        return []
    return [_note(sweep, of_set, groups), _legend(sweep, shown), charts.panels(items)]


def _loss_by_step(sweep: Sweep, of_set: str) -> list[str]:
    """Of each run; where they are too many for a chart, of the headline's and the best."""
    means: dict[str, dict[int, float | None]] = defaultdict(dict)
    colours: dict[str, str] = {}
    for name, mean in sweep.losses(of_set).items():
        about = sweep.cells[name]
        if about["step"] is not None:
            run = _run(about)
            means[run][about["step"]] = mean
            colours.setdefault(run, sweep.colours[name])
    points = {
        run: line
        for run, by_step in means.items()
        if len(by_step) > 1 and (line := _points(by_step))
    }
    if not points:
        return []
    first = _run(sweep.cells[sweep.first(of_set)])
    order = sorted(points, key=lambda run: (run != first, min(points[run].values())))
    drawn = [run for run in points if run in order[:MAX_LINES]]
    colours = distinct({run: colours[run] for run in drawn})
    target = target_of(sweep.summary)
    lines = [Line(points[run], colour) for run, colour in colours.items()]
    parts = [
        legend(colours),
        charts.panels([Panel("held-out loss", "training step", lines, level=target)], WIDE),
    ]
    if len(points) > len(drawn):
        note = f"Of {len(points)} runs, the headline's and those of the lowest loss."
        parts.insert(0, f"<p class=quiet>{note}</p>")
    if target is not None:
        reached = {run: _first_below(points[run], target) for run in drawn}
        said = "; ".join(
            f"{run}: " + ("not reached" if step is None else f"first reached at step {step}")
            for run, step in reached.items()
        )
        parts.append(f"<p>MLPerf's target (dashed) is {target} or below. {escape(said)}.</p>")
    return parts


def _run(about: Mapping[str, Any]) -> str:
    return f"{about['checkpoint']}, {PARAMETER_NAMES[about['params']]} parameters"


def _first_below(points: Mapping[int, Estimate], target: float) -> int | None:
    return min((step for step, value in points.items() if value.mean <= target), default=None)


def _best(sweep: Sweep, of_set: str, groups: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Groups of cells in order; where there are too many for a chart, those with the best cells."""
    places = {name: i for i, name in enumerate(sweep.ranked(of_set))}

    def place(names: Sequence[str]) -> int:
        return min((places[name] for name in names if name in places), default=len(places))

    kept = sorted(filter(None, groups), key=place)[:MAX_LINES]
    return [names for names in groups if names in kept]


def _note(sweep: Sweep, of_set: str, groups: Sequence[Sequence[str]]) -> str:
    """What is said where not all groups are drawn."""
    number, metric = len(list(filter(None, groups))), sweep.headline(of_set)
    if number <= MAX_LINES or metric is None:
        return ""
    by = escape(METRICS[metric].title)
    return f"<p class=quiet>Of {number} lines, the headline's and those best by “{by}”.</p>"


def _colours(sweep: Sweep, groups: Sequence[Sequence[str]]) -> list[str]:
    """Of the line of each group."""
    return list(distinct({names[0]: sweep.colours[names[0]] for names in groups}).values())


def _legend(sweep: Sweep, groups: Sequence[Sequence[str]]) -> str:
    """What the cells of each group share, but for what all groups do."""
    shared = []
    for names in groups:
        said = [", ".join(describe(sweep.cells[name])[:2]).split(", ") for name in names]
        shared.append([part for part in said[0] if all(part in other for other in said)])
    titles: dict[str, str] = {}
    for names, own, colour in zip(groups, shared, _colours(sweep, groups), strict=True):
        parts = [p for p in own if len(groups) == 1 or any(p not in other for other in shared)]
        title = ", ".join(parts)
        titles[names[0] if title in ("", *titles) else title] = colour
    return legend(titles)


def held_out_losses(sweep: Sweep) -> list[str]:
    """The loss of each checkpoint by its level of noise, and in a table."""
    colours_of: dict[str, str] = {}
    for name, about in sweep.cells.items():
        if not about["baseline"]:
            colours_of.setdefault(loss_name(about), sweep.colours[name])
    parts = []
    for of_set, losses in sweep.summary["losses"].items():
        kinds = sorted({kind for one in losses.values() for kind in one.get("kinds", {})})
        views = kinds if len(kinds) > 1 else [ALL]
        first = loss_name(sweep.cells[sweep.first(of_set)])
        means = {name: finite(one["mean"]) for name, one in losses.items()}
        known = [name for name, mean in means.items() if mean is not None]
        drawn = sorted(known, key=lambda name: (name != first, means[name]))[:MAX_LINES]
        colours = distinct({n: colours_of.get(n, GREYS[0]) for n in losses if n in drawn})
        items = []
        for view in views:
            lines = []
            for name, colour in colours.items():
                part = losses[name] if view == ALL else losses[name]["kinds"].get(view)
                if part:
                    points = _points({level["t"]: level["mean"] for level in part["levels"]})
                    lines.append(Line(points, colour))
            title = "all" if view == ALL else view.replace("_", " ")
            positive = all(p.mean > 0 for line in lines for p in line.points.values())
            items.append(Panel(title, "time t, from 0 (clean) to 1 (noise)", lines, log_y=positive))
        parts += [
            f"<h3>{escape(of_set)}</h3>",
            charts.panels(items, WIDE),
            losses_table(losses, kinds if len(kinds) > 1 else [], colours),
        ]
    if parts:
        parts.insert(
            0,
            "<p>The flow-matching loss of examples held out, at fixed times and with fixed noise: "
            "two checkpoints differ by their weights alone.</p>",
        )
    return parts


def training(title: str, run: Path) -> str:
    """Each player's loss by step, and what was measured on held-out examples meanwhile."""
    trained, held_out = (read_lines(run / f"{name}.jsonl") for name in ("metrics", "validation"))
    losses = [name for name in (trained[0] if trained else {}) if name.endswith("/loss")]
    if not losses:
        return f"<p>{escape(title)}: no losses in {escape(str(run / 'metrics.jsonl'))}.</p>"
    items = []
    for name in losses:
        points = _points({line["step"]: line.get(name) for line in trained})
        # It may fall by magnitudes.
        positive = all(value.mean > 0 for value in points.values())
        lines = [Line(points, COLOURS[0])]
        items.append(Panel(f"{title}: {name}", "step", lines, log_y=positive, markers=False))
    known = held_out[0] if held_out else {}
    judged = [name for name in HEADLINE if name in known][:1]
    for name in ["loss"] * ("loss" in known) + judged:
        points = _points({line["step"]: line.get(name) for line in held_out})
        shown = METRICS[name].title if name in METRICS else name
        percent = name in METRICS and is_percent(name)
        lines = [Line(points, COLOURS[0])]
        items.append(Panel(f"{title}, held out: {shown}", "step", lines, percent))
    return charts.panels(items)


def _points(values: Mapping[Any, float | None]) -> dict[Any, Estimate]:
    """Values without intervals, but for what is not finite."""
    return {x: Estimate(y) for x, y in values.items() if finite(y) is not None}


def _panel(metric: str, xlabel: str, lines: Sequence[Line], **settings) -> Panel:
    return Panel(METRICS[metric].title, xlabel, lines, is_percent(metric), **settings)
