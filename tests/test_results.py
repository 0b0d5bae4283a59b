"""A cell's folder: whole pictures or none, no mixing with another cell's, a kill costs a line."""

import json

import numpy as np
import pytest
from PIL import Image

from kontext_jax import results
from kontext_jax.results import CellFolder
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
        file.write_bytes(b"\x89PNG half")
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
    assert folder.scores(judges) is None
    rows = [{"id": "a", "l1": 0.125, "ssim": None}, {"id": "b", "l1": 1 / 3, "ssim": 0.5}]
    whole = {"judges": judges, "scores": {"fid": 7.25}}
    folder.write_scores(rows, whole)
    again = CellFolder(tmp_path, RECORD)
    assert again.scores(judges) == (rows, whole)
    assert again.scores(judges | {"left_out": ("efflite0",)}) == (rows, whole)
    assert again.scores(judges | {"left_out": []}) is None
    assert again.scores({"config": {"clip": "y"}, "left_out": ["efflite0"]}) is None


@pytest.mark.parametrize("file", ["scores.jsonl", "whole.json"])
def test_scores_and_their_judges_are_not_mixed_up(tmp_path, monkeypatch, file):
    """A kill between the two files must not give one judge's name to another's numbers."""
    folder = CellFolder(tmp_path, RECORD)
    folder.write_scores([{"l1": 1.0}], {"judges": {"by": "old"}, "scores": {}})
    replace = results.os.replace

    def killed(old, new):
        if new.name == file:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.write_scores([{"l1": 2.0}], {"judges": {"by": "new"}, "scores": {}})
    for judge, value in (("old", 1.0), ("new", 2.0)):
        found = folder.scores({"by": judge})
        assert found is None or found[0] == [{"l1": value}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    first = CellFolder(tmp_path, RECORD)
    first.save({"a": picture(0)})
    monkeypatch.setattr(results.jax, "process_index", lambda: 1)
    other = CellFolder(tmp_path, RECORD)
    other.save({"b": picture(1)})
    other.log({"batch": 0})
    other.write_scores([], {"judges": {}})
    assert other.has("a") and not other.has("b")
    assert other.batches() == [] and other.scores({}) is None
    with pytest.raises(ValueError, match="another seed"):
        CellFolder(tmp_path, RECORD | {"seed": 2})
    assert not any(CellFolder(tmp_path / "none", RECORD).has(name) for name in "ab")
    assert not (tmp_path / "none").exists()
