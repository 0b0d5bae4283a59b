"""The folder of one cell on one task set: its images and their scores.

::

    DIR/cells/SET/CELL/record.json     everything that determines the images: weights, sampler, ...
                       images/ID.png   one image per task, written as soon as it is sampled
                       batches.jsonl   seconds per batch
                       scores.jsonl    one line per task, once all images are there
                       whole.json      scores of the set, and the record of the judges

The images are what counts: a sweep that was killed generates only the missing ones, and a new judge
scores those that are there. Every file gets its name only when it is complete and on disk. With
several processes, the first one writes and all read, so they must share the file system.
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from kontext_jax.data.folder import load_image
from kontext_jax.files import atomic_path, short_digest, write_text
from kontext_jax.types import RGBImage, Task

MAX_NAME = 200
"""Characters of an image file's stem; file systems allow 255 bytes with suffixes."""


class CellFolder:
    """The folder of one cell on one task set."""

    def __init__(self, path: Path, record: Mapping[str, Any]):
        """Opens or creates the folder.

        Args:
          path: path of the folder.
          record: JSON of everything that determines the cell's images.

        Raises:
          ValueError: the folder holds images of another record, or its record is damaged.
        """
        self._path, self._writes = path, jax.process_index() == 0
        check_record(path, record)
        if self._writes:
            (path / "images").mkdir(parents=True, exist_ok=True)
            write_text(path / "record.json", json.dumps(record, indent=2) + "\n")
        multihost_utils.sync_global_devices(f"folder {path}")

    def has(self, task_id: str) -> bool:
        """Whether the image of a task is stored."""
        file = image_file(self._path, task_id)
        return file.is_file() and file.stat().st_size > 0

    def load(self, task: Task) -> RGBImage:
        """Loads the image of a task.

        Raises:
          FileNotFoundError, ValueError: the image is missing, or cannot be decoded.
        """
        return load_task_image(self._path, task.id)

    def save(self, images: Mapping[str, RGBImage]) -> None:
        """Writes images, keyed by task id."""
        if not self._writes:
            return
        for task_id, image in images.items():
            with atomic_path(image_file(self._path, task_id), shared=False) as file:
                Image.fromarray(np.asarray(image)).save(file, "PNG", compress_level=1)

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line to ``batches.jsonl``."""
        if self._writes:
            with (self._path / "batches.jsonl").open("a") as file:
                # The newline comes first, to end a line that a kill may have truncated.
                file.write("\n" + json.dumps(line))

    def batches(self) -> list[dict[str, Any]]:
        """The lines of ``batches.jsonl``."""
        return read_lines(self._path / "batches.jsonl")

    def write_scores(self, rows: Sequence[Mapping], overall: Mapping[str, Any]) -> None:
        """Writes ``scores.jsonl``, one row per task, and ``whole.json``."""
        if self._writes:
            # Deleted first: a kill must not leave old judges' names next to new scores.
            (self._path / "whole.json").unlink(missing_ok=True)
            write_text(self._path / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(self._path / "whole.json", json.dumps(overall, indent=2) + "\n")

    def scores(
        self, judges: Mapping[str, Any], task_ids: Sequence[str]
    ) -> tuple[list[dict], dict] | None:
        """The content of (``scores.jsonl``, ``whole.json``) if it is complete, otherwise None.

        Args:
          judges: the record of the judges; scores of other judges do not count.
          task_ids: ids of all tasks, in order; each needs a row and an image.
        """
        overall = _json(_text(self._path / "whole.json"))
        if overall is None or overall.get("judges") != json.loads(json.dumps(judges)):
            return None
        rows = read_lines(self._path / "scores.jsonl")
        if [row.get("id") for row in rows] != list(task_ids) or not all(map(self.has, task_ids)):
            return None
        return rows, overall


def check_record(path: Path, record: Mapping[str, Any], unknown: Container[str] = ()) -> None:
    """Refuses a cell's folder whose images belong to another record; a new folder is fine.

    Args:
      path: path of the folder.
      record: JSON of everything that determines the cell's images.
      unknown: keys to ignore, because their values are not known yet.

    Raises:
      ValueError: the folder holds images of another record, or its record is damaged.
    """
    file = path / "record.json"
    if not file.is_file():
        return
    stored, current = _json(_text(file)), json.loads(json.dumps(record))
    if stored is None:
        raise ValueError(
            f"{file} is damaged, and only it says how the images were made: delete {path}."
        )
    keys = [key for key in current | stored if key not in unknown]
    changed = [key for key in keys if stored.get(key) != current.get(key)]
    if changed:
        raise ValueError(
            f"{path} holds images made with different {' and '.join(changed)}: use another "
            "--workdir, or delete that folder."
        )


def image_file(folder: Path, task_id: str) -> Path:
    """The path of a task's image in a cell's folder."""
    name = quote(task_id, safe="")
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}-{short_digest(task_id)}"
    return folder / "images" / f"{name}.png"


def load_task_image(folder: Path, task_id: str) -> RGBImage:
    """Loads a task's image from a cell's folder.

    Raises:
      FileNotFoundError, ValueError: the image is missing, or cannot be decoded.
    """
    try:
        return load_image(image_file(folder, task_id))
    except ValueError as error:
        message = f"{str(error).removesuffix('.')}; delete it, and start again to regenerate it."
        raise ValueError(message) from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line, without truncated ones; [] if it is missing."""
    return [line for line in map(_json, _text(file).splitlines()) if line is not None]


def _text(file: Path) -> str:
    """The text of a file, empty if it is missing; undecodable bytes are replaced."""
    return file.read_text(errors="replace") if file.is_file() else ""


def _json(text: str) -> dict | None:
    """Parses a JSON object; None if it is truncated or not an object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
