"""Random crops of the photographs that Python packages bring along, for autoencoders.

There are eleven, from scikit-image, scikit-learn and matplotlib (extra `photographs`): people,
buildings, food, a room, microscopy, the sky. Three of them are held out as a whole. A crop is a
square of random size and place, scaled down to the size that is asked for; half are mirrored. There
are too few for anything but comparing autoencoders.
"""

import importlib.resources
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kontext_jax.types import Triple

FILES = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/coffee.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/retina.jpg",
        "sklearn/datasets/images/china.jpg",
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
    ),
    "validation": (
        "skimage/data/chelsea.png",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/flower.jpg",
    ),
}
"""The photographs of each split, as package and path."""

MARGIN = 12
"""Pixels cut off all sides of a photograph: one has a frame."""


def triples(num: int, split: str, size: int = 64, seed: int = 0) -> Iterator[Triple]:
    """Yields ``num`` crops of ``size`` pixels, of all photographs in turn.

    Raises:
      FileNotFoundError: a package is not installed.
      ValueError: a photograph is smaller than ``size``.
    """
    photographs = {name: _read(name) for name in FILES[split]}
    for i in range(num):
        name = FILES[split][i % len(photographs)]
        rng = np.random.default_rng((seed, split == "train", i))
        yield Triple(
            id=f"{split}-{i}",
            target=_crop(name, photographs[name], size, rng),
            contexts=(),
            prompt="a photograph",
            category="text_to_image",
        )


def _read(name: str) -> Image.Image:
    package, _, path = name.partition("/")
    try:
        data = (importlib.resources.files(package) / path).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is missing: pip install 'kontext-jax[photographs]'."
        ) from error
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.crop((MARGIN, MARGIN, image.width - MARGIN, image.height - MARGIN))


def _crop(
    name: str, image: Image.Image, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    largest = min(image.size)
    if largest < size:
        raise ValueError(f"{name} has no square of {size} pixels: lower --size to {largest}.")
    side = int(rng.integers(size, largest + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in image.size)
    crop = image.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(crop)
    return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)
