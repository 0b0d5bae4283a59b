"""Images, tasks and networks that stand in for real ones, for the tests of judges."""

import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from kontext_jax.metrics.ocr import Reader
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Task
from kontext_jax.weights.clip_vision import Clip


def mesh_of(num_devices: int = 1):
    return make_mesh(MeshConfig(), jax.devices()[:num_devices])


def image(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def task(target=None, *contexts: np.ndarray, **fields) -> Task:
    known = dict(prompt="make it red", category="local", size=(16, 16))
    return Task("x", contexts, truth=target, **known | fields)


class Alone:
    """Fails if two threads enter at a time."""

    def __init__(self):
        self._lock = threading.Lock()

    def __enter__(self):
        assert self._lock.acquire(blocking=False), "two at a time"
        time.sleep(0.003)

    def __exit__(self, *error):
        self._lock.release()


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


class FakeReader(Reader):
    def __init__(self):
        self._alone = Alone()

    def read(self, image):
        with self._alone:
            return "OPEN" if image[0, 0, 0] else ""
