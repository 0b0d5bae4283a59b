"""A sweep as one self-contained page: how well, how fast, what it looks like.

It needs no network. Every cell has one colour in all charts, as long as there are enough of these;
baselines are grey.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kontext_jax.evaluation.scores import ALL, CONFIDENCE, DRAWS, METRICS, MIN_GROUPS
from kontext_jax.evaluation.summary import (
    DISTANCES,
    count_of,
    describe,
    estimate_of,
    found_on,
    interval_of,
    is_percent,
    loss_name,
    main_metrics,
    metrics_of,
    points_of,
    target_of,
)
from kontext_jax.report import charts, gallery, trends
from kontext_jax.report.charts import Line
from kontext_jax.report.gallery import Gallery
from kontext_jax.report.page import (
    MAX_BARS,
    MAX_PAIRS,
    MAX_PICTURES,
    STYLE,
    Sweep,
    colours_of,
    distinct,
    legend,
    row_of,
)
from kontext_jax.report.tables import category_table, set_table, speed_of, times_table
from kontext_jax.types import Task


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
        "Turn by turn": trends.turns(sweep),
        "Steps and time": trends.steps(sweep),
        "Checkpoints": trends.checkpoints(sweep),
        "Held-out loss": trends.held_out_losses(sweep),
        "Pictures": _sheets(sweep),
        "Side by side": _pairs(sweep),
        "Training": [trends.training(title, Path(run)) for title, run in (curves or {}).items()],
        "Time": [times_table(summary.get("seconds", {}))],
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
        metrics = main_metrics(found.values())[:6]
        head = ["", *(METRICS[metric].title for metric in metrics), "seconds an image"]
        rows = [head]
        for name, numbers in found.items():
            values = [estimate_of(numbers, metric) for metric in metrics]
            shown = [
                METRICS[metric].show(value.mean) if value else "–"
                for metric, value in zip(metrics, values, strict=True)
            ]
            rows.append([name, *shown, speed_of(numbers, "seconds_per_image")])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        parts.append("\n".join([f"{of_set}: {about['num_tasks']} tasks", *lines]))
    return "\n\n".join(parts)


def _head(sweep: Sweep) -> list[str]:
    rows = []
    for name, about in sweep.cells.items():
        said = "".join(f"<td>{escape(part)}</td>" for part in describe(about))
        rows.append(row_of(sweep, name, said))
    cells = (
        "<details><summary>All cells</summary><div class=wide><table class=text><tr><th>cell</th>"
        "<th>networks</th><th>sampler</th><th>weights</th></tr>"
        f"{''.join(rows)}</table></div></details>"
    )
    if sweep.sets:
        return [*_headline(sweep), cells]
    return [*_headline_of_losses(sweep), cells]


def _headline(sweep: Sweep) -> list[str]:
    of_set = sweep.sets[0]
    first, metric = sweep.first(of_set), sweep.headline(of_set)
    found = sweep.found(of_set)[first]
    value = estimate_of(found, metric) if metric else None
    what = "tasks" if "text_to_image" in found["count"] else "edits"
    what = f"held-out {what}" if sweep.summary["sets"][of_set]["held_out"] else what
    if metric is None or value is None:
        title = f"{found['count'][ALL]} {what}, and no judge that has a number for them"
    else:
        number = count_of(found, metric) or found["count"][ALL]
        shown, interval = METRICS[metric].show(value.mean), interval_of(found, metric)
        interval = f" ({interval})" if interval else ""
        if metric == "edit_success":
            title = f"{shown} of {number} {what} carried out{interval}"
        else:
            title = f"{METRICS[metric].title} {shown}{interval} over {number} {what}"
    networks, sampling, weights = describe(sweep.cells[first])
    said = "; ".join(filter(None, (networks, sampling, weights and f"weights {weights}")))
    return [
        f"<h1>{escape(title)}</h1>",
        f"<p><b>{escape(first)}</b> on <b>{escape(of_set)}</b>: {escape(said)}.</p>",
    ]


def _headline_of_losses(sweep: Sweep) -> list[str]:
    """Of a sweep that makes no pictures."""
    of_set = next(iter(sweep.summary["losses"]), None)
    if of_set is None:
        return ["<h1>No pictures, and no networks that have a held-out loss</h1>"]
    first, target = sweep.first(of_set), target_of(sweep.summary)
    mean, about = sweep.losses(of_set)[first], sweep.cells[first]
    shown = "that is not finite" if mean is None else f"{mean:.4f}"
    number = sweep.summary["losses"][of_set][loss_name(about)]["count"]
    title = f"Held-out loss {shown} over {number} losses of {of_set}"
    said = describe(about)[0]
    if target is not None:
        verb = "is not reached" if mean is None or mean > target else "is reached"
        said += f"; MLPerf's target, {target} or below, {verb}"
    return [f"<h1>{escape(title)}</h1>", f"<p><b>{escape(first)}</b>: {escape(said)}.</p>"]


def _results(sweep: Sweep) -> list[str]:
    if not sweep.sets:
        return []
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
            f"<h3>{escape(of_set)}</h3>",
            f"<p>{counts[ALL]} tasks: {escape(kinds)}.</p>",
            set_table(sweep, of_set),
        ]
    known = [numbers for of_set in sweep.sets for numbers in sweep.found(of_set).values()]
    notes = [
        f"Small numbers, and those in brackets, are {CONFIDENCE:.0%} intervals by a bootstrap of "
        f"{DRAWS} draws of whole groups, for tasks that share an image or a session are not "
        f"independent; there is none of fewer than {MIN_GROUPS} groups, or where all are alike. "
        "Arrows say whether more (↑) or less (↓) is better; the best of each column is bold, "
        "baselines aside.",
        "“3 of 18” under a number: only three of the tasks have one, as where a face is lost in "
        "the pictures of the others. Nothing is bold where the best has fewer than another.",
    ]
    if metrics_of(known, DISTANCES):
        notes.append(
            "Fréchet distances are of a set as a whole, of sessions of their last pictures, and "
            "too large for few pictures: compare cells of one set, not sets of different numbers."
        )
    devices = {
        f"{numbers['speed']['chips']:g} × {numbers['speed']['device']}"
        for numbers in known
        if numbers["speed"]
    }
    if devices:
        notes.append(f"Times are of {', '.join(sorted(devices))}. {sweep.summary['timed']}")
    notes += [f"Left out: {name}. {why}" for name, why in sweep.summary["left_out"].items()]
    return parts + [f"<p class=quiet>{escape(note)}</p>" for note in notes]


def _categories(sweep: Sweep) -> list[str]:
    parts = []
    for of_set in sweep.sets:
        found, metric = sweep.found(of_set), sweep.headline(of_set)
        first = sweep.first(of_set)
        categories = [name for name in found[first]["count"] if name != ALL]
        metrics = [m for m in main_metrics([found[first]]) if m in found[first]["metrics"]][:3]
        if len(categories) < 2 or not metrics:
            continue
        parts.append(f"<h3>{escape(of_set)}</h3>")
        if metric in found[first]["metrics"]:
            cells = sweep.some(of_set, MAX_BARS)
            cells = [name for name in cells if not sweep.is_baseline(name)] or cells
            colours = distinct({name: sweep.colours[name] for name in cells})
            lines = [
                Line(points_of(found[name], metric, "category", categories), colours[name])
                for name in cells
            ]
            groups = {name: name.replace("_", " ") for name in categories}
            parts += [
                sweep.note(of_set, MAX_BARS),
                legend(colours),
                charts.bars(groups, lines, METRICS[metric].title, is_percent(metric)),
            ]
        beside = [name for name in found if name == first or sweep.is_baseline(name)]
        parts.append(category_table(sweep, found, [*categories, ALL], metrics, beside))
    return parts


def _sheets(sweep: Sweep) -> list[str]:
    parts = []
    for of_set in sweep.sets:
        first, cells = sweep.first(of_set), sweep.some(of_set, MAX_PICTURES)
        tasks = sweep.gallery.tasks[of_set].values()
        note = "The first tasks of each category in turn, not chosen by their results."
        if any(task.follows for task in tasks):
            note += (
                " In later turns each cell edits its own picture of the turn before; the context "
                "shown is the session's first."
            )
        parts += [
            f"<h3>{escape(of_set)}</h3>",
            f"<p class=quiet>{note}</p>",
            sweep.note(of_set, MAX_PICTURES),
            sweep.gallery.sheet(of_set, cells, sweep.sheet_rows),
        ]
        metric, known = sweep.headline(of_set), sweep.found(of_set)[first]["metrics"]
        if metric not in known or not METRICS[metric].better:
            continue
        has_ties = "l1" in known and metric != "l1"
        ties = "; ties are broken by the L1 to the truth" if has_ties else ""
        truth = ", truth" if any(task.truth is not None for task in tasks) else ""
        for title, cards in sweep.gallery.extremes(of_set, first, metric):
            parts += [
                f"<h3>{title}: {escape(of_set)}, {escape(first)}</h3>",
                f"<p class=quiet>Context, result{truth}; by “{METRICS[metric].title}”{ties}.</p>",
                f"<div class=cards>{cards}</div>",
            ]
    return parts


def _pairs(sweep: Sweep) -> list[str]:
    kept = {of_set: sweep.some(of_set, MAX_PAIRS) for of_set in sweep.sets}
    for of_set, cells in kept.items():
        sweep.gallery.keep(of_set, cells, sweep.sheet_rows)
    names = list(dict.fromkeys(name for cells in kept.values() for name in cells))
    if len(names) < 2:
        return []

    def select(name: str, options: Sequence[str], chosen: int) -> str:
        lines = "".join(
            f"<option{' selected' if i == chosen else ''}>{escape(option)}</option>"
            for i, option in enumerate(options)
        )
        return f"<label class=choice>{name} <select id={name}>{lines}</select></label>"

    return [
        *dict.fromkeys(sweep.note(of_set, MAX_PAIRS) for of_set in sweep.sets),
        "<p>"
        + select("set", sweep.sets, 0)
        + select("left", names, 0)
        + select("right", names, 1)
        + "</p><div class=wide><table class=sheet id=pair></table></div>",
    ]
