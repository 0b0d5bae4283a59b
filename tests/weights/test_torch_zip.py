"""Tests of PyTorch's zip archives (since 1.6): tensors are read, and nothing is executed."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.torch_legacy import read_tensors
from tests.weights import legacy

TENSORS = {
    "kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.linspace(0, 1, 5, dtype=np.float16),
    "short": np.linspace(0, 1, 6).astype(ml_dtypes.bfloat16).reshape(3, 2),
    "count": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float32),
}
STORAGES = {
    "float32": b"FloatStorage",
    "float16": b"HalfStorage",
    "bfloat16": b"BFloat16Storage",
    "int64": b"LongStorage",
}


def storage(key: str, array: np.ndarray) -> bytes:
    kind = b"ctorch\n" + STORAGES[array.dtype.name] + b"\n"
    parts = (legacy.text("storage"), kind, legacy.text(key), legacy.text("cuda:0"))
    return legacy.group(*parts, legacy.number(array.size)) + b"Q"


def entries(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns a dict of contiguous tensors whose storages have their names, and module versions."""
    items = b""
    for name, array in tensors.items():
        strides = [step // array.itemsize for step in array.strides]
        items += legacy.text(name) + legacy.tensor(storage(name, array), array.shape, strides)
    versions = b"}" + legacy.text("_metadata") + b"}sb"
    return b"ccollections\nOrderedDict\n)R(" + items + b"u" + versions


def save(path: Path, tensors: Mapping[str, np.ndarray], pickle: bytes | None = None, **more: bytes):
    """Writes the tensors, or only their storages with a given pickle; ``more`` are records."""
    program = legacy.pickled(entries(tensors) if pickle is None else pickle)
    records = {"data.pkl": program, ".format_version": b"1", ".storage_alignment": b"64"}
    records |= {"byteorder": b"little", "version": b"3\n", ".data/serialization_id": b"0" * 40}
    records |= {f"data/{name}": array.tobytes() for name, array in tensors.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (records | more).items():
            archive.writestr(f"archive/{name}", content)
    return path


def refusal(path) -> str:
    """Returns the reason in the message that a file is refused with."""
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    start = f"Cannot read {path}: "
    end = ". Pass a file of torch.save with a dict of tensors."
    message = str(error.value)
    assert message.startswith(start) and message.endswith(end)
    return message.removeprefix(start).removesuffix(end)


def test_tensors_are_read_bit_for_bit(tmp_path):
    tensors = read_tensors(save(tmp_path / "file.pth", TENSORS))
    assert list(tensors) == list(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array, strict=True)


def test_tensors_may_share_a_storage_with_any_strides(tmp_path):
    numbers = np.arange(12).astype(ml_dtypes.bfloat16)
    stored = storage("0", numbers)
    program = b"}(" + legacy.text("full") + legacy.tensor(stored, (3, 4), (4, 1))
    program += legacy.text("transposed") + legacy.tensor(stored, (4, 2), (1, 4), offset=4) + b"u"
    tensors = read_tensors(save(tmp_path / "file.pth", {"0": numbers}, program))
    np.testing.assert_array_equal(tensors["full"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(tensors["transposed"], numbers.reshape(3, 4)[1:].T)


def test_archives_of_1_6_without_byte_order_are_read(tmp_path):
    path = save(tmp_path / "file.pth", TENSORS)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    kept = ("archive/data.pkl", "archive/version", "archive/data/")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.startswith(kept):
                archive.writestr(name, content)
    np.testing.assert_array_equal(read_tensors(path)["kernel"], TENSORS["kernel"])


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_malicious_file_is_refused_and_not_executed(tmp_path, is_alone):
    target = tmp_path / "target"
    program = pickle.dumps(Malicious(target), protocol=2)[2:-1]  # without PROTO and STOP
    if not is_alone:
        start = entries(TENSORS)[: -len(b"}X\x09\x00\x00\x00_metadata}sb") - 1]
        program = start + legacy.text("more") + program + b"u"
    path = save(tmp_path / "file.pth", TENSORS, program)
    assert refusal(path).startswith("it refers to ") and refusal(path).endswith(".mkdir")
    assert not target.exists()


NUMBERS = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (legacy.tensor(storage("0", NUMBERS), (2, 3), (3, 1), offset=1), "one of its tensors exc"),
        (legacy.tensor(storage("0", NUMBERS[1:]), (5,), (1,)), "the size of its storage 0 differs"),
        (legacy.tensor(storage("1", NUMBERS), (6,), (1,)), "it is truncated or corrupt"),
        (legacy.tensor(legacy.storage("0", NUMBERS, b")"), (6,), (1,)), "one of its storages is a"),
        (b"}", "it holds more than named tensors"),
    ],
)
def test_tensors_that_do_not_fit_their_storages_are_refused(tmp_path, value, reason):
    program = b"}(" + legacy.text("a") + value + b"u"
    assert refusal(save(tmp_path / "file.pth", {"0": NUMBERS}, program)).startswith(reason)


def test_a_truncated_archive_is_refused(tmp_path):
    path = save(tmp_path / "file.pth", {"half": TENSORS["half"]})
    content = path.read_bytes()
    for length in range(4, len(content), 7):
        path.write_bytes(content[:length])
        assert refusal(path) == "it is truncated or corrupt"


def test_a_changed_byte_is_refused_or_does_not_change_the_tensors(tmp_path):
    """Tensors do not change with the archive's name or with records that they do not need."""
    path, refused = save(tmp_path / "file.pth", {"half": TENSORS["half"]}), 0
    content = path.read_bytes()
    for i in range(0, len(content), 3):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        try:
            np.testing.assert_array_equal(read_tensors(path)["half"], TENSORS["half"])
        except WeightsError:
            refused += 1
    assert refused > len(content) / 30


def test_other_archives_are_refused(tmp_path):
    path = save(tmp_path / "file.pth", TENSORS, byteorder=b"big")
    assert refusal(path) == "its numbers are big-endian"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.npy", b"0")
    assert refusal(path) == "it is a zip archive with 0 data.pkl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one/data.pkl", b"0")
        archive.writestr("two/data.pkl", b"0")
    assert refusal(path) == "it is a zip archive with 2 data.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", legacy.pickled(b"}"))
    assert refusal(path) == "its records are compressed"
    path.write_bytes(b"PK\x03\x04 and no archive")
    assert refusal(path) == "it is truncated or corrupt"
    assert read_tensors(save(path, {})) == {}
