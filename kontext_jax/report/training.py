"""Report sections about training: curves of all players, and the latents of autoencoders."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kontext_jax.evaluation.cell_folder import read_lines
from kontext_jax.evaluation.scores import METRICS
from kontext_jax.evaluation.summary import (
    MAIN,
    RECONSTRUCTION,
    Estimate,
    estimates_of,
    groups_varying,
    is_percent,
)
from kontext_jax.report import charts
from kontext_jax.report.charts import Line, Panel
from kontext_jax.report.page import COLOURS, Sweep

HIDDEN = ("learning_rate", "latent_mean", "latent_square")
"""Metrics of a player that are not drawn: known in advance, or drawn as latents."""

PAIR = {"real": COLOURS[0], "made": COLOURS[1]}
"""Ends of the names of metrics that share a chart, and their colours."""

TITLES = {"kl": "KL", "l1": "L1", "l2": "L2", "r1": "R1"}
"""Titles of metrics that are not their names with spaces."""

MAX_POINTS = 300
"""Points of a curve; more are averaged, so that long runs stay legible."""

MAX_SCORES = 8
"""Charts of validation metrics for a run."""

WIDE_RANGE = 10.0
"""Ratio of largest and smallest value from which an axis is logarithmic."""


def curves(title: str, run: Path) -> list[str]:
    """Returns charts of the training metrics of all players, and of validation, by step."""
    metrics, validation = (read_lines(run / f"{name}.jsonl") for name in ("metrics", "validation"))
    names = list(dict.fromkeys(name for line in metrics for name in line if "/" in name))
    if not any(name.endswith("/loss") for name in names):
        return [f"<p>{escape(title)}: no losses in {escape(str(run / 'metrics.jsonl'))}.</p>"]
    items = [_curve(name, lines, metrics) for name, lines in _charts(names).items()]
    is_autoencoder = any(name.startswith("autoencoder/") for name in names)
    validated = {name for line in validation for name in line}
    scores = [name for name in (RECONSTRUCTION if is_autoencoder else MAIN) if name in validated]
    scores = [name for name in scores if METRICS[name].better][:MAX_SCORES]
    for name in ["loss"] * ("loss" in validated) + scores:
        points = estimates_of({line["step"]: line.get(name) for line in validation})
        label = METRICS[name].title if name in METRICS else name
        percent = name in METRICS and is_percent(name)
        items.append(Panel(f"held out: {label}", "step", [Line(points, COLOURS[0])], percent))
    return [f"<h3>{escape(title)}</h3>", charts.panels(items)]


def _charts(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns title -> the labels and names of the metrics of a chart; the losses come first."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        player, _, metric = name.rpartition("/")
        stem, _, end = metric.rpartition("_")
        if metric in HIDDEN:
            continue
        if end in PAIR:
            found.setdefault(f"{player}: {stem or 'logits'}", {})[end] = name
        else:
            found[f"{player}: {TITLES.get(metric, metric.replace('_', ' '))}"] = {"": name}
    return dict(sorted(found.items(), key=lambda item: not item[0].endswith(": loss")))


def _curve(title: str, names: Mapping[str, str], metrics: Sequence[Mapping[str, Any]]) -> Panel:
    curves = {
        label: _thinned(estimates_of({line["step"]: line.get(name) for line in metrics}))
        for label, name in names.items()
    }
    log_y = _has_wide_range([point.mean for points in curves.values() for point in points.values()])
    lines = []
    for label, points in curves.items():
        colour = PAIR.get(label, COLOURS[0])
        # A weight is 0 before its player starts.
        points = {step: point for step, point in points.items() if point.mean > 0 or not log_y}
        labels = {max(points): (label, colour)} if label and points else {}
        lines.append(Line(points, colour, labels=labels))
    percent = title.endswith(": accuracy")
    return Panel(title, "step", lines, percent, log_y=log_y, markers=False)


def _thinned(points: Mapping[int, Estimate]) -> dict[int, Estimate]:
    """Returns means over neighbours, at the last step of each, if there are many points."""
    steps, number = sorted(points), max(1, math.ceil(len(points) / MAX_POINTS))
    parts = [steps[start : start + number] for start in range(0, len(steps), number)]
    return {part[-1]: Estimate(float(np.mean([points[x].mean for x in part]))) for part in parts}


def _has_wide_range(values: Sequence[float]) -> bool:
    """Whether no value is negative, and the positive ones differ by a factor of `WIDE_RANGE`."""
    positive = [value for value in values if value > 0]
    return bool(positive) and min(values) >= 0 and max(positive) >= WIDE_RANGE * min(positive)


def latents(sweep: Sweep) -> list[str]:
    """Returns bars of the statistics of each autoencoder's latents, by channel.

    Of several checkpoints of a run, only the last one has bars.
    """
    cells, parts = sweep.cells, []
    for title, statistics in sweep.summary["latents"].items():
        steps = next((names for names in groups_varying(cells, "step") if title in names), [title])
        if title in cells and title != max(steps, key=lambda name: cells[name]["step"] or 0):
            continue
        colour, channels = sweep.colours.get(title, COLOURS[0]), statistics["channels"]
        moments = zip(channels["mean"], channels["std"], strict=True)
        bars = {
            "mean ± standard deviation": [Estimate(m, m - std, m + std) for m, std in moments],
            "kurtosis (dashed: normal)": [Estimate(x) for x in channels["kurtosis"]],
            "KL divergence from N(0, 1), nats": [Estimate(x) for x in channels["kl"]],
        }
        codes = statistics.get("codes")
        note = f"{len(channels['mean'])} channels, before scale and shift."
        if codes:
            del bars["KL divergence from N(0, 1), nats"]  # discrete latents have no posterior
            note += (
                f" {codes['used']:.1%} of {codes['number']:,} codes are used; their perplexity is "
                f"{codes['perplexity']:,.1f}."
            )
        items = [
            Panel(
                name,
                "channel",
                [Line(dict(enumerate(values)), colour)],
                bars=True,
                level=3.0 if name.startswith("kurtosis") else None,
            )
            for name, values in bars.items()
        ]
        parts += [f"<h3>{escape(title)}</h3>", f"<p>{note}</p>", charts.panels(items)]
    if parts:
        parts.append(
            "<p class=quiet>Measured on training images when the checkpoint was saved. A channel "
            "whose KL divergence is near 0 carries no information.</p>"
        )
    return parts
