"""What scores come to: means with intervals of confidence, by category and by turn."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from kontext_jax.types import Task

ALL = "all"

DRAWS = 1000
"""Of the bootstrap."""

CONFIDENCE = 0.95

MIN_GROUPS = 8
"""Fewer are too few for an interval: of normal values, it would hold the truth in 74 % of cases
with 3 groups and in 79 % with 4, but in 88 % with 8 and in 93 % with 32."""

DRAWN_AT_ONCE = 2**20
"""Groups; bounds the bootstrap's memory."""


class Metric(NamedTuple):
    """How a number is called, written and read.

    Attributes:
      title: in headings.
      show: its text.
      better: +1 where more is better, -1 where less is, 0 where neither is: a picture that is just
        like its context has not been edited.
    """

    title: str
    show: Callable[[float], str]
    better: int


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


METRICS = {
    "edit_success": Metric("edit carried out", _percent, +1),
    "preservation": Metric("the rest kept", _percent, +1),
    "l1": Metric("L1 to the truth", _plain(4), -1),
    "l2": Metric("L2 to the truth", _plain(4), -1),
    "psnr": Metric("PSNR, dB", _plain(2), +1),
    "ssim": Metric("SSIM", _plain(3), +1),
    "lpips_alex": Metric("LPIPS (AlexNet)", _plain(3), -1),
    "lpips_vgg": Metric("LPIPS (VGG)", _plain(3), -1),
    "clip_i": Metric("CLIP-I to the truth", _plain(3), +1),
    "clip_i_context": Metric("CLIP-I to the context", _plain(3), 0),
    "clip_t": Metric("CLIP-T", _plain(3), +1),
    "clip_dir": Metric("CLIP direction", _plain(3), +1),
    "dinov2": Metric("DINOv2 to the truth", _plain(3), +1),
    "dinov2_context": Metric("DINOv2 to the context", _plain(3), 0),
    "efflite0": Metric("EfficientNet-Lite0 to the truth", _plain(3), +1),
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
}
"""All metrics, in the order in which tables show them. The last are of a set as a whole."""


class Estimate(NamedTuple):
    """A mean of ``count`` values, and the interval of confidence around it, where there is one."""

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(
    values: Float[np.ndarray, " n"], groups: Sequence[str], draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The mean of values, with a percentile bootstrap over groups (Efron 1979).

    Values of one group (prompts of one image, turns of one session) are not independent, so whole
    groups are drawn, with replacement; a draw's mean is that of all of its values. Few groups, or
    groups that are all alike, do not tell how others would differ: there is no interval then.

    Args:
      values: one or more.
      groups: of each value.
      draws: how often.
      seed: of the draws.
    """
    _, inverse = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(inverse, values), np.bincount(inverse)
    if len(sums) < MIN_GROUPS or np.ptp(sums / counts) == 0:
        return Estimate(float(values.mean()), None, None, len(values))
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // len(sums))
    means = []
    for start in range(0, draws, at_once):
        drawn = rng.integers(len(sums), size=(min(at_once, draws - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    means = np.concatenate(means)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def summarise(rows: Sequence[Mapping]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """metric -> {"category": {name: estimate}, "turn": {number: estimate}}.

    Turns are of those sessions that have all of them: others would make a difference between two
    turns one of their pictures.

    Args:
      rows: lines of scores: metrics by name, None where there is nothing to say, and the task's
        ``category``, ``group`` and ``turn``. Metrics of which no row says anything are left out.
    """
    found = {}
    last = max((row["turn"] for row in rows), default=0)
    whole = {row["group"] for row in rows if row["turn"] == last}
    for metric in METRICS:
        judged = [row for row in rows if row.get(metric) is not None]
        if not judged:
            continue
        found[metric] = {
            "category": _by(judged, metric, lambda row: row["category"]) | _all(judged, metric),
            "turn": _by(
                [row for row in judged if row["group"] in whole],
                metric,
                lambda row: str(row["turn"]),
            ),
        }
    return found


def _by(rows: Sequence[Mapping], metric: str, key: Callable) -> dict[str, Estimate]:
    parts: dict[str, list[Mapping]] = defaultdict(list)
    for row in rows:
        parts[key(row)].append(row)
    return {name: _estimate(parts[name], metric) for name in sorted(parts)}


def _all(rows: Sequence[Mapping], metric: str) -> dict[str, Estimate]:
    return {ALL: _estimate(rows, metric)}


def _estimate(rows: Sequence[Mapping], metric: str) -> Estimate:
    values = np.array([row[metric] for row in rows], np.float64)
    return estimate(values, [row["group"] for row in rows])


def spread(tasks: Sequence[Task], number: int) -> list[int]:
    """The first tasks of each category in turn, chosen before any result is known."""
    queues: dict[str, list[int]] = defaultdict(list)
    for i, task in enumerate(tasks):
        queues[task.category].append(i)
    turns = max(map(len, queues.values()))
    order = [queue[k] for k in range(turns) for queue in queues.values() if k < len(queue)]
    return order[:number]
