"""Did the edit happen, and only it? The checker of `data.world`, which reads pictures back.

Comparing pixels with the truth would call a good picture with one pixel shifted wrong, and a
picture that lost its small letters right. So the picture is *read*: each factor (background, the
colour of the object on the left, the second letter of the word) gets the value whose drawing fits
best, among all that `data.scene` can draw, or `UNREADABLE` where even the best one fits badly. An
edit is right when the factors that the instruction names read as told.

All reading is done at 32 x 32 pixels, to which larger pictures are averaged, and on softened
pictures: an autoencoder's soft edges and the grain of a sampler are not errors of editing.
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
"""What is read of the world's details; those of other data sets may have some of these."""

# Tolerances, for values of 0 to 1; THING, LETTER and FIGURE bound the root mean square difference
# between the softened picture and the best drawing over the region of the factor. Each is set
# above what honest pictures leave (gaussian grain of 0.04; a blur of 0.7 pixels; 24 principal
# components of each 8 x 8 patch, as a small autoencoder would) and near what wrong ones leave.
SETTING_TOLERANCE = 0.06  # largest channel of the median; two settings differ by 0.13 or more
BACKGROUND_TOLERANCE = 0.05  # honest: up to 0.03; blur of a whole pixel: 0.03
EMPTY_TOLERANCE = 0.06  # honest: up to 0.03; an object faded to a third: 0.13, the palest 0.05
THING_TOLERANCE = 0.11  # honest: up to 0.09; even mixture of two objects: 0.12
LETTER_TOLERANCE = 0.11  # honest: up to 0.09; even mixture of two letters: 0.11
FIGURE_TOLERANCE = 0.12  # honest: up to 0.10; even mixture of two characters: 0.13
DRIFT_TOLERANCE = 0.04  # mean absolute; honest: 98 % up to 0.025; all darker by 11 / 255: 0.043
MIN_ALONE = 0.05  # of the picture; fewer pixels are the insides of objects, which are read anyway

IN_PLACE = ("local", "global", "text")  # the categories in which pixels can stay where they are


class Verdict(NamedTuple):
    """What became of one edit.

    Attributes:
      edited: every factor that the instruction names is as told, and those that it leaves open have
        some value that can be read; None where it asks for nothing that is not there already.
      preserved: every other factor is as it should be, and untouched pixels have not drifted; None
        for text-to-image, where nothing is there to be preserved.

    Of data that no checker reads, both are None.
    """

    edited: bool | None
    preserved: bool | None


def check(image: UInt8[np.ndarray, "height width 3"], details: str) -> Verdict:
    """Judges an edited picture.

    Args:
      image: what the model made of the example's contexts and prompt.
      details: those of the example; of others than `data.world` writes there is no verdict.

    Returns:
      The verdict; see there.

    Raises:
      ValueError: the picture is not of the size of the example's target.
    """
    facts = json.loads(details)
    if not isinstance(facts, dict) or not facts.keys() >= DETAILS:
        return Verdict(None, None)
    size = facts["size"]
    if image.shape[:2] != (size, size):
        raise ValueError(f"image is {image.shape[0]}x{image.shape[1]}; its truth is {size}x{size}")
    after, seen = Scene.from_json(facts["after"]), read(image)
    right = {factor: seen[factor] == value for factor, value in after.factors().items()}
    free = facts["free"]
    edited = None
    if facts["names"] or free:
        edited = all(right[factor] for factor in facts["names"])
        edited &= all(seen[factor] not in (None, UNREADABLE) for factor in free)
    if not facts["before"]:
        return Verdict(edited, None)
    rest = right.keys() - {*facts["names"], *free}
    preserved = all(right[factor] for factor in rest)
    if preserved and facts["category"] in IN_PLACE:
        preserved = _drift(image, Scene.from_json(facts["before"]), after) <= DRIFT_TOLERANCE
    return Verdict(edited, preserved)


def _drift(image: UInt8[np.ndarray, "size size 3"], before: Scene, after: Scene) -> float:
    """Mean absolute error of the softened picture over the pixels that the truth leaves alone."""
    old, new = (_unit(render(scene, len(image))) for scene in (before, after))
    alone = _soften(_soften(abs(new - old))).max(-1) == 0  # two pixels from any change, or more
    error = abs(_soften(_unit(image)) - _soften(old))
    return float(error[alone].mean()) if alone.mean() >= MIN_ALONE else 0.0


def read(image: UInt8[np.ndarray, "size size 3"]) -> dict[str, str | None]:
    """What a picture shows, factor by factor, with no knowledge of what it should show.

    Args:
      image: a square picture of at least 32 pixels a side.

    Returns:
      The factors of `Scene.factors`: a value, None where there is nothing, or ``UNREADABLE``. In a
      word, single letters may be.
    """
    shrunk = Image.fromarray(image).resize((READ_SIZE, READ_SIZE), Image.Resampling.BOX)
    pixels = _soften(_unit(np.asarray(shrunk)))
    setting = _read_setting(pixels)
    if setting is None:  # all else is seen against the background
        return dict.fromkeys(Scene("").factors(), UNREADABLE)
    guesses = [guess(pixels, setting) for guess in (_best_things, _best_sign, _best_figure)]
    errors = [np.square(pixels - _look(guess)).mean(-1) for guess in guesses]
    best = min(range(len(guesses)), key=lambda i: errors[i].sum())
    return _believe(guesses[best], errors[best])


# ---- regions of the picture, at the size of reading ---------------------------------------------

Region = tuple[slice, slice]


def _region(x0: float, y0: float, x1: float, y1: float) -> Region:
    """Rows and columns of a box in the unit square."""
    x0, y0, x1, y1 = (round(READ_SIZE * edge) for edge in (x0, y0, x1, y1))
    return np.s_[max(y0, 0) : y1, max(x0, 0) : x1]


