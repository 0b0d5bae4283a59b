"""launch/rate_distortion.py: rates, file formats and the drawing; the runs are left out."""

import importlib.util
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig, to_pixels
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Task

FILE = Path(__file__).parents[1] / "launch/rate_distortion.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("rate_distortion", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("kind", [{"fsq_levels": (5, 4, 3)}, {}], ids=["discrete", "continuous"])
def test_rates_match_their_formulas(script, images, kind):
    config = AutoencoderConfig.tiny(
        channels=8, channel_multipliers=(1, 1), **kind, latent_channels=3
    )
    model = Autoencoder(config, rngs=nnx.Rngs(0))
    bits = script.bits_per_pixel(model, images, make_mesh(MeshConfig()))
    pixels = to_pixels(jnp.asarray(np.stack(images)))
    if kind:
        _, counts = np.unique(model.codes(pixels), return_counts=True)
        shares = counts / counts.sum()
        expected = -np.sum(shares * np.log2(shares)) / 4
        assert 0 < expected <= math.log2(60) / 4
    else:
        mean, logvar = (np.asarray(x, np.float64) for x in model.moments(pixels))
        nats = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
        expected = nats.sum() / math.log(2) / (3 * 16 * 16)
    assert bits == pytest.approx(expected, rel=1e-4)


def test_formats_have_more_bytes_for_less_error(script):
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    image = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))
    for codec, qualities in script.CODECS.items():
        sizes, decoded = zip(*(script.coded(image, codec, q) for q in qualities), strict=True)
        errors = [np.square(image - x.astype(float)).mean() for x in decoded]
        assert list(sizes) == sorted(sizes) and errors[0] > errors[-1]


def test_curves_and_strip_are_drawn(script, images, tmp_path):
    names = [*script.runs(), *(f"{codec}-{q}" for codec, qs in script.CODECS.items() for q in qs)]
    scores = dict.fromkeys(script.METRICS, 1.0)
    points = [script.Point(name, 0.1 + 0.1 * i, scores, images) for i, name in enumerate(names)]
    assert set(script._curves(points)) == {
        *((kind, losses) for kind in script.LATENT_KINDS for losses in script.LOSSES),
        *((codec, "") for codec in script.CODECS),
    }
    tasks = [Task(str(i), (), "", "local", (16, 16), truth=image) for i, image in enumerate(images)]
    script.draw_curves(points, tmp_path / "curves.png")
    script.draw_strip(points, tasks, tmp_path / "strip.png", rows=2)
    for name in ("curves.png", "strip.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name).convert("L")))) > 20
