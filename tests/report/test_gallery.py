"""The images of a report: their selection, ranking and encoding."""

import base64
import io

import numpy as np
from PIL import Image

from kontext_jax.report.gallery import data_uri, pick_tasks, ranked_ids
from kontext_jax.types import Task

CATEGORIES = ("local", "text", "text_to_image")


def task(name: str, category: str = "local", **more) -> Task:
    return Task(name, (), "do", category, (16, 16), **more)


def decoded(uri: str) -> np.ndarray:
    kind, text = uri.removeprefix("data:image/").split(";base64,")
    assert kind in ("png", "jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_sessions_are_picked_with_all_turns():
    sessions = [
        task(f"s{k}.{turn}", turn=turn, follows=f"s{k}.{turn - 1}" if turn > 1 else "")
        for turn in (1, 2)
        for k in range(3)
    ]
    ids = [task.id for task in pick_tasks(sessions, 4)]
    assert ids == ["s0.1", "s0.2", "s1.1", "s1.2"]
    assert [task.id for task in pick_tasks(sessions, 1)] == ["s0.1", "s0.2"]


def test_every_category_is_picked():
    tasks = [task(str(i), CATEGORIES[i // 3]) for i in range(9)]
    assert [task.id for task in pick_tasks(tasks, 4)] == ["0", "3", "6", "1"]


def test_tasks_are_ranked_by_the_metric_then_by_l1():
    rows = [
        {"id": "a", "edit_success": 1.0, "l1": 0.2},
        {"id": "b", "edit_success": 0.0, "l1": 0.1},
        {"id": "c", "edit_success": 1.0, "l1": 0.1},
        {"id": "d", "edit_success": None, "l1": 0.0},
    ]
    assert ranked_ids(rows, "edit_success") == ["c", "a", "b"]
    assert ranked_ids(rows, "l1") == ["d", "b", "c", "a"]


def test_small_images_are_lossless_and_others_become_small_jpegs():
    noise = np.random.default_rng(0).integers(0, 256, (300, 600, 3)).astype(np.uint8)
    assert data_uri(noise).startswith("data:image/jpeg;")
    assert decoded(data_uri(noise)).shape == (128, 256, 3)
    np.testing.assert_array_equal(decoded(data_uri(noise[:128, :128])), noise[:128, :128])
    smooth = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 200, 3))
    assert data_uri(smooth).startswith("data:image/jpeg;")
    assert decoded(data_uri(smooth)).shape == (200, 200, 3)
    np.testing.assert_allclose(decoded(data_uri(smooth)), smooth, atol=3)
