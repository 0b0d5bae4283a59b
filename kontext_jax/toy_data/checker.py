"""The checker of `world`: whether an edit was carried out and the rest of the image preserved.

Pixel differences from the target would reject a good image that is shifted by one pixel, and accept
an image that lost its small letters. The checker therefore *reads* the image. Each factor
(background, colour of the left object, second letter of the word) gets the value whose rendering
fits best among all that `scene` can render, or `UNREADABLE` if even the best one fits badly. An
edit is correct if the factors that the instruction names have the values it asks for.

Reading happens at 32 x 32 pixels, to which larger images are averaged, and on blurred images: the
soft edges of an autoencoder and the grain of a sampler are not editing errors.
"""

import functools
import json
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from kontext_jax.toy_data.scene import (
    ALPHABET,
    BACKGROUNDS,
    BOARD_BOX,
    BOARDS,
    CELL,
    COLOURS,
    EYES,
    FIGURE_HEIGHTS,
    LETTER_CORNERS,
    PLACES,
    SHAPES,
    STYLES,
    TONES,
    TOPPERS,
    Figure,
    Scene,
    Sign,
    Thing,
    render,
)

READ_SIZE = 32
UNREADABLE = "?"

DETAILS = frozenset(("category", "size", "names", "free", "before", "after"))
"""The keys of the world's details that the checker needs; other data sets may have some of them."""

# Tolerances for pixels in [0, 1]. THING, LETTER and FIGURE bound the root mean square difference
# between the blurred image and the best rendering over a factor's region. Each is above the error
# of valid images (Gaussian grain of 0.04, a blur of 0.7 pixels, or 24 principal components of each
# 8 x 8 patch, as from a small autoencoder) and close to the error of wrong ones.
SETTING_TOLERANCE = 0.06  # largest channel of the median; two settings differ by at least 0.13
BACKGROUND_TOLERANCE = 0.05  # valid: up to 0.03; a blur of one pixel: 0.03
EMPTY_TOLERANCE = 0.06  # valid: up to 0.03; an object faded to a third: 0.13, the palest 0.05
THING_TOLERANCE = 0.11  # valid: up to 0.09; the mean of two objects: 0.12
LETTER_TOLERANCE = 0.11  # valid: up to 0.09; the mean of two letters: 0.11
FIGURE_TOLERANCE = 0.12  # valid: up to 0.10; the mean of two characters: 0.13
DRIFT_TOLERANCE = 0.04  # mean absolute; valid: 98 % up to 0.025; all darker by 11 / 255: 0.043
MIN_UNCHANGED = 0.05  # fraction of the image; fewer are interiors of objects, which are read anyway

IN_PLACE = ("local", "global", "text")  # categories in which unedited pixels keep their position


class Verdict(NamedTuple):
    """The checker's judgement of one edit; both fields are None for data other than the world's.

    Attributes:
      edited: whether every factor that the instruction names has the requested value, and every
        factor that it leaves free has a readable value. None if nothing had to change.
      preserved: whether every other factor is unchanged and unedited pixels have not drifted. None
        for text-to-image, which has nothing to preserve.
    """

    edited: bool | None
    preserved: bool | None


def check(image: UInt8[np.ndarray, "height width 3"], details: str) -> Verdict:
    """Judges whether an edited image follows its instruction and preserves the rest.

    Args:
      image: the model's output for an example.
      details: the example's details, as written by `world`.

    Raises:
      ValueError: the image and the example's target differ in size.
    """
    facts = json.loads(details)
    if not isinstance(facts, dict) or not facts.keys() >= DETAILS:
        return Verdict(None, None)
    size = facts["size"]
    if image.shape[:2] != (size, size):
        raise ValueError(f"image is {image.shape[0]}x{image.shape[1]}; its target is {size}x{size}")
    after, factors = Scene.from_json(facts["after"]), read(image)
    correct = {factor: factors[factor] == value for factor, value in after.factors().items()}
    free = facts["free"]
    edited = None
    if facts["names"] or free:
        edited = all(correct[factor] for factor in facts["names"])
        edited &= all(factors[factor] not in (None, UNREADABLE) for factor in free)
    if not facts["before"]:
        return Verdict(edited, None)
    rest = correct.keys() - {*facts["names"], *free}
    preserved = all(correct[factor] for factor in rest)
    if preserved and facts["category"] in IN_PLACE:
        preserved = _drift(image, Scene.from_json(facts["before"]), after) <= DRIFT_TOLERANCE
    return Verdict(edited, preserved)


