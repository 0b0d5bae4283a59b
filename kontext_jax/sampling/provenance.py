"""Image files that tell how they were made: a JSON record inside the PNG itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kontext_jax.files import atomic_path

KEY = "kontext_jax"
"""Keyword of the PNG's text chunk that holds the record."""


def format_of(path: Path) -> str:
    """Pillow's name of the image format that the ending of ``path`` stands for.

    Raises:
      ValueError: it stands for none that can be written.
    """
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"The output {path} has no ending of an image format, such as .png.")
    return name


def write_image(
    image: UInt8[np.ndarray, "h w 3"], path: Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """Writes an image in the format of its ending: all of it or, on failure, nothing.

    Args:
      image: the pixels.
      path: where to; its folder is made if it is missing.
      provenance: JSON values that a PNG carries along; other formats leave them out.

    Raises:
      OSError: it cannot be written there.
      ValueError: ``path`` has no ending of an image format.
    """
    name = format_of(path)
    options = {}
    if provenance is not None and name == "PNG":
        text = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(KEY, text)  # tEXt would hold Latin-1 only
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as file:
            Image.fromarray(image).save(file, name, **options)
    except OSError as error:
        raise OSError(f"The image {path} cannot be written: {error}.") from error


def read_provenance(path: Path) -> dict[str, Any] | None:
    """The record of an image, or None where it carries none.

    Raises:
      OSError: there is no such file, or it is no image.
      ValueError: what it carries is not a record.
    """
    with Image.open(path) as image:
        image.load()  # text may come after the pixels
        text = image.info.get(KEY)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"The text {KEY!r} in {path} is not a JSON object.")
    return record
