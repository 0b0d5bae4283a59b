"""What a cell of a sweep leaves on disk: its pictures, and what they were found to be worth.

::

    DIR/cells/SET/CELL/record.json     what made the pictures: weights, sampler, tasks, seed
                       images/ID.png   one picture a task, written as soon as it is made
                       batches.jsonl   how long each batch took
                       scores.jsonl    one line a task, when all pictures are there
                       whole.json      scores of the set as a whole, and by whom it was judged

Pictures are the record: a sweep that was killed makes those that are missing, and a new judge needs
none to be made again. Each file appears under its name when it is complete and on the disk. In a
job of several processes the first one writes; all read the same folder, on a file system that they
share.
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
"""Characters of a picture's name; file systems take 255 bytes, ends included."""


class CellFolder:
    """The folder of one cell on one set."""

    def __init__(self, path: Path, record: Mapping[str, Any]):
        """Opens or makes it.

        Args:
          path: of the folder.
          record: JSON of all that decides what its pictures look like.

        Raises:
          ValueError: it holds pictures that something else made, or nothing tells what did.
        """
        self._path, self._writes = path, jax.process_index() == 0
        check_record(path, record)
        if self._writes:
            (path / "images").mkdir(parents=True, exist_ok=True)
            write_text(path / "record.json", json.dumps(record, indent=2) + "\n")
        multihost_utils.sync_global_devices(f"folder {path}")

    def has(self, task: str) -> bool:
        """Whether a task's picture is there."""
        file = picture_file(self._path, task)
        return file.is_file() and file.stat().st_size > 0

    def load(self, task: Task) -> RGBImage:
        """A task's picture.

        Raises:
          FileNotFoundError, ValueError: it is missing, or cannot be decoded.
        """
        return load_picture(self._path, task.id)

    def save(self, pictures: Mapping[str, RGBImage]) -> None:
        """Writes pictures, by the ids of their tasks."""
        if not self._writes:
            return
        for task, picture in pictures.items():
            with atomic_path(picture_file(self._path, task), shared=False) as file:
                Image.fromarray(np.asarray(picture)).save(file, "PNG", compress_level=1)

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds a line about a batch."""
        if self._writes:
            with (self._path / "batches.jsonl").open("a") as file:
                # In front, so that it also ends a line that a kill cut short.
                file.write("\n" + json.dumps(line))

    def batches(self) -> list[dict[str, Any]]:
        """The lines about batches."""
        return read_lines(self._path / "batches.jsonl")

    def write_scores(self, rows: Sequence[Mapping], whole: Mapping[str, Any]) -> None:
        """Writes scores: a line a task, and what is said of all together."""
        if self._writes:
            # First, so that a kill leaves no judges' names beside the numbers of others.
            (self._path / "whole.json").unlink(missing_ok=True)
            write_text(self._path / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(self._path / "whole.json", json.dumps(whole, indent=2) + "\n")

    def scores(
        self, judges: Mapping[str, Any], tasks: Sequence[str]
    ) -> tuple[list[dict], dict] | None:
        """(rows, whole) by these judges; None if there is anything to make or to judge.

        Args:
          judges: what tells them from others.
          tasks: ids of all tasks, in order: each has a row, and its picture is there.
        """
        whole = _json(_text(self._path / "whole.json"))
        if whole is None or whole.get("judges") != json.loads(json.dumps(judges)):
            return None
        rows = read_lines(self._path / "scores.jsonl")
        if [row.get("id") for row in rows] != list(tasks) or not all(map(self.has, tasks)):
            return None
        return rows, whole


def check_record(path: Path, record: Mapping[str, Any], unknown: Container[str] = ()) -> None:
    """Refuses a cell's folder that another record is of; there need be none.

    Args:
      path: of the folder.
      record: JSON of all that decides what its pictures look like.
      unknown: keys of a record that cannot be told yet.

    Raises:
      ValueError: it holds pictures that something else made, or nothing tells what did.
    """
    file = path / "record.json"
    if not file.is_file():
        return
    stored, mine = _json(_text(file)), json.loads(json.dumps(record))
    if stored is None:
        raise ValueError(
            f"{file} is damaged, and nothing else tells what made the pictures: delete {path}."
        )
    keys = [key for key in mine | stored if key not in unknown]
    changed = [key for key in keys if stored.get(key) != mine.get(key)]
    if changed:
        raise ValueError(
            f"{path} holds pictures of another {' and '.join(changed)}: give another --workdir, or "
            "delete that folder."
        )


def picture_file(folder: Path, task: str) -> Path:
    """Where a cell's folder has the picture of a task, by the task's id."""
    name = quote(task, safe="")
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}-{short_digest(task)}"
    return folder / "images" / f"{name}.png"


def load_picture(folder: Path, task: str) -> RGBImage:
    """The picture of a task in a cell's folder.

    Raises:
      FileNotFoundError, ValueError: it is missing, or cannot be decoded.
    """
    try:
        return load_image(picture_file(folder, task))
    except ValueError as error:
        message = f"{str(error).removesuffix('.')}; delete it, and it is made again."
        raise ValueError(message) from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; what a kill cut short is left out, and so is no file."""
    return [line for line in map(_json, _text(file).splitlines()) if line is not None]


def _text(file: Path) -> str:
    """A file's text, empty if there is none; what is damaged stays so."""
    return file.read_text(errors="replace") if file.is_file() else ""


def _json(text: str) -> dict | None:
    """An object; None of what is torn."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
