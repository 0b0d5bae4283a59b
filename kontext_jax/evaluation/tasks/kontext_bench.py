"""Reads a local copy of KontextBench: 1,026 instructions for 108 images, in five categories.

Labs et al., arXiv 2506.15742; huggingface.co/datasets/black-forest-labs/kontext-bench. A copy is a
folder with images and one table, with one instruction per line::

    test/metadata.jsonl
    test/images/0000.jpg

    {"file_name": "images/0000.jpg", "key": "0000_00", "instruction": "...",
     "category": "Instruction Editing - Local"}

The benchmark has no target images.
"""

import os
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from kontext_jax.data.folder import check_strings, json_object, load_image
from kontext_jax.types import Task

TABLE = "metadata.jsonl"

CATEGORIES = {
    "Instruction Editing - Local": "local",
    "Instruction Editing - Global": "global",
    "Text Editing": "text",
    "Character Reference": "character",
    "Style Reference": "style",
}
"""The benchmark's category names -> ours."""

_KEYS = ("file_name", "key", "instruction", "category")

_QUOTED = re.compile(r"""["“”]([^"“”]+)["“”]|(?<!\w)['‘’](.+?)['‘’](?!\w)""", re.DOTALL)
_ANY = r"[^.;!?\0]*"
_SAYING = r"\b(?:says?|saying|reads?|reading|spells?|spelling)\b"
# What may precede the words directly: articles, nouns for text, and other quotations in a list.
_NOUNS = "words?|text|phrase|name|title|numbers?|letters?|sentence|slogan|message|caption|line"
_LEAD = rf'(?:[\s,:&]|""|\b(?:the|an?|new|and|following|instead|now|just|{_NOUNS})\b)*'
_NO_LOOKS = rf"(?!{_ANY}\b(?:colou?r|font|style|size|background|position)\b)"
# Verbs -> pattern of the text between the verb and the quotation ("\0") if the quotation is to be
# written. After a verb of the last group it never is.
_ORDERS = {
    "add|write|insert|put|place|print|paint|engrave|type|display|include": (
        rf"(?:{_ANY}(?:{_SAYING}|\bwith\b))?{_LEAD}\0"
    ),
    "replace|substitute": (
        rf"{_NO_LOOKS}{_ANY}\b(?:with|by)\b(?:{_ANY}{_SAYING})?{_LEAD}\0(?!\s*(?:with|by)\b)"
    ),
    "change|edit|modify|update|alter|turn|convert|rename|correct|fix|translate|rewrite|switch": (
        rf"{_NO_LOOKS}{_ANY}(?<!next )(?<!close )(?<!closer )(?<!similar )\b(?:to|into|so)\b"
        rf"(?:{_ANY}{_SAYING}|\s+be\b)?{_LEAD}\0(?!\s*(?:to|into)\b)"
    ),
    "make|have|let|should|must": (rf"{_ANY}(?<!that )(?<!which )\b(?:say|read|spell)\b{_LEAD}\0"),
    "remove|delete|erase|keep|move|swap": r"(?!)",
}
_VERB = re.compile(rf"\b(?:{'|'.join(_ORDERS)})\b", re.IGNORECASE)


class _Line(NamedTuple):
    """One validated line of the table; ``where`` is its location for error messages."""

    where: str
    file_name: str
    image: pathlib.Path
    key: str
    instruction: str
    category: str


def kontext_bench(folder: os.PathLike | str, turns: int = 1) -> list[Task]:
    """The benchmark's tasks in the order of its table.

    A task asks for an image of its context's size. The tasks of one image share its array, and form
    a group.

    Args:
      folder: folder that contains ``test/metadata.jsonl`` or ``metadata.jsonl``.
      turns: with more than one, the tasks are sessions: the local and global instructions of an
        image, sorted by key, are followed one after the other, up to this many. Images with fewer
        than two, and all other instructions, are left out.

    Raises:
      FileNotFoundError: `folder` has no table.
      ValueError: a line is invalid, its image is missing or damaged, no line is left, or `turns` is
        below 1.
    """
    if turns < 1:
        raise ValueError(f"turns must be 1 or more, not {turns}.")
    lines = _read(_table(pathlib.Path(folder)))
    if turns == 1:
        images = _load(lines)
        return [_task(line, images[line.image]) for line in lines]
    sessions = _sessions(lines, turns)
    if not sessions:
        raise ValueError(f"No image of {folder} has two local or global instructions: set turns=1.")
    images = _load(line for session in sessions for line in session)
    return [
        _task(line, images[line.image])._replace(
            id=f"{line.file_name}/turn{turn}",
            turn=turn,
            follows=f"{line.file_name}/turn{turn - 1}" if turn > 1 else "",
        )
        for session in sessions
        for turn, line in enumerate(session, 1)
    ]


