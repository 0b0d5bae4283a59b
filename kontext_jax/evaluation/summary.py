"""What a sweep's summary says: the numbers of a cell on a set, and what a cell is.

*Found* is the part of ``summary.json`` about one cell on one set, *about* that about one cell.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kontext_jax.evaluation.held_out_loss import MLPERF, MLPERF_TARGET
from kontext_jax.evaluation.scores import ALL, METRICS

HEADLINE = (
    *("edit_success", "clip_dir", "dinov2", "clip_i", "l1", "clip_t", "ocr_contains"),
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

PARAMETER_NAMES = {"ema": "averaged", "params": "raw"}

DISTANCES = ("fid", "fd_inception", "fd_dinov2", "fd_efflite0")


class Estimate(NamedTuple):
    """A mean, and the ends of its confidence interval if there is one."""

    mean: float
    low: float | None = None
    high: float | None = None


def found_on(summary: Mapping[str, Any], of_set: str) -> dict[str, Mapping[str, Any]]:
    """What is known on a set, by the names of the cells that are for it."""
    cells = summary["cells"].items()
    return {name: about["sets"][of_set] for name, about in cells if of_set in about["sets"]}


def estimate_of(
    found: Mapping[str, Any], metric: str, by: str = "category", key: str = ALL
) -> Estimate | None:
    """A metric's value; None if it is not known, or not finite."""
    if key == ALL and metric in found["whole"]:
        values = [found["whole"][metric]]
    else:
        values = found["metrics"].get(metric, {}).get(by, {}).get(key, [None])[:3]
    mean, *ends = map(finite, values)
    return None if mean is None else Estimate(mean, *ends)


def count_of(found: Mapping[str, Any], metric: str, key: str = ALL) -> int:
    """Of how many tasks a metric's value is; 0 if it is of the set as a whole, or not known."""
    estimate = found["metrics"].get(metric, {}).get("category", {}).get(key)
    return estimate[3] if estimate else 0


def metrics_of(found: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Those of some metrics that any cell has."""
    known = {
        metric for numbers in found for part in ("metrics", "whole") for metric in numbers[part]
    }
    return [name for name in dict.fromkeys(names) if name in known]


def main_metrics(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics of some cells that come first; all of them where none of these is known."""
    found = list(found)
    return metrics_of(found, MAIN) or metrics_of(found, METRICS)


def interval_of(found: Mapping[str, Any], metric: str, key: str = ALL) -> str:
    """Low and high end; empty where there is no interval, as of a set as a whole."""
    value = estimate_of(found, metric, key=key)
    if value is None or value.low is None or value.high is None:
        return ""
    show = METRICS[metric].show
    return f"{show(value.low).removesuffix('%')} – {show(value.high)}"


def points_of(
    found: Mapping[str, Any], metric: str, by: str, keys: Sequence[Any]
) -> dict[Any, Estimate]:
    """key -> value, of those keys of which something is known."""
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


def first_cell(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The cell that the headline is about: the first, or the last step of the first one's run."""
    first = next(iter(cells))
    steps = next((names for names in alike(cells, "step") if first in names), [first])
    return max(steps, key=lambda name: cells[name]["step"] or 0)


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
        networks += f", step {about['step']}, {PARAMETER_NAMES[about['params']]} parameters"
    sampling = ", ".join(
        (
            f"{sampler['num_steps']} step{'s' if sampler['num_steps'] > 1 else ''}",
            sampler["method"],
            *([f"guidance {sampler['guidance']:g}"] if about["takes_guidance"] else []),
            f"cfg {sampler['cfg_scale']:g}",
            f"shift {about['shift']}",
        )
    )
    weights = ", ".join(f"{name} {str(sign[0])[:8]}" for name, sign in about["weights"].items())
    return networks, sampling, weights


def finite(value: float | None) -> float | None:
    """A number; None where it is not finite, which JSON has no words for."""
    return value if value is not None and math.isfinite(value) else None


def goodness(metric: str, value: float) -> float:
    """A number that is larger where a metric's value is better, or if it cannot be, is more."""
    return (METRICS[metric].better or 1) * value


def target_of(summary: Mapping[str, Any]) -> float | None:
    """The loss at which a run is done, if losses are measured in MLPerf's way."""
    is_mlperf = summary.get("config", {}).get("loss") == dataclasses.asdict(MLPERF)
    return MLPERF_TARGET if is_mlperf else None
