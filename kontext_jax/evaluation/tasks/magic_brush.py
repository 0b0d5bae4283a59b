"""Reads a local copy of MagicBrush: edits of photographs, in sessions of one or more turns.

Zhang et al., arXiv 2306.10012; github.com/OSU-NLP-Group/MagicBrush. There are two layouts. The
authors' archives of the dev and test splits, and the published test split, consist of files::

    edit_sessions.json               {"<id>": [{"input": "<id>-input.png", "output":
                                      "<id>-output1.png", "instruction": "..."}, ...], ...}
    global_descriptions.json         {"<id>": {"<id>-input.png": "caption", ...}, ...}
    images/<id>/<id>-input.png       and <id>-output1.png, <id>-output2.png, ...

The captions are optional. The train and dev splits at huggingface.co/datasets/osunlp/MagicBrush
consist of tables: ``data/dev-00000-of-00004.parquet`` and so on, with the columns ``img_id``,
``turn_index`` (from 1), ``source_img``, ``instruction``, ``target_img``, and without captions. The
masks of both layouts are not read, because models get only the instruction.
"""

import functools
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from kontext_jax.data.folder import check_strings, decode_image, json_object, load_image
from kontext_jax.types import Task

SPLITS = ("dev", "test")
SESSIONS, CAPTIONS = "edit_sessions.json", "global_descriptions.json"

_COLUMNS = {
    "img_id": str,
    "turn_index": int,
    "source_img": dict,
    "instruction": str,
    "target_img": dict,
}


class _Turn(NamedTuple):
    """One edit of the session ``session``; ``number`` counts from 1."""

    session: str
    number: int
    source: UInt8[np.ndarray, "_ _ 3"]
    target: UInt8[np.ndarray, "_ _ 3"]
    instruction: str
    source_caption: str = ""
    target_caption: str = ""


def magic_brush(
    folder: os.PathLike | str, split: str = "test", sessions: bool = False
) -> list[Task]:
    """The benchmark's tasks, session by session; a session is a group.

    Each image is decoded once and kept: about 3 MB per image, 5 GB for all of test.

    Args:
      folder: folder that contains the split as ``test/edit_sessions.json`` or
        ``data/test-*.parquet``; or the split's own folder, with ``edit_sessions.json``, unless its
        name is that of the other split.
      split: "dev" or "test".
      sessions: whether each turn starts from the image generated in the turn before (the paper's
        multi-turn setting); otherwise every turn starts from its stored image.

    Raises:
      FileNotFoundError: the split, or one of its files, is not in `folder`.
      ValueError: the split is unknown, empty or invalid; the message names the file, and the
        session or row.
    """
    if split not in SPLITS:
        raise ValueError(f'The splits of MagicBrush are {" and ".join(SPLITS)}, not "{split}".')
    turns_of: dict[str, list[_Turn]] = {}
    for turn in _turns(pathlib.Path(folder), split):
        turns_of.setdefault(turn.session, []).append(turn)
    if not turns_of:
        raise ValueError(f"The {split} split of MagicBrush in {folder} has no edits.")
    return [task for turns in turns_of.values() for task in _tasks(turns, sessions)]


def _tasks(turns: list[_Turn], chained: bool) -> Iterator[Task]:
    turns = sorted(turns, key=lambda turn: turn.number)
    numbers = [turn.number for turn in turns]
    if numbers != list(range(1, len(turns) + 1)):
        listed = ", ".join(map(str, numbers))
        raise ValueError(
            f"Session {turns[0].session} of MagicBrush has turns {listed}, which must count from 1"
            " without gaps: download it again."
        )
    for turn in turns:
        start = turns[0] if chained else turn
        height, width, _ = turn.target.shape
        yield Task(
            id=f"{turn.session}/{turn.number}",
            contexts=(start.source,),
            prompt=turn.instruction,
            category="local",
            size=(width, height),
            truth=turn.target,
            group=turn.session,
            turn=turn.number if chained else 1,
            follows=f"{turn.session}/{turn.number - 1}" if chained and turn.number > 1 else "",
            source_caption=start.source_caption,
            target_caption=turn.target_caption,
        )


