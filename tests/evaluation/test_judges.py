"""Judges without networks, and what all judges share."""

import threading
import time

import numpy as np
import pytest
from jax.experimental import multihost_utils

from kontext_jax.evaluation import judges
from kontext_jax.evaluation.judges import (
    Outputs,
    Scores,
    judge_drift,
    judge_pixels,
    judge_world,
    per_image,
    run_judges,
)
from kontext_jax.geometry import resize
from kontext_jax.metrics import pixels
from kontext_jax.toy_data import world
from tests.evaluation.fakes import Alone, image, task


def test_targets_and_contexts_are_resized_to_the_output():
    target, first = image(0, 40, 30), image(1, 16, 24)
    tasks = [task(target, first, image(2)), task(), task(image(3), image(3))]
    outputs = Outputs("set", tasks, [image(4, 20, 15), image(5), image(6)])
    assert outputs.sizes == [(20, 15), (16, 16), (16, 16)]
    for images, stored in ((outputs.targets, target), (outputs.contexts, first)):
        np.testing.assert_array_equal(images[0], resize(stored, (20, 15)))
        assert images[1] is None
        assert images[2] is (outputs.tasks[2].truth if stored is target else tasks[2].contexts[0])
    assert outputs.images[0].shape == (15, 20, 3)


def test_run_judges_merges_scores_and_refuses_clashing_metrics():
    outputs = Outputs("set", [task(), task()], [image(0), image(1)])

    def returning(columns, set_scores):
        return lambda outputs: Scores(columns, set_scores)

    first = returning({"a": [1.0, None]}, {"fid": 2.0})
    second, third = returning({"b": [3.0, 4.0]}, {}), returning({}, {"kid": 5.0})
    merged = Scores({"a": [1.0, None], "b": [3.0, 4.0]}, {"fid": 2.0, "kid": 5.0})
    assert run_judges([first, second, third], outputs) == merged
    assert run_judges([], outputs) == Scores({}, {})
    for other in (returning({"a": [0.0, 0.0]}, {}), returning({}, {"fid": 0.0})):
        with pytest.raises(ValueError, match=r"Two judges return (a|fid)\."):
            run_judges([first, other], outputs)
    with pytest.raises(ValueError, match="c has 3 values for 2 tasks"):
        run_judges([first, returning({"c": [1.0, 2.0, 3.0]}, {})], outputs)


VALUES = [1 / 3, None, np.pi * 1e-30, float("nan"), -7.0, 1e300, 0.0]


def scores_of(i: int) -> dict:
    """The scores of image i; every third has no key b."""
    return {"a": VALUES[i]} | ({"b": -i / 7} if i % 3 else {})


EXPECTED = Scores(
    {
        "b": [-i / 7 if i % 3 else None for i in range(7)],
        "a": [1 / 3, None, np.pi * 1e-30, None, -7.0, 1e300, 0.0],
    }
)


def test_per_image_scores_keep_their_order_and_every_bit():
    assert per_image(scores_of, ("b", "a"), range(7)) == EXPECTED
    pairs = per_image(lambda i, j: {"a": 10 * i + j}, ("a",), [1, 2], [3, 4])
    assert pairs.columns == {"a": [13.0, 24.0]}


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_share_the_images(monkeypatch, processes):
    """Collects every process's share first, then gathers all; the last case has idle processes."""
    shares, scored, result = [], [], []
    monkeypatch.setattr(judges.jax, "process_count", lambda: processes)

    def score(i):
        scored.append(i)
        return scores_of(i)

    def run(process, gather):
        with monkeypatch.context() as patch:
            patch.setattr(judges.jax, "process_index", lambda: process)
            patch.setattr(multihost_utils, "process_allgather", gather)
            result[:] = [per_image(score, ("b", "a"), range(7))]

    def keep(x):
        shares.append(np.array(x))
        return np.stack([x] * processes)

    for process in range(processes):
        run(process, keep)
    assert sorted(scored) == list(range(7))
    for process in range(processes):
        run(process, lambda x: np.stack(shares))
        assert result == [EXPECTED]
    assert shares[0].dtype == np.uint32  # JAX would round float64


