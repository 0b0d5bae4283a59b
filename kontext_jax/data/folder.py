"""The user's own triples: a folder with images and ``triples.jsonl``, one JSON object per line.

::

    {"target": "a.png", "contexts": ["b.png"], "prompt": "make it night"}
    {"target": "c.jpg", "prompt": "a cat on a mat", "id": "cat", "split": "validation"}

Paths are relative to the folder. What may be left out: ``contexts`` (none), ``id`` (the target's
path), ``split`` ("train"), ``details`` (an object for the user's own use), and ``category``
("local", or "text_to_image" where there is no context).
"""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
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
    """One line of the table, checked; ``where`` names it in messages."""

    where: str
    split: str
    id: str
    target: pathlib.Path
    contexts: tuple[pathlib.Path, ...]
    prompt: str
    category: str
    details: str


def read(folder: os.PathLike | str) -> dict[str, list[Line]]:
    """Reads and checks the whole table, but none of the images, and sorts its lines into splits.

    Raises:
      FileNotFoundError: there is no table in `folder`.
      ValueError: a line is wrong, or names an image that does not exist, or there is no line.
    """
    table = pathlib.Path(folder) / TABLE
    if not table.is_file():
        raise FileNotFoundError(f"There is no {TABLE} in {folder}: name its folder with --input.")
    splits: dict[str, list[Line]] = {}
    first_use: dict[str, str] = {}
    for number, text in enumerate(table.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        line = _parse(text, f"{table}, line {number}", table.parent)
        if line.id in first_use:
            raise ValueError(
                f'{line.where}: the id "{line.id}" is taken by {first_use[line.id]};'
                ' give each line an "id" of its own.'
            )
        first_use[line.id] = f"line {number}"
        splits.setdefault(line.split, []).append(line)
    if not splits:
        raise ValueError(f"{table} is empty.")
    return splits


def triples(lines: Sequence[Line]) -> Iterator[Triple]:
    """Loads the images of each line in turn.

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
    try:
        fields = json.loads(text.decode())
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{where}: this is not JSON in UTF-8: {error}.") from error
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


def _check(fields: Any, where: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f'{where}: this is not an object such as {{"target": ..., ...}}.')
    for key, value in fields.items():
        if key not in _TYPES:
            raise ValueError(f'{where}: unknown key "{key}"; the keys are {", ".join(_TYPES)}.')
        if not isinstance(value, _TYPES[key]):
            raise ValueError(f'{where}: "{key}" must be a {_TYPES[key].__name__}, not {value!r}.')
    for key in ("target", "prompt"):
        if key not in fields:
            raise ValueError(f'{where}: the key "{key}" is missing.')
    if not all(isinstance(context, str) for context in fields.get("contexts", [])):
        raise ValueError(f'{where}: "contexts" must be a list of paths.')
    if fields.get("category", CATEGORIES[0]) not in CATEGORIES:
        raise ValueError(
            f'{where}: the category "{fields["category"]}" is none of {", ".join(CATEGORIES)}.'
        )


def _load(path: pathlib.Path, where: str) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return load_image(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def load_image(path: os.PathLike | str) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file, upright, transparency laid on white.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be decoded.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no image {path}.")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on bad bytes
        raise ValueError(f"the image {path} cannot be decoded: {error}.") from error
