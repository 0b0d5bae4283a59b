"""Pixel metrics against a reference image: L1, L2, PSNR, SSIM.

Images are 8-bit RGB of the same size; everything is computed in float64.
"""

import numpy as np
from jaxtyping import Float

from kontext_jax.types import RGBImage

WINDOW = 11
SIGMA = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

BAND = 64
"""Rows per channel that SSIM processes at once. A band's intermediates fit into a core's cache, so
that neither memory nor other threads slow it down."""


def l1(image: RGBImage, reference: RGBImage) -> float:
    """Returns the mean absolute error as a fraction of the range, 0 to 1."""
    return float(np.abs(_difference(image, reference)).mean()) / 255


def l2(image: RGBImage, reference: RGBImage) -> float:
    """Returns the mean squared error of pixels scaled to [0, 1]."""
    return float(np.square(_difference(image, reference) / 255).mean())


def psnr(image: RGBImage, reference: RGBImage) -> float:
    """Returns the peak signal-to-noise ratio in dB; infinite for equal images."""
    error = l2(image, reference)
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(image: RGBImage, reference: RGBImage) -> float:
    """Returns the structural similarity (Wang et al. 2004), averaged over channels and positions.

    1 is best. Window and constants are the paper's: a Gaussian with a sigma of 1.5 pixels, cropped
    to 11 x 11. Only positions with the entire window inside the image count.

    Raises:
      ValueError: sizes differ, or a side is shorter than the window.
    """
    if min(image.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW} pixels a side, not {image.shape[:2]}.")
    _check_shapes(image, reference)
    total, rows = 0.0, image.shape[0] - WINDOW + 1
    for channel in range(3):
        for top in range(0, rows, BAND):
            band = np.s_[top : top + BAND + WINDOW - 1, :, channel]
            total += _ssim_sum(image[band].astype(np.float64), reference[band].astype(np.float64))
    return total / (3 * rows * (image.shape[1] - WINDOW + 1))


def _ssim_sum(x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"]) -> float:
    """Returns the sum of SSIM over all positions."""
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance = _local_mean(x * y) - product
    variances = _local_mean(x * x + y * y) - squares
    luminance = (2 * product + C1) / (squares + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    return float((luminance * structure).sum())


def _local_mean(x: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "_ _"]:
    reach = WINDOW // 2
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / SIGMA))
    weights /= weights.sum()
    for _ in range(2):  # along rows, then along columns
        x = x.T
        count = len(x) - WINDOW + 1
        total = weights[reach] * x[reach : reach + count]
        for i in range(reach):
            mirrored = WINDOW - 1 - i
            total += weights[i] * (x[i : i + count] + x[mirrored : mirrored + count])
        x = total
    return x


def _difference(image: RGBImage, reference: RGBImage) -> Float[np.ndarray, "_ _ 3"]:
    _check_shapes(image, reference)
    return image.astype(np.float64) - reference


def _check_shapes(image: RGBImage, reference: RGBImage) -> None:
    if image.shape != reference.shape:
        raise ValueError(
            f"images must have the same shape to be compared, not {image.shape} and "
            f"{reference.shape}."
        )
