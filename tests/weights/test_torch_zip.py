"""PyTorch's files of 1.6 and later: zip archives of tensors, and of nothing that is run."""

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
    """A dict of contiguous tensors, whose storages have their names, with modules' versions."""
    items = b""
    for name, array in tensors.items():
        strides = [step // array.itemsize for step in array.strides]
        items += legacy.text(name) + legacy.tensor(storage(name, array), array.shape, strides)
    versions = b"}" + legacy.text("_metadata") + b"}sb"
    return b"ccollections\nOrderedDict\n)R(" + items + b"u" + versions


def save(path: Path, tensors: Mapping[str, np.ndarray], made: bytes | None = None, **more: bytes):
    """Writes the tensors, or their storages alone with another pickle; ``more`` are records."""
    program = legacy.pickled(entries(tensors) if made is None else made)
    records = {"data.pkl": program, ".format_version": b"1", ".storage_alignment": b"64"}
    records |= {"byteorder": b"little", "version": b"3\n", ".data/serialization_id": b"0" * 40}
    records |= {f"data/{name}": array.tobytes() for name, array in tensors.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (records | more).items():
            archive.writestr(f"archive/{name}", content)
    return path


def refusal(path) -> str:
    """Why the file is not read."""
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    start, end = f"{path} is not read: ", ". Give a dict of tensors that torch.save wrote."
    sentence = str(error.value)
    assert sentence.startswith(start) and sentence.endswith(end)
    return sentence.removeprefix(start).removesuffix(end)


def test_tensors_come_out_bit_for_bit(tmp_path):
    tensors = read_tensors(save(tmp_path / "file.pth", TENSORS))
    assert list(tensors) == list(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array, strict=True)


def test_tensors_share_storages_in_any_order(tmp_path):
    numbers = np.arange(12).astype(ml_dtypes.bfloat16)
    stored = storage("0", numbers)
    made = b"}(" + legacy.text("whole") + legacy.tensor(stored, (3, 4), (4, 1))
    made += legacy.text("turned") + legacy.tensor(stored, (4, 2), (1, 4), offset=4) + b"u"
    tensors = read_tensors(save(tmp_path / "file.pth", {"0": numbers}, made))
    np.testing.assert_array_equal(tensors["whole"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(tensors["turned"], numbers.reshape(3, 4)[1:].T)


def test_files_of_1_6_tell_no_byte_order(tmp_path):
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
    """Pickled, it makes a folder for whoever loads it."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_malicious_file_is_refused_and_does_nothing(tmp_path, is_alone):
    target = tmp_path / "made"
    program = pickle.dumps(Malicious(target), protocol=2)[2:-1]  # its PROTO and STOP left out
    made = entries(TENSORS)[: -len(b"}X\x09\x00\x00\x00_metadata}sb") - 1]
    made = program if is_alone else made + legacy.text("more") + program + b"u"
    path = save(tmp_path / "file.pth", TENSORS, made)
    assert refusal(path).startswith("it asks for ") and refusal(path).endswith(".mkdir")
    assert not target.exists()


NUMBERS = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (legacy.tensor(storage("0", NUMBERS), (2, 3), (3, 1), offset=1), "one of its tensors rea"),
        (legacy.tensor(storage("0", NUMBERS[1:]), (5,), (1,)), "its storage 0 is of another size"),
        (legacy.tensor(storage("1", NUMBERS), (6,), (1,)), "it is cut off or mixed up"),
        (legacy.tensor(legacy.storage("0", NUMBERS, b")"), (6,), (1,)), "one of its storages is a"),
        (b"}", "it holds more than tensors and their names"),
    ],
)
def test_tensors_that_do_not_fit_their_storages_are_refused(tmp_path, value, why):
    made = b"}(" + legacy.text("a") + value + b"u"
    assert refusal(save(tmp_path / "file.pth", {"0": NUMBERS}, made)).startswith(why)


def test_every_cut_is_noticed(tmp_path):
    path = save(tmp_path / "file.pth", {"half": TENSORS["half"]})
    whole = path.read_bytes()
    for length in range(4, len(whole), 7):
        path.write_bytes(whole[:length])
        assert refusal(path) == "it is cut off or mixed up"


def test_no_changed_byte_goes_further_than_a_refusal(tmp_path):
    """Or changes nothing: a name of the archive's, or what no tensor needs."""
    path, refused = save(tmp_path / "file.pth", {"half": TENSORS["half"]}), 0
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            np.testing.assert_array_equal(read_tensors(path)["half"], TENSORS["half"])
        except WeightsError:
            refused += 1
    assert refused > len(whole) / 30


def test_archives_of_other_kinds_are_refused(tmp_path):
    path = save(tmp_path / "file.pth", TENSORS, byteorder=b"big")
    assert refusal(path) == "its numbers are big-endian"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.npy", b"0")
    assert refusal(path) == "it is a zip archive of 0 data.pkl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one/data.pkl", b"0")
        archive.writestr("two/data.pkl", b"0")
    assert refusal(path) == "it is a zip archive of 2 data.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", legacy.pickled(b"}"))
    assert refusal(path) == "some of its records are compressed"
    path.write_bytes(b"PK\x03\x04 and no archive")
    assert refusal(path) == "it is cut off or mixed up"
    assert read_tensors(save(path, {})) == {}
