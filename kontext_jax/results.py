"""What a cell of a sweep leaves on disk: its pictures, and what they were found to be worth.

::

    DIR/cells/SET/CELL/record.json     what made the pictures: weights, sampler, tasks, seed
                       images/ID.png   one picture a task, written as soon as it is made
                       batches.jsonl   how long each batch took
                       scores.jsonl    one line a task, when all pictures are there
                       whole.json      scores of the set as a whole, and by whom it was judged

Pictures are the record: a sweep that was killed makes those that are missing, and a new judge needs
none to be made again. Each file appears under its name when it is complete. In a job of several
processes the first one writes; all read the same folder, on a file system that they share.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from PIL import Image

from kontext_jax.data.folder import load_image
from kontext_jax.types import Task

Picture = UInt8[np.ndarray, "_ _ 3"]


class CellFolder:
    """The folder of one cell on one set."""

    def __init__(self, path: Path, record: Mapping[str, Any]):
        """Opens or makes it.

        Args:
          path: of the folder.
          record: JSON of all that decides what its pictures look like.

        Raises:
          ValueError: it holds pictures that something else made.
        """
        self._path, self._writes = path, jax.process_index() == 0
        file = path / "record.json"
        text = json.dumps(record, indent=2) + "\n"
        mine = json.loads(text)
        if file.is_file() and (stored := json.loads(file.read_text())) != mine:
            changed = [key for key in mine | stored if stored.get(key) != mine.get(key)]
            raise ValueError(
                f"{path} holds pictures of another {' and '.join(changed)}: give another --workdir,"
                " or delete that folder."
            )
        if self._writes:
            (path / "images").mkdir(parents=True, exist_ok=True)
            write_text(file, text)
        multihost_utils.sync_global_devices(f"folder {path}")

    def has(self, task: str) -> bool:
        """Whether a task's picture is there."""
        return self._image(task).is_file()

    def load(self, task: Task) -> Picture:
        """A task's picture.

        Raises:
          FileNotFoundError, ValueError: it is missing, or cannot be decoded.
        """
        return load_image(self._image(task.id))

    def save(self, pictures: Mapping[str, Picture]) -> None:
        """Writes pictures, by the ids of their tasks."""
        if not self._writes:
            return
        for task, picture in pictures.items():
            file = self._image(task)
            temporary = file.with_suffix(".tmp")
            Image.fromarray(np.asarray(picture)).save(temporary, "PNG", compress_level=1)
            os.replace(temporary, file)

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds a line about a batch."""
        if self._writes:
            with (self._path / "batches.jsonl").open("a") as file:
                # In front, so that it also ends a line that a kill cut short.
                file.write("\n" + json.dumps(line))

    def batches(self) -> list[dict[str, Any]]:
        """The lines about batches; what a kill cut short is left out."""
        file = self._path / "batches.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [line for line in map(_json, lines) if line is not None]

    def write_scores(self, rows: Sequence[Mapping], whole: Mapping[str, Any]) -> None:
        """Writes scores: a line a task, and what is said of all together."""
        if self._writes:
            # First, so that a kill leaves no judges' names beside the numbers of others.
            (self._path / "whole.json").unlink(missing_ok=True)
            write_text(self._path / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(self._path / "whole.json", json.dumps(whole, indent=2) + "\n")

    def scores(self, judges: Mapping[str, Any]) -> tuple[list[dict], dict] | None:
        """(rows, whole) by these judges; None if they have not judged yet."""
        files = self._path / "scores.jsonl", self._path / "whole.json"
        if not all(file.is_file() for file in files):
            return None
        whole = json.loads(files[1].read_text())
        if whole["judges"] != json.loads(json.dumps(judges)):
            return None
        return [json.loads(line) for line in files[0].read_text().splitlines()], whole

    def _image(self, task: str) -> Path:
        return self._path / "images" / f"{quote(task, safe='')}.png"


def write_text(file: Path, text: str) -> None:
    """Writes a file that appears under its name when it is complete."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def _json(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
