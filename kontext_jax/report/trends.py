"""Report sections with line charts: by turn, sampling steps, training step and noise level."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kontext_jax.evaluation.scores import ALL, CONFIDENCE, METRICS, MIN_GROUPS
from kontext_jax.evaluation.summary import (
    DISTANCES,
    OVER_TURNS,
    PARAMETER_NAMES,
    Estimate,
    describe,
    estimate_of,
    estimates_of,
    finite,
    groups_varying,
    is_percent,
    loss_name,
    metrics_of,
    points_of,
    target_of,
)
from kontext_jax.report import charts
from kontext_jax.report.charts import Line, Panel
from kontext_jax.report.page import (
    GREYS,
    MAX_LABELS,
    MAX_LINES,
    Sweep,
    distinct_colours,
    legend,
)
from kontext_jax.report.tables import losses_table

WIDE = (5.6, 3.0)
"""Size in inches of charts that are laid out two per row."""


def turns(sweep: Sweep) -> list[str]:
    """Returns charts of quality by turn of multi-turn sessions."""
    parts = []
    for set_name in sweep.sets:
        results = sweep.results(set_name)
        turns = sorted({task.turn for task in sweep.gallery.tasks[set_name].values()})
        metrics = [
            metric
            for metric in metrics_of(results.values(), OVER_TURNS)
            if any(metric in numbers["metrics"] for numbers in results.values())
        ][:6]
        if len(turns) < 2 or not metrics:
            continue
        drawn = sweep.top(set_name, MAX_LINES)
        colours = distinct_colours({name: sweep.colours[name] for name in drawn})
        items = []
        for metric in metrics:
            lines = []
            for name, colour in colours.items():
                points = points_of(results[name], metric, "turn", turns)
                lines.append(Line(points, colour, sweep.is_baseline(name)))
            items.append(_panel(metric, "turn", lines, ticks=turns))
        parts += [
            f"<h3>{escape(set_name)}</h3>",
            sweep.selection_note(set_name, MAX_LINES),
            legend(colours),
            charts.panels(items),
        ]
    if parts:
        parts.append(
            "<p class=quiet>Only sessions that have all turns count. Bands are "
            f"{CONFIDENCE:.0%} confidence intervals; there is none for fewer than {MIN_GROUPS} "
            "sessions, or if all values are equal. Baselines are dashed, have no bands, and do not "
            "set the scale, so they may lie outside a chart.</p>"
        )
    return parts


def steps(sweep: Sweep) -> list[str]:
    """Returns charts of quality by sampling steps, and by time per image."""
    samplers = {name: cell for name, cell in sweep.cells.items() if not cell["autoencoder"]}
    families = groups_varying(samplers, "num_steps")
    if not any(len(names) > 1 for names in families):
        return []
    parts = []
    for set_name in sweep.sets:
        results, metric = sweep.results(set_name), sweep.headline_metric(set_name)
        if metric is None:
            continue
        known = {name for name in results if estimate_of(results[name], metric)}
        groups = [[name for name in names if name in known] for names in families]
        drawn = _top_groups(sweep, set_name, groups)
        crowded = sum(map(len, drawn)) > MAX_LABELS
        by_steps, by_time, ticks = [], [], set()
        for names, colour in zip(drawn, _colours(sweep, drawn), strict=True):
            steps = {name: sweep.cells[name]["sampler"]["num_steps"] for name in names}
            times = {
                name: finite(results[name]["speed"].get("seconds_per_image")) for name in names
            }
            times = {name: seconds for name, seconds in times.items() if seconds is not None}
            ticks |= set(steps.values())
            for xs, lines in ((steps, by_steps), (times, by_time)):
                points = {x: estimate_of(results[name], metric) for name, x in xs.items()}
                labels = {x: (name, sweep.colours[name]) for name, x in xs.items()}
                if points:
                    lines.append(Line(points, colour, labels={} if crowded else labels))
        items = [_panel(metric, "sampling steps", by_steps, log_x=True, ticks=sorted(ticks))]
        if by_time:
            items.append(_panel(metric, "seconds per image", by_time, log_x=True))
        parts.append(f"<h3>{escape(set_name)}</h3>")
        if crowded:
            parts += [_selection_note(sweep, set_name, groups), _legend(sweep, drawn)]
        parts.append(charts.panels(items, WIDE))
    return ["<p>Lines connect cells that differ only in the number of sampling steps.</p>", *parts]


def checkpoints(sweep: Sweep) -> list[str]:
    """Returns charts of quality and held-out loss by training step."""
    parts = []
    for set_name in dict.fromkeys([*sweep.sets, *sweep.summary["losses"]]):
        section = _quality_by_step(sweep, set_name) if set_name in sweep.sets else []
        section += _loss_by_step(sweep, set_name)
        parts += [f"<h3>{escape(set_name)}</h3>", *section] if section else []
    return parts


def _quality_by_step(sweep: Sweep, set_name: str) -> list[str]:
    results = sweep.results(set_name)
    runs = {name: sweep.cells[name] for name in results if sweep.cells[name]["step"] is not None}
    groups = [names for names in groups_varying(runs, "step") if len(names) > 1]
    metrics = filter(None, [sweep.headline_metric(set_name), "l1", *DISTANCES])
    drawn = _top_groups(sweep, set_name, groups)
    items = []
    for metric in metrics_of(results.values(), metrics)[:3]:
        lines = []
        for names, colour in zip(drawn, _colours(sweep, drawn), strict=True):
            values = {runs[name]["step"]: estimate_of(results[name], metric) for name in names}
            points = {step: value for step, value in values.items() if value}
            lines += [Line(points, colour)] if points else []
        items += [_panel(metric, "training step", lines)] if lines else []
    if not items:
        return []
    note = _selection_note(sweep, set_name, groups)
    return [note, _legend(sweep, drawn), charts.panels(items)]


def _loss_by_step(sweep: Sweep, set_name: str) -> list[str]:
    """Returns a chart of the runs' losses: up to ``MAX_LINES``, the headline's and the lowest."""
    means: dict[str, dict[int, float | None]] = defaultdict(dict)
    colours: dict[str, str] = {}
    for name, mean in sweep.losses(set_name).items():
        cell = sweep.cells[name]
        if cell["step"] is not None:
            run = _run(cell)
            means[run][cell["step"]] = mean
            colours.setdefault(run, sweep.colours[name])
    points = {
        run: line
        for run, by_step in means.items()
        if len(by_step) > 1 and (line := estimates_of(by_step))
    }
    if not points:
        return []
    first = _run(sweep.cells[sweep.headline_cell(set_name)])
    order = sorted(points, key=lambda run: (run != first, min(points[run].values())))
    drawn = [run for run in points if run in order[:MAX_LINES]]
    colours = distinct_colours({run: colours[run] for run in drawn})
    target = target_of(sweep.summary)
    lines = [Line(points[run], colour) for run, colour in colours.items()]
    parts = [
        legend(colours),
        charts.panels([Panel("held-out loss", "training step", lines, level=target)], WIDE),
    ]
    if len(points) > len(drawn):
        note = f"Shown of {len(points)} runs: the headline run and those with the lowest loss."
        parts.insert(0, f"<p class=quiet>{note}</p>")
    if target is not None:
        reached_at = {run: _first_below(points[run], target) for run in drawn}
        details = "; ".join(
            f"{run}: " + ("not reached" if step is None else f"first reached at step {step}")
            for run, step in reached_at.items()
        )
        parts.append(f"<p>MLPerf's target (dashed) is {target} or below. {escape(details)}.</p>")
    return parts


def _run(cell: Mapping[str, Any]) -> str:
    return f"{cell['checkpoint']}, {PARAMETER_NAMES[cell['params']]} parameters"


def _first_below(points: Mapping[int, Estimate], target: float) -> int | None:
    return min((step for step, value in points.items() if value.mean <= target), default=None)


def _top_groups(
    sweep: Sweep, set_name: str, groups: Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    """Returns the groups that are drawn: up to ``MAX_LINES``, those with the best cells."""
    ranks = {name: i for i, name in enumerate(sweep.ranked(set_name))}

    def rank(names: Sequence[str]) -> int:
        return min((ranks[name] for name in names if name in ranks), default=len(ranks))

    top = sorted(filter(None, groups), key=rank)[:MAX_LINES]
    return [names for names in groups if names in top]


def _selection_note(sweep: Sweep, set_name: str, groups: Sequence[Sequence[str]]) -> str:
    """Returns how the drawn groups are selected; empty if all are drawn."""
    number, metric = len(list(filter(None, groups))), sweep.headline_metric(set_name)
    if number <= MAX_LINES or metric is None:
        return ""
    title = escape(METRICS[metric].title)
    return (
        f"<p class=quiet>Shown of {number} lines: the one of the headline cell and the best by "
        f"“{title}”.</p>"
    )


def _colours(sweep: Sweep, groups: Sequence[Sequence[str]]) -> list[str]:
    """Returns a colour for the line of each group."""
    return list(distinct_colours({names[0]: sweep.colours[names[0]] for names in groups}).values())


def _legend(sweep: Sweep, groups: Sequence[Sequence[str]]) -> str:
    """Returns a legend of groups: the settings that a group's cells share and other groups lack."""
    shared = []
    for names in groups:
        settings = [", ".join(describe(sweep.cells[name])[:2]).split(", ") for name in names]
        shared.append([part for part in settings[0] if all(part in other for other in settings)])
    titles: dict[str, str] = {}
    for names, own, colour in zip(groups, shared, _colours(sweep, groups), strict=True):
        parts = [p for p in own if len(groups) == 1 or any(p not in other for other in shared)]
        title = ", ".join(parts)
        titles[names[0] if title in ("", *titles) else title] = colour
    return legend(titles)


