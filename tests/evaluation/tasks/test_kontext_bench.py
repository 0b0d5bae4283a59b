"""KontextBench: tasks match the table, sessions chain edits, and errors name the line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from kontext_jax.data.folder import load_image
from kontext_jax.evaluation.tasks.kontext_bench import kontext_bench, words_to_write
from kontext_jax.types import CATEGORIES
from tests.evaluation.tasks.miniature import (
    KONTEXT_BENCH,
    write_lines,
    write_miniature_kontext_bench,
)


@pytest.fixture
def folder(tmp_path):
    write_miniature_kontext_bench(tmp_path / "bench")
    return tmp_path / "bench"


def test_tasks_match_the_table(folder):
    tasks = kontext_bench(folder)
    assert [task.prompt for task in tasks] == [
        prompt for prompts in KONTEXT_BENCH for _, prompt in prompts
    ]
    assert [task.category for task in tasks[:5]] == ["local", "global", "text", "local", "local"]
    assert {task.category for task in tasks} == set(CATEGORIES) - {"text_to_image"}
    last = tasks[-1]
    assert (last.id, last.group, last.size) == ("0004_01", "images/0004.jpg", (56, 16))
    stored = np.asarray(Image.open(folder / "test/images/0004.jpg"))
    np.testing.assert_array_equal(last.contexts[0], stored)
    assert len(last.contexts) == 1
    assert (last.truth, last.turn, last.follows, last.details) == (None, 1, "", "{}")


def test_only_text_edits_have_words(folder):
    lines = read_lines(folder)
    for line in lines:
        line["instruction"] = 'add "X"'
    write_lines(folder / "test/metadata.jsonl", lines)
    assert {task.category for task in kontext_bench(folder) if task.words == "X"} == {"text"}
    assert {task.words for task in kontext_bench(folder)} == {"", "X"}


def test_each_image_is_decoded_once_and_shared(folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "kontext_jax.evaluation.tasks.kontext_bench.load_image",
        lambda path: loaded.append(path.name) or load_image(path),
    )
    tasks = kontext_bench(folder)
    assert loaded == [f"000{number}.jpg" for number in range(5)]
    arrays = {task.group: task.contexts[0] for task in tasks}
    assert len(arrays) == 5
    assert all(task.contexts[0] is arrays[task.group] for task in tasks)


def test_the_folder_can_be_that_of_the_table(folder):
    assert [task.id for task in kontext_bench(folder / "test")] == [
        task.id for task in kontext_bench(str(folder))
    ]


def test_images_are_rotated_according_to_exif(folder):
    sideways = Image.Exif()
    sideways[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (32, 16), (255, 0, 0)).save(folder / "test/images/0000.jpg", exif=sideways)
    task = kontext_bench(folder)[0]
    assert task.size == (16, 32) and task.contexts[0].shape == (32, 16, 3)


def test_sessions_chain_local_and_global_edits(folder):
    tasks = kontext_bench(folder, turns=3)
    assert [(task.id, task.follows, task.turn, task.prompt) for task in tasks] == [
        ("images/0000.jpg/turn1", "", 1, "make the ball red"),
        ("images/0000.jpg/turn2", "images/0000.jpg/turn1", 2, "make it night"),
        ("images/0001.jpg/turn1", "", 1, "add a hat"),
        ("images/0001.jpg/turn2", "images/0001.jpg/turn1", 2, "remove the hat"),
        ("images/0002.jpg/turn1", "", 1, "make it winter"),
        ("images/0002.jpg/turn2", "images/0002.jpg/turn1", 2, "open the door"),
    ]
    assert [task.category for task in tasks[:2]] == ["local", "global"]
    assert {task.group for task in tasks} == {f"images/000{number}.jpg" for number in range(3)}
    assert tasks[1].contexts[0] is tasks[0].contexts[0]


def test_sessions_are_sorted_by_key_and_limited_to_the_turns(folder):
    lines = read_lines(folder)
    image = lines[0]["file_name"]
    more = [
        {"file_name": image, "key": f"0000_{key:02d}", "instruction": str(key)}
        | {"category": "Instruction Editing - Local"}
        for key in (11, 10, 12)
    ]
    write_lines(folder / "test/metadata.jsonl", more + lines)
    prompts = [task.prompt for task in kontext_bench(folder, turns=4) if task.group == image]
    assert prompts == ["make the ball red", "make it night", "10", "11"]


def test_sessions_need_an_image_with_two_edits(folder):
    write_lines(folder / "test/metadata.jsonl", read_lines(folder)[-4:])
    assert len(kontext_bench(folder)) == 4
    with pytest.raises(ValueError, match="No image of .* has two local or global instructions"):
        kontext_bench(folder, turns=2)


GOOD = {
    "file_name": "images/0000.jpg",
    "key": "0000_01",
    "instruction": "x",
    "category": "Text Editing",
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'key': 1}", "line 2: this is not JSON in UTF-8"),
        ("[1]", "line 2: this is not an object"),
        ({k: v for k, v in GOOD.items() if k != "key"}, 'line 2: the key "key" is missing'),
        (GOOD | {"instruction": None}, 'line 2: "instruction" must be a str, not None'),
        (GOOD | {"key": 3}, 'line 2: "key" must be a str, not 3'),
        (GOOD | {"category": "Texts"}, 'line 2: the category "Texts" is not one of Instruction Ed'),
        (GOOD | {"file_name": "images/9.jpg"}, "line 2: the image .*9.jpg does not exist"),
        (GOOD | {"file_name": "images/bad.jpg"}, "line 2: the image .*bad.jpg cannot be decoded"),
        (GOOD | {"key": "0000_00"}, 'line 2: the key "0000_00" is also that of another line'),
    ],
)
def test_an_error_names_the_line(folder, line, message):
    (folder / "test/images/bad.jpg").write_bytes(b"not an image")
    write_lines(folder / "test/metadata.jsonl", [GOOD | {"key": "0000_00"}, line])
    with pytest.raises(ValueError, match=message):
        kontext_bench(folder)


def test_a_missing_or_empty_table_is_an_error(folder):
    with pytest.raises(ValueError, match="turns must be 1 or more, not 0"):
        kontext_bench(folder, turns=0)
    (folder / "test/metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="metadata.jsonl is empty"):
        kontext_bench(folder)
    shutil.rmtree(folder / "test")
    with pytest.raises(FileNotFoundError, match="bench does not contain KontextBench: "):
        kontext_bench(folder)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("Replace 'joy' with 'BFL'", "BFL"),
        ('replace the title "Good night" by "Bad day".', "Bad day"),
        ('Replace the text with a sign that reads "B"', "B"),
        ('change the text to "OPEN" in red letters', "OPEN"),
        ("Change “OPEN” to “CLOSED”", "CLOSED"),
        ("change the word ‘don’t’ into ‘can’t’", "can’t"),
        ("change the dog's name to 'Rex's'", "Rex's"),
        ('Change the sign so that it says: "B"', "B"),
        ('change the sign that says "A" to say "B"', "B"),
        ('edit the number from "7" to "12", keep the font', "12"),
        ('add "B"', "B"),
        ("Add the text 'hello, world' below the logo", "hello, world"),
        ('add a banner saying "B" above "A"', "B"),
        ('Write "B" instead of "A"', "B"),
        ('put a sign with the words "B" on the wall', "B"),
        ('make the shirt say "B"', "B"),
        ('The cup should read "B" now', "B"),
        ('Remove "A" and write "B"', "B"),
        ('write " two\nlines "', "two\nlines"),
        # No quotation is certain to be written.
        ("change the text to B", ""),
        ('remove "A"', ""),
        ('delete the sign that says "A"', ""),
        ('translate "A" to French', ""),
        ('make "A" bigger', ""),
        ('make the words that say "A" bigger', ""),
        ('change the color of "A" to "red"', ""),
        ('change the font of the word "A" to serif', ""),
        ('replace the sign with "A" with a tree', ""),
        ('replace "A" with a heart', ""),
        ('change the letter next to "A" to blue', ""),
        ('change the letter next to "A"', ""),
        ('add a comma to "A"', ""),
        ('add a heart below "A"', ""),
        ('Change "A" to "B" and "C" to "D"', ""),
        ('write "A" and "B"', ""),
        ('write "B" on the 5" card', ""),
        ("write the dogs' names", ""),
        ('the "A" sign', ""),
        ("", ""),
    ],
)
def test_words_to_write(instruction, words):
    assert words_to_write(instruction) == words


def read_lines(folder) -> list[dict]:
    table = folder / "test/metadata.jsonl"
    return [json.loads(line) for line in table.read_text().splitlines()]