def words_to_write(instruction: str) -> str:
    """The words that an instruction asks to write into the image; empty unless they are certain.

    They are certain if exactly one quotation is to be written, judging by the last verb before it:

      - replace, and the quotation follows "with" or "by";
      - change, and it follows "to", "into" or "so that it says";
      - add or write, and it follows directly or after "saying", "that reads", "with the text";
      - make, have or should, and it follows "say", "read" or "spell".

    Quotations to be removed, that locate something, or whose colour, font or the like is to change
    are not to be written.
    """
    if len(re.findall('["“”]', instruction)) % 2:  # a sign for inches, or an unclosed quotation
        return ""
    quotations = list(_QUOTED.finditer(instruction))
    written = [quotation for quotation in quotations if _is_written(quotation, quotations)]
    if len(written) != 1:
        return ""
    return (written[0][1] or written[0][2]).strip()


def _is_written(quotation: re.Match, quotations: list[re.Match]) -> bool:
    """Whether the last verb before a quotation asks to write it."""
    text = quotation.string
    masked, end = "", 0
    for other in quotations:  # verbs inside quotations do not count
        masked += text[end : other.start()] + ("\0" if other is quotation else '""')
        end = other.end()
    masked += text[end:]
    verbs = list(_VERB.finditer(masked, 0, masked.index("\0")))
    if not verbs:
        return False
    verb = verbs[-1]
    order = next(order for group, order in _ORDERS.items() if verb[0].lower() in group.split("|"))
    return re.match(order, masked[verb.end() :], re.IGNORECASE) is not None


def _table(folder: pathlib.Path) -> pathlib.Path:
    for table in (folder / "test" / TABLE, folder / TABLE):
        if table.is_file():
            return table
    raise FileNotFoundError(
        f"{folder} does not contain KontextBench: it has neither test/{TABLE} nor {TABLE}."
    )


def _read(table: pathlib.Path) -> list[_Line]:
    lines: dict[str, _Line] = {}
    for number, text in enumerate(table.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        line = _parse(text, f"{table}, line {number}", table.parent)
        if line.key in lines:
            raise ValueError(f'{line.where}: the key "{line.key}" is also that of another line.')
        lines[line.key] = line
    if not lines:
        raise ValueError(f"{table} is empty.")
    return list(lines.values())


def _parse(text: bytes, where: str, folder: pathlib.Path) -> _Line:
    fields = json_object(text, where, 'such as {"file_name": ..., ...}')
    check_strings(fields, _KEYS, where)
    if fields["category"] not in CATEGORIES:
        raise ValueError(
            f'{where}: the category "{fields["category"]}" is not one of {", ".join(CATEGORIES)}.'
        )
    image = folder / fields["file_name"]
    if not image.is_file():
        raise ValueError(f"{where}: the image {image} does not exist.")
    return _Line(
        where=where,
        file_name=fields["file_name"],
        image=image,
        key=fields["key"],
        instruction=fields["instruction"],
        category=CATEGORIES[fields["category"]],
    )


def _sessions(lines: list[_Line], turns: int) -> list[list[_Line]]:
    """The first ``turns`` local and global lines of each image that has at least two."""
    of_image: dict[str, list[_Line]] = {}
    for line in sorted(lines, key=lambda line: line.key):
        if line.category in ("local", "global"):
            of_image.setdefault(line.file_name, []).append(line)
    return [session[:turns] for session in of_image.values() if len(session) > 1]


def _load(lines: Iterable[_Line]) -> dict[pathlib.Path, UInt8[np.ndarray, "_ _ 3"]]:
    """Decodes each image once."""
    images = {}
    for line in lines:
        if line.image not in images:
            try:
                images[line.image] = load_image(line.image)
            except ValueError as error:
                raise ValueError(f"{line.where}: {error}") from error
    return images


def _task(line: _Line, image: UInt8[np.ndarray, "h w 3"]) -> Task:
    height, width, _ = image.shape
    return Task(
        id=line.key,
        contexts=(image,),
        prompt=line.instruction,
        category=line.category,
        size=(width, height),
        group=line.file_name,
        words=words_to_write(line.instruction) if line.category == "text" else "",
    )
