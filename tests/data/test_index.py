"""The index: columns on disk that give back the rows, and name their folder if they cannot."""

import hashlib
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_jax.data import index as index_module
from kontext_jax.data import store
from kontext_jax.data.index import Columns, Index, IndexWriter, Record, Row, index_path
from kontext_jax.data.sources import TripleSource
from kontext_jax.types import Triple

SIZE = st.tuples(st.integers(1, 10**5), st.integers(1, 10**5))
FIELDS = st.tuples(
    st.text(min_size=1, max_size=9),
    st.text(max_size=3),
    SIZE,
    st.lists(SIZE, max_size=3),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize(("block", "known"), [(2**14, 2**20), (2, 1)])
@given(fields=st.lists(FIELDS, min_size=1, max_size=9))
def test_an_index_gives_back_its_rows(tmp_path_factory, block, known, fields):
    """From memory, and from disk in blocks of any size."""
    rows = [Row(*values) for values in fields]
    folder = tmp_path_factory.mktemp("index") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "BLOCK", block)
        patch.setattr(index_module, "MAX_KNOWN", known)
        with IndexWriter(folder) as writer:
            for row in rows:
                writer.add(row)
    loaded, gathered = Index.load(folder), Index.of(rows)
    for index in (loaded, gathered):
        assert list(index) == rows and len(index) == len(index.ids) == len(rows)
        assert list(index.ids) == [row.id for row in rows]
        assert index.ids[-1] == rows[-1].id and index[-1] == rows[-1]
    assert loaded.digest == gathered.digest
    assert all(isinstance(column, np.memmap) for column in loaded.columns)
    digests = [row.digest for row in rows]
    assert (Index.of(rows[::-1]).digest == loaded.digest) == (digests == digests[::-1])


def test_records_with_images_of_the_same_sizes_share_an_entry():
    rows = [Row(f"{i}", "", (8, 9), [(8, 9)] * (i % 2), 5, i) for i in range(10)]
    assert Index.of(rows).columns.sizes.tolist() == [[8, 9]] * 3


def test_more_categories_than_fit_are_refused(monkeypatch):
    monkeypatch.setattr(index_module, "MAX_CATEGORIES", 2)
    rows = [Row(f"{i}", f"{i}", (8, 9), [], 5, i) for i in range(3)]
    with pytest.raises(ValueError, match="There are more than 2 categories: give"):
        Index.of(rows)


def triple(name: str) -> Triple:
    """A triple with as many contexts as its name has letters, but one."""
    image = np.full((4, 6, 3), 7, np.uint8)
    return Triple(name, image, (image[:2],) * (len(name) - 1), "a grey wall", "text_to_image")


@pytest.fixture
def path(tmp_path):
    store.write({"train": map(triple, ["a", "ü", "ab", "abc", "b"])}, tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("name", ["index.json", *(f"{name}.npy" for name in Columns._fields)])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_and_missing_files_are_named(path, name, damage):
    file = index_path(path, "train") / name
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(data[: len(data) - 8] if damage == "cut" else b"")
    message = f"^The index {path}/index-train is incomplete or damaged .*: delete the folder to"
    with pytest.raises(ValueError, match=message):
        _ = TripleSource(path, "train").index
    shutil.rmtree(index_path(path, "train"))
    assert len(TripleSource(path, "train").index) == 5


def test_columns_of_another_index_are_refused(path, tmp_path):
    store.write({"train": map(triple, ["x"])}, tmp_path / "other")
    folders = [index_path(folder, "train") for folder in (path, tmp_path / "other")]
    shutil.copy(folders[1] / "digests.npy", folders[0])
    with pytest.raises(ValueError, match="its files have different lengths"):
        _ = TripleSource(path, "train").index


def save_npz(path, rows):
    """Writes an index as versions before 2 did; returns the fingerprint that they computed."""
    flat = [size for row in rows for size in row.context_sizes]
    columns = {
        "ids": np.array([row.id for row in rows], np.str_),
        "categories": np.array([row.category for row in rows], np.str_),
        "target_sizes": np.array([row.target_size for row in rows], np.int32).reshape(-1, 2),
        "context_sizes": np.array(flat, np.int32).reshape(-1, 2),
        "context_counts": np.array([len(row.context_sizes) for row in rows], np.int32),
        "prompt_bytes": np.array([row.prompt_bytes for row in rows], np.int32),
        "digests": np.array([row.digest for row in rows], np.uint64),
    }
    np.savez_compressed(path, **columns)
    digest = hashlib.sha256()
    for name, array in columns.items():
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def test_a_data_set_with_an_index_of_an_earlier_version_opens(path):
    """Its fingerprint stays, so that stores of latents remain valid."""
    rows = list(TripleSource(path, "train").index)
    shutil.rmtree(index_path(path, "train"))
    old = path / "index-train.npz"
    fingerprint = save_npz(old, rows)
    source = TripleSource(path, "train")
    assert list(source.index) == rows and source.fingerprint == fingerprint

    old.write_bytes(old.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"^The index {old} is damaged .*: delete it to read"):
        _ = TripleSource(path, "train").index
    save_npz(old, rows[:-1])
    with pytest.raises(ValueError, match=f"^{old} lists 4 records, but the split has 5: delete it"):
        _ = TripleSource(path, "train").index


def test_the_digest_covers_every_field():
    record = Record(
        id="ab", target=_png(), contexts=[_png()], prompt="c", category="local", details="{}"
    )
    changed = [
        record | {"id": "a"},
        record | {"id": "a", "prompt": "bc"},
        record | {"prompt": "d"},
        record | {"category": "global"},
        record | {"details": "[]"},
        record | {"target": _png(shade=8)},
        record | {"contexts": []},
    ]
    digests = {Row.of(Record(**fields)).digest for fields in [record, *changed]}
    assert len(digests) == 1 + len(changed)


def _png(shade: int = 7) -> bytes:
    return store.encode_png(np.full((2, 2, 3), shade, np.uint8))
