"""Judges: metrics that score a model's images, one number per image or per set.

A judge is called with `Outputs`, the tasks of a set and a model's images for them. It returns None
where it has nothing to compare with (no target, no face, no words). Those of this module need no
networks; `network_judges` has those that do, and `judge_panel` the choice of a sweep.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from kontext_jax.geometry import Size, resize, size_of
from kontext_jax.metrics import pixels
from kontext_jax.metrics.drift import colour_drift, drift
from kontext_jax.toy_data import checker
from kontext_jax.types import RGBImage, Task

Column = list[float | None]

MIN_TILES = 6
"""Tiles that must agree before a zoom is reported; two or three lie too close together."""

UNCHANGED = 8
"""Levels of 255 by which target and context may differ where an edit leaves the image alone."""

MAX_THREADS = 32
"""Each thread holds the memory for one image; more threads than this only wait for each other."""


class Outputs:
    """The input of a judge: a model's images for the tasks of a set, with their references.

    Targets and contexts are resized to the size of the model's image.
    """

    def __init__(self, name: str, tasks: Sequence[Task], images: Sequence[RGBImage]):
        """``name`` is the set's: judges may cache features of its targets and contexts."""
        self.name, self.tasks, self.images = name, list(tasks), list(images)

    @functools.cached_property
    def sizes(self) -> list[Size]:
        return [size_of(image) for image in self.images]

    @functools.cached_property
    def targets(self) -> list[RGBImage | None]:
        return self._resized([task.truth for task in self.tasks])

    @functools.cached_property
    def contexts(self) -> list[RGBImage | None]:
        """The first stored context of each task; in a session, the context of its first turn."""
        return self._resized([task.contexts[0] if task.contexts else None for task in self.tasks])

    def _resized(self, images: Sequence[RGBImage | None]) -> list[RGBImage | None]:
        pairs = zip(images, self.sizes, strict=True)
        return [None if image is None else resize(image, size) for image, size in pairs]


class Scores(NamedTuple):
    """The scores that a judge returns.

    Attributes:
      columns: metric -> one number per task.
      set_scores: metric -> one number for the whole set.
    """

    columns: Mapping[str, Column]
    set_scores: Mapping[str, float] = {}


Judge = Callable[[Outputs], Scores]
"""Scores outputs; all processes call it together."""


def run_judges(judges: Sequence[Judge], outputs: Outputs) -> Scores:
    """Merges the scores of all judges.

    Raises:
      ValueError: two judges return the same metric, or a column does not have one value per task.
    """
    columns: dict[str, Column] = {}
    set_scores: dict[str, float] = {}
    for judge in judges:
        scores = judge(outputs)
        clashing = columns.keys() & scores.columns.keys()
        clashing |= set_scores.keys() & scores.set_scores.keys()
        if clashing:
            raise ValueError(f"Two judges return {', '.join(sorted(clashing))}.")
        for name, column in scores.columns.items():
            if len(column) != len(outputs.tasks):
                raise ValueError(f"{name} has {len(column)} values for {len(outputs.tasks)} tasks.")
        columns |= scores.columns
        set_scores |= scores.set_scores
    return Scores(columns, set_scores)


def per_image(
    function: Callable[..., Mapping[str, float | None]],
    names: Sequence[str],
    *inputs: Sequence,
    threads: int | None = None,
) -> Scores:
    """Maps ``function`` over images with threads; each process handles its share.

    Args:
      function: returns scores by name; several threads call it at once.
      names: scores to keep.
      inputs: arguments of ``function``, one sequence each, with one entry per image.
      threads: by default one per core, up to `MAX_THREADS`; 1 if ``function`` is not thread-safe.
    """
    number = len(inputs[0])
    share = range(number)[jax.process_index() :: jax.process_count()]
    values = np.zeros((number, len(names)))
    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        results = pool.map(function, *([column[i] for i in share] for column in inputs))
        for i, scores in zip(share, results, strict=True):
            values[i] = [np.nan if scores.get(name) is None else scores[name] for name in names]
    # Gathered as uint32, because JAX would round float64.
    bits = multihost_utils.process_allgather(values.view(np.uint32))
    gathered = np.asarray(bits).reshape(-1, number, 2 * len(names)).view(np.float64)
    for process, theirs in enumerate(gathered):
        values[process :: len(gathered)] = theirs[process :: len(gathered)]
    return Scores({name: _column(column) for name, column in zip(names, values.T, strict=True)})


def _column(values: Float[np.ndarray, " n"]) -> Column:
    return [None if np.isnan(value) else float(value) for value in values]


def judge_pixels(outputs: Outputs) -> Scores:
    """L1, L2, PSNR and SSIM to the target; see `metrics.pixels`."""

    def score(image: RGBImage, target: RGBImage | None) -> dict[str, float | None]:
        if target is None:
            return {}
        # The PSNR of identical images is infinite; a cap of 100 dB keeps means finite.
        scores = {
            "l1": pixels.l1(image, target),
            "l2": pixels.l2(image, target),
            "psnr": min(pixels.psnr(image, target), 100.0),
        }
        if min(image.shape[:2]) >= pixels.WINDOW:
            scores["ssim"] = pixels.ssim(image, target)
        return scores

    names = ("l1", "l2", "psnr", "ssim")
    return per_image(score, names, outputs.images, outputs.targets)


def judge_world(outputs: Outputs) -> Scores:
    """Whether the toy world's checker finds the edit carried out and the rest preserved: 1 or 0.

    It reads only images of the target's size.
    """

    def score(image: RGBImage, task: Task) -> dict[str, float | None]:
        if task.truth is None or task.truth.shape != image.shape:
            return {}
        verdict = checker.check(image, task.details)
        values = {"edit_success": verdict.edited, "preservation": verdict.preserved}
        return {name: None if value is None else float(value) for name, value in values.items()}

    return per_image(score, ("edit_success", "preservation"), outputs.images, outputs.tasks)


def judge_drift(outputs: Outputs) -> Scores:
    """Shift, zoom and colour drift of the regions that the edit should leave unchanged.

    These are the pixels where target and context agree: all of them in an identity probe.
    """

    def score(
        image: RGBImage, target: RGBImage | None, context: RGBImage | None
    ) -> dict[str, float | None]:
        if target is None or context is None:
            return {}
        far = np.abs(target.astype(np.int16) - context) > UNCHANGED
        edited = far[..., 0] | far[..., 1] | far[..., 2]
        kept = ~edited if edited.any() else None
        scores: dict[str, float | None] = {}
        if not edited.all():
            scores["colour_drift"] = float(np.abs(colour_drift(image, target, kept)).mean())
        try:
            motion = drift(image, target, kept)
        except ValueError:  # too small or too flat to register
            return scores
        scores["shift"] = float(np.hypot(*motion.shift))
        if motion.tiles >= MIN_TILES:
            # The absolute value, so that zooming in and out do not cancel in a mean.
            scores["zoom"] = 100 * abs(motion.scale - 1)
        return scores

    names = ("shift", "zoom", "colour_drift")
    return per_image(score, names, outputs.images, outputs.targets, outputs.contexts)
