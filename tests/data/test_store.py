"""Writing: invalid input is refused, and no incomplete data set remains."""

import json

import numpy as np
import pytest

from kontext_jax.data import store
from kontext_jax.data.sources import TripleSource
from kontext_jax.types import Triple

NOT_RGB = '"x": the target has shape .*; it must be an RGB image'


def triple(name: str = "a", **changes) -> Triple:
    image = np.full((4, 6, 3), 7, np.uint8)
    return Triple(name, image, (), "a grey wall", "text_to_image")._replace(**changes)


def test_files_of_a_data_set(tmp_path):
    splits = {"train": map(triple, "abcde"), "validation": [triple("z")]}
    store.write(splits, tmp_path / "parent" / "set", num_shards=2)
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]
    assert sorted(path.name for path in (tmp_path / "parent" / "set").iterdir()) == [
        "dataset_info.json",
        "features.json",
        "index-train",
        "index-validation",
        "triples-train.array_record-00000-of-00002",
        "triples-train.array_record-00001-of-00002",
        "triples-validation.array_record-00000-of-00001",
    ]
    info = json.loads((tmp_path / "parent" / "set" / "dataset_info.json").read_text())
    assert {split["name"]: split["shardLengths"] for split in info["splits"]} == {
        "train": ["2", "3"],
        "validation": ["1"],
    }


def test_the_number_of_shards_depends_on_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1000)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    store.write({"train": [triple(name, target=noise) for name in "abc"]}, tmp_path / "set")
    assert len(list((tmp_path / "set").glob("triples-train*"))) == 3
    assert [triple.id for triple in TripleSource(tmp_path / "set", "train")] == ["a", "b", "c"]


def test_splits_are_consumed_lazily(tmp_path):
    """No split is held in memory: each triple is spooled before the next is requested."""

    def counting():
        for number in range(3):
            [spool] = tmp_path.glob(".set.incomplete-*/train.spool")
            yield triple(str(number))
        assert spool.exists()

    store.write({"train": counting()}, tmp_path / "set")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "no split"),
        ({"train": []}, 'The split "train" is empty'),
        ({"train": [triple()], "validation": []}, 'The split "validation" is empty'),
        ({"all": [triple()]}, '"all" cannot name a split'),
        ({"a-b": [triple()]}, '"a-b" cannot name a split'),
        ({"train": [triple("twin"), triple("b"), triple("twin")]}, '"twin" is used twice'),
        ({"train": [triple("twin")], "validation": [triple("twin")]}, '"twin" is used twice'),
        ({"train": [triple("")]}, "id must be a non-empty string"),
        ({"train": [triple("x", category="tiny")]}, "\"x\": the category is 'tiny', not one of"),
        ({"train": [triple("x", prompt=None)]}, '"x": the prompt is None'),
        (
            {"train": [triple("x", target=np.zeros((4, 4), np.uint8))]},
            NOT_RGB,
        ),
        (
            {"train": [triple("x", target=np.zeros((4, 4, 4), np.uint8))]},
            NOT_RGB,
        ),
        ({"train": [triple("x", target=np.zeros((4, 4, 3)))]}, '"x": the target .* float64'),
        (
            {"train": [triple("x", target=np.zeros((0, 4, 3), np.uint8))]},
            NOT_RGB,
        ),
        ({"train": [triple("x", target=None)]}, NOT_RGB),
        (
            {"train": [triple("x", contexts=(triple().target, np.zeros((4, 4, 1), np.uint8)))]},
            '"x": context 1 has shape .*; it must be an RGB image',
        ),
    ],
)
def test_invalid_triples_are_refused_and_nothing_remains(tmp_path, splits, message):
    with pytest.raises(ValueError, match=message):
        store.write(splits, tmp_path / "set")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [RuntimeError("the disk is full"), KeyboardInterrupt()])
def test_nothing_remains_after_a_failure(tmp_path, failure):
    def failing():
        yield triple("a")
        raise failure

    with pytest.raises(type(failure)):
        store.write({"train": [triple("b")], "validation": failing()}, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_nothing_remains_after_a_failure_in_tfds(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.Triples, "_shard_iterators_per_split", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write({"train": [triple()]}, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_and_unchanged(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="choose another --output or delete it"):
        store.write({"train": [triple()]}, tmp_path / "set")
    assert [path.name for path in tmp_path.rglob("*")] == ["set"]


def test_fewer_than_one_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_shards is 0"):
        store.write({"train": [triple()]}, tmp_path / "set", num_shards=0)
