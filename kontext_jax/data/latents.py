"""A store of latents: a data set's images as an autoencoder encoded them, read instead of pixels.

A store is one folder, with these files for each split::

    latents-train.job.json                      settings, and how records are divided into chunks
    latents-train-00003-of-00040.array_record   one chunk of the records
    latents-train.npz                           ids and checksums of all records, in order
    latents-train.json                          `Meta`; written last: the store is complete

A record is one line of JSON followed by little-endian bfloat16 numbers: the C channels of each
token of the target, of each context, and of the teacher's sample of the target if there is one::

    {"id": "a/7", "sizes": [[48, 32], [32, 32]], "tokens": [24, 16], "sample": false}

The format needs no pickle and a few lines to read; opening an .npz archive instead would take
longer than reading the record. The last record of a file is not an example but the file's part of
the .npz, so a complete file stands alone.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Shaped, UInt32

from kontext_jax.data.cached_once import cached_once
from kontext_jax.data.sources import CorruptRecordError, TripleSource
from kontext_jax.data.text import TextConfig
from kontext_jax.files import atomic_path, short_digest, write_text
from kontext_jax.geometry import GeometryConfig
from kontext_jax.settings import Settings, check_least
from kontext_jax.types import Latents

DTYPE = np.dtype(ml_dtypes.bfloat16)

COMMAND = "`python -m kontext_jax.encode --config=...`"


@dataclass(kw_only=True, unsafe_hash=True)
class LatentsConfig(Settings):
    """Settings of a store of latents and of the teacher's samples in it.

    Attributes:
      path: folder of the store, written by `kontext_jax.encode`; empty to read pixels.
      samples: share of the examples, drawn again in every epoch, whose target is replaced by the
        teacher's sample; 1 is a purely synthetic data set.
      num_steps: sampler steps of the samples, see `SamplerConfig`.
      guidance: embedded guidance of the samples.
      cfg_scale: classifier-free guidance of the samples.
      seed: seed of the samples' noise.
    """

    path: str = ""
    samples: float = 0.0
    num_steps: int = 50
    guidance: float = 2.5
    cfg_scale: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.samples <= 1:
            raise ValueError(f"latents.samples is {self.samples}; set a share from 0 to 1.")
        if self.samples and not self.path:
            raise ValueError("latents.samples needs a store to read from: set latents.path.")
        check_least(self, "latents.", num_steps=1)

    def sampling(self) -> dict[str, Any]:
        """The settings that determine the samples."""
        names = ("num_steps", "guidance", "cfg_scale", "seed")
        return {name: getattr(self, name) for name in names}


class EncodedExample(NamedTuple):
    """An example in the store; ``sample`` is the teacher's sample of the target, if any."""

    id: str
    target: Latents
    contexts: tuple[Latents, ...]
    sample: Latents | None = None


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Everything that determines the latents of a store, as JSON values.

    Attributes:
      data: fingerprint of the split.
      split: name of the split.
      geometry: sizes that images were resized to.
      networks: identity of each network that was used, by name (`locations.identity_of`).
      usage: how networks were used, by names such as "teacher.dtype" (`locations.usage_of`); empty
        in stores written before usage was recorded.
      sampling: `LatentsConfig.sampling`, `TextConfig.lengths` and the teacher's schedule; None
        without samples.
    """

    data: str
    split: str
    geometry: dict[str, Any]
    networks: dict[str, list]
    usage: dict[str, str] = field(default_factory=dict)
    sampling: dict[str, Any] | None = None

    def differences(self, other: "StoreSettings") -> list[str]:
        """Names of the settings that differ in ``other``."""
        names = []
        for name, ours in vars(self).items():
            theirs = getattr(other, name)
            if name == "usage":  # a network in only one of them is reported by ``networks``
                names += [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
            elif isinstance(ours, dict) and isinstance(theirs, dict) and name != "geometry":
                names += [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
            elif ours != theirs:
                names.append(name)
        return names


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Contents of a complete store.

    Attributes:
      settings: how the store was made.
      channels: channels of a token.
      records: number of examples in each file.
      unreadable: number of examples left out because their record could not be read.
      digest: SHA-256 of the records' ids and checksums, in any order of the records.
    """

    settings: StoreSettings
    channels: int
    records: tuple[int, ...]
    unreadable: int
    digest: str

    def fingerprint(self) -> str:
        """Identity of the store's contents."""
        text = json.dumps([dataclasses.asdict(self.settings), self.digest], sort_keys=True)
        return short_digest(text)

    @classmethod
    def load(cls, path: Path) -> "Meta":
        """Reads a file written by `save`."""
        values = json.loads(path.read_text())
        settings, records = values.pop("settings"), values.pop("records")
        return cls(settings=StoreSettings(**settings), records=tuple(records), **values)

    def save(self, path: Path) -> None:
        """Writes a JSON file atomically."""
        write_json(path, dataclasses.asdict(self))


