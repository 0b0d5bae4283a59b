"""Index of a split's records, so that planning does not have to decode them.

An index is a folder of memory-mapped columns::

    index.json          number of records, digest, names of the categories; written last
    ids.npy             all ids, in UTF-8, one after the other
    id_ends.npy         end of each id
    categories.npy      category of each record, as an index to the names
    shapes.npy          sizes of each record's images, as an entry of the table below
    prompt_bytes.npy, digests.npy
    shape_ends.npy      end of each entry in `sizes`
    sizes.npy           (height, width) of the images of all entries, in each the target first

Records with images of the same sizes share an entry, so that the plan looks at sizes once.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import IO, NamedTuple, SupportsIndex, TypedDict

import numpy as np
from jaxtyping import Int, UInt8, UInt16, UInt32, UInt64
from PIL import Image

BLOCK = 2**14  # records written at a time
MAX_KNOWN = 2**20  # entries that later records may share; bounds the memory of a build
MAX_CATEGORIES = 2**16


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


class Columns(NamedTuple):
    """The arrays of an index of n records, with a table of k entries."""

    ids: UInt8[np.ndarray, " bytes"]
    id_ends: UInt64[np.ndarray, " n"]
    categories: UInt16[np.ndarray, " n"]
    shapes: UInt32[np.ndarray, " n"]
    prompt_bytes: UInt32[np.ndarray, " n"]
    digests: UInt64[np.ndarray, " n"]
    shape_ends: UInt64[np.ndarray, " k"]
    sizes: Int[np.ndarray, "m 2"]


@dataclasses.dataclass(frozen=True)
class Index:
    """The n records of a split, in reading order.

    Attributes:
      columns: ids, sizes and more of all records.
      category_names: the categories that ``columns.categories`` refers to.
      digest: SHA-256 of the digests of all records, and thereby of their contents and order.
    """

    columns: Columns
    category_names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.columns.id_ends)

    def __getitem__(self, i: SupportsIndex) -> Row:
        """The i-th record's row."""
        columns = self.columns
        target, *contexts = _entry(columns.sizes, columns.shape_ends, int(columns.shapes[i]))
        return Row(
            id=self.ids[i],
            category=self.category_names[columns.categories[i]],
            target_size=tuple(target.tolist()),
            context_sizes=[tuple(size.tolist()) for size in contexts],
            prompt_bytes=int(columns.prompt_bytes[i]),
            digest=int(columns.digests[i]),
        )

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the records, decoded one at a time."""
        return _Ids(self)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Index":
        """Gathers the rows into arrays."""
        builder = _Builder()
        columns = builder.columns(list(rows))
        return cls(columns, tuple(builder.categories), builder.digest.hexdigest())

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Index":
        """Maps an index that `IndexWriter` wrote.

        Raises:
          ValueError: it is incomplete or damaged.
        """
        try:
            meta = json.loads((folder / "index.json").read_text())
            files = [folder / f"{name}.npy" for name in Columns._fields]
            index = cls(
                Columns(*(np.load(file, mmap_mode="r") for file in files)),
                tuple(meta["categories"]),
                meta["digest"],
            )
            columns = index.columns
            lengths = {len(column) for column in columns[1:6]}
            ends = (columns.id_ends[-1], columns.shape_ends[-1])
            if lengths != {meta["records"]} or ends != (len(columns.ids), len(columns.sizes)):
                raise ValueError("its files have different lengths")
        except Exception as error:  # NumPy and JSON raise errors of many classes
            raise ValueError(
                f"The index {folder} is incomplete or damaged ({error}): delete the folder to "
                "read the index from the records."
            ) from error
        return index

    @classmethod
    def load_npz(cls, path: pathlib.Path) -> "Index":
        """Reads an index that earlier versions wrote, with the digest that they computed from it.

        Raises:
          ValueError: it is damaged.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                old = dict(arrays)
            names = ("ids", "categories", "target_sizes", "context_sizes", "context_counts")
            ids, categories, targets, contexts, counts = (old[name].tolist() for name in names)
            sizes = map(tuple, contexts)
            contexts = [[next(sizes) for _ in range(count)] for count in counts]
            rest = (old["prompt_bytes"].tolist(), old["digests"].tolist())
            rows = zip(ids, categories, map(tuple, targets), contexts, *rest, strict=True)
            index = cls.of(Row(*row) for row in rows)
        except Exception as error:  # as in `load`
            raise ValueError(
                f"The index {path} is damaged ({error}): delete it to read the index from the "
                "records."
            ) from error
        digest = hashlib.sha256()
        for name in (*names, "prompt_bytes", "digests"):
            digest.update(f"{name} {old[name].dtype.str} {old[name].shape} ".encode())
            digest.update(np.ascontiguousarray(old[name]).tobytes())
        return dataclasses.replace(index, digest=digest.hexdigest())


