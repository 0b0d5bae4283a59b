"""Tests of safetensors files: they equal the library's, and invalid files are refused."""

import json
import pickle
import weakref
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kontext_jax.weights.files import (
    TENSOR_DTYPES,
    NewTensor,
    TensorFiles,
    WeightsError,
    write_file,
    write_sharded,
)


def arrays_of(dtype, *shapes) -> dict[str, np.ndarray]:
    """Returns arrays of random bits, including infinities, NaNs, subnormals and -0."""
    rng = np.random.default_rng(0)
    bits = [rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8) for shape in shapes]
    return {f"tensor.{i}": b.view(dtype)[..., 0] for i, b in enumerate(bits)}


def new(arrays: dict[str, np.ndarray]) -> list[NewTensor]:
    return [NewTensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()]


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


def read_all(path: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(path)
    return {name: files.read(name) for name in files.entries}


def refusal(path: Path) -> str:
    """Returns the message, one sentence, that opening a file or folder fails with."""
    with pytest.raises((WeightsError, FileNotFoundError)) as error:
        TensorFiles(path)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", TENSOR_DTYPES)
def test_the_library_reads_our_files_and_we_read_its_files(tmp_path, name):
    dtype = TENSOR_DTYPES[name]
    arrays = arrays_of(dtype, (3, 5), (7,), (2, 3, 1, 1), (1,))
    metadata = {"format": "pt", "kontext_jax": json.dumps({"prompt": '"夜"\n'})}
    write_file(tmp_path / "ours", new(arrays), metadata)
    save_file(arrays, tmp_path / "theirs", metadata)
    assert_same(load_file(tmp_path / "ours"), arrays)
    assert_same(read_all(tmp_path / "ours"), arrays)
    assert_same(read_all(tmp_path / "theirs"), arrays)
    with safe_open(tmp_path / "ours", framework="np") as opened:
        assert opened.metadata() == metadata
        assert opened.get_slice("tensor.0").get_dtype() == name
    for file in ("ours", "theirs"):
        files = TensorFiles(tmp_path / file)
        assert files.record == {"prompt": '"夜"\n'}
        assert files.entries["tensor.2"] == (tmp_path / file, (2, 3, 1, 1), name)


def test_mixed_dtypes_are_written_after_a_padded_header(tmp_path):
    shapes = iter([(3,), (2, 2), (5,)])
    arrays = {
        name: arrays_of(dtype, next(shapes))["tensor.0"] for name, dtype in TENSOR_DTYPES.items()
    }
    write_file(tmp_path / "file", new(arrays), {})
    assert_same(load_file(tmp_path / "file"), arrays)
    length = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert length % 8 == 0
    assert (tmp_path / "file").stat().st_size == 8 + length + sum(a.nbytes for a in arrays.values())


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path):
    references = []

    def make(value):
        assert all(reference() is None for reference in references)
        array = np.full((50, 4), value, np.float32)
        references.append(weakref.ref(array))
        return array

    float32 = np.dtype(np.float32)
    tensors = [NewTensor(f"{i}", (50, 4), float32, lambda i=i: make(i)) for i in range(3)]
    write_file(tmp_path / "file", tensors, {})
    assert {name: array.max() for name, array in load_file(tmp_path / "file").items()} == {
        "0": 0,
        "1": 1,
        "2": 2,
    }


def test_shards_have_an_index_in_diffusers_format(tmp_path):
    arrays = arrays_of(np.dtype(np.float32), (2, 5), (5,), (30,), (1,), (1,))  # 40, 20, 120, 4, 4
    write_sharded(tmp_path, "model", new(arrays), {"format": "pt"}, max_shard_bytes=60)
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 188},
        "weight_map": {
            "tensor.0": shards[0],
            "tensor.1": shards[0],
            "tensor.2": shards[1],
            "tensor.3": shards[2],
            "tensor.4": shards[2],
        },
    }
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(shards)
    for shard in shards:
        names = {name for name, file in index["weight_map"].items() if file == shard}
        assert_same(load_file(tmp_path / shard), {name: arrays[name] for name in names})
        with safe_open(tmp_path / shard, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert_same(read_all(tmp_path), arrays)


def test_a_single_file_has_no_index(tmp_path):
    arrays = arrays_of(np.dtype(ml_dtypes.bfloat16), (2, 5), (5,))
    write_sharded(tmp_path, "model", new(arrays), {}, max_shard_bytes=30)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(read_all(tmp_path), arrays)


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "model.safetensors"
    write_file(path, new(arrays_of(np.dtype(np.float32), (8, 8))), {"format": "pt"})
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(path).startswith(f"{path} is truncated or not a safetensors file (")
    assert refusal(tmp_path).startswith(f"{path} is truncated or not a safetensors file (")


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(path: Path, payload: Payload, protocol: int) -> None:
    path.write_bytes(pickle.dumps({"weight": payload}, protocol))


def zipped(path: Path, payload: Payload) -> None:
    """Writes the payload in the zip format of torch.save."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": payload}, 2))
        archive.writestr("archive/data/0", bytes(16))


@pytest.fixture
def nothing_is_unpickled(tmp_path, monkeypatch):
    """A payload; the test fails if anything unpickles it."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    payload = Payload(tmp_path / "unpickled")
    yield payload
    assert not payload.path.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
def test_a_pickle_named_safetensors_is_refused_unread(tmp_path, nothing_is_unpickled, protocol):
    path = tmp_path / "model.safetensors"
    if protocol == "zip":
        zipped(path, nothing_is_unpickled)
    else:
        pickled(path, nothing_is_unpickled, protocol)
    assert refusal(path).startswith(f"{path} is a pickle, not a safetensors file; pickles can run")
    assert refusal(tmp_path).startswith(f"{path} is a pickle")


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_of_an_old_protocol_is_refused_unread(tmp_path, nothing_is_unpickled, protocol):
    path = tmp_path / "model.safetensors"
    pickled(path, nothing_is_unpickled, protocol)
    assert refusal(path).startswith(f"{path} is truncated or not a safetensors file")


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_file_suffix_of_pickles_is_refused_unread(tmp_path, nothing_is_unpickled, ending):
    path = tmp_path / f"model{ending}"
    zipped(path, nothing_is_unpickled)
    assert refusal(path) == f"{path} is a pickle; only .safetensors files are loaded."
    assert refusal(tmp_path) == f"{tmp_path} holds no .safetensors file."


def test_a_folder_of_several_files_needs_an_index(tmp_path):
    for name in ("a", "b"):
        write_file(tmp_path / f"{name}.safetensors", new(arrays_of(TENSOR_DTYPES["F16"], (2,))), {})
    assert refusal(tmp_path) == f"{tmp_path} holds 2 .safetensors files and no index."


def test_a_shard_missing_from_the_folder_is_refused(tmp_path):
    arrays = arrays_of(np.dtype(np.float32), (4,), (4,), (4,))
    write_sharded(tmp_path, "model", new(arrays), {}, max_shard_bytes=16)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    missing = ["model-00002-of-00003.safetensors"]
    assert refusal(tmp_path) == f"{index} lists missing files: {missing}."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["b"]}}',
    ],
)
def test_an_invalid_index_is_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(tmp_path) == f"{index} is not an index of safetensors files."


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    arrays = arrays_of(np.dtype(np.float32), (4,), (4,))
    write_sharded(tmp_path, "model", new(arrays), {}, max_shard_bytes=16)
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_file(second, new(arrays), {})
    assert refusal(tmp_path) == f"tensor.0 is in both {first} and {second}."


def test_a_missing_folder_is_refused(tmp_path):
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'} holds no .safetensors file."
