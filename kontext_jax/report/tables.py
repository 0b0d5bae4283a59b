"""The tables of the report: values, confidence intervals, and the best of each column."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kontext_jax.evaluation.scores import ALL, METRICS
from kontext_jax.evaluation.summary import (
    RECONSTRUCTION,
    count_of,
    estimate_of,
    finite,
    goodness,
    interval_of,
    metrics_of,
)
from kontext_jax.report.page import MAX_ROWS, Sweep, cell_row, dot

SPEED = {
    "seconds_per_image": "seconds per image",
    "images_per_second_per_chip": "images per second per chip",
    "compile_seconds": "compile seconds",
}


def set_table(sweep: Sweep, set_name: str) -> str:
    """Returns the metrics and speed of each cell on a set; of many cells the best, the rest folded.

    The best value of each column is bold.
    """
    results = sweep.results(set_name)
    names = RECONSTRUCTION if sweep.is_reconstructed(set_name) else METRICS
    metrics = metrics_of(results.values(), names)
    speeds = SPEED if any(numbers["speed"] for numbers in results.values()) else {}
    bold = {metric: _best(sweep, results, metric) for metric in metrics}
    arrows = {1: "\u00a0↑", -1: "\u00a0↓", 0: ""}
    heads = [METRICS[metric].title + arrows[METRICS[metric].better] for metric in metrics]
    head = "".join(f"<th>{escape(title)}</th>" for title in ("cell", *heads))
    head += "".join(f"<th{_separator(i)}>{title}</th>" for i, title in enumerate(speeds.values()))
    rows = {}
    for name, numbers in results.items():
        columns = [_value(results, name, metric, name in bold[metric]) for metric in metrics]
        for i, speed in enumerate(speeds):
            columns.append(f"<td{_separator(i)}>{speed_of(numbers, speed)}</td>")
        rows[name] = cell_row(sweep, name, "".join(columns))

    def table(names: Iterable[str]) -> str:
        body = "".join(rows[name] for name in names)
        return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"

    if len(results) <= MAX_ROWS:
        return table(results)
    baselines = [name for name in results if sweep.is_baseline(name)]
    top = dict.fromkeys([*sweep.top(set_name, MAX_ROWS), *baselines])
    return (
        f"{table(top)}{sweep.selection_note(set_name, MAX_ROWS)}"
        f"<details><summary>All {len(results)} cells</summary>{table(results)}</details>"
    )


def _value(
    results: Mapping[str, Mapping[str, Any]],
    name: str,
    metric: str,
    is_best: bool = False,
    key: str = ALL,
    css: str = "",
) -> str:
    """Returns a value with its interval, and its number of tasks if that is small or cells differ.

    Small is less than half of the tasks.
    """
    value = estimate_of(results[name], metric, key=key)
    if value is None:
        return f"<td{css}>–</td>"
    text = METRICS[metric].show(value.mean)
    text = f"<b>{text}</b>" if is_best else text
    count, tasks = count_of(results[name], metric, key), results[name]["count"][key]
    differ = len({count_of(numbers, metric, key) for numbers in results.values()} - {0}) > 1
    few = f"{count} of {tasks}" if count and (differ or 2 * count < tasks) else ""
    small = filter(None, (interval_of(results[name], metric, key), few))
    return f"<td{css}>{text}{''.join(f'<small>{line}</small>' for line in small)}</td>"


def _best(sweep: Sweep, results: Mapping[str, Mapping[str, Any]], metric: str) -> set[str]:
    """Returns the best cells by a metric; empty if fewer than two cells can be compared.

    A cell's mean excludes images without a score, such as those in which no face is found. If the
    best mean is of fewer images than another cell's, no cell is best.
    """
    if not METRICS[metric].better:
        return set()
    quality = {
        name: goodness(metric, value.mean)
        for name, numbers in results.items()
        if not sweep.is_baseline(name) and (value := estimate_of(numbers, metric))
    }
    if len(quality) < 2:
        return set()
    counts = {name: count_of(results[name], metric) for name in quality}
    best = {name for name, value in quality.items() if value == max(quality.values())}
    return {name for name in best if counts[name] == max(counts.values())}


def category_table(
    sweep: Sweep,
    results: Mapping[str, Mapping[str, Any]],
    categories: Sequence[str],
    metrics: Sequence[str],
    cells: Sequence[str],
) -> str:
    """Returns a table of categories by metrics, with a column of each metric for each cell."""
    head = "".join(
        f"<th class=first colspan={len(cells)} style='text-align:center'>"
        f"{escape(METRICS[metric].title)}</th>"
        for metric in metrics
    )
    names = "".join(f"<th{_separator(i)}>{escape(name)}</th>" for i, name in enumerate(cells))
    rows = []
    for category in categories:
        values = []
        for metric in metrics:
            for i, name in enumerate(cells):
                classes = ["first"] * (i == 0) + ["baseline"] * sweep.is_baseline(name)
                css = f" class='{' '.join(classes)}'"
                values.append(_value(results, name, metric, key=category, css=css))
        count = results[cells[0]]["count"][category]
        label = escape(category.replace("_", " "))
        css = " class=total" if category == ALL else ""
        rows.append(f"<tr{css}><td>{label}</td><td>{count}</td>{''.join(values)}</tr>")
    return (
        f"<div class=wide><table><tr><th></th><th></th>{head}</tr>"
        f"<tr><th>category</th><th>tasks</th>{names * len(metrics)}</tr>"
        f"{''.join(rows)}</table></div>"
    )


def losses_table(
    losses: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], colours: Mapping[str, str]
) -> str:
    """Returns a table of checkpoints by kinds of examples; without a colour if not in the chart."""
    head = "".join(f"<th>{escape(kind.replace('_', ' '))}</th>" for kind in kinds)
    rows = []
    for name, loss in losses.items():
        by_kind = loss.get("kinds", {})
        values = [loss["mean"], *(by_kind[k]["mean"] if k in by_kind else None for k in kinds)]
        values = map(finite, values)
        columns = "".join(f"<td>{'–' if v is None else f'{v:.4f}'}</td>" for v in values)
        label = dot(colours.get(name, "none")) + escape(name)
        rows.append(f"<tr><td>{label}</td><td>{loss['count']}</td>{columns}</tr>")
    return (
        "<div class=wide><table><tr><th>checkpoint</th><th>losses</th><th>mean</th>"
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def times_table(seconds: Mapping[str, float | None]) -> str:
    """Returns a table of the time of each stage; empty if no time is known."""
    known = {name: time for name, time in seconds.items() if finite(time) is not None}
    if not known:
        return ""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{v:.0f} s</td></tr>" for k, v in known.items())
    total = sum(known.values())
    return (
        f"<table><tr><th>stage</th><th></th></tr>{rows}"
        f"<tr class=total><td>total</td><td>{total:.0f} s</td></tr></table>"
    )


def speed_of(results: Mapping[str, Any], name: str) -> str:
    """Returns one of ``SPEED`` as text."""
    speed = finite(results["speed"].get(name))
    return "–" if speed is None else f"{speed:.3g}"


def _separator(i: int) -> str:
    return " class=first" if i == 0 else ""
