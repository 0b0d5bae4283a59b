"""Known shifts, scales and tints are found again; what was not to be kept is not looked at."""

import numpy as np
import pytest

from kontext_jax.metrics.drift import colour_drift, drift

SIZE = 192


def waves(seed: int):
    """A picture as a function of place, which can be looked at from anywhere: no resampling."""
    rng = np.random.default_rng(seed)
    frequency = rng.uniform(-0.12, 0.12, (80, 2))
    phase, strength = rng.uniform(0, 2 * np.pi, 80), 9 / (1 + 20 * np.hypot(*frequency.T))

    def look(shift=(0.0, 0.0), scale=1.0):
        centre = (SIZE - 1) / 2
        places = np.arange(SIZE) - centre
        x, y = ((places - by) / scale for by in shift)
        angle = 2 * np.pi * (frequency[:, :1] * x)[:, None, :]
        angle = angle + 2 * np.pi * (frequency[:, 1:] * y)[:, :, None] + phase[:, None, None]
        grey = 128 + np.einsum("k,kyx->yx", strength, np.sin(angle))
        return np.repeat(np.clip(np.round(grey), 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)

    return look


@pytest.mark.parametrize("shift", [(0.1, 0.0), (0.0, -0.1), (0.5, -0.3), (-1.0, 2.0), (3.0, -3.0)])
def test_shifts_are_found_within_a_tenth(shift):
    look = waves(0)
    found = drift(look(shift), look())
    np.testing.assert_allclose(found.shift, shift, atol=0.1 * np.hypot(*shift))
    assert abs(found.scale - 1) < 5e-4 and found.tiles > 10


@pytest.mark.parametrize("scale", [0.97, 0.99, 0.995, 1.005, 1.01, 1.03])
def test_scales_are_found_within_a_tenth(scale):
    look = waves(1)
    found = drift(look((0.4, -0.2), scale), look())
    assert abs(found.scale - scale) < 0.1 * abs(scale - 1)
    np.testing.assert_allclose(found.shift, (0.4, -0.2), atol=0.05)


def test_an_edited_part_does_not_count():
    look, kept = waves(2), np.ones((SIZE, SIZE), bool)
    after = look((0.5, 0.0))
    kept[:96, :] = False
    after[:96] = waves(3)()[:96]
    found = drift(after, look(), kept)
    np.testing.assert_allclose(found.shift, (0.5, 0.0), atol=0.05)
    after[96:, :, 0] += 3
    red, green, blue = colour_drift(after, look((0.5, 0.0)), kept)
    assert (red, green, blue) == (3.0, 0.0, 0.0)


def test_a_tile_that_says_otherwise_is_left_out():
    look = waves(4)
    after = look((1.0, 1.0))
    after[:48, :48] = waves(5)()[:48, :48]
    np.testing.assert_allclose(drift(after, look()).shift, (1.0, 1.0), atol=0.05)


def test_what_cannot_be_measured_is_refused():
    look, flat = waves(6), np.full((SIZE, SIZE, 3), 9, np.uint8)
    with pytest.raises(ValueError, match="nothing to hold on to"):
        drift(flat, flat)
    with pytest.raises(ValueError, match="nothing to hold on to"):
        drift(flat, look())
    with pytest.raises(ValueError, match="nothing to hold on to"):
        drift(look(), look(), np.zeros((SIZE, SIZE), bool))
    with pytest.raises(ValueError, match="one size"):
        drift(look()[:64], look())
