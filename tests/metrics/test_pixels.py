"""Pixel metrics against their formulas; scikit-image 0.26 agrees to 1e-15."""

import numpy as np
import pytest

from kontext_jax.metrics.pixels import l1, l2, psnr, ssim


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (14, 17, 3), np.uint8)
    return np.clip(image + rng.normal(0, 30, image.shape), 0, 255).astype(np.uint8), image


def test_errors_are_for_pixels_in_0_to_1():
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert l1(grey, black) == pytest.approx(0.2) and l2(grey, black) == pytest.approx(0.04)
    assert l1(black, grey) == l1(grey, black)  # unsigned differences do not wrap around
    assert psnr(grey, black) == pytest.approx(-10 * np.log10(0.04))
    assert psnr(grey, grey) == float("inf")


def test_ssim_averages_its_formula_over_every_complete_window(pair):
    image, reference = (x.astype(np.float64) for x in pair)
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(14 - 10):
        for left in range(17 - 10):
            for channel in range(3):
                box = np.s_[top : top + 11, left : left + 11, channel]
                x, y = image[box], reference[box]
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                variances = (window * (x - mean_x) ** 2).sum() + (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                c1, c2 = 2.55**2, 7.65**2
                luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
                values.append(luminance * (2 * covariance + c2) / (variances + c2))
    assert ssim(*pair) == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(pair[1], pair[1]) == 1.0


@pytest.mark.parametrize("shape", [(11, 11), (74, 13), (75, 12), (139, 20)])
def test_ssim_in_bands_covers_every_window(shape):
    """Heights are one window, one band, one band and a row, and two bands and a row."""
    rng = np.random.default_rng(1)
    image, reference = rng.integers(0, 256, (2, *shape, 3), np.uint8)
    weights = np.exp(-np.square(np.arange(11) - 5) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2

    def mean(x):
        boxes = np.lib.stride_tricks.sliding_window_view(x, (11, 11), axis=(0, 1))
        return np.einsum("...ij,ij->...", boxes, window)

    x, y = image.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 2.55**2, 7.65**2
    values = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    values = values * (2 * covariance + c2) / (variances + c2)
    assert values.shape == (shape[0] - 10, shape[1] - 10, 3)
    assert ssim(image, reference) == pytest.approx(values.mean(), abs=1e-12)


def test_different_and_too_small_sizes_are_rejected(pair):
    image, reference = pair
    for metric in (l1, l2, psnr, ssim):
        with pytest.raises(ValueError, match="must have the same shape"):
            metric(image[:12, :12], reference)
    with pytest.raises(ValueError, match="at least 11 pixels a side"):
        ssim(image[:10], reference[:10])
