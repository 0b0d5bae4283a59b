"""The tables of the page: a number, its interval, and which is best."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kontext_jax.evaluation.scores import ALL, METRICS
from kontext_jax.evaluation.summary import (
    count_of,
    estimate_of,
    finite,
    goodness,
    interval_of,
    metrics_of,
)
from kontext_jax.report.page import MAX_ROWS, Sweep, dot, row_of

SPEED = {
    "seconds_per_image": "seconds an image",
    "images_per_second_per_chip": "images a second and chip",
    "compile_seconds": "seconds to compile",
}


def set_table(sweep: Sweep, of_set: str) -> str:
    """Cells by metrics, then their speed; the best, if there are many, then all."""
    found = sweep.found(of_set)
    metrics = metrics_of(found.values(), METRICS)
    speeds = SPEED if any(numbers["speed"] for numbers in found.values()) else {}
    bold = {metric: _best(sweep, found, metric) for metric in metrics}
    arrows = {1: "\u00a0↑", -1: "\u00a0↓", 0: ""}
    heads = [METRICS[metric].title + arrows[METRICS[metric].better] for metric in metrics]
    head = "".join(f"<th>{escape(title)}</th>" for title in ("cell", *heads))
    head += "".join(f"<th{_first(i)}>{title}</th>" for i, title in enumerate(speeds.values()))
    rows = {}
    for name, numbers in found.items():
        cells = [_cell(found, name, metric, name in bold[metric]) for metric in metrics]
        for i, speed in enumerate(speeds):
            cells.append(f"<td{_first(i)}>{speed_of(numbers, speed)}</td>")
        rows[name] = row_of(sweep, name, "".join(cells))

    def table(names: Iterable[str]) -> str:
        shown = "".join(rows[name] for name in names)
        return f"<div class=wide><table><tr>{head}</tr>{shown}</table></div>"

    if len(found) <= MAX_ROWS:
        return table(found)
    baselines = [name for name in found if sweep.is_baseline(name)]
    first = dict.fromkeys([*sweep.some(of_set, MAX_ROWS), *baselines])
    return (
        f"{table(first)}{sweep.note(of_set, MAX_ROWS)}"
        f"<details><summary>All {len(found)} cells</summary>{table(found)}</details>"
    )


def _cell(
    found: Mapping[str, Mapping[str, Any]],
    name: str,
    metric: str,
    is_best: bool = False,
    key: str = ALL,
    css: str = "",
) -> str:
    """A value, its interval, and of how many tasks it is where not all cells, or few, have it."""
    value = estimate_of(found[name], metric, key=key)
    if value is None:
        return f"<td{css}>–</td>"
    shown = METRICS[metric].show(value.mean)
    shown = f"<b>{shown}</b>" if is_best else shown
    count, tasks = count_of(found[name], metric, key), found[name]["count"][key]
    differ = len({count_of(numbers, metric, key) for numbers in found.values()} - {0}) > 1
    few = f"{count} of {tasks}" if count and (differ or 2 * count < tasks) else ""
    small = filter(None, (interval_of(found[name], metric, key), few))
    return f"<td{css}>{shown}{''.join(f'<small>{text}</small>' for text in small)}</td>"


def _best(sweep: Sweep, found: Mapping[str, Mapping[str, Any]], metric: str) -> set[str]:
    """The cells that are best; none where there are no two to compare, or none can be.

    Pictures of which a metric says nothing, as of a face that is lost, are not in a cell's mean;
    who has such a mean of fewer pictures than another is not called best, and nobody else is.
    """
    if not METRICS[metric].better:
        return set()
    worth = {
        name: goodness(metric, value.mean)
        for name, numbers in found.items()
        if not sweep.is_baseline(name) and (value := estimate_of(numbers, metric))
    }
    counts = {name: count_of(found[name], metric) for name in worth}
    best = {n for n, value in worth.items() if value == max(worth.values()) and len(worth) > 1}
    return {name for name in best if counts[name] == max(counts.values())}


def category_table(
    sweep: Sweep,
    found: Mapping[str, Mapping[str, Any]],
    categories: Sequence[str],
    metrics: Sequence[str],
    cells: Sequence[str],
) -> str:
    """Categories by metrics, each of a few cells."""
    head = "".join(
        f"<th class=first colspan={len(cells)} style='text-align:center'>"
        f"{escape(METRICS[metric].title)}</th>"
        for metric in metrics
    )
    names = "".join(f"<th{_first(i)}>{escape(name)}</th>" for i, name in enumerate(cells))
    rows = []
    for category in categories:
        values = []
        for metric in metrics:
            for i, name in enumerate(cells):
                words = ["first"] * (i == 0) + ["baseline"] * sweep.is_baseline(name)
                css = f" class='{' '.join(words)}'"
                values.append(_cell(found, name, metric, key=category, css=css))
        count = found[cells[0]]["count"][category]
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
    """Checkpoints by the kinds of what their loss is of; those in no chart have no colour."""
    head = "".join(f"<th>{escape(kind.replace('_', ' '))}</th>" for kind in kinds)
    rows = []
    for name, one in losses.items():
        known = one.get("kinds", {})
        values = [one["mean"], *(known[kind]["mean"] if kind in known else None for kind in kinds)]
        values = map(finite, values)
        cells = "".join(f"<td>{'–' if v is None else f'{v:.4f}'}</td>" for v in values)
        shown = dot(colours.get(name, "none")) + escape(name)
        rows.append(f"<tr><td>{shown}</td><td>{one['count']}</td>{cells}</tr>")
    return (
        "<div class=wide><table><tr><th>checkpoint</th><th>losses</th><th>mean</th>"
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def times_table(seconds: Mapping[str, float | None]) -> str:
    """What each stage took; empty if nothing is known."""
    known = {name: time for name, time in seconds.items() if finite(time) is not None}
    if not known:
        return ""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{v:.0f} s</td></tr>" for k, v in known.items())
    total = sum(known.values())
    return (
        f"<table><tr><th>stage</th><th></th></tr>{rows}"
        f"<tr class=total><td>together</td><td>{total:.0f} s</td></tr></table>"
    )


def speed_of(found: Mapping[str, Any], name: str) -> str:
    """One of ``SPEED`` as text."""
    speed = finite(found["speed"].get(name))
    return "–" if speed is None else f"{speed:.3g}"


def _first(i: int) -> str:
    return " class=first" if i == 0 else ""