def test_one_thread_per_core_and_results_stay_in_order(cores):
    """All seven must run at once: each waits until the next one is done."""
    done = [threading.Event() for _ in range(8)]
    done[7].set()

    def score(i: int) -> dict:
        assert done[i + 1].wait(60)
        done[i].set()
        return scores_of(i)

    assert per_image(score, ("b", "a"), range(7)) == EXPECTED


def test_one_thread_for_functions_that_are_not_thread_safe(cores):
    alone = Alone()

    def score(i: int) -> dict:
        with alone:
            return scores_of(i)

    assert per_image(score, ("b", "a"), range(7), threads=1) == EXPECTED
    with pytest.raises(AssertionError, match="two at a time"):
        per_image(score, ("b", "a"), range(7))


def test_the_first_failure_is_raised_and_stops_the_rest(cores):
    scored = []

    def score(i: int) -> dict:
        scored.append(i)
        if i in (2, 5):
            raise ValueError(f"image {i} is broken")
        time.sleep(0.01)
        return scores_of(0)

    for threads in (None, 1):
        with pytest.raises(ValueError, match="image 2 is broken"):
            per_image(score, ("b", "a"), range(500), threads=threads)
    assert len(scored) < 500


def test_scores_do_not_depend_on_the_number_of_threads(monkeypatch):
    targets = [waves(i) for i in range(8)]
    images = [waves(i, (0.1 * i, -0.3), 1 + i / 500) for i in range(8)]
    outputs = Outputs("set", [task(target, target) for target in targets], images)
    scores = []
    for cores in (1, 5):
        monkeypatch.setattr(judges.os, "cpu_count", lambda n=cores: n)
        scores.append(run_judges([judge_pixels, judge_drift], outputs))
    assert scores[0] == scores[1]
    assert len(set(scores[0].columns["ssim"])) == len(set(scores[0].columns["shift"])) == 8


def test_pixel_scores_match_the_metrics():
    target = image(0, 20, 24)
    tasks = [task(target), task(image(0, 40, 30)), task(), task(target), task(image(1, 8, 8))]
    images = [image(2, 20, 24), image(3, 20, 15), image(4), target.copy(), image(5, 8, 8)]
    columns, set_scores = judge_pixels(Outputs("set", tasks, images))
    assert list(columns) == ["l1", "l2", "psnr", "ssim"] and set_scores == {}
    for i, expected in ((0, target), (1, resize(tasks[1].truth, (20, 15))), (4, tasks[4].truth)):
        for name in ("l1", "l2", "psnr"):
            assert columns[name][i] == getattr(pixels, name)(images[i], expected)
    assert columns["ssim"][0] == pixels.ssim(images[0], target)
    assert columns["ssim"][1] == pixels.ssim(images[1], resize(tasks[1].truth, (20, 15)))
    assert columns["ssim"][4] is None  # smaller than the window
    assert [columns[name][2] for name in columns] == [None] * 4
    assert [columns[name][3] for name in columns] == [0.0, 0.0, 100.0, pytest.approx(1.0)]


def test_the_toy_world_s_checker_accepts_targets_and_rejects_contexts():
    tasks = [task for task in world.sessions(6, turns=2) if task.turn == 1]
    named = {task.prompt for task in tasks}
    assert len(named) > 3
    targets = judge_world(Outputs("set", tasks, [task.truth for task in tasks])).columns
    assert targets == {"edit_success": [1.0] * 6, "preservation": [1.0] * 6}
    contexts = judge_world(Outputs("set", tasks, [task.contexts[0] for task in tasks])).columns
    assert contexts == {"edit_success": [0.0] * 6, "preservation": [1.0] * 6}
    grey = [np.full((32, 32, 3), 128, np.uint8)] * 6
    assert judge_world(Outputs("set", tasks, grey)).columns["preservation"] == [0.0] * 6
    large = [np.full((64, 64, 3), 128, np.uint8)] * 6
    assert judge_world(Outputs("set", tasks, large)).columns["edit_success"] == [None] * 6


def test_the_toy_world_s_checker_returns_none_without_details():
    triples = (world.triple(index, split="train") for index in range(100))
    drawn = next(triple for triple in triples if not triple.contexts)
    tasks = [task(image(0)), task(drawn.target, details=drawn.details)]
    columns = judge_world(Outputs("set", tasks, [image(1), drawn.target])).columns
    assert columns == {"edit_success": [None, 1.0], "preservation": [None, None]}


