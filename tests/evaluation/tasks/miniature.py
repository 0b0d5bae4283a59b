"""Miniature copies of the public benchmarks for tests, in the original layouts."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

LOCAL, GLOBAL = "Instruction Editing - Local", "Instruction Editing - Global"
TEXT, STYLE, CHARACTER = "Text Editing", "Style Reference", "Character Reference"

KONTEXT_BENCH = [
    [(LOCAL, "make the ball red"), (GLOBAL, "make it night"), (TEXT, "replace 'joy' with 'day'")],
    [(LOCAL, "add a hat"), (LOCAL, "remove the hat"), (STYLE, "draw a ship in this style")],
    [(GLOBAL, "make it winter"), (LOCAL, "open the door"), (CHARACTER, "the same man as a cook")],
    [(TEXT, 'change the sign to say "OPEN"'), (CHARACTER, "this woman on a beach")],
    [(STYLE, "a dog, drawn like this"), (LOCAL, "make the roof green")],
]
"""The (category, instruction) pairs of each image."""

MAGIC_BRUSH = {"139": ["put a cat on the seat", "make it sleep", "add a lamp"], "30": ["add fog"]}
"""The instructions of each session."""


def random_image(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """An image of coarse coloured squares, which JPEG preserves."""
    squares = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


def write_miniature_kontext_bench(folder: Path, seed: int = 0) -> None:
    """Five images of different sizes with two or three instructions each, in all categories."""
    images = folder / "test" / "images"
    images.mkdir(parents=True)
    lines = []
    for number, prompts in enumerate(KONTEXT_BENCH):
        file = f"{number:04d}.jpg"
        random_image(seed + number, 24 + 8 * number, 16).save(images / file, quality=95)
        for position, (category, instruction) in enumerate(prompts):
            lines.append(
                {
                    "file_name": f"images/{file}",
                    "key": f"{number:04d}_{position:02d}",
                    "instruction": instruction,
                    "category": category,
                    "image_idx": number,
                    "prompt_idx": position,
                }
            )
    write_lines(folder / "test" / "metadata.jsonl", lines)


def write_lines(table: Path, lines: list) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    table.write_text("\n".join(texts) + "\n", encoding="utf-8")


def write_miniature_magic_brush(folder: Path, seed: int = 0) -> None:
    """Two sessions, with three turns and one, in the layout of the dev and test archives."""
    sessions, captions = {}, {}
    for session, instructions in MAGIC_BRUSH.items():
        images = folder / "images" / session
        images.mkdir(parents=True)
        files = [f"{session}-input.png"]
        files += [f"{session}-output{turn}.png" for turn in range(1, len(instructions) + 1)]
        for turn, file in enumerate(files):
            magic_brush_image(session, turn, seed).save(images / file)
        sessions[session] = [
            {"input": before, "mask": f"{session}-mask{turn}.png", "output": after}
            | {"instruction": instruction}
            for turn, (before, after, instruction) in enumerate(
                zip(files[:-1], files[1:], instructions, strict=True), 1
            )
        ]
        captions[session] = {file: f"what {file} shows" for file in files}
    edits = [edit for session in sessions.values() for edit in session]
    for name, content in (
        ("edit_sessions", sessions),
        ("edit_turns", edits),
        ("global_descriptions", captions),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))


def magic_brush_image(session: str, turn: int, seed: int = 0) -> Image.Image:
    """The output of a turn, or the session's input for turn 0."""
    return random_image(seed + 100 * int(session) + turn, 32, 24)


def magic_brush_rows(seed: int = 0) -> list[dict]:
    """The same sessions as rows of the published tables, in reverse order."""
    rows = []
    for session, instructions in MAGIC_BRUSH.items():
        for turn, instruction in enumerate(instructions, 1):
            image = {}
            for column, number in (("source_img", turn - 1), ("target_img", turn)):
                with io.BytesIO() as file:
                    magic_brush_image(session, number, seed).save(file, "PNG")
                    image[column] = {"bytes": file.getvalue(), "path": None}
            rows.append(
                {"img_id": session, "turn_index": turn, "mask_img": image["source_img"]}
                | {"instruction": instruction}
                | image
            )
    return rows[::-1]
