"""Tests of PyTorch's files before 1.6: tensors are read, and nothing in a file is executed."""

import os
import pickle

import numpy as np
import pytest

from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.torch_legacy import read_tensors
from tests.weights import legacy

TENSORS = {
    "kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.linspace(0, 1, 5, dtype=np.float16),
    "count": np.array(7, np.int64),
}


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
    tensors = read_tensors(legacy.save(tmp_path / "file.pth", TENSORS))
    assert list(tensors) == list(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name], array)


def test_tensors_may_share_a_storage_with_any_strides(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    stored = legacy.storage("0", numbers)
    program = b"}(" + legacy.text("full") + legacy.tensor(stored, (3, 4), (4, 1))
    program += legacy.text("transposed") + legacy.tensor(stored, (4, 2), (1, 4), offset=4) + b"u"
    tensors = read_tensors(legacy.save(tmp_path / "file.pth", {"0": numbers}, program))
    np.testing.assert_array_equal(tensors["full"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(tensors["transposed"], numbers.reshape(3, 4)[1:].T)


def test_the_oldest_formats_are_read(tmp_path):
    """``_rebuild_tensor``, as in torchvision's VGG16, and names as bytes, as Python 2 wrote."""
    numbers = np.arange(6, dtype=np.float32)
    stored = legacy.storage("0", numbers)
    shape, strides = (legacy.group(*map(legacy.number, x)) for x in ((2, 3), (3, 1)))
    view = legacy.group(stored, legacy.number(0), shape, strides)
    tensor = b"ctorch._utils\n_rebuild_tensor\n" + view + b"R"
    parameter = b"ctorch._utils\n_rebuild_parameter\n" + legacy.group(tensor, b"\x89", b"N") + b"R"
    names = b"U\x01a", b"T\x01\x00\x00\x00b"
    pairs = [b"](" + x + y + b"e" for x, y in zip(names, (tensor, parameter), strict=True)]
    program = b"ccollections\nOrderedDict\n](" + b"".join(pairs) + b"e\x85R"
    tensors = read_tensors(legacy.save(tmp_path / "file.pth", {"0": numbers}, program))
    assert list(tensors) == ["a", "b"]
    for array in tensors.values():
        np.testing.assert_array_equal(array, numbers.reshape(2, 3))


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("hidden", ["alone", "among tensors", "in the key of a storage"])
def test_a_malicious_file_is_refused_and_not_executed(tmp_path, hidden):
    target = tmp_path / "target"
    program = pickle.dumps(Malicious(target), protocol=2)[2:-1]  # without PROTO and STOP
    path = tmp_path / "file.pth"
    if hidden == "alone":
        path.write_bytes(legacy.pickled(program))
    elif hidden == "among tensors":
        entries = legacy.entries(TENSORS)[:-1] + legacy.text("more") + program + b"u"
        legacy.save(path, TENSORS, entries)
    else:
        stored = legacy.group(legacy.text("storage"), b"ctorch\nFloatStorage\n", program) + b"Q"
        legacy.save(path, TENSORS, b"}(" + legacy.text("a") + stored + b"u")
    assert refusal(path).startswith("it refers to ") and refusal(path).endswith(".mkdir")
    assert not target.exists()
    pickle.loads(legacy.pickled(program))  # Python's unpickler does execute it
    assert target.exists()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR", "it refers to builtins.eval"),
        (b"ctorch\nload\n)R", "it refers to torch.load"),
        (b"ctorch\nFloatStorage\n)R", "it is truncated or corrupt"),
        (b"(ios\nmkdir\n", "it has the operation INST, which dicts of tensors never use"),
        (b"\x8c\x02os\x8c\x05mkdir\x93", "it has the operation SHORT_BINUNICODE, which dicts of"),
        (b"\x82\x01", "it has the operation EXT1, which dicts of tensors never use"),
        (b"ccollections\nOrderedDict\n)\x81", "it has the operation NEWOBJ, which dicts of tens"),
    ],
)
def test_other_calls_and_operations_are_refused(tmp_path, program, reason):
    assert refusal(legacy.save(tmp_path / "file.pth", TENSORS, program)).startswith(reason)


NUMBERS = np.arange(6, dtype=np.float32)
STORED = legacy.storage("0", NUMBERS)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (legacy.tensor(STORED, (2, 3), (3, 1), offset=1), "one of its tensors exceeds its stor"),
        (legacy.tensor(STORED, (2, 3), (-3, 1), offset=3), "one of its tensors exceeds its stor"),
        (legacy.tensor(STORED, (2, 3), (3, 1), offset=-1), "one of its tensors exceeds its stor"),
        (legacy.tensor(STORED, (1000, 6), (0, 1)), "one of its tensors exceeds its storage"),
        (legacy.tensor(STORED, (2, 3), (3,)), "it is truncated or corrupt"),
        (legacy.tensor(b"N", (2, 3), (3, 1)), "one of its tensors has no storage"),
        (legacy.tensor(legacy.storage("0", NUMBERS[1:]), (5,), (1,)), "the size of its storage 0 "),
        (legacy.tensor(legacy.storage("1", NUMBERS), (6,), (1,)), "it is truncated or corrupt"),
        (legacy.tensor(legacy.storage("0", NUMBERS, b")"), (6,), (1,)), "one of its storages is a"),
        (legacy.number(3), "it holds more than named tensors"),
    ],
)
def test_tensors_that_do_not_fit_their_storages_are_refused(tmp_path, value, reason):
    program = b"}(" + legacy.text("a") + value + b"u"
    assert refusal(legacy.save(tmp_path / "file.pth", {"0": NUMBERS}, program)).startswith(reason)


def test_a_file_truncated_at_any_byte_is_refused(tmp_path):
    path = legacy.save(tmp_path / "file.pth", {"half": TENSORS["half"]})
    content = path.read_bytes()
    reasons = set()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        reasons.add(refusal(path))
    size = "the size of its storage half differs from what tensors declare"
    assert reasons == {"it is truncated or corrupt", size}


def test_files_of_other_formats_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(legacy.pickled(legacy.number(3)))
    assert refusal(path) == "it has another format"
    legacy.save(path, TENSORS, little_endian=b"\x89")
    assert refusal(path) == "its numbers are big-endian"
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.pth")