SIDE = 96


def waves(seed: int, shift=(0.0, 0.0), scale: float = 1.0) -> np.ndarray:
    """A smooth grey image, computed at the moved positions and so without resampling."""
    rng = np.random.default_rng(seed)
    frequency, phase = rng.uniform(-0.12, 0.12, (60, 2)), rng.uniform(0, 2 * np.pi, 60)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    positions = np.stack([x - shift[0], y - shift[1]], axis=-1) / scale
    grey = 128 + 7 * np.sin(2 * np.pi * positions @ frequency.T + phase).sum(axis=-1)
    return np.repeat(np.clip(np.round(grey), 20, 230).astype(np.uint8)[..., None], 3, axis=2)


def drift_of(output: np.ndarray, target, *contexts) -> dict:
    columns = judge_drift(Outputs("set", [task(target, *contexts)], [output])).columns
    assert list(columns) == ["shift", "zoom", "colour_drift"]
    return {name: column[0] for name, column in columns.items()}


@pytest.mark.parametrize("shift", [(0.3, -0.4), (-1.5, 2.0), (0.0, 0.25)])
def test_drift_measures_a_shift(shift):
    scores = drift_of(waves(0, shift), waves(0), waves(0))
    assert scores["shift"] == pytest.approx(np.hypot(*shift), rel=0.1)
    assert abs(scores["zoom"]) < 0.1


@pytest.mark.parametrize("zoom", [-1.0, 2.0])
def test_drift_measures_a_zoom(zoom):
    scores = drift_of(waves(1, scale=1 + zoom / 100), waves(1), waves(1))
    assert scores["zoom"] == pytest.approx(abs(zoom), rel=0.1)
    assert scores["shift"] < 0.05


def edited(image: np.ndarray, rows: int = 48) -> np.ndarray:
    """The image with every pixel of the upper rows changed a lot."""
    after = image.copy()
    after[:rows] = (image[:rows].astype(int) + 100) % 256
    return after


def test_drift_ignores_the_edited_region():
    context, target = waves(2), edited(waves(2))
    output = edited(waves(2, (0.5, 0.0)))
    output[:48] = waves(3, (5.0, 5.0))[:48] // 2
    scores = drift_of(output, target, context)
    assert scores["shift"] == pytest.approx(0.5, abs=0.06) and scores["colour_drift"] < 0.5
    everywhere = drift_of(output, target, target)
    assert abs(everywhere["shift"] - 0.5) > 0.2 and everywhere["colour_drift"] > 10


def test_colour_drift_is_of_the_unedited_region():
    context, target = waves(4), edited(waves(4))
    output = target.copy()
    output[48:] += np.array([7, 0, 0], np.uint8)
    output[48:, :, 2] -= 2
    output[:48] = 0
    assert drift_of(output, target, context)["colour_drift"] == (7 + 2) / 3
    # Differences of a few levels, as from saving a file twice, do not count as an edit.
    assert (
        drift_of(output, target, np.where(target == context, target + 8, context).astype(np.uint8))[
            "colour_drift"
        ]
        == (7 + 2) / 3
    )
    assert drift_of(output, target, edited(target, SIDE))["colour_drift"] is None
    for channel in range(3):  # an edit of one channel counts as an edit
        context = target.copy()
        context[..., channel] = edited(target, SIDE)[..., channel]
        assert drift_of(output, target, context)["colour_drift"] is None


def test_drift_is_none_without_texture_target_or_context():
    nothing = {"shift": None, "zoom": None, "colour_drift": None}
    flat, grey = np.full((32, 32, 3), 100, np.uint8), np.full((32, 32, 3), 103, np.uint8)
    assert drift_of(grey, flat, flat) == nothing | {"colour_drift": 3.0}
    assert drift_of(grey, None, flat) == drift_of(grey, flat) == nothing
    assert drift_of(waves(0), waves(0), edited(waves(0), SIDE)) == nothing
    small = waves(0)[:8, :8]
    assert drift_of(small, small, small) == nothing | {"colour_drift": 0.0}