def _figure_region(place: str, top: float = 0.0, bottom: float = 1.0) -> Region:
    """Part of a character's box between two heights, 0 at its top and 1 at its feet."""
    x, height = PLACES.get(place, 0.5), FIGURE_HEIGHTS[place]
    y = 0.5 - height / 2
    return _region(x - 0.35 * height, y + top * height, x + 0.35 * height, y + bottom * height)


THING_REGIONS = {place: _region(x - 0.25, 0.25, x + 0.25, 0.75) for place, x in PLACES.items()}
LETTER_REGIONS = tuple(  # with half a cell around the letter, that a neighbour does not reach
    _region(x - CELL / 2, y - CELL / 2, x + 4.5 * CELL, y + 6.5 * CELL) for x, y in LETTER_CORNERS
)
FIGURE_BANDS = {"topper": (0.0, 0.33), "eyes": (0.33, 0.66), "colour": (0.66, 1.0)}


def _believe(scene: Scene, error: Float[np.ndarray, "h w"]) -> dict[str, str | None]:
    """The factors of the best scene, less those whose region fits badly."""

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
            # A ghost is faint and thin, so that an empty place is judged by its worst twentieth.
            ghost = np.sqrt(np.quantile(error[region], 0.95)) > EMPTY_TOLERANCE
            if bad(region, THING_TOLERANCE) if getattr(scene, place) else ghost:
                factors |= dict.fromkeys((f"{place}.shape", f"{place}.colour", "style"), UNREADABLE)
    outside = np.ones(error.shape, bool)
    for region in regions:
        outside[region] = False
    if bad(outside, BACKGROUND_TOLERANCE):
        factors |= dict.fromkeys(("background", "tone"), UNREADABLE)
    return factors


# ---- the best scene of each sort ----------------------------------------------------------------


def _read_setting(pixels: Float32[np.ndarray, "h w 3"]) -> Scene | None:
    """The empty scene of the picture's background and tone, seen above and below all objects."""
    rim = np.concatenate([pixels[:4], pixels[-4:]])
    colour = np.median(rim.reshape(-1, 3), axis=0)  # a hat and two shoulders cannot move it
    settings = [Scene(background, tone) for background, tone in product(BACKGROUNDS, TONES)]
    distances = [abs(_look(scene)[0, 0] - colour).max() for scene in settings]
    best = int(np.argmin(distances))
    return settings[best] if distances[best] <= SETTING_TOLERANCE else None


def _best_things(pixels: Float32[np.ndarray, "h w 3"], setting: Scene) -> Scene:
    options = []
    for style in STYLES:
        things, looks = _thing_looks(replace(setting, style=style))
        fits = [_nearest(pixels[region], looks) for region in THING_REGIONS.values()]
        found = {place: things[i] for place, (i, _) in zip(PLACES, fits, strict=True)}
        options.append((sum(e for _, e in fits), replace(setting, style=style, **found)))
    return min(options, key=lambda option: option[0])[1]


def _best_sign(pixels: Float32[np.ndarray, "h w 3"], setting: Scene) -> Scene:
    options = []
    for board in BOARDS:
        looks = _letter_looks(setting, board)
        fits = [_nearest(pixels[region], looks) for region in LETTER_REGIONS]
        word = "".join(ALPHABET[i] for i, _ in fits)
        options.append((sum(e for _, e in fits), replace(setting, sign=Sign(word, board))))
    return min(options, key=lambda option: option[0])[1]


def _best_figure(pixels: Float32[np.ndarray, "h w 3"], setting: Scene) -> Scene:
    figures, looks = _figure_looks(setting)
    return replace(setting, figure=figures[_nearest(pixels, looks)[0]])


def _nearest(
    crop: Float32[np.ndarray, "h w 3"], looks: Float32[np.ndarray, "n h w 3"]
) -> tuple[int, float]:
    """The look with the least squared error, and that error."""
    errors = np.square(looks - crop).sum(axis=(1, 2, 3))
    best = int(np.argmin(errors))
    return best, float(errors[best])


# A look is a softened drawing of one possibility. There are few settings, so all are kept.


@functools.cache
def _thing_looks(scene: Scene) -> tuple[list[Thing | None], Float32[np.ndarray, "n h w 3"]]:
    """All that may stand at a place, in the setting and style of the scene."""
    things = [None, *(Thing(shape, colour) for shape, colour in product(SHAPES, COLOURS))]
    region = THING_REGIONS["left"]  # it looks the same at the other place
    return things, np.stack([_look(replace(scene, left=thing))[region] for thing in things])


@functools.cache
def _letter_looks(setting: Scene, board: str) -> Float32[np.ndarray, "26 h w 3"]:
    signs = [replace(setting, sign=Sign(3 * letter, board)) for letter in ALPHABET]
    return np.stack([_look(sign)[LETTER_REGIONS[0]] for sign in signs])


@functools.cache
def _figure_looks(setting: Scene) -> tuple[list[Figure], Float32[np.ndarray, "n h w 3"]]:
    figures = [Figure(*values) for values in product(COLOURS, TOPPERS, EYES, FIGURE_HEIGHTS)]
    return figures, np.stack([_look(replace(setting, figure=figure)) for figure in figures])


def _look(scene: Scene) -> Float32[np.ndarray, "h w 3"]:
    return _soften(_unit(render(scene, READ_SIZE)))


def _unit(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    return image.astype(np.float32) / 255


def _soften(image: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """A binomial blur of 3 x 3 pixels."""
    for axis in (0, 1):
        rim = [(1, 1) if i == axis else (0, 0) for i in range(3)]
        padded = np.moveaxis(np.pad(image, rim, mode="edge"), axis, 0)
        image = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    return image
