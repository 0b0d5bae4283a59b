"""Each judge against its metric, with None where it has nothing to compare with."""

import dataclasses
import json
import threading
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from kontext_jax.evaluation import judges
from kontext_jax.evaluation.judges import (
    ClipJudge,
    DistanceJudge,
    FaceJudge,
    FeatureJudge,
    JudgesConfig,
    OcrJudge,
    Outputs,
    Scores,
    judge_drift,
    judge_pixels,
    judge_world,
    make_judges,
    per_image,
    run_judges,
)
from kontext_jax.evaluation.scores import METRICS
from kontext_jax.files import sha256_of
from kontext_jax.geometry import resize
from kontext_jax.metrics import pixels
from kontext_jax.metrics.faces import DETECTOR, RECOGNISER
from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.metrics.kernel import kernel_distance
from kontext_jax.metrics.ocr import Reader
from kontext_jax.metrics.similarity import clip_directional, cosine
from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.models.lpips import Lpips, LpipsConfig
from kontext_jax.settings import to_dict
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.toy_data import world
from kontext_jax.types import Task
from kontext_jax.weights import efficientnet, inception
from kontext_jax.weights.clip_vision import Clip


def mesh_of(num_devices: int = 1):
    return make_mesh(MeshConfig(), jax.devices()[:num_devices])