def _turns(folder: pathlib.Path, split: str) -> Iterator[_Turn]:
    others = set(SPLITS) - {split}
    tables = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if (folder / split / SESSIONS).is_file():
        return _from_files(folder / split)
    if tables:
        return _from_tables(tables)
    if (folder / SESSIONS).is_file() and folder.resolve().name not in others:
        return _from_files(folder)
    raise FileNotFoundError(
        f"{folder} does not contain the {split} split of MagicBrush: it has neither"
        f" {split}/{SESSIONS} nor data/{split}-*.parquet."
    )


def _from_files(folder: pathlib.Path) -> Iterator[_Turn]:
    load = functools.cache(load_image)  # most images are one turn's output and the next one's input
    captions = _captions(folder / CAPTIONS)
    for session, edits in _object(folder / SESSIONS).items():
        where = f'{folder / SESSIONS}, session "{session}"'
        if not isinstance(edits, list):
            raise ValueError(f"{where}: this is not a list of edits.")
        for position, edit in enumerate(edits, 1):
            _check(edit, f"{where}, edit {position}")
            images = folder / "images" / session
            match = re.search(r"-output(\d+)\.", edit["output"])
            yield _Turn(
                session=session,
                number=int(match[1]) if match else position,
                source=load(images / edit["input"]),
                target=load(images / edit["output"]),
                instruction=edit["instruction"],
                source_caption=captions.get(edit["input"], ""),
                target_caption=captions.get(edit["output"], ""),
            )


def _check(edit: Any, where: str) -> None:
    if not isinstance(edit, dict):
        raise ValueError(f'{where}: this is not an object such as {{"input": ..., ...}}.')
    check_strings(edit, ("input", "output", "instruction"), where)


def _captions(path: pathlib.Path) -> dict[str, str]:
    """File name -> caption; empty if `path` is missing. File names begin with their session."""
    captions_of = {}
    for session, captions in (_object(path) if path.is_file() else {}).items():
        if not isinstance(captions, dict) or not all(isinstance(c, str) for c in captions.values()):
            raise ValueError(f'{path}, session "{session}": this is not an object of captions.')
        captions_of |= captions
    return captions_of


def _object(path: pathlib.Path) -> dict[str, Any]:
    return json_object(path.read_bytes(), str(path), "of sessions")


def _from_tables(tables: list[pathlib.Path]) -> Iterator[_Turn]:
    expected = re.search(r"-of-(\d+)", tables[0].name)
    if expected and len(tables) != int(expected[1]):
        raise FileNotFoundError(
            f"{tables[0]} is one of {int(expected[1])} files, but there are {len(tables)}:"
            " download the split again."
        )
    images: dict[bytes, np.ndarray] = {}  # as in `_from_files`, most occur twice
    for table in tables:
        for number, row in enumerate(_rows(table), 1):
            where = f"{table}, row {number}"
            for column, kind in _COLUMNS.items():
                if not isinstance(row[column], kind):
                    raise ValueError(f'{where}: "{column}" must be a {kind.__name__}.')
            yield _Turn(
                session=row["img_id"],
                number=row["turn_index"],
                source=_decode(row["source_img"], images, where),
                target=_decode(row["target_img"], images, where),
                instruction=row["instruction"],
            )


def _rows(table: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Reads a table in small batches, because its images are gigabytes."""
    import pyarrow.parquet  # installed with TFDS; only these tables need it

    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            missing = _COLUMNS.keys() - file.schema_arrow.names
            if missing:
                raise ValueError(f"{table} lacks the columns {', '.join(sorted(missing))}.")
            for batch in file.iter_batches(16, columns=list(_COLUMNS)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{table} cannot be read: {error}.") from error


def _decode(
    stored: dict[str, Any], images: dict[bytes, np.ndarray], where: str
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Decodes an image, or returns the one in `images` that has the same bytes."""
    data = stored.get("bytes")
    if not data:
        raise ValueError(f"{where}: an image has no bytes.")
    digest = hashlib.sha256(data).digest()
    if digest not in images:
        images[digest] = decode_image(io.BytesIO(data), f"{where}: an image")
    return images[digest]
