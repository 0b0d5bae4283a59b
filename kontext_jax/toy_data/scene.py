"""The scenes of `world`: their vocabulary and their renderer.

A scene is a plain background with up to two objects, a sign with a word, or a character. It is
rendered from geometry in the unit square at any size of at least 32 pixels. At 32 pixels, boards
and the cells of letters align with pixels, and boards and objects with tokens of 8 x 8.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

# ---- vocabulary ---------------------------------------------------------------------------------

# RGB, 0 to 255. Backgrounds are pale and colours strong, so every object stands out.
BACKGROUNDS = {
    "sand": (240, 216, 158),
    "sky": (158, 208, 246),
    "mint": (160, 228, 186),
    "pink": (250, 194, 214),
}
COLOURS = {
    "red": (222, 40, 44),
    "green": (28, 146, 62),
    "blue": (36, 84, 216),
    "yellow": (252, 220, 24),
    "purple": (138, 48, 178),
    "orange": (250, 126, 16),
}
WHITE, INK, GOLD = (255, 255, 255), (36, 30, 52), (214, 158, 20)
TONES = {"day": (1.0, 1.0, 1.0), "night": (0.42, 0.46, 0.64)}  # factors of the RGB channels

SHAPES = ("circle", "square", "triangle", "star", "heart")
STYLES = ("solid", "outlined", "striped")
BOARDS = ("red", "green", "blue", "purple")  # colours on which white letters are legible
TOPPERS = ("ears", "hat", "cone", "crown")
EYES = ("dots", "shades", "cyclops")
# Letters have 4 x 6 cells. At 32 pixels a cell has two pixels, and three letters fill a sign.
FONT_ROWS = """
.##. ###. .### ###. #### #### .### #..# .##. ..## #..# #... #..#
#..# #..# #... #..# #... #... #... #..# .##. ...# #.#. #... ####
#..# ###. #... #..# ###. ###. #... #### .##. ...# ##.. #... ####
#### #..# #... #..# #... #... #.## #..# .##. ...# ##.. #... #..#
#..# #..# #... #..# #... #... #..# #..# .##. #..# #.#. #... #..#
#..# ###. .### ###. #### #... .### #..# .##. .##. #..# #### #..#

