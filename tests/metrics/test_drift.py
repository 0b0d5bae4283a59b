"""Drift recovers known shifts, scales and tints, and ignores the edited region."""

import numpy as np
import pytest

from kontext_jax.metrics.drift import (
    MAX_FREQUENCY,
    NUM_REFINEMENTS,
    colour_drift,
    displacement,
    drift,
)

SIZE = 192


def waves(seed: int):
    """An analytic image that renders at any shift and scale without resampling."""
    rng = np.random.default_rng(seed)
    frequency = rng.uniform(-0.12, 0.12, (80, 2))
    phase, amplitude = rng.uniform(0, 2 * np.pi, 80), 9 / (1 + 20 * np.hypot(*frequency.T))

    def render(shift=(0.0, 0.0), scale=1.0):
        centre = (SIZE - 1) / 2
        positions = np.arange(SIZE) - centre
        x, y = ((positions - by) / scale for by in shift)
        angle = 2 * np.pi * (frequency[:, :1] * x)[:, None, :]
        angle = angle + 2 * np.pi * (frequency[:, 1:] * y)[:, :, None] + phase[:, None, None]
        grey = 128 + np.einsum("k,kyx->yx", amplitude, np.sin(angle))
        return np.repeat(np.clip(np.round(grey), 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)

    return render


@pytest.mark.parametrize("shift", [(0.1, 0.0), (0.0, -0.1), (0.5, -0.3), (-1.0, 2.0), (3.0, -3.0)])
def test_shifts_are_measured_within_ten_percent(shift):
    render = waves(0)
    result = drift(render(shift), render())
    np.testing.assert_allclose(result.shift, shift, atol=0.1 * np.hypot(*shift))
    assert abs(result.scale - 1) < 5e-4 and result.tiles > 10


@pytest.mark.parametrize("channel", range(3))
def test_every_channel_counts(channel):
    render = waves(8)
    after, before = (np.full_like(render(), 100) for _ in range(2))
    after[..., channel], before[..., channel] = render((0.6, 0.3))[..., 0], render()[..., 0]
    np.testing.assert_allclose(drift(after, before).shift, (0.6, 0.3), atol=0.06)


@pytest.mark.parametrize("scale", [0.97, 0.99, 0.995, 1.005, 1.01, 1.03])
def test_scales_are_measured_within_ten_percent(scale):
    render = waves(1)
    result = drift(render((0.4, -0.2), scale), render())
    assert abs(result.scale - scale) < 0.1 * abs(scale - 1)
    np.testing.assert_allclose(result.shift, (0.4, -0.2), atol=0.05)


def test_pixels_outside_the_mask_are_ignored():
    render, kept = waves(2), np.ones((SIZE, SIZE), bool)
    after = render((0.5, 0.0))
    kept[:96, :] = False
    after[:96] = waves(3)()[:96]
    result = drift(after, render(), kept)
    np.testing.assert_allclose(result.shift, (0.5, 0.0), atol=0.05)
    after[96:, :, 0] += 3
    red, green, blue = colour_drift(after, render((0.5, 0.0)), kept)
    assert (red, green, blue) == (3.0, 0.0, 0.0)


def test_outlier_tiles_are_ignored():
    render = waves(4)
    after = render((1.0, 1.0))
    after[:48, :48] = waves(5)()[:48, :48]
    np.testing.assert_allclose(drift(after, render()).shift, (1.0, 1.0), atol=0.05)


def window(side: int, offset: float) -> np.ndarray:
    positions = np.clip((np.arange(1, side + 1) - offset) / (side + 1), 0, 1)
    return 0.5 - 0.5 * np.cos(2 * np.pi * positions)


@pytest.mark.parametrize("side", [16, 48, 62])
def test_half_the_spectrum_gives_the_same_displacement_as_all_of_it(side):
    """The reference solves the same least squares over the complete spectrum."""
    render, (left, top) = waves(7), (40, 50)
    first, second = (image[..., 0].astype(np.float64) for image in (render(), render((1.3, -2.6))))
    axis = np.fft.fftfreq(side)
    low = (np.hypot(axis, axis[:, None]) < MAX_FREQUENCY) & (axis**2 + axis[:, None] ** 2 > 0)
    grid = np.stack(np.broadcast_arrays(axis, axis[:, None]), axis=-1)[low]
    slopes = -2 * np.pi * grid

    def spectrum(image, column, row, x=0.0, y=0.0):
        tile = image[row : row + side, column : column + side]
        return np.fft.fft2((tile - tile.mean()) * np.outer(window(side, y), window(side, x)))

    reference = spectrum(first, left, top)
    cross = spectrum(second, left, top) * reference.conj() * low
    agreement = np.fft.ifft2(cross / np.maximum(abs(cross), 1e-9)).real
    row, column = np.unravel_index(agreement.argmax(), agreement.shape)
    move = np.array([column, row]) - side * (np.array([column, row]) >= side // 2)
    for _ in range(NUM_REFINEMENTS):
        whole = np.round(move).astype(int)
        fraction = move - whole
        cross = spectrum(second, left + whole[0], top + whole[1], *fraction)
        cross = (cross * reference.conj())[low]
        weighted = slopes * abs(cross)[:, None]
        phase = np.angle(cross * np.exp(-1j * (slopes @ fraction)))
        move = move + np.linalg.solve(weighted.T @ slopes, weighted.T @ phase)
    result, weight = displacement(first, second, (left, top), side)
    np.testing.assert_allclose(result, move, rtol=1e-12, atol=1e-12)
    assert weight == pytest.approx(np.linalg.eigvalsh(weighted.T @ slopes)[0], rel=1e-11)
    np.testing.assert_allclose(result, (1.3, -2.6), atol=0.1)


def test_flat_images_empty_masks_and_different_sizes_are_rejected():
    render, flat = waves(6), np.full((SIZE, SIZE, 3), 9, np.uint8)
    with pytest.raises(ValueError, match="region to preserve is too flat or small"):
        drift(flat, flat)
    with pytest.raises(ValueError, match="region to preserve is too flat or small"):
        drift(flat, render())
    with pytest.raises(ValueError, match="region to preserve is too flat or small"):
        drift(render(), render(), np.zeros((SIZE, SIZE), bool))
    with pytest.raises(ValueError, match="same size"):
        drift(render()[:64], render())
