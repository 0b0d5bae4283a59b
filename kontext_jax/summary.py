"""What a sweep's summary says: the numbers of a cell on a set, and what a cell is.

*Found* is the part of ``summary.json`` about one cell on one set, *about* that about one cell.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kontext_jax.charts import Value
from kontext_jax.scores import ALL, METRICS

HEADLINE = (
    *("edit_success", "clip_dir", "dinov2", "clip_i", "l1"),
    *(name for name, metric in METRICS.items() if metric.better),
    *METRICS,
)
"""The first of these that is known says best how good a model is."""

MAIN = (
    *("edit_success", "preservation", "clip_dir", "dinov2", "l1", "psnr", "fid", "fd_inception"),
    *("fd_dinov2", "clip_t", "auraface", "dlib_similarity", "ocr_contains", "fd_efflite0"),
    *("clip_i_context", "dinov2_context"),
)
"""The first of these that are known are shown where there is no room for all."""

OVER_TURNS = (
    *("edit_success", "preservation", "l1", "psnr", "auraface", "dlib_similarity"),
    *("dinov2_context", "clip_i_context", "efflite0_context", "shift", "colour_drift"),
)
"""The same of charts over turns: how much is still there of what was."""

DISTANCES = ("fid", "fd_inception", "fd_dinov2", "fd_efflite0")


def found_on(summary: Mapping[str, Any], of_set: str) -> dict[str, Mapping[str, Any]]:
    """What is known on a set, by the names of the cells that are for it."""
    cells = summary["cells"].items()
    return {name: about["sets"][of_set] for name, about in cells if of_set in about["sets"]}


def estimate_of(
    found: Mapping[str, Any], metric: str, by: str = "category", key: str = ALL
) -> Value | None:
    """(mean, low, high) of a metric; all three the same for one of the set as a whole."""
    if key == ALL and metric in found["whole"]:
        return (found["whole"][metric],) * 3
    values = found["metrics"].get(metric, {}).get(by, {}).get(key)
    return None if values is None else (values[0], values[1], values[2])


def metrics_of(found: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Those of some metrics that any cell has."""
    known = {
        metric for numbers in found for part in ("metrics", "whole") for metric in numbers[part]
    }
    return [name for name in dict.fromkeys(names) if name in known]


def interval_of(found: Mapping[str, Any], metric: str, key: str = ALL) -> str:
    """Low and high end; empty for metrics of a set as a whole."""
    value = estimate_of(found, metric, key=key)
    if value is None or metric in found["whole"]:
        return ""
    low, high = map(METRICS[metric].show, value[1:])
    return f"{low.removesuffix('%')} – {high}"


def points_of(
    found: Mapping[str, Any], metric: str, by: str, keys: Sequence[Any]
) -> dict[Any, Value]:
    """key -> (mean, low, high), of those keys of which something is known."""
    values = {key: estimate_of(found, metric, by, str(key)) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def is_percent(metric: str) -> bool:
    """Whether a metric is a share of 1."""
    return METRICS[metric].show(1.0).endswith("%")


def alike(cells: Mapping[str, Mapping[str, Any]], differing: str) -> list[list[str]]:
    """Names of cells, no baselines, in groups that differ in one setting only."""
    groups = defaultdict(list)
    for name, about in cells.items():
        if not about["baseline"]:
            settings = {k: about[k] for k in ("checkpoint", "step", "params", "shift")}
            settings |= about["sampler"]
            settings.pop(differing)
            groups[json.dumps(settings)].append(name)
    return list(groups.values())


def loss_name(about: Mapping[str, Any]) -> str:
    """What the summary's losses call the networks of a cell."""
    step = "" if about["step"] is None else f"@{about['step']}"
    return f"{about['checkpoint']}{step} {about['params']}"


def describe(about: Mapping[str, Any]) -> tuple[str, str, str]:
    """(where a cell's networks come from, how it samples, the first digits of fingerprints)."""
    if about["baseline"] == "copy":
        return "the context, given back as it is", "", ""
    networks, sampler = about["checkpoint"], about["sampler"]
    if about["baseline"] == "reconstruction":
        return f"the truth, through the autoencoder of {networks} and back", "", ""
    if about["baseline"] == "untrained":
        networks = f"new networks of the sizes of {networks}"
    elif about["step"] is not None:
        params = {"ema": "averaged", "params": "raw"}[about["params"]]
        networks += f", step {about['step']}, {params} parameters"
    sampling = (
        f"{sampler['num_steps']} step{'s' if sampler['num_steps'] > 1 else ''}, "
        f"{sampler['method']}, guidance {sampler['guidance']:g}, cfg {sampler['cfg_scale']:g}, "
        f"shift {about['shift']}"
    )
    weights = ", ".join(f"{name} {str(sign[0])[:8]}" for name, sign in about["weights"].items())
    return networks, sampling, weights


def goodness(metric: str, value: float) -> float:
    """A number that is larger where a metric's value is better, or if it cannot be, is more."""
    return (METRICS[metric].better or 1) * value