#..# .##. ###. .##. ###. .### #### #..# #..# #..# #..# #..# ####
##.# #..# #..# #..# #..# #... .##. #..# #..# #..# #..# #..# ...#
##.# #..# #..# #..# #..# .##. .##. #..# #..# #..# .##. .##. ..#.
#.## #..# ###. #..# ###. ...# .##. #..# #..# #### .##. .##. .#..
#.## #..# #... #.## #.#. ...# .##. #..# .##. #### #..# .##. #...
#..# .##. #... .### #..# ###. .##. .##. .##. #..# #..# .##. ####
"""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# ---- geometry, in fractions of the image's side -------------------------------------------------

PLACES = {"left": 0.25, "right": 0.75}  # x of the centre of an object or character
OBJECT_RADIUS = 0.215
OUTLINE, STRIPE = 0.29, 0.4  # thickness of lines and stripes, in object radii
BOARD_BOX = (0.0, 0.25, 1.0, 0.75)  # x0 y0 x1 y1
BOARD_CORNER = 0.08
CELL = 1 / 16  # side of one cell of the font
LETTER_CORNERS = ((1 / 16, 5 / 16), (6 / 16, 5 / 16), (11 / 16, 5 / 16))  # x y of each letter
FIGURE_HEIGHTS = {"left": 0.7, "right": 0.7, "centre": 0.94}
SUPERSAMPLING = 4
MIN_SIZE = 32

# ---- scenes -------------------------------------------------------------------------------------


class Thing(NamedTuple):
    """One object."""

    shape: str
    colour: str


class Sign(NamedTuple):
    """A board with a word of three letters on it."""

    word: str
    board: str


class Figure(NamedTuple):
    """A character: its identity (colour, topper, eyes) and its place."""

    colour: str
    topper: str
    eyes: str
    place: str


PARTS = {"left": Thing, "right": Thing, "sign": Sign, "figure": Figure}


@dataclass(frozen=True)
class Scene:
    """A complete description of an image. Its objects share one style."""

    background: str
    tone: str = "day"
    style: str = "solid"
    left: Thing | None = None
    right: Thing | None = None
    sign: Sign | None = None
    figure: Figure | None = None

    def factors(self) -> dict[str, str | None]:
        """Returns every factor that can be read from the image; None if it is absent."""
        values = {"background": self.background, "tone": self.tone}
        # The style of an empty scene is invisible.
        values["style"] = self.style if self.left or self.right else None
        for name, part in PARTS.items():
            part_values = getattr(self, name) or [None] * len(part._fields)
            values |= {f"{name}.{f}": v for f, v in zip(part._fields, part_values, strict=True)}
        return values

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Scene":
        """Restores a scene from the JSON of its ``asdict``."""
        parts = {name: part(*fields[name]) for name, part in PARTS.items() if fields[name]}
        return cls(**{**fields, **parts})


# ---- drawing ------------------------------------------------------------------------------------

# Signed distances to a shape's edge in object radii: negative and exact inside; v points down.


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v, inradius = v - 0.167, 0.583
    return np.maximum(v, 0.866 * abs(u) - 0.5 * v) - inradius


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v, tip, valley = v - 0.08, 1.08, 0.54
    radius, fifth = np.hypot(u, v), 2 * np.pi / 5
    angle = abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)  # fold onto half an arm
    dx, dy = valley * np.sin(fifth / 2), valley * np.cos(fifth / 2) - tip
    x, y = radius * np.sin(angle), radius * np.cos(angle) - tip
    return (dx * y - dy * x) / np.hypot(dx, dy)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Inigo Quilez, "2D distance functions", with the tip of the heart at v = 0.95."""
    scale = 0.57
    x, y = scale * abs(u), scale * (0.95 - v)
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    along = 0.5 * np.maximum(x + y, 0)
    side = np.minimum(np.hypot(x, y - 1), np.hypot(x - along, y - along)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, side) / scale


DISTANCES = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.88,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
}

# Parts of a character, in heights of the character: u from its axis and v from its top.
FIGURE_PARTS = {
    "body": lambda u, v: (np.hypot(u / 0.25, (v - 1) / 0.26) < 1) & (v < 1),
    "head": lambda u, v: np.hypot(u, v - 0.54) < 0.3,
    "ears": lambda u, v: (abs(abs(u) - 0.17) < 0.5 * (v - 0.12)) & (v < 0.36),
    "hat": lambda u, v: (
        ((abs(u) < 0.19) & (v > 0.02) & (v < 0.3)) | ((abs(u) < 0.31) & (v > 0.25) & (v < 0.33))
    ),
    "cone": lambda u, v: (abs(u) < 0.62 * v) & (v < 0.33),
    "crown": lambda u, v: (
        (abs(u) < 0.21) & (v < 0.33) & (v > 0.06 + 0.3 * abs((u / 0.14 + 0.5) % 1 - 0.5))
    ),
    "dots": lambda u, v: np.hypot(abs(u) - 0.12, v - 0.52) < 0.06,
    "shades": lambda u, v: (abs(u) < 0.27) & (abs(v - 0.51) < 0.07),
    "cyclops": lambda u, v: np.hypot(u, v - 0.51) < 0.15,
    "pupil": lambda u, v: np.hypot(u, v - 0.51) < 0.07,
    "smile": lambda u, v: (abs(np.hypot(u, v - 0.63) - 0.125) < 0.025) & (v > 0.67),
}
TOPPER_COLOURS = {"hat": INK, "cone": WHITE, "crown": GOLD}  # ears are coloured like the head
FONT = {
    letter: np.array([[cell == "#" for cell in row.split()[i]] for row in block.splitlines()])
    for letters, block in zip(
        (ALPHABET[:13], ALPHABET[13:]), FONT_ROWS.strip().split("\n\n"), strict=True
    )
    for i, letter in enumerate(letters)
}


