"""Writing triples: an ArrayRecord data set made by TFDS without TensorFlow, and an index beside it.

A data set is one folder::

    dataset_info.json, features.json         TFDS' own: splits, shard lengths, schema
    triples-train.array_record-00000-of-N    the records, in the order in which they were given
    index-train.npz                          what planning needs to know of them: see `Index`

The builder is a `ShardBasedBuilder` and not the more usual `GeneratorBasedBuilder`, because the
shuffler of the latter keeps a whole split in memory and needs TensorFlow from 1 GB on. It wants
the number of shards before the first record, so the encoded records are spooled to disk once.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import pathlib
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from kontext_jax.data.index import Index, Record, Row, index_path
from kontext_jax.types import CATEGORIES, Triple

SHARD_BYTES = 256 << 20
"""Records of one shard by default; TFDS holds those of the shard being written in memory."""


def features() -> tfds.features.FeaturesDict:
    """The schema of a record."""
    image = {"shape": (None, None, 3), "encoding_format": "png"}
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "target": tfds.features.Image(**image),
            "contexts": tfds.features.Sequence(tfds.features.Image(**image)),
            "prompt": tfds.features.Text(),
            "category": tfds.features.Text(),
            "details": tfds.features.Text(),
        }
    )


def write(
    splits: Mapping[str, Iterable[Triple]],
    output: os.PathLike | str,
    *,
    num_shards: int | None = None,
) -> None:
    """Writes a data set, all of it or, after any failure or interruption, none of it.

    Args:
      splits: the triples of each split, by its name; consumed lazily, one split after the other.
      output: the folder to make; its parents are made too.
      num_shards: files per split, fewer where a split has fewer records; by default as many as
        keep a file below `SHARD_BYTES`.

    Raises:
      FileExistsError: `output` exists.
      ValueError: a split is empty or badly named, an id is used twice, or a triple is malformed.
    """
    output = pathlib.Path(output).absolute()
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists: choose another --output or delete it.")
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}; it must be at least 1.")
    _check_names(splits)
    output.parent.mkdir(parents=True, exist_ok=True)
    # On the disk of `output`, so that a rename suffices.
    prefix = f".{output.name}.incomplete-"
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=prefix) as name:
        folder = pathlib.Path(name)
        seen: set[str] = set()
        spools = {
            split: _spool(_encode_all(split, triples, seen), folder / f"{split}.spool")
            for split, triples in splits.items()
        }
        shards = {split: spool.shards(num_shards) for split, spool in spools.items()}
        dataset = _build(folder, shards)
        for split, spool in spools.items():
            spool.index.save(index_path(dataset, split))
        dataset.rename(output)


class Triples(tfds.core.ShardBasedBuilder):
    """Writes the shards it is given, in their order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, shards: Mapping[str, Sequence[Callable]] | None = None, **kwargs):
        super().__init__(**kwargs)
        self._shards = shards

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Triples: make the target from the contexts by following the prompt.",
            features=features(),
        )

    def _shard_iterators_per_split(self, dl_manager) -> Mapping[str, Sequence[Callable]]:
        return self._shards


def _build(folder: pathlib.Path, shards: Mapping[str, Sequence[Callable]]) -> pathlib.Path:
    """Lets TFDS write the shards somewhere under `folder`; returns the data set's own folder."""
    builder = Triples(shards=shards, data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(None):  # TFDS announces a download and the temporary folder
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return pathlib.Path(builder.data_dir)


@dataclasses.dataclass(frozen=True)
class _Spool:
    """The encoded records of a split in one file, pickled one after the other."""

    path: pathlib.Path
    index: Index

    def shards(self, num_shards: int | None) -> list[Callable[[], Iterator[tuple[str, Record]]]]:
        """One function per shard; TFDS calls them in order, so they share one pass."""
        total = len(self.index)
        wanted = num_shards or math.ceil(self.path.stat().st_size / SHARD_BYTES)
        bounds = np.linspace(0, total, min(wanted, total) + 1).round().astype(int)
        records = self._records()
        return [lambda count=count: itertools.islice(records, count) for count in np.diff(bounds)]

    def _records(self) -> Iterator[tuple[str, Record]]:
        with self.path.open("rb") as file:
            for _ in range(len(self.index)):
                record = pickle.load(file)
                yield record["id"], record
        self.path.unlink()


def _spool(records: Iterable[Record], path: pathlib.Path) -> _Spool:
    rows = []
    with path.open("wb") as file:
        for record in records:
            pickle.dump(record, file)
            rows.append(Row.of(record))
    return _Spool(path, Index.of(rows))


def _encode_all(split: str, triples: Iterable[Triple], seen: set[str]) -> Iterator[Record]:
    """Checks and encodes the triples of a split; `seen` holds the ids of the whole data set."""
    empty = True
    for triple in triples:
        _check(triple)
        if triple.id in seen:
            raise ValueError(f'The id "{triple.id}" is used twice (again in split "{split}").')
        seen.add(triple.id)
        empty = False
        yield Record(
            id=triple.id,
            target=encode_png(triple.target),
            contexts=[encode_png(context) for context in triple.contexts],
            prompt=triple.prompt,
            category=triple.category,
            details=triple.details,
        )
    if empty:
        raise ValueError(f'The split "{split}" is empty; leave it out or give it triples.')


def _check(triple: Triple) -> None:
    if not isinstance(triple.id, str) or not triple.id:
        raise ValueError(f"A triple's id must be a string that is not empty, not {triple.id!r}.")
    if triple.category not in CATEGORIES:
        raise ValueError(
            f'Triple "{triple.id}": its category is {triple.category!r}, not one of'
            f" {', '.join(CATEGORIES)}."
        )
    for name in ("prompt", "details"):
        text = getattr(triple, name)
        if not isinstance(text, str):
            raise ValueError(f'Triple "{triple.id}": its {name} is {text!r}, not a string.')
    images = {"target": triple.target}
    images |= {f"context {i}": context for i, context in enumerate(triple.contexts)}
    for name, image in images.items():
        shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
        is_rgb = dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and 0 not in shape
        if not is_rgb:
            raise ValueError(
                f'Triple "{triple.id}": its {name} is not an RGB image of shape (height, width, 3)'
                f" and type uint8, but has shape {shape} and type {dtype}."
            )


def _check_names(splits: Iterable[str]) -> None:
    """TFDS reads "all", "+" and "[" in a split's name in its own way."""
    names = list(splits)
    if not names:
        raise ValueError("There is no split to write.")
    for name in names:
        if not name.isidentifier() or name == "all":
            raise ValueError(f'"{name}" cannot name a split; use letters, digits and "_".')


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The image as the bytes of a PNG file, which lose nothing."""
    buffer = io.BytesIO()
    # Against the default level: a third of the time, for a tenth more bytes.
    Image.fromarray(image).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()
