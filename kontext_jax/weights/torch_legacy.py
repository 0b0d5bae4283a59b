"""Reads tensors from files of ``torch.save`` without unpickling them.

A file describes its tensors in a pickle: each tensor is a view of a storage. A pickle is a program,
and Python's unpickler calls anything that it names, so this module does not use it. `_interpret`
supports only the operations that a dict of tensors needs, builds plain values, and calls nothing
that a file names.

Before PyTorch 1.6, a file is five pickles (a magic number, the version, sizes of the machine, the
tensors, and the keys of their storages), followed by the bytes of each storage; see
``_legacy_save`` in PyTorch's ``torch/serialization.py``. Since then, a file is a zip archive of one
folder with ``data.pkl`` (the tensors), ``data/<key>`` (the bytes of a storage), ``byteorder``, and
records that tensors do not need; see ``_save`` in the same file. Python 2 wrote names as bytes, and
the oldest files, such as torchvision's VGG16, call ``_rebuild_tensor``.
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
"""Dtypes of the supported storages."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _View(NamedTuple):
    """A tensor as a strided view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file of either format, by name, in their stored dtypes.

    Raises:
      FileNotFoundError: the file does not exist.
      WeightsError: the file has another format, is truncated, or holds anything but tensors.
    """
    content = path.read_bytes()  # bounds all memory: lengths that the file claims allocate nothing
    read = _read_zip if content.startswith(ZIP_START) else _read_legacy
    try:
        return read(io.BytesIO(content))
    except WeightsError as error:
        reason = str(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, *_ZIP_ERRORS):
        reason = "it is truncated or corrupt"
    raise WeightsError(
        f"Cannot read {path}: {reason}. Pass a file of torch.save with a dict of tensors."
    )


_ZIP_ERRORS = (EOFError, RuntimeError, zipfile.BadZipFile)
"""Further errors of zipfile; RuntimeError for encrypted and unsupported (NotImplementedError)."""


def _read_zip(file: io.BytesIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise WeightsError("its records are compressed")
        pickles = [x.filename for x in records if re.fullmatch("[^/]+/data.pkl", x.filename)]
        if len(pickles) != 1:
            raise WeightsError(f"it is a zip archive with {len(pickles)} data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if any(record.filename == f"{folder}byteorder" for record in records):
            if archive.read(f"{folder}byteorder") != b"little":
                raise WeightsError("its numbers are big-endian")
        views = _checked(_interpret(io.BytesIO(archive.read(pickles[0]))))
        data = {}
        for storage in {view.storage for view in views.values()}:
            content = archive.read(f"{folder}data/{storage.key}")
            if len(content) != storage.size * storage.dtype.itemsize:
                raise _size_error(storage)
            data[storage] = np.frombuffer(content, storage.dtype)
    return {name: _elements(view, data[view.storage]) for name, view in views.items()}


def _read_legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    if _interpret(file) != MAGIC or _interpret(file) != VERSION:
        raise WeightsError("it has another format")
    if not _interpret(file)["little_endian"]:
        raise WeightsError("its numbers are big-endian")
    views, keys = _checked(_interpret(file)), _interpret(file)
    storages = {view.storage.key: view.storage for view in views.values()}
    data, rest = {}, memoryview(file.read())
    for key in keys:
        storage = storages[key]
        if storage.size != int.from_bytes(rest[:8], "little"):
            raise _size_error(storage)
        end = 8 + storage.size * storage.dtype.itemsize
        data[storage], rest = np.frombuffer(rest[8:end], storage.dtype, storage.size), rest[end:]
    return {name: _elements(view, data[view.storage]) for name, view in views.items()}


def _checked(views: Any) -> dict[str, _View]:
    names, values = views.keys(), views.values()
    if not all(isinstance(x, str) for x in names) or not all(isinstance(x, _View) for x in values):
        raise WeightsError("it holds more than named tensors")
    return views


def _size_error(storage: _Storage) -> WeightsError:
    return WeightsError(f"the size of its storage {storage.key} differs from what tensors declare")


def _elements(view: _View, data: np.ndarray) -> np.ndarray:
    """Returns a copy of the tensor.

    Strides may be in any order. A tensor with more elements than its storage is refused, so that
    overlapping views cannot allocate more memory than the file has.
    """
    last = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    last = last if math.prod(view.shape) else -1
    if (
        min((view.offset, *view.shape, *view.strides)) < 0
        or view.offset + last >= len(data)
        or math.prod(view.shape) > len(data)
    ):
        raise WeightsError("one of its tensors exceeds its storage")
    strides = [stride * data.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(data[view.offset :], view.shape, strides).copy()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise WeightsError("one of its tensors has no storage")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


class _Name(NamedTuple):
    """The name of a class or function in a file; it is never looked up."""

    name: str


_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": dict,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
}
"""Our replacements of the functions that a file may call."""

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
    """Returns the value of the pickle at the file's position, and moves the position behind it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        mark = len(stack) - 1 - stack[::-1].index(_MARK)
        values = stack[mark + 1 :]
        del stack[mark:]
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
                    raise WeightsError(f"it refers to {argument.replace(' ', '.')}")
                stack.append(_Name(argument))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_CALLS[stack.pop().name](*arguments))
            case "BINPERSID":
                _, kind, key, _, size, *view_metadata = stack.pop()
                if view_metadata not in ([], [None]):
                    raise WeightsError("one of its storages is a view of another")
                stack.append(_Storage(key, STORAGE_DTYPES[kind.name], size))
            case "BUILD":
                stack.pop()  # versions of the modules, which tensors do not need
            case "STOP":
                return stack.pop()
            case name if name != "PROTO":
                raise WeightsError(f"it has the operation {name}, which dicts of tensors never use")
    raise AssertionError("genops ends at STOP or raises an error")