class StoreIndex(NamedTuple):
    """Ids and checksums (CRC-32) of k records, in order."""

    ids: Shaped[np.ndarray, " k"]
    checksums: UInt32[np.ndarray, " k"]

    def digest(self) -> str:
        """SHA-256 of ids and checksums, in any order of the records."""
        order = np.argsort(self.ids)
        sorted_bytes = self.ids[order].tobytes() + self.checksums[order].tobytes()
        return hashlib.sha256(sorted_bytes).hexdigest()


class LatentStore:
    """The records of a complete store, by example id.

    Threads may share a store. It can be pickled; worker processes read the index again.

    Attributes:
      path: folder of the store.
      meta: its contents.
    """

    def __init__(self, path: os.PathLike | str, split: str):
        """Opens a store written by `kontext_jax.encode`.

        Raises:
          FileNotFoundError: the store does not exist, is incomplete, or lacks a file.
        """
        self.path, self._split = Path(path), split
        if not meta_path(path, split).exists():
            if job_path(path, split).exists():
                raise FileNotFoundError(
                    f'The latents of "{split}" in {path} are incomplete: run {COMMAND} again to '
                    "resume."
                )
            raise FileNotFoundError(
                f'There are no latents of "{split}" in {path}: create them with {COMMAND}.'
            )
        self.meta = Meta.load(meta_path(path, split))
        counts = self.meta.records
        files = [chunk_path(path, split, i, len(counts)) for i in range(len(counts))]
        for file in (*files, index_path(path, split)):
            if not file.exists():
                raise FileNotFoundError(
                    f'The latents of "{split}" in {path} lack the file {file.name}: delete '
                    f"{meta_path(path, split).name} and run {COMMAND} again."
                )
        self._records = grain.sources.ArrayRecordDataSource(
            [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True)]
        )

    def __len__(self) -> int:
        return sum(self.meta.records)

    def __getitem__(self, example_id: str) -> EncodedExample:
        """Reads one record.

        Raises:
          CorruptRecordError: the record is missing or damaged.
        """
        ids, checksums = self.index
        rank = np.searchsorted(ids, example_id, sorter=self._order)
        i = int(self._order[rank]) if rank < len(ids) else -1
        try:
            if i < 0 or ids[i] != example_id:
                raise ValueError("its images could not be encoded")
            data = self._records[i]
            if zlib.crc32(data) != checksums[i]:
                raise ValueError("its checksum is wrong")
            return from_bytes(data, self.meta.channels)
        # ArrayRecord raises errors of many classes, which may change.
        except Exception as error:
            raise CorruptRecordError(
                f'The latents of "{example_id}" in "{self._split}" of {self.path} cannot be read: '
                f"{error}"
            ) from error

    @cached_once
    def index(self) -> StoreIndex:
        """Ids and checksums of all records.

        Raises:
          ValueError: the file belongs to another store.
        """
        path = index_path(self.path, self._split)
        with np.load(path, allow_pickle=False) as arrays:
            index = StoreIndex(arrays["ids"], arrays["checksums"])
        if index.digest() != self.meta.digest:
            raise ValueError(
                f"{path} is not the index of this store: delete "
                f"{meta_path(self.path, self._split).name} and run {COMMAND} again."
            )
        return index

    @cached_once
    def _order(self) -> np.ndarray:
        return np.argsort(self.index.ids)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("index", "_order")}


def open_store(
    config: LatentsConfig, source: TripleSource, geometry: GeometryConfig, text: TextConfig
) -> LatentStore:
    """Opens the store of a data set and checks that it matches the settings.

    Args:
      config: location of the store, and how the run reads it.
      source: the data set.
      geometry: geometry of the rows.
      text: the run's tokenisation, which must match the teacher's if samples are read.

    Raises:
      FileNotFoundError: the store is missing or incomplete.
      ValueError: the store was made from other data, for another geometry, or with other samples.
    """
    store = LatentStore(config.path, source.split)
    settings = store.meta.settings
    if settings.data != source.fingerprint:
        raise ValueError(
            f'The latents in {config.path} were made from another version of "{source.split}" of '
            f"{source.path}: create new ones with {COMMAND} and another data.latents.path."
        )
    changed = ["geometry"] if settings.geometry != as_json(geometry) else []
    if config.samples and settings.sampling is None:
        raise ValueError(
            f"data.latents.samples is {config.samples:g}, but {config.path} holds no samples: "
            f"create them with {COMMAND} and another data.latents.path."
        )
    if config.samples:
        expected = config.sampling() | {"text": text.lengths()}
        changed += [name for name in expected if expected[name] != settings.sampling.get(name)]
    if changed:
        raise ValueError(
            f"The latents in {config.path} were made with a different {' and '.join(changed)}: use "
            f"the settings they were made with, or create new ones with {COMMAND} and another "
            "data.latents.path."
        )
    return store