def image(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def task(target=None, *contexts: np.ndarray, **fields) -> Task:
    known = dict(prompt="make it red", category="local", size=(16, 16))
    return Task("x", contexts, truth=target, **known | fields)


# ---- all judges together ------------------------------------------------------------------------


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


@pytest.fixture
def cores(monkeypatch):
    """Pretends that the machine has seven cores."""
    monkeypatch.setattr(judges.os, "cpu_count", lambda: 7)


def test_one_thread_per_core_and_results_stay_in_order(cores):
    """All seven must run at once: each waits until the next one is done."""
    done = [threading.Event() for _ in range(8)]
    done[7].set()

    def score(i: int) -> dict:
        assert done[i + 1].wait(60)
        done[i].set()
        return scores_of(i)

    assert per_image(score, ("b", "a"), range(7)) == EXPECTED


class Alone:
    """Fails if two threads enter at a time."""

    def __init__(self):
        self._lock = threading.Lock()

    def __enter__(self):
        assert self._lock.acquire(blocking=False), "two at a time"
        time.sleep(0.003)

    def __exit__(self, *error):
        self._lock.release()


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


# ---- judges without networks --------------------------------------------------------------------


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


# ---- judges with networks -----------------------------------------------------------------------


class Features:
    """Five statistics per image; records the number of images per call."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.calls.append(len(images))
        return self.of(images)

    @staticmethod
    def of(images: Sequence[np.ndarray]) -> np.ndarray:
        rows = [np.append(x.mean((0, 1)), [x[0].std(), x[:, 0].std()]) for x in images]
        return np.stack(rows).astype(np.float32) / 100 - 1


def feature_outputs(name: str = "set", seed: int = 100, side: int = 16) -> Outputs:
    tasks = [
        task(image(0), image(10)),
        task(None, image(11)),
        task(image(2), image(12), image(99)),
        task(image(3)),
        task(image(4, 32, 32), image(14, 32, 32)),
    ]
    return Outputs(name, tasks, [image(seed + i, side, side) for i in range(5)])


def test_feature_scores_match_the_metrics():
    outputs, features = feature_outputs(), Features()
    columns, set_scores = FeatureJudge("net", features, kid="kid_net")(outputs)
    assert list(columns) == ["net", "net_context"]
    vectors = Features.of(outputs.images)
    for name, images, indices in (
        ("net", outputs.targets, [0, 2, 3, 4]),
        ("net_context", outputs.contexts, [0, 1, 2, 4]),
    ):
        others = Features.of([images[i] for i in indices])
        cosines = [columns[name][i] for i in indices]
        np.testing.assert_array_equal(cosines, cosine(vectors[indices], others))
        assert [columns[name][i] for i in range(5) if i not in indices] == [None]
        assert len(set(cosines)) == 4
    targets, ours = Features.of([outputs.targets[i] for i in (0, 2, 3, 4)]), vectors[[0, 2, 3, 4]]
    assert set_scores == {
        "fd_net": frechet_distance(targets, ours),
        "kid_net": kernel_distance(targets, ours)[0],
    }


def test_distances_use_the_last_image_of_each_session():
    """Sessions have one, two or three turns."""
    turns = {"a1": "", "a2": "a1", "b1": "", "c1": "", "c2": "c1", "c3": "c2"}
    tasks = [
        task(image(i), image(9))._replace(id=name, follows=before)
        for i, (name, before) in enumerate(turns.items())
    ]
    outputs = Outputs("set", tasks, [image(100 + i) for i in range(6)])
    _, set_scores = FeatureJudge("net", Features(), kid="kid_net")(outputs)
    targets, vectors = (
        Features.of([images[i] for i in (1, 2, 5)]) for images in (outputs.targets, outputs.images)
    )
    assert set_scores["fd_net"] == frechet_distance(targets, vectors)
    assert set_scores["kid_net"] == kernel_distance(targets, vectors)[0]


def test_a_feature_judge_with_distances_only():
    judge = FeatureJudge("inception", Features(), similarity="", fd="fid", kid="kid")
    columns, set_scores = judge(feature_outputs())
    assert columns == {} and list(set_scores) == ["fid", "kid"]
    one = Outputs("one", [task(image(0)), task()], [image(1), image(2)])
    assert judge(one) == Scores({}, {})
    same = [image(0), image(1)]
    columns, set_scores = judge(Outputs("same", [task(x) for x in same], same))
    assert set_scores["fid"] == pytest.approx(0, abs=1e-6)


def test_features_of_targets_and_contexts_are_computed_once():
    features = Features()
    judge = FeatureJudge("net", features, kid="kid_net")
    judge(feature_outputs())
    assert sorted(features.calls) == [4, 4, 5]  # targets, contexts, images
    features.calls.clear()
    second = feature_outputs(seed=200)
    scores = judge(second)
    assert features.calls == [5]
    assert scores == FeatureJudge("net", Features(), kid="kid_net")(second)
    for other in (feature_outputs("other set"), feature_outputs(side=24)):
        features.calls.clear()
        scores = judge(other)
        assert sorted(features.calls) == [4, 4, 5]
        assert scores == FeatureJudge("net", Features(), kid="kid_net")(other)


def test_feature_scores_are_none_without_targets_and_contexts():
    features = Features()
    outputs = Outputs("set", [task(), task()], [image(0), image(1)])
    columns, set_scores = FeatureJudge("net", features, kid="kid_net")(outputs)
    assert columns == {"net": [None, None], "net_context": [None, None]} and set_scores == {}
    assert features.calls == [2]


class FakeClip(Clip):
    """Five numbers per image, and per text from counts of letters."""

    def image(self, images, mesh, batch_size=64):
        return Features.of(images)

    def text(self, prompts, mesh, batch_size=64):
        assert len(prompts) and all(prompts)
        return np.stack([self.of(prompt) for prompt in prompts])

    @staticmethod
    def of(text: str) -> np.ndarray:
        return np.array([1.0 + text.count(letter) for letter in "aeiot"], np.float32)


def clip_columns(tasks: list[Task], images: list[np.ndarray]) -> dict[str, list]:
    columns, set_scores = ClipJudge(FakeClip(None, None), mesh_of())(Outputs("set", tasks, images))
    assert list(columns) == ["clip_i", "clip_i_context", "clip_t", "clip_dir"] and set_scores == {}
    return columns


def test_clip_scores_match_the_metrics_for_every_mix_of_captions():
    before, after = "a cat at ease", "too big a tie"
    tasks = [
        task(image(0), image(10), source_caption=before, target_caption=after),
        task(None, image(11), source_caption=before),  # an instruction is not a caption
        task(None, image(12), target_caption=after),
        task(image(3), prompt="a boat on ice", category="text_to_image"),
        task(None, prompt="a boat", target_caption=after, source_caption=before),
        task(image(5), image(15), source_caption=after, target_caption=after),
        task(image(6), image(16), source_caption=after, target_caption=before),
        task(None, prompt="", category="text_to_image"),
    ]
    images = [image(100 + i) for i in range(8)]
    columns, vectors = clip_columns(tasks, images), Features.of(images)

    def cosines(name, others):
        values = [columns[name][i] for i in others]
        np.testing.assert_array_equal(
            values, cosine(vectors[list(others)], np.stack([*others.values()]))
        )
        assert [i for i in range(8) if columns[name][i] is not None] == list(others)

    cosines("clip_i", {i: Features.of([tasks[i].truth])[0] for i in (0, 3, 5, 6)})
    contexts = {i: Features.of([tasks[i].contexts[0]])[0] for i in (0, 1, 2, 5, 6)}
    cosines("clip_i_context", contexts)
    texts = {0: after, 2: after, 3: "a boat on ice", 4: after, 5: after, 6: before}
    cosines("clip_t", {i: FakeClip.of(text) for i, text in texts.items()})
    for i, change in ((0, (after, before)), (6, (before, after))):
        expected = clip_directional(
            vectors[i : i + 1], contexts[i][None], *(FakeClip.of(text)[None] for text in change)
        )
        assert columns["clip_dir"][i] == expected[0]
    assert [i for i in range(8) if columns["clip_dir"][i] is not None] == [0, 6]


def test_clip_scores_are_none_without_captions_targets_or_contexts():
    columns = clip_columns([task(image(0), image(1)), task(None, image(2))], [image(3), image(4)])
    assert columns["clip_t"] == columns["clip_dir"] == [None, None]
    assert columns["clip_i"][1] is None and None not in columns["clip_i_context"]
    columns = clip_columns([task(prompt="a boat")], [image(0)])
    assert columns["clip_i"] == columns["clip_i_context"] == columns["clip_dir"] == [None]
    assert columns["clip_t"][0] is not None


@pytest.fixture(scope="module")
def lpips(random_network):
    return random_network(lambda: Lpips(LpipsConfig(), rngs=nnx.Rngs(0)))


def test_lpips_scores_match_the_network(lpips):
    """With two sizes and a task without a target, on two devices."""
    tasks = [task(image(0, 32, 32)), task(), task(image(2, 64, 80)), task(image(3, 32, 32))]
    images = [image(4, 32, 32), image(5), image(6, 32, 40), tasks[3].truth]
    outputs = Outputs("set", tasks, images)
    columns, set_scores = DistanceJudge("lpips_alex", lpips, mesh_of(2))(outputs)
    assert list(columns) == ["lpips_alex"] and set_scores == {}
    column = columns["lpips_alex"]
    assert column[1] is None and column[3] == pytest.approx(0, abs=1e-6)
    direct = jax.jit(lambda net, a, b: net(to_pixels(a), to_pixels(b)))
    for i in (0, 2):
        expected = float(direct(lpips, images[i][None], outputs.targets[i][None])[0])
        assert column[i] == pytest.approx(expected, rel=1e-5) and abs(expected) > 1e-3
    assert len({column[0], column[2]}) == 2
    none = DistanceJudge("lpips_vgg", lpips, mesh_of())(Outputs("set", [task()], [image(0)]))
    small = Outputs("set", [task(image(0, 30, 32))], [image(1, 30, 32)])
    assert DistanceJudge("x", lpips, mesh_of())(small).columns == {"x": [None]}  # below 31 pixels
    assert none.columns == {"lpips_vgg": [None]}


class FakeFaces:
    """Finds a face in every image whose first pixel is not black."""

    metric = "faces"

    def __init__(self):
        self.calls, self._alone = [], Alone()

    def embed(self, image):
        with self._alone:
            self.calls.append(image[0, 0].tolist())
        return image[0, 0].astype(np.float64) if image[0, 0].any() else None

    def similarity(self, a, b):
        return float(a[0] - b[1])


def face(*colour: int) -> np.ndarray:
    return np.full((4, 4, 3), colour, np.uint8)


def test_face_scores_are_none_without_a_face_in_the_context(cores):
    shared, nobody = face(100, 5, 0), face(0, 0, 0)
    tasks = [
        task(None, shared),
        task(None, nobody),
        task(None, shared, face(9, 9, 9)),
        task(None, shared),
        task(),
        task(None, nobody),
    ]
    encoder = FakeFaces()
    judge = FaceJudge(encoder)
    images = [face(1, 10 + i, 0) for i in range(6)]
    images[2] = face(0, 0, 0)
    scores = judge(Outputs("set", tasks, images))
    similarity = {"faces": [90.0, None, None, 87.0, None, None]}
    # A lost face counts in faces_found, not in the mean similarity.
    assert scores == Scores(similarity | {"faces_found": [1.0, None, 0.0, 1.0, None, None]})
    assert encoder.calls.count([100, 5, 0]) == encoder.calls.count([0, 0, 0]) - 1 == 1
    encoder.calls.clear()
    assert judge(Outputs("set", tasks, images)) == scores
    assert encoder.calls == [
        [1, 10, 0],
        [0, 0, 0],
        [1, 13, 0],
    ]  # contexts are cached
    # An image freed from memory may pass its id to another one, which must not hit the cache.
    for shade in range(1, 20):
        one = judge(Outputs("set", [task(None, face(shade, 0, 0))], [face(7, 1, 0)]))
        assert one.columns["faces"] == [shade - 1.0]


class FakeReader(Reader):
    def __init__(self):
        self._alone = Alone()

    def read(self, image):
        with self._alone:
            return "OPEN" if image[0, 0, 0] else ""


def test_ocr_scores_are_none_for_tasks_without_words(cores):
    tasks = [task(words="open"), task(), task(words="OPEN!"), task(words="open")]
    images = [face(1, 1, 1), face(1, 1, 1), face(1, 1, 1), face(0, 0, 0)]
    scores = OcrJudge(FakeReader())(Outputs("set", tasks, images))
    read = {"ocr_contains": [1.0, None, 0.0, 0.0]}
    assert scores == Scores(read | {"ocr_accuracy": [1.0, None, pytest.approx(0.8), 0.0]})


# ---- make_judges ---------------------------------------------------------------------------------


def test_lite0_is_left_out_if_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    panel = make_judges(JudgesConfig(), mesh_of())
    assert panel.judges == [judge_pixels, judge_world, judge_drift]
    assert list(panel.left_out) == ["efflite0"] and "not installed" in panel.left_out["efflite0"]
    assert panel.record["left_out"] == ["efflite0"] and panel.record["files"] == {}
    panel = make_judges(JudgesConfig(efflite0=False), mesh_of())
    assert len(panel.judges) == 3 and panel.left_out == {} and panel.record["left_out"] == []


@pytest.mark.parametrize("name", ["inception", "dino", "clip", "lpips", "auraface"])
def test_a_missing_path_is_an_error(tmp_path, name):
    config = JudgesConfig(efflite0=False, lpips_heads="heads", **{name: str(tmp_path / "gone")})
    with pytest.raises(FileNotFoundError, match="gone"):
        make_judges(config, mesh_of())


def test_a_folder_of_another_network_is_refused_as_dinov2(monkeypatch):
    class Other:
        config = LpipsConfig()

    monkeypatch.setattr(judges, "open_folder", lambda folder: Other)
    with pytest.raises(ValueError, match="judges.dino: some/folder holds a network other"):
        make_judges(JudgesConfig(efflite0=False, dino="some/folder"), mesh_of())


def test_an_invalid_setting_is_named():
    with pytest.raises(ValueError, match="lpips_net 'squeeze' is not one of alex, vgg"):
        JudgesConfig(lpips_net="squeeze")


@pytest.fixture
def all_judges(request, monkeypatch, random_network, tmp_path) -> JudgesConfig:
    """A config with all judges. Each fake network is the number that its file holds."""
    net = getattr(request, "param", "alex")
    lpips = random_network(lambda: Lpips(LpipsConfig(net=net), rngs=nnx.Rngs(0)))

    class Dlib(FakeFaces):
        metric = "dlib_similarity"

    class Aura(FakeFaces):
        metric = "auraface"

        def __init__(self, folder):
            super().__init__()

    def number(path: Path | str) -> dict[str, np.ndarray]:
        is_file = Path(path).is_file()
        return {"number": np.array(float(Path(path).read_text()) if is_file else 0.0)}

    def load_lpips(backbone, heads, trunk, mesh):
        assert trunk == net
        changed = number(backbone)["number"] + number(heads)["number"]
        return jax.tree.map(lambda x: x + changed.astype(x.dtype), lpips)

    for i, name in enumerate(("efflite0", "inception", "dino", "clip", "lpips", "lpips_heads")):
        (tmp_path / name).write_text(str(i))
    for name in (DETECTOR, RECOGNISER):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(judges, "load_lite0", lambda mesh, config: number(tmp_path / "efflite0"))
    monkeypatch.setattr(judges, "load_inception", lambda path, mesh: number(path))
    monkeypatch.setattr(judges, "_load_dino", lambda path, mesh: number(path))
    monkeypatch.setattr(judges, "load_clip", lambda path, mesh: FakeClip(number(path), None))
    monkeypatch.setattr(judges, "load_lpips", load_lpips)
    monkeypatch.setattr(judges, "AuraFace", Aura)
    monkeypatch.setattr(judges, "DlibFaces", Dlib)
    monkeypatch.setattr(judges, "Reader", FakeReader)
    monkeypatch.setattr(judges, "pooled_features", features_of)
    names = ("inception", "dino", "clip", "lpips", "lpips_heads")
    paths = {name: str(tmp_path / name) for name in names}
    return JudgesConfig(**paths, auraface=str(tmp_path), lpips_net=net, dlib=True, ocr=True)


def features_of(network, images, mesh=None) -> np.ndarray:
    return network["number"].astype(np.float32) + Features.of(images)


@pytest.mark.parametrize("all_judges", ["alex", "vgg"], indirect=True)
def test_judges_return_exactly_the_known_metrics(all_judges, monkeypatch):
    """Each comes from the network that it is named after."""
    other = {"lpips_vgg", "fid", "kid"}
    if all_judges.lpips_net == "vgg":  # and FID's own file, so that every name occurs once
        other = {"lpips_alex", "fd_inception", "kid_inception"}
        monkeypatch.setattr(inception, "FID_SHA256", sha256_of(Path(all_judges.inception)))
    panel = make_judges(all_judges, mesh_of())
    assert panel.left_out == {}
    tasks = list(world.sessions(3, turns=1))
    words = dict(words="OPEN", source_caption="a cat", target_caption="too big")
    outputs = Outputs("set", [task._replace(**words) for task in tasks], [t.truth for t in tasks])
    columns, set_scores = run_judges(panel.judges, outputs)
    returned = [*columns, *set_scores]
    known = [name for name in METRICS if name not in other]
    assert sorted(returned) == sorted(known) and other < METRICS.keys()
    assert known[-len(set_scores) :] == [name for name in known if name in set_scores]
    images = np.stack([task.contexts[0] for task in tasks])
    columns, set_scores = run_judges(panel.judges, Outputs("set", outputs.tasks, list(images)))
    for name, value in (("efflite0", 0.0), ("dinov2", 2.0)):
        network = {"number": np.array(value)}
        expected = cosine(features_of(network, images), features_of(network, outputs.targets))
        np.testing.assert_array_equal(columns[name], expected)
    network = {"number": np.array(1.0)}
    distance = frechet_distance(features_of(network, outputs.targets), features_of(network, images))
    assert set_scores["fid" if "fid" in known else "fd_inception"] == distance


def test_the_record_changes_with_the_content_of_any_file(all_judges, tmp_path):
    """Scores by the old file must not pass for scores by the new one."""
    folder = tmp_path / "clip_folder"
    folder.mkdir()
    inside = [folder / name for name in ("a.safetensors", "b.safetensors", "config.json", "c.txt")]
    names = ("inception", "dino", "lpips", "lpips_heads", "clip")
    files = [*inside, *(tmp_path / name for name in (*names[:-1], DETECTOR, RECOGNISER))]
    for file in (*inside, folder / "README.md"):
        file.write_text("0")
    config = dataclasses.replace(all_judges, clip=str(folder))
    before = make_judges(config, mesh_of()).record
    assert json.loads(json.dumps(before)) == before == make_judges(config, mesh_of()).record
    assert before["files"].keys() == set(map(str, files))
    for file in files:
        kept = file.read_text()
        file.write_text("77")
        after = make_judges(config, mesh_of()).record
        changed = {name for name, value in after["files"].items() if value != before["files"][name]}
        assert changed == {str(file)} and after | {"files": before["files"]} == before
        file.write_text(kept)
    (folder / "README.md").write_text("1")
    assert make_judges(config, mesh_of()).record == before


def test_the_record_holds_version_config_and_packages(all_judges, monkeypatch):
    record = make_judges(all_judges, mesh_of()).record
    with monkeypatch.context() as patch:
        patch.setattr(judges, "VERSION", record["version"] + 1)
        assert make_judges(all_judges, mesh_of()).record != record
    assert record["config"] == to_dict(all_judges) and record["left_out"] == []
    versions = {"dlib-bin": "20.0.1", "rapidocr-onnxruntime": "1.4.4"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(judges.importlib.metadata, "version", version)
    assert make_judges(all_judges, mesh_of()).record["packages"] == versions
    without = dataclasses.replace(all_judges, dlib=False, ocr=False)
    assert make_judges(without, mesh_of()).record["packages"] == {}
    versions["lpips"] = "0.1.4"
    assert make_judges(without, mesh_of()).record["packages"] == {}
    without = dataclasses.replace(without, lpips_heads="")
    assert make_judges(without, mesh_of()).record["packages"] == {"lpips": "0.1.4"}
