"""A cell's folder: files are complete or absent, and never mix settings or judges."""

import json

import numpy as np
import pytest
from PIL import Image

from kontext_jax import files
from kontext_jax.evaluation import cell_folder
from kontext_jax.evaluation.cell_folder import CellFolder, check_record, image_file
from kontext_jax.files import write_text
from kontext_jax.types import Task

RECORD = {"cell": {"sampler": {"num_steps": 2}}, "weights": {"model": ["a", 1.5]}, "seed": 0}


def image(seed: int, width: int = 5, height: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def task(name: str) -> Task:
    return Task(name, (), "make it red", "local", (5, 4))


def test_images_are_stored_losslessly_under_any_id(tmp_path):
    folder = CellFolder(tmp_path / "cell", RECORD)
    names = ["world/train/0/1", "a b%2F?*", "ü", "x.y", "world_train_0_1", "../up"]
    assert not any(map(folder.has, names))
    folder.save({name: image(i, 5 + i) for i, name in enumerate(names[:-1])})
    folder.save({names[-1]: image(5, 10)})
    again = CellFolder(tmp_path / "cell", RECORD)
    assert all(map(again.has, names)) and not again.has("world/train/0/2")
    loaded = [again.load(task(name)) for name in reversed(names)]
    for i, stored in enumerate(reversed(loaded)):
        np.testing.assert_array_equal(stored, image(i, 5 + i))
    assert len(list((tmp_path / "cell" / "images").iterdir())) == len(names)
    assert not (tmp_path / "up.png").exists() and not (tmp_path / "cell" / "up.png").exists()


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image .*b\.png"):
        CellFolder(tmp_path, RECORD).load(task("b"))


def test_a_kill_leaves_no_truncated_image(tmp_path, monkeypatch):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": image(0)})

    def killed(self, file, *args, **kwargs):
        file.write_bytes(b"\x89PNG half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        for name in ("a", "b"):
            with pytest.raises(KeyboardInterrupt):
                folder.save({name: image(1)})
    again = CellFolder(tmp_path, RECORD)
    assert again.has("a") and not again.has("b")
    np.testing.assert_array_equal(again.load(task("a")), image(0))
    again.save({"b": image(1)})
    assert sorted(file.name for file in (tmp_path / "images").glob("*.png")) == ["a.png", "b.png"]
    np.testing.assert_array_equal(again.load(task("b")), image(1))


def test_an_empty_image_file_counts_as_missing(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": image(0)})
    assert folder.has("a")
    image_file(tmp_path, "a").write_bytes(b"")
    assert not folder.has("a")


def test_an_error_about_a_truncated_image_names_the_fix(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": image(0)})
    file = image_file(tmp_path, "a")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"a\.png cannot be .*[^.]; delete it, and start again to regenerate it.$"
    ):
        folder.load(task("a"))


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    events = []
    fsync, replace = files.os.fsync, files.os.replace

    def synced(number):
        events.append(files.os.fstat(number).st_size)
        fsync(number)

    def named(old, new):
        events.append(new.name)
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", named)
    write_text(tmp_path / "a.txt", "ü" * 10)
    assert events == [20, "a.txt"] and (tmp_path / "a.txt").read_text() == "ü" * 10
    folder = CellFolder(tmp_path / "cell", RECORD)
    events.clear()
    folder.save({"b": image(0)})
    assert events == [image_file(tmp_path / "cell", "b").stat().st_size, "b.png"]


def test_long_ids_have_unique_valid_file_names(tmp_path):
    long = ["夜" * 29 + "朝", "夜" * 29 + "昼", "夜" * 400, "x" * 201, "x" * 202]
    short = ["x" * 200, "world/train/0/1"]
    folder = CellFolder(tmp_path, RECORD)
    folder.save({name: image(i) for i, name in enumerate(long + short)})
    for i, name in enumerate(long + short):
        np.testing.assert_array_equal(folder.load(task(name)), image(i))
    stored = {file.name for file in (tmp_path / "images").iterdir()}
    assert len(stored) == 7 and stored >= {"x" * 200 + ".png", "world%2Ftrain%2F0%2F1.png"}


def test_a_folder_of_another_record_is_refused(tmp_path):
    CellFolder(tmp_path, RECORD)
    CellFolder(tmp_path, json.loads(json.dumps(RECORD)))
    CellFolder(tmp_path, RECORD | {"weights": {"model": ("a", 1.5)}})  # JSON has no tuples
    other = RECORD | {"weights": {"model": ["b", 1.5]}, "seed": 1}
    with pytest.raises(
        ValueError, match="images made with different weights and seed: use another"
    ):
        CellFolder(tmp_path, other)
    with pytest.raises(ValueError, match="different tasks: "):
        CellFolder(tmp_path, RECORD | {"tasks": "0"})
    with pytest.raises(ValueError, match="different seed: "):
        CellFolder(tmp_path, {name: RECORD[name] for name in ("cell", "weights")})
    assert json.loads((tmp_path / "record.json").read_text()) == RECORD


def test_unknown_keys_of_a_record_are_not_checked(tmp_path):
    partly = {name: RECORD[name] for name in ("cell", "seed")}
    check_record(tmp_path / "cell", partly)  # the folder does not exist yet
    assert not (tmp_path / "cell").exists()
    CellFolder(tmp_path, RECORD)
    check_record(tmp_path, partly, unknown=("weights",))
    with pytest.raises(ValueError, match="images made with different weights: "):
        check_record(tmp_path, partly)
    with pytest.raises(ValueError, match="images made with different seed: "):
        check_record(tmp_path, partly | {"seed": 1}, unknown=("weights",))


@pytest.mark.parametrize("text", ["", '{"seed": 0, "wei', "[]", "\0\0", "\udc80"])
def test_a_damaged_record_is_refused(tmp_path, text):
    CellFolder(tmp_path, RECORD)
    file = tmp_path / "record.json"
    file.write_text(text, errors="surrogateescape")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"{file} is damaged, .*: delete {tmp_path}\.$"):
        CellFolder(tmp_path, RECORD)
    assert file.read_bytes() == before


def test_a_truncated_line_does_not_affect_other_lines(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    assert folder.batches() == []
    lines = [{"batch": i, "seconds": 0.25 * i} for i in range(4)]
    folder.log(lines[0])
    folder.log(lines[1])
    file = tmp_path / "batches.jsonl"
    file.write_text(file.read_text().rstrip("\n")[:-4])
    again = CellFolder(tmp_path, RECORD)
    assert again.batches() == lines[:1]
    again.log(lines[2])
    again.log(lines[3])
    assert again.batches() == [lines[0], *lines[2:]]


def test_scores_count_only_for_the_judges_that_gave_them(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    judges = {"config": {"clip": "x"}, "left_out": ["efflite0"]}
    folder.save({"a": image(0), "b": image(1)})
    assert folder.scores(judges, ["a", "b"]) is None
    rows = [{"id": "a", "l1": 0.125, "ssim": None}, {"id": "b", "l1": 1 / 3, "ssim": 0.5}]
    overall = {"judges": judges, "scores": {"fid": 7.25}}
    folder.write_scores(rows, overall)
    again = CellFolder(tmp_path, RECORD)
    assert again.scores(judges, ["a", "b"]) == (rows, overall)
    assert again.scores(judges | {"left_out": ("efflite0",)}, ["a", "b"]) == (rows, overall)
    assert again.scores(judges | {"left_out": []}, ["a", "b"]) is None
    assert again.scores({"config": {"clip": "y"}, "left_out": ["efflite0"]}, ["a", "b"]) is None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("scores.jsonl", lambda text: text[:-5]),
        ("scores.jsonl", lambda text: text.splitlines()[0] + "\n"),
        ("scores.jsonl", lambda text: "".join(reversed(text.splitlines(keepends=True)))),
        ("scores.jsonl", lambda text: text[:10] + "\udc80" + text[11:]),
        ("scores.jsonl", lambda text: text.replace('"b"', '"c"')),
        ("scores.jsonl", lambda text: text + text.splitlines()[0]),
        ("scores.jsonl", lambda text: ""),
        ("scores.jsonl", lambda text: "7\n8\n"),
        ("whole.json", lambda text: text[:-3]),
        ("whole.json", lambda text: ""),
        ("whole.json", lambda text: "[]"),
        ("whole.json", lambda text: "\0" * len(text)),
    ],
)
def test_damaged_scores_are_ignored(tmp_path, name, damage):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": image(0), "b": image(1)})
    folder.write_scores([{"id": "a"}, {"id": "b"}], {"judges": {}, "scores": {}})
    assert folder.scores({}, ["a", "b"]) is not None
    file = tmp_path / name
    file.write_text(damage(file.read_text()), errors="surrogateescape")
    assert folder.scores({}, ["a", "b"]) is None


def test_scores_count_only_for_their_tasks_and_with_all_images(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": image(0), "b": image(1)})
    folder.write_scores([{"id": "a"}, {"id": "b"}], {"judges": {}, "scores": {}})
    assert folder.scores({}, ["a", "b"]) is not None
    assert folder.scores({}, ["b", "a"]) is None and folder.scores({}, ["a"]) is None
    image_file(tmp_path, "b").unlink()
    assert folder.scores({}, ["a", "b"]) is None


@pytest.mark.parametrize("file", ["scores.jsonl", "whole.json"])
def test_a_kill_never_pairs_scores_with_other_judges(tmp_path, monkeypatch, file):
    """The kill happens when either of the two files is renamed."""
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": image(0)})
    folder.write_scores([{"id": "a", "l1": 1.0}], {"judges": {"by": "old"}, "scores": {}})
    replace = files.os.replace

    def killed(old, new):
        if new.name == file:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.write_scores([{"id": "a", "l1": 2.0}], {"judges": {"by": "new"}, "scores": {}})
    for judge, value in (("old", 1.0), ("new", 2.0)):
        scores = folder.scores({"by": judge}, ["a"])
        assert scores is None or scores[0] == [{"id": "a", "l1": value}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    first = CellFolder(tmp_path, RECORD)
    first.save({"a": image(0)})
    monkeypatch.setattr(cell_folder.jax, "process_index", lambda: 1)
    other = CellFolder(tmp_path, RECORD)
    other.save({"b": image(1)})
    other.log({"batch": 0})
    other.write_scores([], {"judges": {}})
    assert other.has("a") and not other.has("b")
    assert other.batches() == [] and other.scores({}, []) is None
    with pytest.raises(ValueError, match="different seed"):
        CellFolder(tmp_path, RECORD | {"seed": 2})
    assert not any(CellFolder(tmp_path / "none", RECORD).has(name) for name in "ab")
    assert not (tmp_path / "none").exists()
