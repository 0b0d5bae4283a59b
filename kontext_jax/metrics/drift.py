r"""Shift, scale and colour drift of the parts of an image that an edit should leave alone.

Editing models shift or zoom what they should preserve, often by less than a pixel, and tint it.
Over several turns this accumulates. Shift and scale are measured by phase correlation. Translating
an image by d multiplies its spectrum by exp(-2 pi i f d), so the phase between two images is a
plane over the frequencies f, and a least-squares fit of its slope gives d to a small fraction of a
pixel (Stone et al., 2001, who also weight the frequencies and drop the high ones). Doing this for
tiles of the image gives a field of displacements, which is modelled as a shift and a scale about
the image's centre,

    (1)  d(p) = shift + (scale - 1) (p - centre).
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Complex, Float

from kontext_jax.types import RGBImage

Mask = Bool[np.ndarray, "_ _"]

MAX_FREQUENCY = 0.25
"""Cycles per pixel. Higher frequencies are mostly grain, and resampling distorts them."""

MIN_CONTRAST = 1.0
"""Least standard deviation, in levels of 255, of a tile that can be matched."""

NUM_REFINEMENTS = 3
"""Refinements per tile; each removes the displacement estimated so far and fits the rest."""


class Drift(NamedTuple):
    """The displacement of one image relative to another.

    Attributes:
      shift: pixels (to the right, down) at the image's centre.
      scale: above 1 if the content has grown.
      tiles: number of tiles in the fit, without outliers.
    """

    shift: tuple[float, float]
    scale: float
    tiles: int


def drift(after: RGBImage, before: RGBImage, kept: Mask | None = None) -> Drift:
    """Returns the shift and scale of ``after`` relative to ``before``, by equation (1).

    Args:
      after, before: images of the same size, at least 16 pixels a side.
      kept: pixels that the edit should not change; None for all. Only tiles entirely inside count.

    Raises:
      ValueError: sizes differ or are too small, or too little of the image can be matched.
    """
    if after.shape != before.shape or min(before.shape[:2]) < 16:
        raise ValueError(
            "drift needs two images of the same size, at least 16 pixels a side, not "
            f"{before.shape[:2]} and {after.shape[:2]}."
        )
    height, width = before.shape[:2]
    side = max(16, min(height, width) // 8 * 2)
    first, second = _grey(before), _grey(after)
    centres, moves, weights = [], [], []
    for top in range(0, height - side + 1, side // 2):
        for left in range(0, width - side + 1, side // 2):
            if kept is not None and not kept[top : top + side, left : left + side].all():
                continue
            move, weight = displacement(first, second, (left, top), side)
            if weight > 0:
                centres.append((left + (side - width) / 2, top + (side - height) / 2))
                moves.append(move)
                weights.append(weight)
    if len(centres) < 2:
        raise ValueError("drift cannot be measured: the region to preserve is too flat or small.")
    return _fit(np.array(centres), np.array(moves), np.array(weights))


def colour_drift(
    after: RGBImage, before: RGBImage, kept: Mask | None = None
) -> tuple[float, float, float]:
    """Returns the mean change of the kept pixels in (red, green, blue), in levels of 255."""
    difference = after.astype(np.int16) - before
    pixels = difference.reshape(-1, 3) if kept is None else difference[kept]
    red, green, blue = (float(channel.mean()) for channel in pixels.T)
    return red, green, blue


def _grey(image: RGBImage) -> Float[np.ndarray, "_ _"]:
    """Returns the mean over channels. NumPy is slow at reducing an axis of length 3."""
    return (image[..., 0].astype(np.float64) + image[..., 1] + image[..., 2]) / 3


def displacement(
    first: Float[np.ndarray, "h w"],
    second: Float[np.ndarray, "h w"],
    corner: tuple[int, int],
    side: int,
) -> tuple[tuple[float, float], float]:
    """Returns ((x, y) displacement of a tile of ``first`` in ``second``, its weight).

    The weight is the smaller eigenvalue of the fit's information matrix, or 0 if the tile cannot be
    matched.

    Args:
      first, second: grey images.
      corner: (left, top) of the tile.
      side: height and width of the tile.
    """
    left, top = corner
    tile = first[top : top + side, left : left + side]
    if tile.std() < MIN_CONTRAST:
        return (0.0, 0.0), 0.0
    low, slopes, counts = _frequencies(side)
    spectrum = _spectrum(tile, (0.0, 0.0))
    other_spectrum = _spectrum(second[top : top + side, left : left + side], (0.0, 0.0))
    move, information = _peak(other_spectrum * np.conj(spectrum) * low), np.zeros((2, 2))
    for _ in range(NUM_REFINEMENTS):
        whole = np.round(move).astype(int)
        column, row = left + whole[0], top + whole[1]
        if not (0 <= row <= first.shape[0] - side and 0 <= column <= first.shape[1] - side):
            return (0.0, 0.0), 0.0
        # Whole pixels move the tile and the fraction moves the window: both see the same content.
        fraction, other = move - whole, second[row : row + side, column : column + side]
        if other.std() < MIN_CONTRAST:
            return (0.0, 0.0), 0.0
        cross = _spectrum(other, fraction)[low] * np.conj(spectrum[low])
        plane = slopes[0] * fraction[0] + slopes[1] * fraction[1]
        phase = np.angle(cross * np.exp(-1j * plane))
        weighted = slopes * (counts * np.abs(cross))
        # einsum and not @: BLAS would start threads in each of the caller's threads.
        information = np.einsum("if,jf->ij", weighted, slopes)
        move = move + np.linalg.solve(information, np.einsum("if,f->i", weighted, phase))
    return (float(move[0]), float(move[1])), float(np.linalg.eigvalsh(information)[0])


@functools.cache
def _frequencies(
    side: int,
) -> tuple[Bool[np.ndarray, "s _"], Float[np.ndarray, "2 f"], Float[np.ndarray, " f"]]:
    """Returns (mask of low frequencies, their phase per pixel in x and y, multiplicities).

    A real image's spectrum is stored as one half; most entries also stand for their mirror image.
    """
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    low = (np.hypot(fx, fy) < MAX_FREQUENCY) & ((fx != 0) | (fy != 0))
    return low, -2 * np.pi * np.stack([fx[low], fy[low]]), np.where(fx[low] > 0, 2.0, 1.0)


def _spectrum(
    tile: Float[np.ndarray, "s s"], offset: tuple[float, float] | Float[np.ndarray, "2"]
) -> Complex[np.ndarray, "s _"]:
    """Returns half the spectrum of a zero-mean tile, its Hann window moved by a subpixel offset."""
    positions = np.arange(1, len(tile) + 1)
    x, y = (
        0.5 - 0.5 * np.cos(2 * np.pi * np.clip((positions - by) / (len(tile) + 1), 0, 1))
        for by in offset
    )
    return np.fft.rfft2((tile - tile.mean()) * y[:, None] * x)


def _peak(cross: Complex[np.ndarray, "s _"]) -> Float[np.ndarray, "2"]:
    """Returns the displacement (x, y) in whole pixels at which the phases agree best."""
    agreement = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9))
    side = len(agreement)
    y, x = np.unravel_index(np.argmax(agreement), agreement.shape)
    return (np.array([x, y]) + side // 2) % side - float(side // 2)


def _fit(
    centres: Float[np.ndarray, "n 2"],
    moves: Float[np.ndarray, "n 2"],
    weights: Float[np.ndarray, " n"],
) -> Drift:
    """Fits equation (1) by weighted least squares, then twice more without the outliers."""
    for _ in range(3):
        share = (weights / weights.sum())[:, None]
        centre, mean = (share * centres).sum(axis=0), (share * moves).sum(axis=0)
        spread = (share * np.square(centres - centre)).sum()
        zoom = (share * (centres - centre) * (moves - mean)).sum() / spread if spread > 0 else 0.0
        shift = mean - zoom * centre
        error = np.linalg.norm(moves - shift - zoom * centres, axis=1)
        weights = np.where(error <= 3 * max(np.median(error), 0.02), weights, 0.0)
    return Drift((float(shift[0]), float(shift[1])), 1 + float(zoom), int((weights > 0).sum()))
