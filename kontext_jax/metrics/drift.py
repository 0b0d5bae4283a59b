r"""What an edit moves that it should leave alone: shift and scale of the picture, and its colours.

Models of editing shift or zoom what they were to keep, by pixels or less, and tint it; over several
turns this adds up. Shift and scale are found by phase correlation. A translation by d multiplies a
picture's spectrum by exp(-2 pi i f d): the phase between two pictures is a plane over the
frequencies f, and its slope, by least squares, is d, far below a pixel (Stone et al., 2001, who
also weigh frequencies and leave out the high ones). Done for tiles of the picture, this gives a
field of displacements, which a shift and a scale about the picture's centre explain,

    (1)  d(p) = shift + (scale - 1) (p - centre).
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Complex, Float, UInt8

Image = UInt8[np.ndarray, "_ _ 3"]
Mask = Bool[np.ndarray, "_ _"]

MAX_FREQUENCY = 0.25
"""In cycles a pixel. Above there is grain and little else, and what resampling bends."""

MIN_CONTRAST = 1.0
"""Standard deviation, of 255, below which a tile has nothing to hold on to."""

ROUNDS = 3
"""Of refinement in a tile; each takes away the displacement that was found before."""


class Drift(NamedTuple):
    """How a picture lies against another.

    Attributes:
      shift: pixels (to the right, down), at the picture's centre.
      scale: above 1 where things have grown.
      tiles: places that say so; those that say otherwise, by far, are left out.
    """

    shift: tuple[float, float]
    scale: float
    tiles: int


def drift(after: Image, before: Image, kept: Mask | None = None) -> Drift:
    """How ``after`` has moved against ``before``, by equation (1).

    Args:
      after, before: pictures of one size, 16 pixels a side or more.
      kept: where the edit was to change nothing; everywhere, if left out. A tile counts only if it
        lies in there as a whole.

    Raises:
      ValueError: sizes differ or are too small, or there is too little to hold on to.
    """
    if after.shape != before.shape or min(before.shape[:2]) < 16:
        raise ValueError(
            f"drift is of two pictures of one size, 16 pixels or more, not {before.shape[:2]} "
            f"and {after.shape[:2]}."
        )
    height, width = before.shape[:2]
    side = max(16, min(height, width) // 8 * 2)
    first, second = _grey(before), _grey(after)
    places, moves, weights = [], [], []
    for top in range(0, height - side + 1, side // 2):
        for left in range(0, width - side + 1, side // 2):
            if kept is not None and not kept[top : top + side, left : left + side].all():
                continue
            move, weight = displacement(first, second, (left, top), side)
            if weight > 0:
                places.append((left + (side - width) / 2, top + (side - height) / 2))
                moves.append(move)
                weights.append(weight)
    if len(places) < 2:
        raise ValueError("drift finds nothing to hold on to: what was to be kept is flat or small.")
    return _fit(np.array(places), np.array(moves), np.array(weights))


def colour_drift(
    after: Image, before: Image, kept: Mask | None = None
) -> tuple[float, float, float]:
    """How much redder, greener and bluer the kept pixels have become on average, of 255."""
    difference = after.astype(np.int16) - before
    pixels = difference.reshape(-1, 3) if kept is None else difference[kept]
    red, green, blue = (float(channel.mean()) for channel in pixels.T)
    return red, green, blue


def _grey(image: Image) -> Float[np.ndarray, "_ _"]:
    """The mean of the colours; each by itself, for sums of threes are slow."""
    return (image[..., 0].astype(np.float64) + image[..., 1] + image[..., 2]) / 3


def displacement(
    first: Float[np.ndarray, "h w"],
    second: Float[np.ndarray, "h w"],
    corner: tuple[int, int],
    side: int,
) -> tuple[tuple[float, float], float]:
    """(how far a tile of the first picture is off in the second, how well that is known; 0: not).

    Args:
      first, second: grey pictures.
      corner: (left, top) of the tile.
      side: of the tile.
    """
    left, top = corner
    tile = first[top : top + side, left : left + side]
    if tile.std() < MIN_CONTRAST:
        return (0.0, 0.0), 0.0
    near, slopes, times = _frequencies(side)
    here = _spectrum(tile, (0.0, 0.0))
    there = _spectrum(second[top : top + side, left : left + side], (0.0, 0.0))
    move, information = _peak(there * np.conj(here) * near), np.zeros((2, 2))
    for _ in range(ROUNDS):
        whole = np.round(move).astype(int)
        column, row = left + whole[0], top + whole[1]
        if not (0 <= row <= first.shape[0] - side and 0 <= column <= first.shape[1] - side):
            return (0.0, 0.0), 0.0
        # Whole pixels move the tile; the rest moves the window, so that it sees the same things.
        rest, other = move - whole, second[row : row + side, column : column + side]
        if other.std() < MIN_CONTRAST:
            return (0.0, 0.0), 0.0
        cross = _spectrum(other, rest)[near] * np.conj(here[near])
        phase = np.angle(cross * np.exp(-1j * (slopes[0] * rest[0] + slopes[1] * rest[1])))
        weighted = slopes * (times * np.abs(cross))
        # No products of matrices: BLAS would start threads in each of ours.
        information = np.einsum("if,jf->ij", weighted, slopes)
        move = move + np.linalg.solve(information, np.einsum("if,f->i", weighted, phase))
    return (float(move[0]), float(move[1])), float(np.linalg.eigvalsh(information)[0])


@functools.cache
def _frequencies(
    side: int,
) -> tuple[Bool[np.ndarray, "s _"], Float[np.ndarray, "2 f"], Float[np.ndarray, " f"]]:
    """Of a tile's spectrum: (which count, their phases (x, y) for a pixel, how often each counts).

    A real picture's spectrum is stored by half; most of it stands for the other half too.
    """
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    near = (np.hypot(fx, fy) < MAX_FREQUENCY) & ((fx != 0) | (fy != 0))
    return near, -2 * np.pi * np.stack([fx[near], fy[near]]), np.where(fx[near] > 0, 2.0, 1.0)


def _spectrum(
    tile: Float[np.ndarray, "s s"], moved: tuple[float, float] | Float[np.ndarray, "2"]
) -> Complex[np.ndarray, "s _"]:
    """Half of it, of a tile without its mean, under a Hann window moved by less than a pixel."""
    places = np.arange(1, len(tile) + 1)
    x, y = (
        0.5 - 0.5 * np.cos(2 * np.pi * np.clip((places - by) / (len(tile) + 1), 0, 1))
        for by in moved
    )
    return np.fft.rfft2((tile - tile.mean()) * y[:, None] * x)


def _peak(cross: Complex[np.ndarray, "s _"]) -> Float[np.ndarray, "2"]:
    """The displacement (x, y) in whole pixels: where the phases agree best."""
    agreement = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9))
    side = len(agreement)
    y, x = np.unravel_index(np.argmax(agreement), agreement.shape)
    return (np.array([x, y]) + side // 2) % side - float(side // 2)


def _fit(
    places: Float[np.ndarray, "n 2"],
    moves: Float[np.ndarray, "n 2"],
    weights: Float[np.ndarray, " n"],
) -> Drift:
    """Equation (1) by weighted least squares, twice more without the tiles that it fits badly."""
    for _ in range(3):
        share = (weights / weights.sum())[:, None]
        centre, mean = (share * places).sum(axis=0), (share * moves).sum(axis=0)
        spread = (share * np.square(places - centre)).sum()
        zoom = (share * (places - centre) * (moves - mean)).sum() / spread if spread > 0 else 0.0
        shift = mean - zoom * centre
        error = np.linalg.norm(moves - shift - zoom * places, axis=1)
        weights = np.where(error <= 3 * max(np.median(error), 0.02), weights, 0.0)
    return Drift((float(shift[0]), float(shift[1])), 1 + float(zoom), int((weights > 0).sum()))