def held_out_losses(sweep: Sweep) -> list[str]:
    """Returns charts of each checkpoint's held-out loss by noise level, and a table."""
    colours_of: dict[str, str] = {}
    for name, cell in sweep.cells.items():
        if not cell["baseline"]:
            colours_of.setdefault(loss_name(cell), sweep.colours[name])
    parts = []
    for set_name, losses in sweep.summary["losses"].items():
        kinds = sorted({kind for loss in losses.values() for kind in loss.get("kinds", {})})
        panel_kinds = kinds if len(kinds) > 1 else [ALL]
        first = loss_name(sweep.cells[sweep.headline_cell(set_name)])
        means = {name: finite(loss["mean"]) for name, loss in losses.items()}
        known = [name for name, mean in means.items() if mean is not None]
        drawn = sorted(known, key=lambda name: (name != first, means[name]))[:MAX_LINES]
        colours = distinct_colours({n: colours_of.get(n, GREYS[0]) for n in losses if n in drawn})
        items = []
        for kind in panel_kinds:
            lines = []
            for name, colour in colours.items():
                loss = losses[name] if kind == ALL else losses[name]["kinds"].get(kind)
                if loss:
                    points = estimates_of({level["t"]: level["mean"] for level in loss["levels"]})
                    lines.append(Line(points, colour))
            title = "all" if kind == ALL else kind.replace("_", " ")
            positive = all(p.mean > 0 for line in lines for p in line.points.values())
            xlabel = "noise level t, from 0 (clean) to 1 (noise)"
            items.append(Panel(title, xlabel, lines, log_y=positive))
        parts += [
            f"<h3>{escape(set_name)}</h3>",
            charts.panels(items, WIDE),
            losses_table(losses, kinds if len(kinds) > 1 else [], colours),
        ]
    if parts:
        parts.insert(
            0,
            "<p>The flow-matching loss of held-out examples, at fixed noise levels and with fixed "
            "noise, so checkpoints differ only in their weights.</p>",
        )
    return parts


def _panel(metric: str, xlabel: str, lines: Sequence[Line], **settings) -> Panel:
    return Panel(METRICS[metric].title, xlabel, lines, is_percent(metric), **settings)
