"""Reading triples at random: `TripleSource` is a sequence of them over an ArrayRecord data set."""

import functools
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

from kontext_jax.data.folder import to_rgb
from kontext_jax.data.index import Index, Record, Row, index_path
from kontext_jax.types import Triple

T = TypeVar("T")


class CorruptRecordError(ValueError):
    """A record that cannot be read or decoded; the others of its data set may well be sound."""


class TripleSource(Sequence):  # not Sequence[Triple]: type checkers at run time would read one
    """The triples of one split, read and decoded one by one.

    Threads may share it, and it can be pickled: it travels to a worker process without its index.

    Attributes:
      path: the data set's folder.
      split: the name of the split.
    """

    def __init__(self, path: os.PathLike | str, split: str):
        """Opens a data set made by `store.write`, or elsewhere in the same schema.

        Raises:
          FileNotFoundError: there is no data set at `path`, or not all of its files.
          ValueError: the data set has no such split, nothing in it, or another schema, or its JSON
            is damaged.
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
                    f'The split "{split}" of {path} lacks its file {file.name}.'
                )
        self._records = builder.as_data_source(
            split, decoders={"target": _Undecoded(), "contexts": _Undecoded()}
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Triple:
        """Reads and decodes one triple.

        Raises:
          CorruptRecordError: the record cannot be read, or one of its images not decoded.
          IndexError: `index` is not within the data set.
        """
        return self._read(index, _triple)

    def record(self, index: SupportsIndex) -> Record:
        """Reads one triple and leaves its images encoded: for those who want its prompt.

        Raises:
          CorruptRecordError: the record cannot be read.
          IndexError: `index` is not within the data set.
        """
        return self._read(index, lambda record: record)

    @functools.cached_property
    def index(self) -> Index:
        """Ids, sizes and the like of all records; scans them all where the file is missing.

        Raises:
          CorruptRecordError: the scan met a record of which not even the headers can be read.
          ValueError: the file is not that of this data set.
        """
        path = index_path(self.path, self.split)
        if not path.exists():
            return Index.of([self._read(i, Row.of) for i in range(len(self))])
        index = Index.load(path)
        if len(index) != len(self):
            raise ValueError(
                f"{path} lists {len(index)} records where the split has {len(self)}:"
                " delete it, and it is made anew from the records."
            )
        return index

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the split's contents: the same records in the same order, and no others."""
        return self.index.fingerprint()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("index", "fingerprint")}

    def __repr__(self) -> str:
        return f"TripleSource({str(self.path)!r}, {self.split!r})"

    def _read(self, index: SupportsIndex, convert: Callable[[Record], T]) -> T:
        """Applies `convert` to a record; whatever goes wrong is laid to that record."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'There is no record {index} in "{self.split}" of {self.path}.')
        index, record_id = index % len(self), None
        try:
            record = _record(self._records[index])
            record_id = record["id"]
            return convert(record)
        # ArrayRecord, protobuf and Pillow share no class of errors, and none of theirs is final.
        except Exception as error:
            known = f' ("{record_id}")' if record_id else ""
            raise CorruptRecordError(
                f'Record {index}{known} of the split "{self.split}" of {self.path} cannot be'
                f" read: {error}"
            ) from error


class _Undecoded(tfds.decode.Decoder):
    """Leaves images encoded; unlike TFDS' own `SkipDecoding`, in sequences also."""

    def decode_example(self, serialized_example):
        return serialized_example

    decode_batch_example_np = decode_example


def _open(path: pathlib.Path) -> tfds.core.DatasetBuilder:
    if not (path / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"There is no data set in {path}: make one with"
            f" `python -m kontext_jax.data.build --source=... --output={path}`."
        )
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # TFDS and protobuf share no class of errors
        raise ValueError(
            f"dataset_info.json or features.json of the data set in {path} is missing or damaged"
            f" ({error}): copy or build it anew."
        ) from error
    missing = Record.__annotations__.keys() - builder.info.features.keys()
    if missing:
        raise ValueError(f"The records of {path} lack the fields {', '.join(sorted(missing))}.")
    return builder


def _record(stored: dict[str, Any]) -> Record:
    missing = [name for name in Record.__annotations__ if stored[name] is None]
    if missing:  # so comes what lies beyond the end of a truncated file
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
        return to_rgb(opened)  # not turned upright: the index has the sizes of its header
