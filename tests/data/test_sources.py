"""Reading: triples round-trip, and a broken record is named without affecting the others."""

import io
import pickle
import shutil
import threading
import time
from concurrent import futures

import grain
import numpy as np
import pytest
from PIL import Image

from kontext_jax.data import store
from kontext_jax.data.index import Index, index_path
from kontext_jax.data.sources import CorruptRecordError, TripleSource
from kontext_jax.types import Triple

NUM = 12


def make(number: int) -> Triple:
    """A triple with 0, 1 or 2 contexts, each image of a different size."""
    rng = np.random.default_rng(number)

    def image(height: int, width: int) -> np.ndarray:
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    contexts = tuple(image(3 + place, 5 + number) for place in range(number % 3))
    category = "style" if contexts else "text_to_image"
    return Triple(
        f"näme/{number}",
        image(8 + number, 16),
        contexts,
        "größer " * number,
        category,
        f'{{"number": {number}}}',
    )


def assert_same(written: Triple, read: Triple) -> None:
    for field in ("id", "prompt", "category", "details"):
        assert getattr(written, field) == getattr(read, field)
    for a, b in zip(
        (written.target, *written.contexts), (read.target, *read.contexts), strict=True
    ):
        assert b.dtype == np.uint8
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def path(tmp_path):
    """A data set in three shards."""
    splits = {"train": map(make, range(NUM)), "validation": [make(NUM)]}
    store.write(splits, tmp_path / "set", num_shards=3)
    return tmp_path / "set"


def test_round_trip_is_exact_and_in_order(path):
    source = TripleSource(path, "train")
    assert len(source) == NUM
    for number, triple in enumerate(source):
        assert_same(make(number), triple)
    assert_same(make(NUM - 1), source[-1])
    assert_same(make(2), source[np.int64(2)])
    assert source[0].target.flags.writeable


@pytest.mark.parametrize("index", [NUM, -NUM - 1])
def test_index_out_of_range(path, index):
    with pytest.raises(IndexError, match=f"no record {index}"):
        TripleSource(path, "train")[index]


def test_a_record_has_the_prompt_and_encoded_images(path):
    source = TripleSource(path, "train")
    for index in (0, -1):
        record, triple = source.record(index), source[index]
        assert (record["id"], record["prompt"]) == (triple.id, triple.prompt)
        assert record["target"] == store.encode_png(triple.target)
    with pytest.raises(IndexError, match=f"no record {NUM}"):
        source.record(NUM)


@pytest.mark.parametrize("scanned", [False, True])
def test_the_index_is_in_reading_order(path, scanned):
    if scanned:
        shutil.rmtree(index_path(path, "train"))
    source = TripleSource(path, "train")
    index, triples = source.index, list(source)
    assert len(index) == NUM
    assert list(index.ids) == [triple.id for triple in triples]
    for row, triple in zip(index, triples, strict=True):
        assert (row.id, row.category) == (triple.id, triple.category)
        assert row.target_size == triple.target.shape[:2]
        assert row.context_sizes == [context.shape[:2] for context in triple.contexts]
        assert row.prompt_bytes == len(triple.prompt.encode())
    assert len({row.digest for row in index}) == NUM


def test_fingerprint_depends_on_the_contents_alone(path, tmp_path):
    original = TripleSource(path, "train").fingerprint
    assert original != TripleSource(path, "validation").fingerprint

    store.write({"train": map(make, range(NUM))}, tmp_path / "resharded", num_shards=1)
    assert TripleSource(tmp_path / "resharded", "train").fingerprint == original
    shutil.rmtree(index_path(path, "train"))
    assert TripleSource(path, "train").fingerprint == original

    def one_pixel_off(number: int) -> Triple:
        triple = make(number)
        if number == 5:
            triple.target[0, 0, 0] ^= 1
        return triple

    store.write({"train": map(one_pixel_off, range(NUM))}, tmp_path / "edited")
    assert TripleSource(tmp_path / "edited", "train").fingerprint != original


def test_a_source_is_pickled_without_its_index(path):
    source = TripleSource(path, "train")
    assert source.fingerprint and source[3]  # cached values and open files must not break pickling
    copy = pickle.loads(pickle.dumps(source))
    assert "index" not in vars(copy)
    assert copy.fingerprint == source.fingerprint
    assert_same(make(3), copy[3])


def test_threads_and_grain_read_the_same(path):
    source = TripleSource(path, "train")
    numbers = list(range(NUM)) * 8
    with futures.ThreadPoolExecutor(8) as pool:
        for number, triple in zip(numbers, pool.map(source.__getitem__, numbers), strict=True):
            assert_same(make(number), triple)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    for number, triple in enumerate(dataset):
        assert_same(make(number), triple)


