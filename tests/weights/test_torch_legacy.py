"""PyTorch's files of before 1.6: tensors come out, and nothing that a file asks for is done."""

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
    """Why the file is not read."""
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    start, end = (
        f"{path} is not read: ",
        ". Give a dict of tensors that torch.save wrote.",
    )
    sentence = str(error.value)
    assert sentence.startswith(start) and sentence.endswith(end)
    return sentence.removeprefix(start).removesuffix(end)


def test_tensors_come_out_bit_for_bit(tmp_path):
    tensors = read_tensors(legacy.save(tmp_path / "file.pth", TENSORS))
    assert list(tensors) == list(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name], array)


def test_tensors_share_storages_in_any_order(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    stored = legacy.storage("0", numbers)
    made = b"}(" + legacy.text("whole") + legacy.tensor(stored, (3, 4), (4, 1))
    made += legacy.text("turned") + legacy.tensor(stored, (4, 2), (1, 4), offset=4) + b"u"
    tensors = read_tensors(legacy.save(tmp_path / "file.pth", {"0": numbers}, made))
    np.testing.assert_array_equal(tensors["whole"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(tensors["turned"], numbers.reshape(3, 4)[1:].T)


def test_the_calls_and_names_of_the_oldest_files_are_read(tmp_path):
    """Of torchvision's VGG16 (``_rebuild_tensor``), and of Python 2 (names as bytes)."""
    numbers = np.arange(6, dtype=np.float32)
    stored = legacy.storage("0", numbers)
    shape, strides = (legacy.group(*map(legacy.number, x)) for x in ((2, 3), (3, 1)))
    view = legacy.group(stored, legacy.number(0), shape, strides)
    tensor = b"ctorch._utils\n_rebuild_tensor\n" + view + b"R"
    parameter = b"ctorch._utils\n_rebuild_parameter\n" + legacy.group(tensor, b"\x89", b"N") + b"R"
    names = b"U\x01a", b"T\x01\x00\x00\x00b"
    pairs = [b"](" + x + y + b"e" for x, y in zip(names, (tensor, parameter), strict=True)]
    made = b"ccollections\nOrderedDict\n](" + b"".join(pairs) + b"e\x85R"
    tensors = read_tensors(legacy.save(tmp_path / "file.pth", {"0": numbers}, made))
    assert list(tensors) == ["a", "b"]
    for array in tensors.values():
        np.testing.assert_array_equal(array, numbers.reshape(2, 3))


class Malicious:
    """Pickled, it makes a folder for whoever loads it."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("hidden", ["alone", "among tensors", "in the key of a storage"])
def test_a_malicious_file_is_refused_and_does_nothing(tmp_path, hidden):
    target = tmp_path / "made"
    program = pickle.dumps(Malicious(target), protocol=2)[2:-1]  # its PROTO and STOP left out
    path = tmp_path / "file.pth"
    if hidden == "alone":
        path.write_bytes(legacy.pickled(program))
    elif hidden == "among tensors":
        made = legacy.entries(TENSORS)[:-1] + legacy.text("more") + program + b"u"
        legacy.save(path, TENSORS, made)
    else:
        stored = legacy.group(legacy.text("storage"), b"ctorch\nFloatStorage\n", program) + b"Q"
        legacy.save(path, TENSORS, b"}(" + legacy.text("a") + stored + b"u")
    assert refusal(path).startswith("it asks for ") and refusal(path).endswith(".mkdir")
    assert not target.exists()
    pickle.loads(legacy.pickled(program))  # it would have worked
    assert target.exists()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR", "it asks for builtins.eval"),
        (b"ctorch\nload\n)R", "it asks for torch.load"),
        (b"ctorch\nFloatStorage\n)R", "it is cut off or mixed up"),
        (b"(ios\nmkdir\n", "it has the operation INST, which no dict of tensors takes"),
        (b"\x8c\x02os\x8c\x05mkdir\x93", "it has the operation SHORT_BINUNICODE, which no dict"),
        (b"\x82\x01", "it has the operation EXT1, which no dict of tensors takes"),
        (b"ccollections\nOrderedDict\n)\x81", "it has the operation NEWOBJ, which no dict of te"),
    ],
)
def test_only_what_tensors_take_is_known(tmp_path, program, why):
    assert refusal(legacy.save(tmp_path / "file.pth", TENSORS, program)).startswith(why)


NUMBERS = np.arange(6, dtype=np.float32)
STORED = legacy.storage("0", NUMBERS)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (legacy.tensor(STORED, (2, 3), (3, 1), offset=1), "one of its tensors reaches beyond"),
        (legacy.tensor(STORED, (2, 3), (-3, 1), offset=3), "one of its tensors reaches beyond"),
        (legacy.tensor(STORED, (2, 3), (3, 1), offset=-1), "one of its tensors reaches beyond"),
        (legacy.tensor(STORED, (1000, 6), (0, 1)), "one of its tensors reaches beyond"),
        (legacy.tensor(STORED, (2, 3), (3,)), "it is cut off or mixed up"),
        (legacy.tensor(b"N", (2, 3), (3, 1)), "one of its tensors has no storage"),
        (legacy.tensor(legacy.storage("0", NUMBERS[1:]), (5,), (1,)), "its storage 0 is of anoth"),
        (legacy.tensor(legacy.storage("1", NUMBERS), (6,), (1,)), "it is cut off or mixed up"),
        (legacy.tensor(legacy.storage("0", NUMBERS, b")"), (6,), (1,)), "one of its storages is a"),
        (legacy.number(3), "it holds more than tensors and their names"),
    ],
)
def test_tensors_that_do_not_fit_their_storages_are_refused(tmp_path, value, why):
    made = b"}(" + legacy.text("a") + value + b"u"
    assert refusal(legacy.save(tmp_path / "file.pth", {"0": NUMBERS}, made)).startswith(why)


def test_every_cut_is_noticed(tmp_path):
    path = legacy.save(tmp_path / "file.pth", {"half": TENSORS["half"]})
    whole = path.read_bytes()
    reasons = set()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        reasons.add(refusal(path))
    size = "its storage half is of another size than the tensors say"
    assert reasons == {"it is cut off or mixed up", size}


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(legacy.pickled(legacy.number(3)))
    assert refusal(path) == "it does not start as such files do"
    legacy.save(path, TENSORS, little_endian=b"\x89")
    assert refusal(path) == "its numbers are big-endian"
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.pth")
