"""Reads a user's triples: a folder of images and ``triples.jsonl``, one JSON object per line.

::

    {"target": "a.png", "contexts": ["b.png"], "prompt": "make it night"}
    {"target": "c.jpg", "prompt": "a cat on a mat", "id": "cat", "split": "validation"}

Paths are relative to the folder. Optional keys, with their defaults: ``contexts`` (none), ``id``
(the target's path), ``split`` ("train"), ``details`` (an empty object; free for the user's data),
and ``category`` ("local", or "text_to_image" without contexts).
"""

import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from kontext_jax.types import CATEGORIES, Triple

TABLE = "triples.jsonl"

_TYPES = {
    "target": str,
    "prompt": str,
    "contexts": list,
    "id": str,
    "split": str,
    "category": str,
    "details": dict,
}


class Line(NamedTuple):
    """One checked line of the table; ``where`` names it in error messages."""

    where: str
    split: str
    id: str
    target: pathlib.Path
    contexts: tuple[pathlib.Path, ...]
    prompt: str
    category: str
    details: str


def read(folder: os.PathLike | str) -> dict[str, list[Line]]:
    """Reads and checks the table, without decoding images, and groups its lines by split.

    Raises:
      FileNotFoundError: `folder` has no table.
      ValueError: the table is empty, or a line is invalid or names an image that does not exist.
    """
    table = pathlib.Path(folder) / TABLE
    if not table.is_file():
        raise FileNotFoundError(f"There is no {TABLE} in {folder}: set --input to its folder.")
    splits: dict[str, list[Line]] = {}
    first_use: dict[str, str] = {}
    for number, text in enumerate(table.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        line = _parse(text, f"{table}, line {number}", table.parent)
        if line.id in first_use:
            raise ValueError(
                f'{line.where}: the id "{line.id}" is taken by {first_use[line.id]}:'
                ' give each line a unique "id".'
            )
        first_use[line.id] = f"line {number}"
        splits.setdefault(line.split, []).append(line)
    if not splits:
        raise ValueError(f"{table} is empty: add at least one line.")
    return splits


def triples(lines: Sequence[Line]) -> Iterator[Triple]:
    """Loads the images of the lines, one line at a time.

    Raises:
      ValueError: an image cannot be decoded.
    """
    for line in lines:
        yield Triple(
            id=line.id,
            target=_load(line.target, line.where),
            contexts=tuple(_load(path, line.where) for path in line.contexts),
            prompt=line.prompt,
            category=line.category,
            details=line.details,
        )


def _parse(text: bytes, where: str, folder: pathlib.Path) -> Line:
    fields = json_object(text, where, 'such as {"target": ..., ...}')
    _check(fields, where)
    contexts = fields.get("contexts", [])
    line = Line(
        where=where,
        split=fields.get("split", "train"),
        id=fields.get("id", fields["target"]),
        target=folder / fields["target"],
        contexts=tuple(folder / context for context in contexts),
        prompt=fields["prompt"],
        category=fields.get("category", "local" if contexts else "text_to_image"),
        details=json.dumps(fields.get("details", {})),
    )
    for image in (line.target, *line.contexts):
        if not image.is_file():
            raise ValueError(f"{where}: there is no image {image}.")
    return line


def _check(fields: dict[str, Any], where: str) -> None:
    for key, value in fields.items():
        if key not in _TYPES:
            raise ValueError(f'{where}: unknown key "{key}"; the keys are {", ".join(_TYPES)}.')
        if not isinstance(value, _TYPES[key]):
            raise ValueError(f'{where}: "{key}" must be a {_TYPES[key].__name__}, not {value!r}.')
    check_strings(fields, ("target", "prompt"), where)
    if not all(isinstance(context, str) for context in fields.get("contexts", [])):
        raise ValueError(f'{where}: "contexts" must be a list of paths.')
    if fields.get("category", CATEGORIES[0]) not in CATEGORIES:
        raise ValueError(
            f'{where}: the category "{fields["category"]}" is not one of {", ".join(CATEGORIES)}.'
        )


def json_object(text: bytes, where: str, kind: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
      text: JSON in UTF-8.
      where: name of the source in error messages.
      kind: description of the expected object, which ends the sentence "this is not an object".

    Raises:
      ValueError: the text is not a JSON object.
    """
    try:
        fields = json.loads(text.decode())
    except ValueError as error:  # from JSON or UTF-8
        raise ValueError(f"{where}: this is not JSON in UTF-8: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: this is not an object {kind}.")
    return fields


def check_strings(fields: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Raises ValueError if a key is missing or its value is not a string."""
    for key in keys:
        if key not in fields:
            raise ValueError(f'{where}: the key "{key}" is missing.')
        if not isinstance(fields[key], str):
            raise ValueError(f'{where}: "{key}" must be a str, not {fields[key]!r}.')


def _load(path: pathlib.Path, where: str) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return load_image(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def load_image(path: os.PathLike | str) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to RGB (`to_rgb`), rotated upright by its EXIF orientation.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file cannot be decoded.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no image {path}.")
    return decode_image(path, f"the image {path}")


def decode_image(file: os.PathLike | str | io.BytesIO, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image to RGB (`to_rgb`), rotated upright by its EXIF orientation.

    Raises:
      ValueError: the image cannot be decoded; the message begins with `name`.
    """
    try:
        with Image.open(file) as opened:
            return to_rgb(ImageOps.exif_transpose(opened))
    # Pillow's errors for damaged files and for images that would exhaust memory.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded: {error}.") from error


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Converts an image to 8-bit RGB; puts transparency on white, keeps the upper 8 of 16 bits.

    Raises:
      ValueError: the range of the pixels is unknown, as with 32-bit integers or floats.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have Pillow's mode {image.mode}; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))