def check_networks(
    meta: Meta, config: LatentsConfig, networks: Mapping[str, list], usage: Mapping[str, str]
) -> None:
    """Refuses networks other than those that made the latents.

    Args:
      meta: contents of the store.
      config: how the run reads the store; without samples only the autoencoder matters.
      networks: identity of the run's networks, by name; networks that the run lacks are not
        checked.
      usage: how the run uses them (`locations.usage_of`); likewise.

    Raises:
      ValueError: a network or its usage differs.
    """
    stored = meta.settings.networks | meta.settings.usage
    current = {**networks, **usage}
    changed = [
        name
        for name in stored
        if (config.samples or name.startswith("autoencoder"))
        and name in current
        and current[name] != stored[name]
    ]
    if changed:
        raise ValueError(
            f"The latents in {config.path} were made with a different {' and '.join(changed)} "
            "than this run uses: use the same, or create new latents with "
            f"{COMMAND} and another data.latents.path."
        )


def write_chunk(path: Path, examples: Iterable[EncodedExample | None]) -> None:
    """Writes one file of a store atomically.

    Args:
      path: the file, see `chunk_path`.
      examples: examples of the chunk, consumed lazily; None for one that could not be read.
    """
    ids, checksums, unreadable = [], [], 0
    with atomic_path(path, shared=False) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for example in examples:
                if example is None:
                    unreadable += 1
                    continue
                data = to_bytes(example)
                writer.write(data)
                ids.append(example.id)
                checksums.append(zlib.crc32(data))
            index = {"ids": ids, "checksums": checksums, "unreadable": unreadable}
            writer.write(json.dumps(index).encode())
        finally:
            writer.close()


def read_chunk_index(path: Path) -> dict[str, Any]:
    """Reads a file's part of the index: "ids", "checksums" and "unreadable".

    Raises:
      ValueError: the file is damaged.
    """
    try:
        reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0")
        try:
            return json.loads(reader.read([reader.num_records() - 1])[0])
        finally:
            reader.close()
    except Exception as error:  # as in `LatentStore`
        raise ValueError(
            f"{path} is damaged ({error}): delete it and run {COMMAND} again."
        ) from error


def finish(
    folder: os.PathLike | str, settings: StoreSettings, channels: int, num_chunks: int
) -> Meta:
    """Joins the indices of all chunks and writes the index and the meta, completing the store."""
    split = settings.split
    parts = [read_chunk_index(chunk_path(folder, split, i, num_chunks)) for i in range(num_chunks)]
    index = StoreIndex(
        np.array([example_id for part in parts for example_id in part["ids"]], np.str_),
        np.array([checksum for part in parts for checksum in part["checksums"]], np.uint32),
    )
    with atomic_path(index_path(folder, split), shared=False) as temporary:
        np.savez_compressed(temporary, **index._asdict())
    meta = Meta(
        settings=settings,
        channels=channels,
        records=tuple(len(part["ids"]) for part in parts),
        unreadable=sum(part["unreadable"] for part in parts),
        digest=index.digest(),
    )
    meta.save(meta_path(folder, split))
    return meta


def to_bytes(example: EncodedExample) -> bytes:
    """Serialises an example; the module's docstring describes the format."""
    images = (example.target, *example.contexts)
    header = {
        "id": example.id,
        "sizes": [image.size for image in images],
        "tokens": [len(image.tokens) for image in images],
        "sample": example.sample is not None,
    }
    if example.sample is not None:
        images += (example.sample,)
    numbers = [image.tokens.astype(DTYPE).tobytes() for image in images]
    return b"".join([json.dumps(header).encode(), b"\n", *numbers])


def from_bytes(data: bytes, channels: int) -> EncodedExample:
    """Deserialises an example; its arrays are views of ``data``.

    Raises:
      ValueError: the number of tokens is not the one in the record's header.
    """
    end = data.index(b"\n")
    header = json.loads(data[:end])
    counts = header["tokens"] + header["tokens"][:1] * header["sample"]
    tokens = np.frombuffer(data, DTYPE, offset=end + 1).reshape(-1, channels)
    if len(tokens) != sum(counts):
        raise ValueError(f"it has {len(tokens)} tokens instead of {sum(counts)}")
    parts = np.split(tokens, np.cumsum(counts)[:-1])
    sizes = [tuple(size) for size in header["sizes"]]
    target, *contexts = (Latents(size, part) for size, part in zip(sizes, parts, strict=False))
    sample = Latents(sizes[0], parts[-1]) if header["sample"] else None
    return EncodedExample(header["id"], target, tuple(contexts), sample)


def chunk_path(folder: os.PathLike | str, split: str, chunk: int, num_chunks: int) -> Path:
    """Path of a chunk of a split."""
    return Path(folder) / f"latents-{split}-{chunk:05}-of-{num_chunks:05}.array_record"


def index_path(folder: os.PathLike | str, split: str) -> Path:
    """Path of the index of a split."""
    return Path(folder) / f"latents-{split}.npz"


def meta_path(folder: os.PathLike | str, split: str) -> Path:
    """Path of the meta of a split; the file exists only in a complete store."""
    return Path(folder) / f"latents-{split}.json"


def job_path(folder: os.PathLike | str, split: str) -> Path:
    """Path of the job description, written before the first chunk."""
    return Path(folder) / f"latents-{split}.job.json"


def as_json(value) -> Any:
    """Converts dataclasses and tuples to the values that a JSON round trip would give."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")
