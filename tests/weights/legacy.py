"""Builds files of ``torch.save`` before PyTorch 1.6 from bytes, without PyTorch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kontext_jax.weights.torch_legacy import MAGIC, VERSION

STORAGES = {"f": b"FloatStorage", "e": b"HalfStorage", "i": b"LongStorage"}


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def storage(key: str, array: np.ndarray, view_metadata: bytes = b"N") -> bytes:
    kind = b"ctorch\n" + STORAGES[array.dtype.char.replace("l", "i")] + b"\n"
    parts = (text("storage"), kind, text(key), text("cpu"), number(array.size), view_metadata)
    return group(*parts) + b"Q"


def tensor(stored: bytes, shape, strides, offset: int = 0) -> bytes:
    sizes, steps = (group(*map(number, numbers)) for numbers in (shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    view = group(stored, number(offset), sizes, steps, b"\x89", hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + view + b"R"


def entries(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns a dict of contiguous tensors whose storages have the tensors' names."""
    items = b""
    for name, array in tensors.items():
        strides = [step // array.itemsize for step in array.strides]
        items += text(name) + tensor(storage(name, array), array.shape, strides)
    return b"ccollections\nOrderedDict\n)R(" + items + b"u"


def save(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    pickle: bytes | None = None,
    little_endian: bytes = b"\x88",
) -> Path:
    """Writes the tensors, or only their storages behind a given pickle."""
    magic = MAGIC.to_bytes(10, "little")
    parts = [
        pickled(b"\x8a\x0a" + magic),
        pickled(number(VERSION)),
        pickled(b"}(" + text("little_endian") + little_endian + b"u"),
        pickled(entries(tensors) if pickle is None else pickle),
        pickled(b"](" + b"".join(map(text, tensors)) + b"e"),
    ]
    for array in tensors.values():
        parts += [array.size.to_bytes(8, "little"), array.tobytes()]
    path.write_bytes(b"".join(parts))
    return path