class IndexWriter:
    """Writes an index row by row, in little memory; a context, which completes it at its end."""

    def __init__(self, folder: pathlib.Path):
        """Creates ``folder``, which must not exist."""
        folder.mkdir()
        self._folder, self._builder, self._rows = folder, _Builder(), []
        self._files = [_GrowingArray(folder / f"{name}.npy") for name in Columns._fields]

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, error, *_) -> None:
        if error is None and self._rows:
            self._write_block()
        for file in self._files:
            file.close()
        if error is None:
            meta = {
                "records": self._builder.records,
                "digest": self._builder.digest.hexdigest(),
                "categories": list(self._builder.categories),
            }
            (self._folder / "index.json").write_text(json.dumps(meta))

    def add(self, row: Row) -> None:
        """Appends a row."""
        self._rows.append(row)
        if len(self._rows) == BLOCK:
            self._write_block()

    def _write_block(self) -> None:
        for file, column in zip(self._files, self._builder.columns(self._rows), strict=True):
            file.append(column)
        self._rows = []


def index_path(folder: os.PathLike | str, split: str) -> pathlib.Path:
    """Path of the index of a split."""
    return pathlib.Path(folder) / f"index-{split}"


class _Builder:
    """Turns rows into columns, block by block."""

    def __init__(self):
        self.records, self.digest = 0, hashlib.sha256()
        self.categories: dict[str, int] = {}
        self._entries: dict[tuple[tuple[int, int], ...], int] = {}
        self._id_bytes = self._num_entries = self._num_sizes = 0

    def columns(self, rows: Sequence[Row]) -> Columns:
        """The columns of the next rows; ends count from the first block."""
        entries, new = [], []
        for row in rows:
            images = (row.target_size, *row.context_sizes)
            if images not in self._entries:
                if len(self._entries) == MAX_KNOWN:
                    self._entries.clear()
                self._entries[images] = self._num_entries + len(new)
                new.append(images)
            entries.append(self._entries[images])
            self.categories.setdefault(row.category, len(self.categories))
        if len(self.categories) > MAX_CATEGORIES:
            raise ValueError(
                f"There are more than {MAX_CATEGORIES} categories: give examples of one kind the "
                "same category."
            )
        ids = [row.id.encode() for row in rows]
        digests = np.array([row.digest for row in rows], "<u8")
        id_ends = self._id_bytes + np.cumsum([len(x) for x in ids], dtype=np.uint64)
        shape_ends = self._num_sizes + np.cumsum([len(x) for x in new], dtype=np.uint64)
        self.records += len(rows)
        self.digest.update(digests.tobytes())
        self._id_bytes = int(id_ends[-1])
        self._num_entries += len(new)
        self._num_sizes += sum(map(len, new))
        return Columns(
            ids=np.frombuffer(b"".join(ids), np.uint8),
            id_ends=id_ends,
            categories=np.array([self.categories[row.category] for row in rows], np.uint16),
            shapes=np.array(entries, np.uint32),
            prompt_bytes=np.array([row.prompt_bytes for row in rows], np.uint32),
            digests=digests,
            shape_ends=shape_ends,
            sizes=np.array([size for images in new for size in images], np.int32).reshape(-1, 2),
        )


class _GrowingArray:
    """An .npy file that grows along its first axis; NumPy leaves room in the header for that."""

    def __init__(self, path: pathlib.Path):
        self._file: IO[bytes] = path.open("wb")
        self._length, self._empty = 0, np.zeros(0)

    def append(self, array: np.ndarray) -> None:
        if not self._length:
            self._empty = array[:0]
            self._write_header()
        self._file.write(np.ascontiguousarray(array))
        self._length += len(array)

    def close(self) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        header = np.lib.format.header_data_from_array_1_0(self._empty)
        header["shape"] = (self._length, *self._empty.shape[1:])
        np.lib.format.write_array_header_1_0(self._file, header)


class _Ids(Sequence):
    def __init__(self, index: Index):
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: SupportsIndex) -> str:
        columns = self._index.columns
        return _entry(columns.ids, columns.id_ends, range(len(self))[i]).tobytes().decode()


def _entry(values: np.ndarray, ends: np.ndarray, i: int) -> np.ndarray:
    return values[int(ends[i - 1]) if i else 0 : int(ends[i])]


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
