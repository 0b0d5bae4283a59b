"""Image files that store how they were made, as a JSON record inside the PNG."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kontext_jax.files import atomic_path
from kontext_jax.types import RGBImage

KEY = "kontext_jax"
"""Keyword of the PNG text chunk with the record."""


def format_of(path: Path) -> str:
    """Returns Pillow's name of the image format that the suffix of ``path`` stands for.

    Raises:
      ValueError: Pillow cannot write files with this suffix.
    """
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"The output {path} needs the suffix of an image format, such as .png.")
    return name


def write_image(image: RGBImage, path: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Writes an image atomically, in the format of the path's suffix.

    Args:
      image: the image.
      path: file to write; missing folders are created.
      provenance: JSON values to store in a PNG; other formats leave them out.

    Raises:
      OSError: the file cannot be written.
      ValueError: ``path`` does not have the suffix of an image format.
    """
    name = format_of(path)
    options = {}
    if provenance is not None and name == "PNG":
        text = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(KEY, text)  # tEXt is limited to Latin-1
    try:
        with atomic_path(path) as temporary:
            Image.fromarray(image).save(temporary, name, **options)
    except OSError as error:
        raise OSError(f"The image {path} cannot be written: {error}.") from error


def read_provenance(path: Path) -> dict[str, Any] | None:
    """Returns the record stored in an image, or None if there is none.

    Raises:
      OSError: the file does not exist or is not an image.
      ValueError: the stored text is not a record.
    """
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
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
