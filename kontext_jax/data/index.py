"""Index of a split's records, so that planning does not have to decode them."""

import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Int, Shaped, UInt64
from PIL import Image


class Record(TypedDict):
    """A triple as stored; images are the bytes of PNG or JPEG files."""

    id: str
    target: bytes
    contexts: list[bytes]
    prompt: str
    category: str
    details: str


class Row(NamedTuple):
    """One record's part of the `Index`."""

    id: str
    category: str
    target_size: tuple[int, int]
    context_sizes: list[tuple[int, int]]
    prompt_bytes: int
    digest: int

    @classmethod
    def of(cls, record: Record) -> "Row":
        """Describes a record, reading only the headers of its images.

        Raises:
          OSError: Pillow does not recognise the header of an image.
        """
        return cls(
            id=record["id"],
            category=record["category"],
            target_size=_size(record["target"]),
            context_sizes=[_size(context) for context in record["contexts"]],
            prompt_bytes=len(record["prompt"].encode()),
            digest=_digest(record),
        )


@dataclasses.dataclass(frozen=True)
class Index:
    """The n records of a split, in reading order.

    Attributes:
      ids: ids of the triples.
      categories: categories of the triples.
      target_sizes: (height, width) of the targets in pixels.
      context_sizes: (height, width) of all m contexts, record by record.
      context_counts: number of contexts of each record; sums to m.
      prompt_bytes: length of each prompt in UTF-8 bytes.
      digests: 64-bit hash of each record's contents, to detect edited data sets.
    """

    ids: Shaped[np.ndarray, " n"]
    categories: Shaped[np.ndarray, " n"]
    target_sizes: Int[np.ndarray, "n 2"]
    context_sizes: Int[np.ndarray, "m 2"]
    context_counts: Int[np.ndarray, " n"]
    prompt_bytes: Int[np.ndarray, " n"]
    digests: UInt64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Index":
        """Gathers the rows into arrays."""
        flat = [size for row in rows for size in row.context_sizes]
        return cls(
            ids=np.array([row.id for row in rows], np.str_),
            categories=np.array([row.category for row in rows], np.str_),
            target_sizes=np.array([row.target_size for row in rows], np.int32).reshape(-1, 2),
            context_sizes=np.array(flat, np.int32).reshape(-1, 2),
            context_counts=np.array([len(row.context_sizes) for row in rows], np.int32),
            prompt_bytes=np.array([row.prompt_bytes for row in rows], np.int32),
            digests=np.array([row.digest for row in rows], np.uint64),
        )

    @classmethod
    def load(cls, path: os.PathLike) -> "Index":
        """Reads a file written by `save`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})

    def save(self, path: os.PathLike) -> None:
        """Writes the index to `path`, an .npz file."""
        np.savez_compressed(path, **vars(self))

    def fingerprint(self) -> str:
        """SHA-256 of the index, and thereby of the contents of all records."""
        digest = hashlib.sha256()
        for name, array in vars(self).items():
            digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def index_path(folder: os.PathLike | str, split: str) -> pathlib.Path:
    """Path of the index of a split."""
    return pathlib.Path(folder) / f"index-{split}.npz"


def _size(image: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, from its header."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.height, opened.width


def _digest(record: Record) -> int:
    texts = [record[name].encode() for name in ("id", "prompt", "category", "details")]
    digest = hashlib.blake2b(digest_size=8)
    for part in (*texts, record["target"], *record["contexts"]):
        digest.update(len(part).to_bytes(8, "little"))  # separates the parts
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")
