"""Random access to triples: `TripleSource` is a sequence over an ArrayRecord data set."""

import io
import operator
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from kontext_jax.data.cached_once import cached_once
from kontext_jax.data.folder import to_rgb
from kontext_jax.data.index import Index, Record, Row, index_path
from kontext_jax.types import Triple

T = TypeVar("T")


class CorruptRecordError(ValueError):
    """A record cannot be read or decoded; other records of the data set may still be fine."""


class TripleSource(Sequence):  # with Sequence[Triple], runtime type checkers would read a triple
    """The triples of one split, read and decoded one at a time.

    Threads may share a source. It can be pickled; worker processes read the index again.

    Attributes:
      path: folder of the data set.
      split: name of the split.
    """

    def __init__(self, path: os.PathLike | str, split: str):
        """Opens a data set written by `store.write`, or by another program in the same schema.

        Raises:
          FileNotFoundError: there is no data set at `path`, or it lacks a file.
          ValueError: the split does not exist or is empty, the schema differs, or the JSON is
            damaged.
        """
        self.path = pathlib.Path(path)
        self.split = split
        builder = _open(self.path)
        splits = builder.info.splits
        if split not in splits:
            raise ValueError(f'{path} has no split "{split}"; it has: {", ".join(splits)}.')
        if not splits[split].num_examples:
            raise ValueError(f'The split "{split}" of {path} is empty.')
        for file in splits[split].filepaths:
            if not file.exists():
                raise FileNotFoundError(
                    f'The split "{split}" of {path} lacks the file {file.name}: copy or build the '
                    "data set again."
                )
        self._records = builder.as_data_source(
            split, decoders={"target": _Undecoded(), "contexts": _Undecoded()}
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Triple:
        """Reads and decodes one triple.

        Raises:
          CorruptRecordError: the record cannot be read, or an image cannot be decoded.
          IndexError: `index` is out of range.
        """
        return self._read(index, _triple)

    def record(self, index: SupportsIndex) -> Record:
        """Reads one triple without decoding its images, to get its prompt.

        Raises:
          CorruptRecordError: the record cannot be read.
          IndexError: `index` is out of range.
        """
        return self._read(index, lambda record: record)

    def spread(self, count: int) -> list[int]:
        """The numbers of ``count`` records, or of all if there are fewer, evenly spread."""
        return np.linspace(0, len(self) - 1, min(count, len(self))).astype(int).tolist()

    @cached_once
    def index(self) -> Index:
        """Ids, sizes and more of all records; reads all records if there is no index.

        Raises:
          CorruptRecordError: a record, or the header of one of its images, cannot be read.
          ValueError: the index is damaged or belongs to another data set.
        """
        path = index_path(self.path, self.split)
        old = path.with_name(f"{path.name}.npz")
        if path.exists():
            index = Index.load(path)
        elif old.exists():
            path, index = old, Index.load_npz(old)
        else:
            return Index.of(self._read(i, Row.of) for i in range(len(self)))
        if len(index) != len(self):
            raise ValueError(
                f"{path} lists {len(index)} records, but the split has {len(self)}: delete it to "
                "read the index from the records."
            )
        return index

    @property
    def fingerprint(self) -> str:
        """Hash of the split's records and their order, computed when the index was made."""
        return self.index.digest

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "index"}

    def __repr__(self) -> str:
        return f"TripleSource({str(self.path)!r}, {self.split!r})"

    def _read(self, index: SupportsIndex, convert: Callable[[Record], T]) -> T:
        """Applies `convert` to a record; any error is attributed to that record."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'There is no record {index} in "{self.split}" of {self.path}.')
        index, record_id = index % len(self), None
        try:
            record = _record(self._records[index])
            record_id = record["id"]
            return convert(record)
        # ArrayRecord, protobuf and Pillow raise errors of many unrelated classes, which may change.
        except Exception as error:
            name = f' ("{record_id}")' if record_id else ""
            raise CorruptRecordError(
                f'Record {index}{name} of the split "{self.split}" of {self.path} cannot be'
                f" read: {error}"
            ) from error


class _Undecoded(tfds.decode.Decoder):
    """Leaves images encoded; unlike TFDS' `SkipDecoding`, also in sequences."""

    def decode_example(self, serialized_example):
        return serialized_example

    decode_batch_example_np = decode_example


def _open(path: pathlib.Path) -> tfds.core.DatasetBuilder:
    if not (path / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"There is no data set in {path}: build one with"
            f" `python -m kontext_jax.data.build --source=... --output={path}`."
        )
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # TFDS and protobuf share no error class
        raise ValueError(
            f"dataset_info.json or features.json of the data set in {path} is missing or damaged"
            f" ({error}): copy or build it again."
        ) from error
    missing = Record.__annotations__.keys() - builder.info.features.keys()
    if missing:
        raise ValueError(f"The records of {path} lack the fields {', '.join(sorted(missing))}.")
    return builder


def _record(stored: dict[str, Any]) -> Record:
    missing = [name for name in Record.__annotations__ if stored[name] is None]
    if missing:  # a record beyond the end of a truncated file is read as None
        raise ValueError(f"it lacks {', '.join(missing)}")
    texts = {name: stored[name].decode() for name in ("id", "prompt", "category", "details")}
    return Record(target=stored["target"], contexts=list(stored["contexts"]), **texts)


def _triple(record: Record) -> Triple:
    return Triple(
        id=record["id"],
        target=_decode(record["target"]),
        contexts=tuple(_decode(context) for context in record["contexts"]),
        prompt=record["prompt"],
        category=record["category"],
        details=record["details"],
    )


def _decode(image: bytes) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(io.BytesIO(image)) as opened:
        return to_rgb(opened)  # EXIF rotation is ignored: the index has the sizes in the header
