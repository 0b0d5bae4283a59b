"""Reads and writes safetensors files one tensor at a time.

The format: eight bytes with the length of the header; the header as JSON, from names to dtype,
shape and byte range; the bytes of the tensors.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

TENSOR_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""Supported dtypes of weights, by their names in safetensors."""

METADATA_KEY = "kontext_jax"
"""Key of our JSON record in a file's metadata."""

PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
PICKLE_ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class WeightsError(ValueError):
    """Invalid weights; the message says which and why."""


class Entry(NamedTuple):
    """A file and what its header says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of one safetensors file, or of the safetensors files of a folder.

    Attributes:
      path: the file or folder.
      entries: header entries of the tensors, by name.
      record: our JSON record in the metadata; empty if there is none.
    """

    def __init__(self, path: Path):
        """Reads the headers.

        Raises:
          FileNotFoundError: the file, or one that the folder's index names, does not exist.
          WeightsError: a file is truncated, or not a safetensors file.
        """
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.record: dict[str, Any] = {}
        for file in _find_files(path):
            self._add(file)

    def _add(self, file: Path) -> None:
        with _open(file) as opened:
            metadata = opened.metadata() or {}
            if METADATA_KEY in metadata:
                self.record = json.loads(metadata[METADATA_KEY])
            for name in opened.keys():  # noqa: SIM118, not a dict
                if name in self.entries:
                    raise WeightsError(f"{name} is in both {self.entries[name].file} and {file}.")
                tensor = opened.get_slice(name)
                self.entries[name] = Entry(file, tuple(tensor.get_shape()), tensor.get_dtype())

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor.

        Opens the file anew for every tensor: an open file keeps the pages of its tensors mapped.
        """
        with _open(self.entries[name].file) as opened:
            return opened.get_tensor(name)


def _open(file: Path):
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        with file.open("rb") as stream:
            if stream.read(4).startswith(PICKLE_STARTS):
                raise WeightsError(
                    f"{file} is a pickle, not a safetensors file; pickles can run arbitrary code "
                    "and are never loaded. Save the weights as safetensors."
                ) from error
        raise WeightsError(f"{file} is truncated or not a safetensors file ({error}).") from error


def _find_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        if path.suffix in PICKLE_ENDINGS:
            raise WeightsError(f"{path} is a pickle; only .safetensors files are loaded.")
        yield path
        return
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if indices:
        try:
            names = set(json.loads(indices[0].read_text())["weight_map"].values())
            missing = sorted(name for name in names if not (path / name).is_file())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{indices[0]} is not an index of safetensors files.") from error
        if missing:
            raise FileNotFoundError(f"{indices[0]} lists missing files: {missing}.")
        yield from (path / name for name in sorted(names))
    elif len(files) == 1:
        yield files[0]
    elif files:
        raise FileNotFoundError(f"{path} holds {len(files)} .safetensors files and no index.")
    else:
        raise FileNotFoundError(f"{path} holds no .safetensors file.")


class NewTensor(NamedTuple):
    """A tensor to write; ``make`` returns its values and is called when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, with one tensor in memory at a time.

    Raises:
      OSError: the disk is full, or the folder does not exist.
    """
    names = {dtype: name for name, dtype in TENSOR_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the first tensor starts at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            array = tensor.make()
            assert array.shape == tensor.shape and array.dtype == tensor.dtype, tensor.name
            file.write(array.tobytes())
            del array  # before the next one is made


def write_sharded(
    folder: Path,
    stem: str,
    tensors: Sequence[NewTensor],
    metadata: Mapping[str, str],
    max_shard_bytes: int,
) -> None:
    """Writes ``stem.safetensors``, or numbered shards and their index.

    Args:
      folder: folder of the files.
      stem: file name without suffix.
      tensors: tensors to write, in this order.
      metadata: metadata of every file.
      max_shard_bytes: maximum size of a shard; a larger tensor gets its own shard.

    Raises:
      OSError: the disk is full, or the folder does not exist.
    """
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", tensors, metadata)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, metadata)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