def test_threads_compute_the_index_once(path, monkeypatch):
    source, num_threads = TripleSource(path, "train"), 16
    loads, barrier, load = [], threading.Barrier(num_threads), Index.load

    def slow_load(file):
        loads.append(file)
        time.sleep(0.05)  # lets other threads in
        return load(file)

    monkeypatch.setattr(Index, "load", slow_load)

    def read(_):
        barrier.wait()
        return source.fingerprint, source.index

    with futures.ThreadPoolExecutor(num_threads) as pool:
        fingerprints, indices = zip(*pool.map(read, range(num_threads)), strict=True)
    assert loads == [index_path(path, "train")]
    assert all(index is source.index for index in indices)
    assert set(fingerprints) == {source.index.digest}
    assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint


@pytest.mark.parametrize("broken", ["target", "context"])
def test_a_broken_image_is_named_and_others_are_readable(tmp_path, monkeypatch, broken):
    good = store.encode_png
    shape = make(4).target.shape if broken == "target" else make(4).contexts[0].shape
    monkeypatch.setattr(
        store, "encode_png", lambda image: good(image)[: 60 if image.shape == shape else None]
    )
    store.write({"train": map(make, range(NUM))}, tmp_path / "set")
    source = TripleSource(tmp_path / "set", "train")
    message = f'Record 4 \\("näme/4"\\) of the split "train" of {tmp_path}/set cannot be read'
    with pytest.raises(CorruptRecordError, match=message):
        source[4]
    assert_same(make(3), source[3])
    assert_same(make(5), source[5])


def _flip_bytes(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(b ^ 255 for b in content[middle : middle + 64])
        + content[middle + 64 :]
    )


@pytest.mark.parametrize(
    "damage", [_flip_bytes, lambda content: content[: len(content) // 2], lambda content: b""]
)
def test_a_damaged_shard_affects_only_its_records(tmp_path, damage):
    large = [
        make(number)._replace(
            target=np.random.default_rng(number).integers(0, 256, (96, 96, 3), np.uint8)
        )
        for number in range(NUM)
    ]
    store.write({"train": large}, tmp_path / "set", num_shards=3)
    [shard] = (tmp_path / "set").glob("triples-train*-00001-of-*")
    shard.write_bytes(damage(shard.read_bytes()))
    source = TripleSource(tmp_path / "set", "train")
    corrupt = []
    for number in range(NUM):
        try:
            assert_same(large[number], source[number])
        except CorruptRecordError as error:
            assert f"Record {number} " in str(error)
            corrupt.append(number)
    assert corrupt and set(corrupt) <= {4, 5, 6, 7}


def test_missing_or_empty_data_is_named(path, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no data set in .*nowhere: build one .*data\.build"
    ):
        TripleSource(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match='no split "test"; it has: train, validation'):
        TripleSource(path, "test")
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace('"1"', '"0"'))
    with pytest.raises(ValueError, match='The split "validation" of .* is empty'):
        TripleSource(path, "validation")
    next(path.glob("triples-train*-00001-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks the file triples-train"):
        TripleSource(path, "train")


def test_a_data_set_with_another_schema_is_refused(path):
    features = path / "features.json"
    features.write_text(features.read_text().replace('"contexts"', '"inputs"'))
    with pytest.raises(ValueError, match="lack the fields contexts"):
        TripleSource(path, "train")


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: ""])
def test_damaged_json_is_named_with_its_folder(path, name, damage):
    file = path / name
    file.write_text(damage(file.read_text()))
    message = f"^dataset_info.json or features.json of the data set in {path} is missing or damaged"
    with pytest.raises(ValueError, match=message):
        TripleSource(path, "train")


def test_images_of_other_modes_are_converted(tmp_path, monkeypatch):
    """Other programs may write 16 bits, or an EXIF rotation, which is ignored."""

    def encode(image):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(buffer, "PNG", exif=exif)
        return buffer.getvalue()

    monkeypatch.setattr(store, "encode_png", encode)
    store.write({"train": [make(3)]}, tmp_path / "set")
    source = TripleSource(tmp_path / "set", "train")
    for channel in range(3):
        np.testing.assert_array_equal(source[0].target[..., channel], make(3).target[..., 0])
    assert source[0].target.shape[:2] == source.index[0].target_size


def test_the_index_of_another_data_set_is_refused(path):
    shutil.rmtree(index_path(path, "train"))
    index_path(path, "validation").rename(index_path(path, "train"))
    with pytest.raises(ValueError, match=f"lists 1 records, but the split has {NUM}: delete"):
        _ = TripleSource(path, "train").index