def _object(x: np.ndarray, y: np.ndarray, place: str, shape: str, layer: str) -> np.ndarray:
    u, v = (x - PLACES[place]) / OBJECT_RADIUS, (y - 0.5) / OBJECT_RADIUS
    distance = DISTANCES[shape](u, v)
    if layer == "outlined":
        return (distance < 0) & (distance > -OUTLINE)
    if layer == "stripes":
        return (distance < 0) & (np.floor((v + 1) / STRIPE) % 2 == 1)
    return distance < 0


def _board(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = BOARD_BOX
    beyond_x = np.maximum(abs(x - (x0 + x1) / 2) - (x1 - x0) / 2 + BOARD_CORNER, 0)
    beyond_y = np.maximum(abs(y - (y0 + y1) / 2) - (y1 - y0) / 2 + BOARD_CORNER, 0)
    return np.hypot(beyond_x, beyond_y) < BOARD_CORNER


def _letter(x: np.ndarray, y: np.ndarray, corner: tuple[float, float], letter: str) -> np.ndarray:
    glyph = np.pad(FONT[letter], 1)  # positions outside the letter are clipped to an empty rim
    column = np.clip(np.floor((x - corner[0]) / CELL) + 1, 0, glyph.shape[1] - 1)
    row = np.clip(np.floor((y - corner[1]) / CELL) + 1, 0, glyph.shape[0] - 1)
    return glyph[row.astype(int), column.astype(int)]


def _figure(x: np.ndarray, y: np.ndarray, place: str, part: str) -> np.ndarray:
    height = FIGURE_HEIGHTS[place]
    return FIGURE_PARTS[part]((x - PLACES.get(place, 0.5)) / height, (y - 0.5) / height + 0.5)


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    steps = (np.arange(size * SUPERSAMPLING, dtype=np.float32) + 0.5) / (size * SUPERSAMPLING)
    return tuple(np.meshgrid(steps, steps))


@functools.lru_cache(maxsize=1024)  # about 170 masks per size
def _mask(size: int, draw: Callable, *args: Any) -> Float32[np.ndarray, "size size 1"]:
    """Returns the fraction of each pixel that the layer covers."""
    coverage = draw(*_grid(size), *args).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    return coverage.mean(axis=(1, 3), dtype=np.float32)[..., None]


def _layers(scene: Scene) -> Iterator[tuple[tuple[int, int, int], Callable, tuple]]:
    """Yields (colour, mask function, its arguments) for each layer, from back to front."""
    for place in PLACES:
        if thing := getattr(scene, place):
            layer = "outlined" if scene.style == "outlined" else "solid"
            yield COLOURS[thing.colour], _object, (place, thing.shape, layer)
            if scene.style == "striped":
                yield WHITE, _object, (place, thing.shape, "stripes")
    if scene.sign:
        yield COLOURS[scene.sign.board], _board, ()
        for corner, letter in zip(LETTER_CORNERS, scene.sign.word, strict=True):
            yield WHITE, _letter, (corner, letter)
    if scene.figure:
        colour, topper, eyes, place = scene.figure
        colour = COLOURS[colour]
        yield tuple(int(0.75 * c) for c in colour), _figure, (place, "body")
        yield colour, _figure, (place, "head")
        yield TOPPER_COLOURS.get(topper, colour), _figure, (place, topper)
        yield WHITE if eyes == "cyclops" else INK, _figure, (place, eyes)
        if eyes == "cyclops":
            yield INK, _figure, (place, "pupil")
        yield INK, _figure, (place, "smile")


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Renders a scene at ``size`` x ``size`` pixels, antialiased.

    Raises:
      ValueError: the size is below 32 pixels, where letters become illegible.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}; a scene needs at least {MIN_SIZE} pixels a side")
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for colour, draw, args in _layers(scene):
        image += _mask(size, draw, *args) * (np.array(colour, np.float32) - image)
    return np.rint(image * np.array(TONES[scene.tone], np.float32)).astype(np.uint8)
