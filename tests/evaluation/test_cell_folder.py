"""A cell's folder: whole pictures or none, no mixing with another cell's, a kill costs a line."""

import json

import numpy as np
import pytest
from PIL import Image

from kontext_jax import files
from kontext_jax.evaluation import cell_folder
from kontext_jax.evaluation.cell_folder import CellFolder, check_record, picture_file
from kontext_jax.files import write_text
from kontext_jax.types import Task

RECORD = {"cell": {"sampler": {"num_steps": 2}}, "weights": {"model": ["a", 1.5]}, "seed": 0}


def picture(seed: int, width: int = 5, height: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def task(name: str) -> Task:
    return Task(name, (), "make it red", "local", (5, 4))


def test_pictures_come_back_to_the_last_bit_in_the_order_asked_for(tmp_path):
    folder = CellFolder(tmp_path / "cell", RECORD)
    names = ["world/train/0/1", "a b%2F?*", "ü", "x.y", "world_train_0_1", "../up"]
    assert not any(map(folder.has, names))
    folder.save({name: picture(i, 5 + i) for i, name in enumerate(names[:-1])})
    folder.save({names[-1]: picture(5, 10)})
    again = CellFolder(tmp_path / "cell", RECORD)
    assert all(map(again.has, names)) and not again.has("world/train/0/2")
    loaded = [again.load(task(name)) for name in reversed(names)]
    for i, image in enumerate(reversed(loaded)):
        np.testing.assert_array_equal(image, picture(i, 5 + i))
    assert len(list((tmp_path / "cell" / "images").iterdir())) == len(names)
    assert not (tmp_path / "up.png").exists() and not (tmp_path / "cell" / "up.png").exists()


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image .*b\.png"):
        CellFolder(tmp_path, RECORD).load(task("b"))


def test_half_of_a_picture_never_appears(tmp_path, monkeypatch):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": picture(0)})

    def killed(image, file, *args, **kwargs):
        file.write(b"\x89PNG half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        for name in ("a", "b"):
            with pytest.raises(KeyboardInterrupt):
                folder.save({name: picture(1)})
    again = CellFolder(tmp_path, RECORD)
    assert again.has("a") and not again.has("b")
    np.testing.assert_array_equal(again.load(task("a")), picture(0))
    again.save({"b": picture(1)})
    assert sorted(file.name for file in (tmp_path / "images").glob("*.png")) == ["a.png", "b.png"]
    np.testing.assert_array_equal(again.load(task("b")), picture(1))


def test_a_picture_that_a_crash_left_empty_is_missing(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": picture(0)})
    assert folder.has("a")
    picture_file(tmp_path, "a").write_bytes(b"")
    assert not folder.has("a")


def test_a_picture_that_is_cut_short_is_named_with_the_mend(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": picture(0)})
    file = picture_file(tmp_path, "a")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"a\.png cannot be .*[^.]; delete it, and it is made again.$"
    ):
        folder.load(task("a"))


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    seen = []
    fsync, replace = files.os.fsync, files.os.replace

    def synced(number):
        seen.append(files.os.fstat(number).st_size)
        fsync(number)

    def named(old, new):
        seen.append(new.name)
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", named)
    write_text(tmp_path / "a.txt", "ü" * 10)
    assert seen == [20, "a.txt"] and (tmp_path / "a.txt").read_text() == "ü" * 10
    folder = CellFolder(tmp_path / "cell", RECORD)
    seen.clear()
    folder.save({"b": picture(0)})
    assert seen == [picture_file(tmp_path / "cell", "b").stat().st_size, "b.png"]


def test_long_ids_have_names_of_their_own_that_file_systems_take(tmp_path):
    long = ["夜" * 29 + "朝", "夜" * 29 + "昼", "夜" * 400, "x" * 201, "x" * 202]
    short = ["x" * 200, "world/train/0/1"]
    folder = CellFolder(tmp_path, RECORD)
    folder.save({name: picture(i) for i, name in enumerate(long + short)})
    for i, name in enumerate(long + short):
        np.testing.assert_array_equal(folder.load(task(name)), picture(i))
    found = {file.name for file in (tmp_path / "images").iterdir()}
    assert len(found) == 7 and found >= {"x" * 200 + ".png", "world%2Ftrain%2F0%2F1.png"}


def test_pictures_of_another_record_are_refused(tmp_path):
    CellFolder(tmp_path, RECORD)
    CellFolder(tmp_path, json.loads(json.dumps(RECORD)))
    CellFolder(tmp_path, RECORD | {"weights": {"model": ("a", 1.5)}})  # JSON has no tuples
    other = RECORD | {"weights": {"model": ["b", 1.5]}, "seed": 1}
    with pytest.raises(ValueError, match="pictures of another weights and seed: give another"):
        CellFolder(tmp_path, other)
    with pytest.raises(ValueError, match="another tasks: "):
        CellFolder(tmp_path, RECORD | {"tasks": "0"})
    with pytest.raises(ValueError, match="another seed: "):
        CellFolder(tmp_path, {name: RECORD[name] for name in ("cell", "weights")})
    assert json.loads((tmp_path / "record.json").read_text()) == RECORD


def test_a_record_is_checked_as_far_as_it_is_known(tmp_path):
    partly = {name: RECORD[name] for name in ("cell", "seed")}
    check_record(tmp_path / "cell", partly)  # there is none yet
    assert not (tmp_path / "cell").exists()
    CellFolder(tmp_path, RECORD)
    check_record(tmp_path, partly, unknown=("weights",))
    with pytest.raises(ValueError, match="pictures of another weights: "):
        check_record(tmp_path, partly)
    with pytest.raises(ValueError, match="pictures of another seed: "):
        check_record(tmp_path, partly | {"seed": 1}, unknown=("weights",))


@pytest.mark.parametrize("text", ["", '{"seed": 0, "wei', "[]", "\0\0", "\udc80"])
def test_pictures_without_their_record_are_refused(tmp_path, text):
    CellFolder(tmp_path, RECORD)
    file = tmp_path / "record.json"
    file.write_text(text, errors="surrogateescape")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"{file} is damaged, .*: delete {tmp_path}\.$"):
        CellFolder(tmp_path, RECORD)
    assert file.read_bytes() == before


def test_what_a_kill_cut_short_costs_no_other_line(tmp_path):
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


def test_scores_are_those_of_the_judges_who_gave_them(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    judges = {"config": {"clip": "x"}, "left_out": ["efflite0"]}
    folder.save({"a": picture(0), "b": picture(1)})
    assert folder.scores(judges, ["a", "b"]) is None
    rows = [{"id": "a", "l1": 0.125, "ssim": None}, {"id": "b", "l1": 1 / 3, "ssim": 0.5}]
    whole = {"judges": judges, "scores": {"fid": 7.25}}
    folder.write_scores(rows, whole)
    again = CellFolder(tmp_path, RECORD)
    assert again.scores(judges, ["a", "b"]) == (rows, whole)
    assert again.scores(judges | {"left_out": ("efflite0",)}, ["a", "b"]) == (rows, whole)
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
def test_damaged_scores_are_none(tmp_path, name, damage):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": picture(0), "b": picture(1)})
    folder.write_scores([{"id": "a"}, {"id": "b"}], {"judges": {}, "scores": {}})
    assert folder.scores({}, ["a", "b"]) is not None
    file = tmp_path / name
    file.write_text(damage(file.read_text()), errors="surrogateescape")
    assert folder.scores({}, ["a", "b"]) is None


def test_scores_are_of_these_tasks_and_of_pictures_that_are_there(tmp_path):
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": picture(0), "b": picture(1)})
    folder.write_scores([{"id": "a"}, {"id": "b"}], {"judges": {}, "scores": {}})
    assert folder.scores({}, ["a", "b"]) is not None
    assert folder.scores({}, ["b", "a"]) is None and folder.scores({}, ["a"]) is None
    picture_file(tmp_path, "b").unlink()
    assert folder.scores({}, ["a", "b"]) is None


@pytest.mark.parametrize("file", ["scores.jsonl", "whole.json"])
def test_scores_and_their_judges_are_not_mixed_up(tmp_path, monkeypatch, file):
    """A kill between the two files must not give one judge's name to another's numbers."""
    folder = CellFolder(tmp_path, RECORD)
    folder.save({"a": picture(0)})
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
        found = folder.scores({"by": judge}, ["a"])
        assert found is None or found[0] == [{"id": "a", "l1": value}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    first = CellFolder(tmp_path, RECORD)
    first.save({"a": picture(0)})
    monkeypatch.setattr(cell_folder.jax, "process_index", lambda: 1)
    other = CellFolder(tmp_path, RECORD)
    other.save({"b": picture(1)})
    other.log({"batch": 0})
    other.write_scores([], {"judges": {}})
    assert other.has("a") and not other.has("b")
    assert other.batches() == [] and other.scores({}, []) is None
    with pytest.raises(ValueError, match="another seed"):
        CellFolder(tmp_path, RECORD | {"seed": 2})
    assert not any(CellFolder(tmp_path / "none", RECORD).has(name) for name in "ab")
    assert not (tmp_path / "none").exists()