def _drift(image: UInt8[np.ndarray, "size size 3"], before: Scene, after: Scene) -> float:
    """Returns the mean absolute error of the blurred image over pixels that should not change."""
    old, new = (_unit(render(scene, len(image))) for scene in (before, after))
    unchanged = _blur(_blur(abs(new - old))).max(-1) == 0  # two or more pixels from any change
    error = abs(_blur(_unit(image)) - _blur(old))
    return float(error[unchanged].mean()) if unchanged.mean() >= MIN_UNCHANGED else 0.0


def read(image: UInt8[np.ndarray, "size size 3"]) -> dict[str, str | None]:
    """Reads the factors of an image, without knowledge of what it should show.

    Args:
      image: a square image of at least 32 pixels a side.

    Returns:
      The factors of `Scene.factors`: a value, None if absent, or ``UNREADABLE``, which can also
      replace single letters of a word.
    """
    shrunk = Image.fromarray(image).resize((READ_SIZE, READ_SIZE), Image.Resampling.BOX)
    pixels = _blur(_unit(np.asarray(shrunk)))
    setting = _read_setting(pixels)
    if setting is None:  # everything else is read against the background
        return dict.fromkeys(Scene("").factors(), UNREADABLE)
    scenes = [fit(pixels, setting) for fit in (_fit_things, _fit_sign, _fit_figure)]
    errors = [np.square(pixels - _template(scene)).mean(-1) for scene in scenes]
    best = min(range(len(scenes)), key=lambda i: errors[i].sum())
    return _readable_factors(scenes[best], errors[best])


# ---- regions of the image, at READ_SIZE ---------------------------------------------------------

Region = tuple[slice, slice]


def _region(x0: float, y0: float, x1: float, y1: float) -> Region:
    """Returns the rows and columns of a box in the unit square."""
    x0, y0, x1, y1 = (round(READ_SIZE * edge) for edge in (x0, y0, x1, y1))
    return np.s_[max(y0, 0) : y1, max(x0, 0) : x1]


def _figure_region(place: str, top: float = 0.0, bottom: float = 1.0) -> Region:
    """Returns a character's box between two heights, 0 at its top and 1 at its feet."""
    x, height = PLACES.get(place, 0.5), FIGURE_HEIGHTS[place]
    y = 0.5 - height / 2
    return _region(x - 0.35 * height, y + top * height, x + 0.35 * height, y + bottom * height)


THING_REGIONS = {place: _region(x - 0.25, 0.25, x + 0.25, 0.75) for place, x in PLACES.items()}
LETTER_REGIONS = tuple(  # the letter with a margin of half a cell, which no neighbour reaches
    _region(x - CELL / 2, y - CELL / 2, x + 4.5 * CELL, y + 6.5 * CELL) for x, y in LETTER_CORNERS
)
FIGURE_BANDS = {"topper": (0.0, 0.33), "eyes": (0.33, 0.66), "colour": (0.66, 1.0)}


def _readable_factors(scene: Scene, error: Float[np.ndarray, "h w"]) -> dict[str, str | None]:
    """Returns the factors of the best scene, `UNREADABLE` where its region fits badly."""

    def bad(region: Region | Bool[np.ndarray, "h w"], tolerance: float) -> bool:
        return bool(np.sqrt(error[region].mean()) > tolerance)

    factors, regions = scene.factors(), []
    if scene.sign:
        regions = [_region(*BOARD_BOX)]
        letters = zip(scene.sign.word, LETTER_REGIONS, strict=True)
        factors["sign.word"] = "".join(
            UNREADABLE if bad(region, LETTER_TOLERANCE) else letter for letter, region in letters
        )
    elif scene.figure:
        place = scene.figure.place
        regions = [_figure_region(place)]
        for name, band in FIGURE_BANDS.items():
            if bad(_figure_region(place, *band), FIGURE_TOLERANCE):
                factors[f"figure.{name}"] = UNREADABLE
    else:
        regions = list(THING_REGIONS.values())
        for place, region in THING_REGIONS.items():
            # Remains of an object are faint and thin: judge empty places by their worst 5 %.
            ghost = np.sqrt(np.quantile(error[region], 0.95)) > EMPTY_TOLERANCE
            if bad(region, THING_TOLERANCE) if getattr(scene, place) else ghost:
                factors |= dict.fromkeys((f"{place}.shape", f"{place}.colour", "style"), UNREADABLE)
    outside = np.ones(error.shape, bool)
    for region in regions:
        outside[region] = False
    if bad(outside, BACKGROUND_TOLERANCE):
        factors |= dict.fromkeys(("background", "tone"), UNREADABLE)
    return factors


