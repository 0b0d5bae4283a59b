"""How far a picture is from the true one, pixel by pixel: errors, PSNR, SSIM.

Pictures are 8-bit RGB of one size; all is computed in float64.
"""

import numpy as np
from jaxtyping import Float, UInt8

Image = UInt8[np.ndarray, "_ _ 3"]

WINDOW = 11
SIGMA = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

BAND = 64
"""Rows of a channel that SSIM looks at together: what it computes of them stays in a core's cache,
so that neither memory nor other threads hold it up."""


def l1(image: Image, truth: Image) -> float:
    """The mean absolute error, as a share of the range: 0 to 1."""
    return float(np.abs(_difference(image, truth)).mean()) / 255


def l2(image: Image, truth: Image) -> float:
    """The mean square error, of pixels of 0 to 1."""
    return float(np.square(_difference(image, truth) / 255).mean())


def psnr(image: Image, truth: Image) -> float:
    """The peak signal to noise ratio in dB; infinite for equal pictures."""
    error = l2(image, truth)
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(image: Image, truth: Image) -> float:
    """Structural similarity (Wang et al. 2004), the mean over channels and places; 1 at best.

    The paper's own window, a Gaussian of 1.5 pixels cut off at 11 x 11, its constants, and only
    places where the whole window lies in the picture.

    Raises:
      ValueError: a side is shorter than the window.
    """
    if min(image.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs sides of {WINDOW} pixels, not {image.shape[:2]}.")
    if image.shape != truth.shape:
        raise ValueError(f"pictures of {image.shape} and {truth.shape} do not compare.")
    total, places = 0.0, image.shape[0] - WINDOW + 1
    for channel in range(3):
        for top in range(0, places, BAND):
            rows = np.s_[top : top + BAND + WINDOW - 1, :, channel]
            total += _similarity(image[rows].astype(np.float64), truth[rows].astype(np.float64))
    return total / (3 * places * (image.shape[1] - WINDOW + 1))


def _similarity(x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"]) -> float:
    """The sum over places of what SSIM is the mean of."""
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


def _difference(image: Image, truth: Image) -> Float[np.ndarray, "_ _ 3"]:
    if image.shape != truth.shape:
        raise ValueError(f"pictures of {image.shape} and {truth.shape} do not compare.")
    return image.astype(np.float64) - truth
