"""KontextBench, read from a local copy: 1,026 instructions for 108 pictures, in five kinds of edit.

Labs et al., arXiv 2506.15742; huggingface.co/datasets/black-forest-labs/kontext-bench. A copy is a
folder with pictures and one table, of which each line is one instruction::

    test/metadata.jsonl
    test/images/0000.jpg

    {"file_name": "images/0000.jpg", "key": "0000_00", "instruction": "...",
     "category": "Instruction Editing - Local"}

Nobody knows the right pictures: there is no truth to compare with.
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
"""The benchmark's names of the categories, and ours."""

_KEYS = ("file_name", "key", "instruction", "category")

_QUOTED = re.compile(r"""["“”]([^"“”]+)["“”]|(?<!\w)['‘’](.+?)['‘’](?!\w)""", re.DOTALL)
_ANY = r"[^.;!?\0]*"
_SAYING = r"\b(?:says?|saying|reads?|reading|spells?|spelling)\b"
# What may stand right before the words: articles, nouns for words, and words that are listed.
_NOUNS = "words?|text|phrase|name|title|numbers?|letters?|sentence|slogan|message|caption|line"
_LEAD = rf'(?:[\s,:&]|""|\b(?:the|an?|new|and|following|instead|now|just|{_NOUNS})\b)*'
_NO_LOOKS = rf"(?!{_ANY}\b(?:colou?r|font|style|size|background|position)\b)"
# For each group of verbs, what stands between the verb and the words, here "\0", if they are to be
# written; whatever stands between them and the verbs of the last group, they are not.
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
    """One line of the table, checked; ``where`` names it in messages."""

    where: str
    file_name: str
    image: pathlib.Path
    key: str
    instruction: str
    category: str


def kontext_bench(folder: os.PathLike | str, turns: int = 1) -> list[Task]:
    """The benchmark's tasks, in the order of its table; tasks of one picture share its array.

    Each picture that is asked for is of its context's size. Tasks of one picture are one group.

    Args:
      folder: the one with ``test/metadata.jsonl``, or the one with ``metadata.jsonl``.
      turns: for more than one, sessions: each picture's local and global instructions are followed
        one after the other, sorted by their keys, up to so many. Pictures with fewer than two are
        left out, and so are all other instructions.

    Raises:
      FileNotFoundError: there is no table in `folder`.
      ValueError: a line is wrong or names a picture that is missing or broken, no line is left, or
        `turns` is below 1.
    """
    if turns < 1:
        raise ValueError(f"turns must be 1 or more, not {turns}.")
    lines = _read(_table(pathlib.Path(folder)))
    if turns == 1:
        images = _load(lines)
        return [_task(line, images[line.image]) for line in lines]
    sessions = _sessions(lines, turns)
    if not sessions:
        raise ValueError(
            f"No picture of {folder} has two local or global instructions: set turns=1."
        )
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
    """The words that an instruction wants to see in the picture; empty if that is not certain.

    Words are certain if they are the only ones in quotation marks that an order to write leads up
    to: the last verb before them is

      - to replace, and they follow "with" or "by";
      - to change, and they follow "to", "into" or "so that it says";
      - to add or write, and they follow at once or after "saying", "that reads", "with the text";
      - to make or have, or "should", and they follow "say", "read" or "spell".

    Quotations that are to be removed, that name a place, or of which the colour, font or the like
    is to change are not words to write.
    """
    if len(re.findall('["“”]', instruction)) % 2:  # inches, or a mark was forgotten
        return ""
    quotations = list(_QUOTED.finditer(instruction))
    written = [quotation for quotation in quotations if _is_written(quotation, quotations)]
    if len(written) != 1:
        return ""
    return (written[0][1] or written[0][2]).strip()


def _is_written(quotation: re.Match, quotations: list[re.Match]) -> bool:
    """Whether the last verb before a quotation orders to write it."""
    text = quotation.string
    around, end = "", 0
    for other in quotations:  # what is quoted are no verbs
        around += text[end : other.start()] + ("\0" if other is quotation else '""')
        end = other.end()
    around += text[end:]
    verbs = list(_VERB.finditer(around, 0, around.index("\0")))
    if not verbs:
        return False
    verb = verbs[-1]
    order = next(order for group, order in _ORDERS.items() if verb[0].lower() in group.split("|"))
    return re.match(order, around[verb.end() :], re.IGNORECASE) is not None


def _table(folder: pathlib.Path) -> pathlib.Path:
    for table in (folder / "test" / TABLE, folder / TABLE):
        if table.is_file():
            return table
    raise FileNotFoundError(
        f"There is no KontextBench in {folder}: neither test/{TABLE} nor {TABLE} is there."
    )


def _read(table: pathlib.Path) -> list[_Line]:
    lines: dict[str, _Line] = {}
    for number, text in enumerate(table.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        line = _parse(text, f"{table}, line {number}", table.parent)
        if line.key in lines:
            raise ValueError(f'{line.where}: the key "{line.key}" is that of another line also.')
        lines[line.key] = line
    if not lines:
        raise ValueError(f"{table} is empty.")
    return list(lines.values())


def _parse(text: bytes, where: str, folder: pathlib.Path) -> _Line:
    fields = json_object(text, where, 'such as {"file_name": ..., ...}')
    check_strings(fields, _KEYS, where)
    if fields["category"] not in CATEGORIES:
        raise ValueError(
            f'{where}: the category "{fields["category"]}" is none of {", ".join(CATEGORIES)}.'
        )
    image = folder / fields["file_name"]
    if not image.is_file():
        raise ValueError(f"{where}: there is no image {image}.")
    return _Line(
        where=where,
        file_name=fields["file_name"],
        image=image,
        key=fields["key"],
        instruction=fields["instruction"],
        category=CATEGORIES[fields["category"]],
    )


def _sessions(lines: list[_Line], turns: int) -> list[list[_Line]]:
    """Each picture's first so many local and global lines, where there are two or more."""
    of_image: dict[str, list[_Line]] = {}
    for line in sorted(lines, key=lambda line: line.key):
        if line.category in ("local", "global"):
            of_image.setdefault(line.file_name, []).append(line)
    return [session[:turns] for session in of_image.values() if len(session) > 1]


def _load(lines: Iterable[_Line]) -> dict[pathlib.Path, UInt8[np.ndarray, "_ _ 3"]]:
    """Decodes each picture once."""
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
