"""Known shifts, scales and tints are found again; what was not to be kept is not looked at."""

import numpy as np
import pytest

from kontext_jax.metrics.drift import MAX_FREQUENCY, ROUNDS, colour_drift, displacement, drift

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


@pytest.mark.parametrize("channel", range(3))
def test_every_colour_is_looked_at(channel):
    look = waves(8)
    after, before = (np.full_like(look(), 100) for _ in range(2))
    after[..., channel], before[..., channel] = look((0.6, 0.3))[..., 0], look()[..., 0]
    np.testing.assert_allclose(drift(after, before).shift, (0.6, 0.3), atol=0.06)


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


def window(side: int, moved: float) -> np.ndarray:
    places = np.clip((np.arange(1, side + 1) - moved) / (side + 1), 0, 1)
    return 0.5 - 0.5 * np.cos(2 * np.pi * places)


@pytest.mark.parametrize("side", [16, 48, 62])
def test_a_tile_against_the_whole_plane_of_frequencies(side):
    """The same least squares with all of the spectrum, of which half says all."""
    look, (left, top) = waves(7), (40, 50)
    first, second = (image[..., 0].astype(np.float64) for image in (look(), look((1.3, -2.6))))
    axis = np.fft.fftfreq(side)
    near = (np.hypot(axis, axis[:, None]) < MAX_FREQUENCY) & (axis**2 + axis[:, None] ** 2 > 0)
    grid = np.stack(np.broadcast_arrays(axis, axis[:, None]), axis=-1)[near]
    slopes = -2 * np.pi * grid

    def spectrum(picture, column, row, x=0.0, y=0.0):
        tile = picture[row : row + side, column : column + side]
        return np.fft.fft2((tile - tile.mean()) * np.outer(window(side, y), window(side, x)))

    here = spectrum(first, left, top)
    cross = spectrum(second, left, top) * here.conj() * near
    agreement = np.fft.ifft2(cross / np.maximum(abs(cross), 1e-9)).real
    row, column = np.unravel_index(agreement.argmax(), agreement.shape)
    move = np.array([column, row]) - side * (np.array([column, row]) >= side // 2)
    for _ in range(ROUNDS):
        whole = np.round(move).astype(int)
        rest = move - whole
        cross = (spectrum(second, left + whole[0], top + whole[1], *rest) * here.conj())[near]
        weighted = slopes * abs(cross)[:, None]
        phase = np.angle(cross * np.exp(-1j * (slopes @ rest)))
        move = move + np.linalg.solve(weighted.T @ slopes, weighted.T @ phase)
    found, weight = displacement(first, second, (left, top), side)
    np.testing.assert_allclose(found, move, rtol=1e-12, atol=1e-12)
    assert weight == pytest.approx(np.linalg.eigvalsh(weighted.T @ slopes)[0], rel=1e-11)
    np.testing.assert_allclose(found, (1.3, -2.6), atol=0.1)


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
