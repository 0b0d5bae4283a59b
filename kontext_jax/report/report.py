"""The report of a sweep: one self-contained HTML page with scores, charts and images.

The page needs no network. Each cell keeps its colour in all charts as long as there are enough
colours; baselines are grey.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kontext_jax.evaluation.scores import ALL, CONFIDENCE, DRAWS, METRICS, MIN_GROUPS
from kontext_jax.evaluation.sheets import ERROR_GAIN
from kontext_jax.evaluation.summary import (
    DISTANCES,
    count_of,
    describe,
    estimate_of,
    interval_of,
    is_percent,
    is_reconstructed,
    loss_name,
    main_metrics,
    metrics_of,
    points_of,
    results_on,
    target_of,
)
from kontext_jax.report import charts, gallery, training, trends
from kontext_jax.report.charts import Line
from kontext_jax.report.gallery import Gallery
from kontext_jax.report.page import (
    MAX_BARS,
    MAX_IMAGES,
    MAX_PAIRS,
    STYLE,
    Sweep,
    cell_row,
    colours_of,
    distinct_colours,
    legend,
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
    """Writes ``report.html`` into ``workdir``.

    Args:
      workdir: folder of the sweep, with the images and scores of its cells.
      summary: content of the sweep's ``summary.json``.
      tasks: tasks of each set.
      sheet_rows: number of tasks of each set whose images are shown.
      curves: title -> workdir of each run whose training metrics are drawn.

    Raises:
      FileNotFoundError, ValueError: an image or a file of scores is missing or damaged.
    """
    reconstructed = [name for name in tasks if is_reconstructed(summary, name)]
    pictures = Gallery(workdir, tasks, reconstructed)
    sweep = Sweep(summary, pictures, colours_of(summary["cells"]), sheet_rows)
    sections = {
        "Results": _results(sweep),
        "By category": _categories(sweep),
        "Turn by turn": trends.turns(sweep),
        "Quality and speed": trends.steps(sweep),
        "Checkpoints": trends.checkpoints(sweep),
        "Held-out loss": trends.held_out_losses(sweep),
        "Images": _sheets(sweep),
        "Side by side": _pairs(sweep),
        "Latents": training.latents(sweep),
        "Training": [
            part
            for title, run in (curves or {}).items()
            for part in training.curves(title, Path(run))
        ],
        "Run time": [times_table(summary.get("seconds", {}))],
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
        "<body>" + "\n".join([*body, sweep.gallery.scripts()]) + "</body></html>\n"
    )
    (workdir / "report.html").write_text(page, encoding="utf-8")


def table(summary: Mapping[str, Any]) -> str:
    """Returns the main metrics of all cells on each set, as text tables."""
    parts = []
    for set_name, info in summary["sets"].items():
        results = results_on(summary, set_name)
        metrics = main_metrics(summary, set_name)[:6]
        head = ["", *(METRICS[metric].title for metric in metrics), "seconds per image"]
        rows = [head]
        for name, numbers in results.items():
            values = [estimate_of(numbers, metric) for metric in metrics]
            texts = [
                METRICS[metric].show(value.mean) if value else "–"
                for metric, value in zip(metrics, values, strict=True)
            ]
            rows.append([name, *texts, speed_of(numbers, "seconds_per_image")])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        parts.append("\n".join([f"{set_name}: {info['num_tasks']} tasks", *lines]))
    return "\n\n".join(parts)


def _head(sweep: Sweep) -> list[str]:
    """Returns the headline and the folded list of all cells."""
    rows = []
    for name, cell in sweep.cells.items():
        columns = "".join(f"<td>{escape(part)}</td>" for part in describe(cell))
        rows.append(cell_row(sweep, name, columns))
    cells = (
        "<details><summary>All cells</summary><div class=wide><table class=text><tr><th>cell</th>"
        "<th>networks</th><th>sampler or latents</th><th>weights</th></tr>"
        f"{''.join(rows)}</table></div></details>"
    )
    return [*(_headline(sweep) if sweep.sets else _loss_headline(sweep)), cells]


def _headline(sweep: Sweep) -> list[str]:
    set_name = sweep.sets[0]
    cell, metric = sweep.headline_cell(set_name), sweep.headline_metric(set_name)
    numbers = sweep.results(set_name)[cell]
    value = estimate_of(numbers, metric) if metric else None
    noun = "tasks" if "text_to_image" in numbers["count"] else "edits"
    noun = "images" if sweep.is_reconstructed(set_name) else noun
    noun = f"held-out {noun}" if sweep.summary["sets"][set_name]["held_out"] else noun
    if metric is None or value is None:
        title = f"{numbers['count'][ALL]} {noun}, not scored by any judge"
    else:
        count = count_of(numbers, metric) or numbers["count"][ALL]
        interval = interval_of(numbers, metric)
        interval = f" ({interval})" if interval else ""
        shown = METRICS[metric].show(value.mean)
        if metric == "edit_success":
            title = f"{shown} of {count} {noun} carried out{interval}"
        else:
            name = METRICS[metric].title
            title = f"{name[0].upper()}{name[1:]}: {shown}{interval} on {count} {noun}"
    networks, sampling, weights = describe(sweep.cells[cell])
    details = "; ".join(filter(None, (networks, sampling, weights and f"weights {weights}")))
    return [
        f"<h1>{escape(title)}</h1>",
        f"<p><b>{escape(cell)}</b> on <b>{escape(set_name)}</b>: {escape(details)}.</p>",
    ]


def _loss_headline(sweep: Sweep) -> list[str]:
    """Returns the headline of a sweep that generates no images."""
    set_name = next(iter(sweep.summary["losses"]), None)
    if set_name is None:
        return ["<h1>No images and no held-out losses</h1>"]
    name, target = sweep.headline_cell(set_name), target_of(sweep.summary)
    mean, cell = sweep.losses(set_name)[name], sweep.cells[name]
    loss = "not finite" if mean is None else f"{mean:.4f}"
    count = sweep.summary["losses"][set_name][loss_name(cell)]["count"]
    title = f"Held-out loss on {set_name}: {loss} (mean of {count} losses)"
    details = describe(cell)[0]
    if target is not None:
        verb = "is not reached" if mean is None or mean > target else "is reached"
        details += f"; MLPerf's target ({target} or below) {verb}"
    return [f"<h1>{escape(title)}</h1>", f"<p><b>{escape(name)}</b>: {escape(details)}.</p>"]


def _results(sweep: Sweep) -> list[str]:
    """Returns the table of each set, and notes on how to read it."""
    if not sweep.sets:
        return []
    parts = []
    for set_name in sweep.sets:
        results = sweep.results(set_name)
        counts = next(iter(results.values()))["count"]
        kinds = ", ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if name != ALL
        )
        turns = max(task.turn for task in sweep.gallery.tasks[set_name].values())
        kinds += f"; sessions of up to {turns} turns" if turns > 1 else ""
        parts += [
            f"<h3>{escape(set_name)}</h3>",
            f"<p>{counts[ALL]} tasks: {escape(kinds)}.</p>",
            set_table(sweep, set_name),
        ]
    known = [numbers for set_name in sweep.sets for numbers in sweep.results(set_name).values()]
    notes = [
        f"Ranges are {CONFIDENCE:.0%} confidence intervals from {DRAWS} bootstrap draws of groups; "
        "tasks that share an image or a session form a group, because they are not independent. "
        f"There is no interval for fewer than {MIN_GROUPS} groups, or if all values are equal. "
        "Arrows show whether higher (↑) or lower (↓) is better. The best value of each column is "
        "bold, baselines excluded.",
        "“3 of 18” below a value: only 3 of 18 tasks have a score, for example because no face was "
        "found in the other images. No value is bold if the best one covers fewer tasks than "
        "another.",
    ]
    if metrics_of(known, DISTANCES):
        notes.append(
            "Fréchet distances compare whole sets of images; of a session, only the last image "
            "counts. They are too large for small sets: compare cells on one set, but not sets of "
            "different sizes."
        )
    devices = {
        f"{numbers['speed']['chips']:g} × {numbers['speed']['device']}"
        for numbers in known
        if numbers["speed"]
    }
    if devices:
        notes.append(f"Timed on {', '.join(sorted(devices))}. {sweep.summary['timed']}")
    notes += [f"Not available: {name}. {why}" for name, why in sweep.summary["left_out"].items()]
    return parts + [f"<p class=quiet>{escape(note)}</p>" for note in notes]


def _categories(sweep: Sweep) -> list[str]:
    """Returns bars and a table by category for each set."""
    parts = []
    for set_name in sweep.sets:
        results, metric = sweep.results(set_name), sweep.headline_metric(set_name)
        cell = sweep.headline_cell(set_name)
        known = results[cell]["metrics"]
        categories = [name for name in results[cell]["count"] if name != ALL]
        metrics = [name for name in main_metrics(sweep.summary, set_name) if name in known][:3]
        if len(categories) < 2 or not metrics:
            continue
        parts.append(f"<h3>{escape(set_name)}</h3>")
        if metric in known:
            cells = sweep.top(set_name, MAX_BARS)
            cells = [name for name in cells if not sweep.is_baseline(name)] or cells
            colours = distinct_colours({name: sweep.colours[name] for name in cells})
            lines = [
                Line(points_of(results[name], metric, "category", categories), colours[name])
                for name in cells
            ]
            groups = {name: name.replace("_", " ") for name in categories}
            parts += [
                sweep.selection_note(set_name, MAX_BARS),
                legend(colours),
                charts.bars(groups, lines, METRICS[metric].title, is_percent(metric)),
            ]
        columns = [name for name in results if name == cell or sweep.is_baseline(name)]
        parts.append(category_table(sweep, results, [*categories, ALL], metrics, columns))
    return parts


def _sheets(sweep: Sweep) -> list[str]:
    """Returns a sheet of images for each set, and the headline cell's best and worst images."""
    parts = []
    for set_name in sweep.sets:
        cell, cells = sweep.headline_cell(set_name), sweep.top(set_name, MAX_IMAGES)
        tasks = sweep.gallery.tasks[set_name].values()
        note = "The first tasks of each category, selected independently of the results."
        if sweep.is_reconstructed(set_name):
            note += f" Errors are {ERROR_GAIN} times as large, around middle grey."
        if any(task.follows for task in tasks):
            note += (
                " From the second turn on, each cell edits its own image of the previous turn; the "
                "context shown is the session's first image."
            )
        parts += [
            f"<h3>{escape(set_name)}</h3>",
            f"<p class=quiet>{note}</p>",
            sweep.selection_note(set_name, MAX_IMAGES),
            sweep.gallery.sheet(set_name, cells, sweep.sheet_rows),
        ]
        metric, known = sweep.headline_metric(set_name), sweep.results(set_name)[cell]["metrics"]
        if metric not in known or not METRICS[metric].better:
            continue
        target = ", target" if any(task.truth is not None for task in tasks) else ""
        images = f"Context, result{target}"
        if sweep.is_reconstructed(set_name):
            images = "Original, reconstruction, error"
        order = f"ranked by “{METRICS[metric].title}”"
        if "l1" in known and metric != "l1":
            order += f", then by “{METRICS['l1'].title}”"
        for title, cards in sweep.gallery.extremes(set_name, cell, metric):
            parts += [
                f"<h3>{title}: {escape(set_name)}, {escape(cell)}</h3>",
                f"<p class=quiet>{images}; {order}.</p>",
                f"<div class=cards>{cards}</div>",
            ]
    return parts


def _pairs(sweep: Sweep) -> list[str]:
    """Returns the interactive comparison of two cells."""
    cells_of = {set_name: sweep.top(set_name, MAX_PAIRS) for set_name in sweep.sets}
    for set_name, cells in cells_of.items():
        sweep.gallery.add_set(set_name, cells, sweep.sheet_rows)
    names = list(dict.fromkeys(name for cells in cells_of.values() for name in cells))
    if len(names) < 2:
        return []

    def select(name: str, options: Sequence[str], selected: int) -> str:
        lines = "".join(
            f"<option{' selected' if i == selected else ''}>{escape(option)}</option>"
            for i, option in enumerate(options)
        )
        return f"<label class=choice>{name} <select id={name}>{lines}</select></label>"

    return [
        *dict.fromkeys(sweep.selection_note(set_name, MAX_PAIRS) for set_name in sweep.sets),
        "<p>"
        + select("set", sweep.sets, 0)
        + select("left", names, 0)
        + select("right", names, 1)
        + "</p><div class=wide><table class=sheet id=pair></table></div>",
    ]
