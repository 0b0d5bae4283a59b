"""Reads a sweep's ``summary.json``: numbers of a cell on a set, descriptions of cells, and CSV.

*Results* is the part of the summary about one cell on one set, *cell* the part about one cell.
"""

import csv
import dataclasses
import io
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
"""Metrics in order of how well they rank models; the first one available makes the headline."""

MAIN = (
    *("edit_success", "preservation", "clip_dir", "dinov2", "l1", "psnr", "fid", "fd_inception"),
    *("fd_dinov2", "clip_t", "auraface", "dlib_similarity", "ocr_contains", "fd_efflite0"),
    *("clip_i_context", "dinov2_context"),
)
"""Metrics in order of preference where there is no room for all."""

RECONSTRUCTION = (
    *("psnr", "ssim", "lpips_vgg", "lpips_alex", "distance_efflite0", "fid", "fd_inception"),
    *("fd_dinov2", "fd_efflite0", "bits_per_pixel", "code_usage", "code_perplexity"),
)
"""Metrics of autoencoders, in order of preference."""

OVER_TURNS = (
    *("edit_success", "preservation", "l1", "psnr", "auraface", "dlib_similarity"),
    *("dinov2_context", "clip_i_context", "efflite0_context", "shift", "colour_drift"),
)
"""Metrics in order of preference for charts over turns: how much of the first image remains."""

PARAMETER_NAMES = {"ema": "averaged", "params": "raw"}

DISTANCES = ("fid", "fd_inception", "fd_dinov2", "fd_efflite0")


class Estimate(NamedTuple):
    """A mean, and the ends of its confidence interval if it has one."""

    mean: float
    low: float | None = None
    high: float | None = None


def results_on(summary: Mapping[str, Any], set_name: str) -> dict[str, Mapping[str, Any]]:
    """cell name -> results, for the cells that were evaluated on a set."""
    cells = summary["cells"].items()
    return {name: cell["sets"][set_name] for name, cell in cells if set_name in cell["sets"]}


def estimate_of(
    results: Mapping[str, Any], metric: str, by: str = "category", key: str = ALL
) -> Estimate | None:
    """A metric's value; None if it is missing or not finite."""
    if key == ALL and metric in results["whole"]:
        values = [results["whole"][metric]]
    else:
        values = results["metrics"].get(metric, {}).get(by, {}).get(key, [None])[:3]
    mean, *ends = map(finite, values)
    return None if mean is None else Estimate(mean, *ends)


def count_of(results: Mapping[str, Any], metric: str, key: str = ALL) -> int:
    """The number of tasks behind a metric's value; 0 for a metric of the set, or a missing one."""
    estimate = results["metrics"].get(metric, {}).get("category", {}).get(key)
    return estimate[3] if estimate else 0