# ---- the best scene of each kind ----------------------------------------------------------------


def _read_setting(pixels: Float32[np.ndarray, "h w 3"]) -> Scene | None:
    """Returns the empty scene of the image's background and tone, read from the top and bottom."""
    rim = np.concatenate([pixels[:4], pixels[-4:]])
    colour = np.median(rim.reshape(-1, 3), axis=0)  # robust to a hat and two shoulders
    settings = [Scene(background, tone) for background, tone in product(BACKGROUNDS, TONES)]
    distances = [abs(_template(scene)[0, 0] - colour).max() for scene in settings]
    best = int(np.argmin(distances))
    return settings[best] if distances[best] <= SETTING_TOLERANCE else None


def _fit_things(pixels: Float32[np.ndarray, "h w 3"], setting: Scene) -> Scene:
    options = []
    for style in STYLES:
        things, templates = _thing_templates(replace(setting, style=style))
        fits = [_nearest(pixels[region], templates) for region in THING_REGIONS.values()]
        placed = {place: things[i] for place, (i, _) in zip(PLACES, fits, strict=True)}
        options.append((sum(e for _, e in fits), replace(setting, style=style, **placed)))
    return min(options, key=lambda option: option[0])[1]


def _fit_sign(pixels: Float32[np.ndarray, "h w 3"], setting: Scene) -> Scene:
    options = []
    for board in BOARDS:
        templates = _letter_templates(setting, board)
        fits = [_nearest(pixels[region], templates) for region in LETTER_REGIONS]
        word = "".join(ALPHABET[i] for i, _ in fits)
        options.append((sum(e for _, e in fits), replace(setting, sign=Sign(word, board))))
    return min(options, key=lambda option: option[0])[1]


def _fit_figure(pixels: Float32[np.ndarray, "h w 3"], setting: Scene) -> Scene:
    figures, templates = _figure_templates(setting)
    return replace(setting, figure=figures[_nearest(pixels, templates)[0]])


def _nearest(
    crop: Float32[np.ndarray, "h w 3"], templates: Float32[np.ndarray, "n h w 3"]
) -> tuple[int, float]:
    """Returns the index of the template with the least squared error, and that error."""
    errors = np.square(templates - crop).sum(axis=(1, 2, 3))
    best = int(np.argmin(errors))
    return best, float(errors[best])


# A template is a blurred rendering of one option. There are few settings, so all are cached.


@functools.cache
def _thing_templates(scene: Scene) -> tuple[list[Thing | None], Float32[np.ndarray, "n h w 3"]]:
    """Returns all options for one place, and their templates in the scene's setting and style."""
    things = [None, *(Thing(shape, colour) for shape, colour in product(SHAPES, COLOURS))]
    region = THING_REGIONS["left"]  # the other place looks the same
    return things, np.stack([_template(replace(scene, left=thing))[region] for thing in things])


@functools.cache
def _letter_templates(setting: Scene, board: str) -> Float32[np.ndarray, "26 h w 3"]:
    signs = [replace(setting, sign=Sign(3 * letter, board)) for letter in ALPHABET]
    return np.stack([_template(sign)[LETTER_REGIONS[0]] for sign in signs])


@functools.cache
def _figure_templates(setting: Scene) -> tuple[list[Figure], Float32[np.ndarray, "n h w 3"]]:
    figures = [Figure(*values) for values in product(COLOURS, TOPPERS, EYES, FIGURE_HEIGHTS)]
    return figures, np.stack([_template(replace(setting, figure=figure)) for figure in figures])


def _template(scene: Scene) -> Float32[np.ndarray, "h w 3"]:
    return _blur(_unit(render(scene, READ_SIZE)))


def _unit(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    return image.astype(np.float32) / 255


def _blur(image: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """Applies a binomial blur of 3 x 3 pixels."""
    for axis in (0, 1):
        rim = [(1, 1) if i == axis else (0, 0) for i in range(3)]
        padded = np.moveaxis(np.pad(image, rim, mode="edge"), axis, 0)
        image = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    return image
