"""Tensors of the files that ``torch.save`` writes, without running them.

The tensors stand in a pickle, which tells for each what it shows of which storage. A pickle is a
program, and Python's unpickler calls whatever that names; so it is not used. `_interpret` knows the
few operations that a dict of tensors takes, builds plain values, and calls nothing that a file
names.

Before version 1.6 a file is five pickles - a magic number, the version, the machine's sizes, the
tensors, and the keys of their storages - and then the bytes of each storage; the layout is that of
``_legacy_save`` in PyTorch's ``torch/serialization.py``. Since then it is a zip archive with a
folder of ``data.pkl``, the tensors, ``data/<key>``, the bytes of a storage, ``byteorder``, and
records that tensors do not need (``_save`` in the same file). Python 2 wrote names as bytes, and
the oldest files call ``_rebuild_tensor``, as torchvision's VGG16 does.
"""

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from kontext_jax.weights.files import WeightsError

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001

ZIP_START = b"PK\x03\x04"

STORAGE_DTYPES = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
}
"""Of the storages that are read."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _View(NamedTuple):
    """A tensor: which elements of a storage it shows, counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of either kind, by name, in the dtypes they are stored in.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: it is another kind of file, is cut off, or holds anything but tensors.
    """
    content = path.read_bytes()  # which no claimed length makes allocate more
    read = _read_zip if content.startswith(ZIP_START) else _read_legacy
    try:
        return read(io.BytesIO(content))
    except WeightsError as error:
        why = str(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, *_ZIP_ERRORS):
        why = "it is cut off or mixed up"
    raise WeightsError(f"{path} is not read: {why}. Give a dict of tensors that torch.save wrote.")


_ZIP_ERRORS = (EOFError, RuntimeError, zipfile.BadZipFile)
"""What else zipfile raises; of RuntimeError's kinds for what is encrypted or not implemented."""


def _read_zip(file: io.BytesIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise WeightsError("some of its records are compressed")
        pickles = [x.filename for x in records if re.fullmatch("[^/]+/data.pkl", x.filename)]
        if len(pickles) != 1:
            raise WeightsError(f"it is a zip archive of {len(pickles)} data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if any(record.filename == f"{folder}byteorder" for record in records):
            if archive.read(f"{folder}byteorder") != b"little":
                raise WeightsError("its numbers are big-endian")
        views = _checked(_interpret(io.BytesIO(archive.read(pickles[0]))))
        data = {}
        for storage in {view.storage for view in views.values()}:
            content = archive.read(f"{folder}data/{storage.key}")
            if len(content) != storage.size * storage.dtype.itemsize:
                raise _other_size(storage)
            data[storage] = np.frombuffer(content, storage.dtype)
    return {name: _elements(view, data[view.storage]) for name, view in views.items()}


def _read_legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    if _interpret(file) != MAGIC or _interpret(file) != VERSION:
        raise WeightsError("it does not start as such files do")
    if not _interpret(file)["little_endian"]:
        raise WeightsError("its numbers are big-endian")
    views, keys = _checked(_interpret(file)), _interpret(file)
    storages = {view.storage.key: view.storage for view in views.values()}
    data, rest = {}, memoryview(file.read())
    for key in keys:
        storage = storages[key]
        if storage.size != int.from_bytes(rest[:8], "little"):
            raise _other_size(storage)
        end = 8 + storage.size * storage.dtype.itemsize
        data[storage], rest = np.frombuffer(rest[8:end], storage.dtype, storage.size), rest[end:]
    return {name: _elements(view, data[view.storage]) for name, view in views.items()}


def _checked(views: Any) -> dict[str, _View]:
    names, values = views.keys(), views.values()
    if not all(isinstance(x, str) for x in names) or not all(isinstance(x, _View) for x in values):
        raise WeightsError("it holds more than tensors and their names")
    return views


def _other_size(storage: _Storage) -> WeightsError:
    return WeightsError(f"its storage {storage.key} is of another size than the tensors say")


def _elements(view: _View, data: np.ndarray) -> np.ndarray:
    """The tensor, copied; strides may be in any order, but no element is shown twice."""
    reach = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    reach = reach if math.prod(view.shape) else -1
    if (
        min((view.offset, *view.shape, *view.strides)) < 0
        or view.offset + reach >= len(data)
        or math.prod(view.shape) > len(data)
    ):
        raise WeightsError("one of its tensors reaches beyond its storage")
    strides = [stride * data.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(data[view.offset :], view.shape, strides).copy()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise WeightsError("one of its tensors has no storage")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


class _Name(NamedTuple):
    """A class or function that a file names; it stays a name."""

    name: str


_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": dict,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
}
"""What a file may call, and what is called instead."""

_MARK = object()

_NEW: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}


def _interpret(file: io.BytesIO) -> Any:
    """The value of the pickle at the file's position, which is then behind it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        at = len(stack) - 1 - stack[::-1].index(_MARK)
        values = stack[at + 1 :]
        del stack[at:]
        return values

    for operation, argument, _ in pickletools.genops(file):
        match operation.name:
            case name if name in _NEW:
                stack.append(_NEW[name]())
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPENDS":
                values = pop_to_mark()
                stack[-1].extend(values)
            case "SETITEM":
                key, value = stack.pop(-2), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                values = pop_to_mark()
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in _CALLS and argument not in STORAGE_DTYPES:
                    raise WeightsError(f"it asks for {argument.replace(' ', '.')}")
                stack.append(_Name(argument))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_CALLS[stack.pop().name](*arguments))
            case "BINPERSID":
                _, kind, key, _, size, *whole = stack.pop()
                if whole not in ([], [None]):
                    raise WeightsError("one of its storages is a part of another")
                stack.append(_Storage(key, STORAGE_DTYPES[kind.name], size))
            case "BUILD":
                stack.pop()  # the versions of the modules that the tensors are of
            case "STOP":
                return stack.pop()
            case name if name != "PROTO":
                raise WeightsError(f"it has the operation {name}, which no dict of tensors takes")
    raise AssertionError("genops ends at STOP or raises")