def metrics_of(all_results: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Those of the metrics in ``names`` that any cell has, without repetition."""
    known = {
        metric
        for results in all_results
        for part in ("metrics", "whole")
        for metric in results[part]
    }
    return [name for name in dict.fromkeys(names) if name in known]


def main_metrics(summary: Mapping[str, Any], set_name: str) -> list[str]:
    """The metrics of `MAIN`, or of `RECONSTRUCTION` for autoencoders, that any cell of a set has.

    If there are none, all metrics that any cell has.
    """
    all_results = results_on(summary, set_name).values()
    main = RECONSTRUCTION if is_reconstructed(summary, set_name) else MAIN
    return metrics_of(all_results, main) or metrics_of(all_results, METRICS)


def is_reconstructed(summary: Mapping[str, Any], set_name: str) -> bool:
    """Whether all cells of a set are autoencoders, so that its images are reconstructions."""
    return all(summary["cells"][name]["autoencoder"] for name in results_on(summary, set_name))


def interval_of(results: Mapping[str, Any], metric: str, key: str = ALL) -> str:
    """The confidence interval as text; empty without one, as for a metric of the set."""
    value = estimate_of(results, metric, key=key)
    if value is None or value.low is None or value.high is None:
        return ""
    show = METRICS[metric].show
    return f"{show(value.low).removesuffix('%')} – {show(value.high)}"


def points_of(
    results: Mapping[str, Any], metric: str, by: str, keys: Sequence[Any]
) -> dict[Any, Estimate]:
    """key -> estimate, for the keys that have one."""
    values = {key: estimate_of(results, metric, by, str(key)) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def is_percent(metric: str) -> bool:
    """Whether a metric is a fraction, shown in percent."""
    return METRICS[metric].show(1.0).endswith("%")


def groups_varying(cells: Mapping[str, Mapping[str, Any]], setting: str) -> list[list[str]]:
    """Names of cells, without baselines, grouped so that only ``setting`` varies in a group."""
    groups = defaultdict(list)
    for name, cell in cells.items():
        if not cell["baseline"]:
            settings = {k: cell[k] for k in ("checkpoint", "step", "params", "shift")}
            settings |= cell["sampler"]
            settings.pop(setting)
            groups[json.dumps(settings)].append(name)
    return list(groups.values())


def pick_headline_cell(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The cell of the headline: the first one, or the last step among those that share its run."""
    first = next(iter(cells))
    steps = next((names for names in groups_varying(cells, "step") if first in names), [first])
    return max(steps, key=lambda name: cells[name]["step"] or 0)


def loss_name(cell: Mapping[str, Any]) -> str:
    """The key of a cell's networks in the summary's losses."""
    step = "" if cell["step"] is None else f"@{cell['step']}"
    return f"{cell['checkpoint']}{step} {cell['params']}"


def describe(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    """(origin of a cell's networks, its sampling or latents, first digits of its fingerprints)."""
    if cell["baseline"] == "copy":
        return "the context, unchanged", "", ""
    networks, sampler = cell["checkpoint"], cell["sampler"]
    if cell["baseline"] == "reconstruction":
        return f"the target, reconstructed by the autoencoder of {networks}", "", ""
    if cell["baseline"] == "untrained":
        networks = f"untrained networks of the sizes of {networks}"
    elif cell["step"] is not None:
        networks += f", step {cell['step']}, {PARAMETER_NAMES[cell['params']]} parameters"
    if cell["autoencoder"]:
        usage = _describe_latents(**cell["autoencoder"])
    else:
        usage = ", ".join(
            (
                f"{sampler['num_steps']} step{'s' if sampler['num_steps'] > 1 else ''}",
                sampler["method"],
                *([f"guidance {sampler['guidance']:g}"] if cell["takes_guidance"] else []),
                f"cfg {sampler['cfg_scale']:g}",
                f"shift {cell['shift']}",
            )
        )
    weights = ", ".join(f"{name} {str(sign[0])[:8]}" for name, sign in cell["weights"].items())
    return networks, usage, weights


def _describe_latents(downsample: int, channels: int, codes: int) -> str:
    content = f"one of {codes:,} codes" if codes else f"{channels} channels"
    return f"{content} per {downsample} × {downsample} pixels"


def finite(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON has no NaN or infinity."""
    return value if value is not None and math.isfinite(value) else None


def estimates_of(values: Mapping[Any, float | None]) -> dict[Any, Estimate]:
    """The finite values, as estimates without intervals."""
    return {x: Estimate(y) for x, y in values.items() if finite(y) is not None}


def goodness(metric: str, value: float) -> float:
    """A number to sort by: larger for better values, or for larger ones if neither is better."""
    return (METRICS[metric].better or 1) * value


def target_of(summary: Mapping[str, Any]) -> float | None:
    """MLPerf's target loss if losses follow MLPerf's protocol, otherwise None."""
    is_mlperf = summary.get("config", {}).get("loss") == dataclasses.asdict(MLPERF)
    return MLPERF_TARGET if is_mlperf else None


def as_csv(summary: Mapping[str, Any]) -> str:
    """The summary as CSV, one number per line: of a cell or, for held-out losses, a checkpoint."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", "set", "metric", "by", "of", "mean", "low", "high", "count"])
    for cell_name, cell in summary["cells"].items():
        for set_name, results in cell["sets"].items():
            for metric, breakdowns in results["metrics"].items():
                for by, estimates in breakdowns.items():
                    for key, values in estimates.items():
                        writer.writerow([cell_name, set_name, metric, by, key, *values])
            for part in ("whole", "speed"):
                for metric, value in results[part].items():
                    writer.writerow([cell_name, set_name, metric, part, ALL, value, "", "", ""])
    for set_name, checkpoints in summary["losses"].items():
        for checkpoint, losses in checkpoints.items():
            levels = {f"t={level['t']:g}": level for level in losses["levels"]}
            for key, part in ({ALL: losses} | levels | losses["kinds"]).items():
                row = [checkpoint, set_name, "held_out_loss", "loss", key, part["mean"]]
                writer.writerow([*row, "", "", part["count"]])
    return text.getvalue()
