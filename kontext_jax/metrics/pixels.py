"""How far a picture is from the true one, pixel by pixel: errors, PSNR, SSIM.

Pictures are 8-bit RGB of one size; all is computed in float64.
"""

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import correlate1d

Image = UInt8[np.ndarray, "_ _ 3"]

WINDOW = 11
SIGMA = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


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
    _difference(image, truth)
    x, y = image.astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x = _local_mean(x * x) - mean_x**2
    variance_y = _local_mean(y * y) - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return float(np.mean(luminance * structure))


def _local_mean(x: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "_ _ 3"]:
    reach = WINDOW // 2
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / SIGMA))
    weights /= weights.sum()
    for axis in (0, 1):
        x = correlate1d(x, weights, axis=axis)
    return x[reach:-reach, reach:-reach]


def _difference(image: Image, truth: Image) -> Float[np.ndarray, "_ _ 3"]:
    if image.shape != truth.shape:
        raise ValueError(f"pictures of {image.shape} and {truth.shape} do not compare.")
    return image.astype(np.float64) - truth
