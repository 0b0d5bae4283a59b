"""Aggregates scores: means with confidence intervals, by category and by turn."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from kontext_jax.types import Task

ALL = "all"

DRAWS = 1000
"""Bootstrap draws per interval."""

CONFIDENCE = 0.95

MIN_GROUPS = 8
"""Fewest groups that get an interval. For normal values, a 95 % interval covers the true mean in
74 % of cases with 3 groups and 79 % with 4, but in 88 % with 8 and 93 % with 32."""

MAX_DRAWN = 2**20
"""Groups drawn at once, which bounds the bootstrap's memory."""


class Metric(NamedTuple):
    """How a metric is displayed.

    Attributes:
      title: name in headings.
      show: formats a value.
      better: +1 if more is better, -1 if less is better, 0 if neither: an image identical to its
        context has not been edited.
    """

    title: str
    show: Callable[[float], str]
    better: int


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


METRICS = {
    "edit_success": Metric("edit success", _percent, +1),
    "preservation": Metric("rest preserved", _percent, +1),
    "l1": Metric("L1 to the target", _plain(4), -1),
    "l2": Metric("L2 to the target", _plain(4), -1),
    "psnr": Metric("PSNR, dB", _plain(2), +1),
    "ssim": Metric("SSIM", _plain(3), +1),
    "lpips_alex": Metric("LPIPS (AlexNet)", _plain(3), -1),
    "lpips_vgg": Metric("LPIPS (VGG)", _plain(3), -1),
    "distance_efflite0": Metric("distance (EfficientNet-Lite0)", _plain(3), -1),
    "clip_i": Metric("CLIP-I to the target", _plain(3), +1),
    "clip_i_context": Metric("CLIP-I to the context", _plain(3), 0),
    "clip_t": Metric("CLIP-T", _plain(3), +1),
    "clip_dir": Metric("CLIP direction", _plain(3), +1),
    "dinov2": Metric("DINOv2 to the target", _plain(3), +1),
    "dinov2_context": Metric("DINOv2 to the context", _plain(3), 0),
    "efflite0": Metric("EfficientNet-Lite0 to the target", _plain(3), +1),
    "efflite0_context": Metric("EfficientNet-Lite0 to the context", _plain(3), 0),
    "auraface": Metric("same face (AuraFace)", _plain(3), +1),
    "auraface_found": Metric("face still there (AuraFace)", _percent, +1),
    "dlib_similarity": Metric("same face (dlib)", _plain(3), +1),
    "dlib_similarity_found": Metric("face still there (dlib)", _percent, +1),
    "ocr_contains": Metric("words read (OCR)", _percent, +1),
    "ocr_accuracy": Metric("words, and no others (OCR)", _percent, +1),
    "shift": Metric("shift of what stays, pixels", _plain(3), -1),
    "zoom": Metric("zoom of what stays, %", _plain(2), -1),
    "colour_drift": Metric("colour drift of what stays, of 255", _plain(2), -1),
    "fid": Metric("FID", _plain(2), -1),
    "kid": Metric("KID", _plain(4), -1),
    "fd_inception": Metric("FD (InceptionV3)", _plain(2), -1),
    "kid_inception": Metric("KD (InceptionV3)", _plain(4), -1),
    "fd_dinov2": Metric("FD (DINOv2)", _plain(1), -1),
    "kid_dinov2": Metric("KD (DINOv2)", _plain(4), -1),
    "fd_efflite0": Metric("FD (EfficientNet-Lite0)", _plain(1), -1),
    "kid_efflite0": Metric("KD (EfficientNet-Lite0)", _plain(4), -1),
    "bits_per_pixel": Metric("bits per pixel", _plain(3), 0),
    "code_usage": Metric("codes used", _percent, +1),
    "code_perplexity": Metric("perplexity of codes", _plain(1), +1),
}
"""All metrics in the order of the tables; those from ``fid`` on are of a whole set."""


class Estimate(NamedTuple):
    """The mean of ``count`` values, and the ends of its confidence interval if it has one."""

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(
    values: Float[np.ndarray, " n"], groups: Sequence[str], draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The mean of values, with a percentile bootstrap interval over groups (Efron 1979).

    Values of one group (prompts of one image, turns of one session) are not independent, so each
    draw resamples whole groups with replacement and averages all of their values. There is no
    interval if the groups are fewer than `MIN_GROUPS` or all have the same mean: they do not show
    how much other groups would vary.

    Args:
      values: at least one value.
      groups: group of each value.
      draws: number of bootstrap draws.
      seed: seed of the draws.
    """
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(group_of, values), np.bincount(group_of)
    if len(sums) < MIN_GROUPS or np.ptp(sums / counts) == 0:
        return Estimate(float(values.mean()), None, None, len(values))
    rng = np.random.default_rng(seed)
    at_once = max(1, MAX_DRAWN // len(sums))
    means = []
    for start in range(0, draws, at_once):
        drawn = rng.integers(len(sums), size=(min(at_once, draws - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    means = np.concatenate(means)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def summarise(rows: Sequence[Mapping]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Estimates by metric: {"category": {name: estimate}, "turn": {number: estimate}}.

    Turns are compared over the sessions that have all of them, so that a difference between two
    turns is not one between their sessions. Metrics without a value are left out.

    Args:
      rows: scores of one task each: metrics by name, None without a value, and the task's
        ``category``, ``group`` and ``turn``.
    """
    estimates = {}
    last = max((row["turn"] for row in rows), default=0)
    complete = {row["group"] for row in rows if row["turn"] == last}
    for metric in METRICS:
        scored = [row for row in rows if row.get(metric) is not None]
        if not scored:
            continue
        in_complete = [row for row in scored if row["group"] in complete]
        estimates[metric] = {
            "category": _estimates_by(scored, metric, "category")
            | {ALL: _estimate(scored, metric)},
            "turn": _estimates_by(in_complete, metric, "turn"),
        }
    return estimates


def _estimates_by(rows: Sequence[Mapping], metric: str, field: str) -> dict[str, Estimate]:
    parts: dict[str, list[Mapping]] = defaultdict(list)
    for row in rows:
        parts[str(row[field])].append(row)
    return {name: _estimate(parts[name], metric) for name in sorted(parts)}


def _estimate(rows: Sequence[Mapping], metric: str) -> Estimate:
    values = np.array([row[metric] for row in rows], np.float64)
    return estimate(values, [row["group"] for row in rows])


def spread(tasks: Sequence[Task], number: int) -> list[int]:
    """Indices of the first ``number`` tasks, one per category in turn."""
    queues: dict[str, list[int]] = defaultdict(list)
    for i, task in enumerate(tasks):
        queues[task.category].append(i)
    turns = max(map(len, queues.values()))
    order = [queue[k] for k in range(turns) for queue in queues.values() if k < len(queue)]
    return order[:number]
