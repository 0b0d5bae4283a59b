"""Writes triples as an ArrayRecord data set, by TFDS without TensorFlow, and an index beside it.

A data set is one folder::

    dataset_info.json, features.json         splits, shard lengths and schema, for TFDS
    triples-train.array_record-00000-of-N    the records, in the order given
    index-train                              sizes and more of all records, see `Index`
    plans                                    may appear when a large data set is first read; see
                                             `pipeline.plan_of`

The builder is a `ShardBasedBuilder` instead of the more common `GeneratorBasedBuilder`, whose
shuffler keeps a whole split in memory and needs TensorFlow above 1 GB. It needs the number of
shards before the first record, so the encoded records are first spooled to disk.
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

from kontext_jax.data.index import IndexWriter, Record, Row, index_path
from kontext_jax.types import CATEGORIES, Triple

SHARD_BYTES = 256 << 20
"""Default size of a shard; TFDS holds the shard being written in memory."""


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
    """Writes a data set atomically: a failure or interruption leaves nothing behind.

    Args:
      splits: triples of each split, by name; consumed lazily, one split after the other.
      output: folder to create, with its parents.
      num_shards: files per split, or fewer if a split has fewer records; by default enough to
        keep files below `SHARD_BYTES`.

    Raises:
      FileExistsError: `output` exists.
      ValueError: a split is empty or has an invalid name, an id occurs twice, or a triple is
        malformed.
    """
    output = pathlib.Path(output).absolute()
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists: choose another --output or delete it.")
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}; set at least 1.")
    _check_names(splits)
    output.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk as `output`, so that it can be renamed.
    prefix = f".{output.name}.incomplete-"
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=prefix) as name:
        folder = pathlib.Path(name)
        known_ids: set[str] = set()
        spools = {
            split: _spool(_encode_all(split, triples, known_ids), folder, split)
            for split, triples in splits.items()
        }
        shards = {split: spool.shards(num_shards) for split, spool in spools.items()}
        dataset = _build(folder, shards)
        for split in splits:
            index_path(folder, split).rename(index_path(dataset, split))
        dataset.rename(output)


class Triples(tfds.core.ShardBasedBuilder):
    """TFDS builder that writes the given shards, in order."""

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
    """Lets TFDS write the shards under `folder`; returns the folder of the data set."""
    builder = Triples(shards=shards, data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(None):  # hides the announcement of a download
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return pathlib.Path(builder.data_dir)


@dataclasses.dataclass(frozen=True)
class _Spool:
    """The encoded records of a split, pickled one after the other in one file."""

    path: pathlib.Path
    total: int

    def shards(self, num_shards: int | None) -> list[Callable[[], Iterator[tuple[str, Record]]]]:
        """One function per shard; TFDS calls them in order, so they share one iterator."""
        count = num_shards or math.ceil(self.path.stat().st_size / SHARD_BYTES)
        bounds = np.linspace(0, self.total, min(count, self.total) + 1).round().astype(int)
        records = self._records()
        return [lambda count=count: itertools.islice(records, count) for count in np.diff(bounds)]

    def _records(self) -> Iterator[tuple[str, Record]]:
        with self.path.open("rb") as file:
            for _ in range(self.total):
                record = pickle.load(file)
                yield record["id"], record
        self.path.unlink()


def _spool(records: Iterable[Record], folder: pathlib.Path, split: str) -> _Spool:
    """Writes the records' spool and index."""
    path, total = folder / f"{split}.spool", 0
    with path.open("wb") as file, IndexWriter(index_path(folder, split)) as index:
        for record in records:
            pickle.dump(record, file)
            index.add(Row.of(record))
            total += 1
    return _Spool(path, total)


def _encode_all(split: str, triples: Iterable[Triple], known_ids: set[str]) -> Iterator[Record]:
    """Checks and encodes the triples of a split; adds their ids to those of the data set."""
    empty = True
    for triple in triples:
        _check(triple)
        if triple.id in known_ids:
            raise ValueError(f'The id "{triple.id}" is used twice (again in split "{split}").')
        known_ids.add(triple.id)
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
        raise ValueError(f"A triple's id must be a non-empty string, not {triple.id!r}.")
    if triple.category not in CATEGORIES:
        raise ValueError(
            f'Triple "{triple.id}": the category is {triple.category!r}, not one of'
            f" {', '.join(CATEGORIES)}."
        )
    for name in ("prompt", "details"):
        text = getattr(triple, name)
        if not isinstance(text, str):
            raise ValueError(f'Triple "{triple.id}": the {name} is {text!r}, not a string.')
    images = {"the target": triple.target}
    images |= {f"context {i}": context for i, context in enumerate(triple.contexts)}
    for name, image in images.items():
        shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
        is_rgb = dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and 0 not in shape
        if not is_rgb:
            raise ValueError(
                f'Triple "{triple.id}": {name} has shape {shape} and type {dtype}; it must be'
                " an RGB image of shape (height, width, 3) and type uint8."
            )


def _check_names(splits: Iterable[str]) -> None:
    """Refuses names with a special meaning in TFDS, such as "all", "+" and "["."""
    names = list(splits)
    if not names:
        raise ValueError("There is no split to write: give at least one.")
    for name in names:
        if not name.isidentifier() or name == "all":
            raise ValueError(f'"{name}" cannot name a split: use letters, digits and "_".')


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encodes an image losslessly as PNG."""
    buffer = io.BytesIO()
    # A third of the time of the default level, for a tenth more bytes.
    Image.fromarray(image).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()
