"""A store of latents: what an autoencoder made of a data set's images, read in their place.

A store is one folder, with these files for each split::

    latents-train.job.json                      what is to be made, and in which chunks
    latents-train-00003-of-00040.array_record   a chunk of the records
    latents-train.npz                           ids and checksums of all records, in their order
    latents-train.json                          `Meta`; written last: the store is complete

A record is one line of JSON and then numbers, bfloat16 in little-endian order: C channels of each
token of the target, of each context, and of the teacher's sample of the target if there is one::

    {"id": "a/7", "sizes": [[48, 32], [32, 32]], "tokens": [24, 16], "sample": false}

Bytes that anyone can read in a few lines: no pickle, and nothing to parse but that line, where the
zip archive of an .npz takes longer to open than the record to read. The last record of a file is no
example but the file's part of the .npz, so that a file that is complete needs no other.
"""

import dataclasses
import functools
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
    """Latents in place of pixels, and a teacher's samples in place of some of the targets.

    Attributes:
      path: folder of the store that `kontext_jax.encode` makes; empty to read pixels.
      samples: share of the examples, drawn anew in every epoch, whose target is the teacher's
        sample; 1 is a purely synthetic data set.
      num_steps, guidance, cfg_scale: how the samples are made, see `SamplerConfig`.
      seed: of the samples' noise.
    """

    path: str = ""
    samples: float = 0.0
    num_steps: int = 50
    guidance: float = 2.5
    cfg_scale: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.samples <= 1:
            raise ValueError(f"latents.samples {self.samples} is a share: give 0 to 1.")
        if self.samples and not self.path:
            raise ValueError("latents.samples needs a store to read them from: set latents.path.")
        check_least(self, "latents.", num_steps=1)

    def sampling(self) -> dict[str, Any]:
        """The settings that decide what the samples look like."""
        names = ("num_steps", "guidance", "cfg_scale", "seed")
        return {name: getattr(self, name) for name in names}


class Encoded(NamedTuple):
    """An example in the store; ``sample`` is the teacher's target, None where none was made."""

    id: str
    target: Latents
    contexts: tuple[Latents, ...]
    sample: Latents | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides the latents of a store, as JSON values.

    Attributes:
      data: fingerprint of the split.
      split: its name.
      geometry: which sizes the images were brought to.
      networks: what tells each network that was used from others, by name (`places.identity_of`).
      usage: how they were used, by names such as "teacher.dtype" (`places.usage_of`); empty in a
        store from before this was told.
      sampling: `LatentsConfig.sampling`, `TextConfig.lengths` and the teacher's schedule; None
        without samples.
    """

    data: str
    split: str
    geometry: dict[str, Any]
    networks: dict[str, list]
    usage: dict[str, str] = field(default_factory=dict)
    sampling: dict[str, Any] | None = None

    def changes(self, other: "Settings") -> list[str]:
        """Names of what is not the same in ``other``."""
        found = []
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if name == "usage":  # a network that only one of them has is told of already
                found += [key for key in mine if theirs.get(key, mine[key]) != mine[key]]
            elif isinstance(mine, dict) and isinstance(theirs, dict) and name != "geometry":
                found += [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
            elif mine != theirs:
                found.append(name)
        return found


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a store holds.

    Attributes:
      settings: how it was made.
      channels: of a token.
      records: examples in each file.
      unreadable: examples that are not there, for their records could not be read.
      digest: SHA-256 of the records' ids and checksums, whatever their order.
    """

    settings: Settings
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
        """Reads what `save` wrote."""
        values = json.loads(path.read_text())
        settings, records = Settings(**values.pop("settings")), tuple(values.pop("records"))
        return cls(settings=settings, records=records, **values)

    def save(self, path: Path) -> None:
        """Writes a JSON file, all of it or nothing."""
        write_json(path, dataclasses.asdict(self))


class StoreIndex(NamedTuple):
    """Ids and checksums (CRC-32) of k records, in their order."""

    ids: Shaped[np.ndarray, " k"]
    checksums: UInt32[np.ndarray, " k"]

    def digest(self) -> str:
        """SHA-256 of both, whatever the order."""
        order = np.argsort(self.ids)
        digest = hashlib.sha256(self.ids[order].tobytes())
        digest.update(self.checksums[order].tobytes())
        return digest.hexdigest()


class LatentStore:
    """The records of a complete store by their examples' ids.

    Threads may share it, and it can be pickled: it travels to a worker process without its index.

    Attributes:
      path: the store's folder.
      meta: what it holds.
    """

    def __init__(self, path: os.PathLike | str, split: str):
        """Opens what `kontext_jax.encode` made.

        Raises:
          FileNotFoundError: there is no such store, it is incomplete, or lacks one of its files.
        """
        self.path, self._split = Path(path), split
        if not meta_path(path, split).exists():
            if job_path(path, split).exists():
                raise FileNotFoundError(
                    f'The latents of "{split}" in {path} are incomplete: start {COMMAND} again, '
                    "and it goes on."
                )
            raise FileNotFoundError(
                f'There are no latents of "{split}" in {path}: make them with {COMMAND}.'
            )
        self.meta = Meta.load(meta_path(path, split))
        counts = self.meta.records
        files = [chunk_path(path, split, i, len(counts)) for i in range(len(counts))]
        for file in (*files, index_path(path, split)):
            if not file.exists():
                raise FileNotFoundError(
                    f'The latents of "{split}" in {path} lack their file {file.name}: delete '
                    f"{meta_path(path, split).name} and start {COMMAND} again."
                )
        self._records = grain.sources.ArrayRecordDataSource(
            [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True)]
        )

    def __len__(self) -> int:
        return sum(self.meta.records)

    def __getitem__(self, example_id: str) -> Encoded:
        """Reads one record.

        Raises:
          CorruptRecordError: it is not there, or not what was written.
        """
        ids, checksums = self.index
        rank = np.searchsorted(ids, example_id, sorter=self._order)
        place = int(self._order[rank]) if rank < len(ids) else -1
        try:
            if place < 0 or ids[place] != example_id:
                raise ValueError("its images could not be encoded")
            data = self._records[place]
            if zlib.crc32(data) != checksums[place]:
                raise ValueError("its checksum is wrong")
            return from_bytes(data, self.meta.channels)
        # ArrayRecord has errors of many classes, and none of them is final.
        except Exception as error:
            raise CorruptRecordError(
                f'The latents of "{example_id}" in "{self._split}" of {self.path} cannot be read: '
                f"{error}"
            ) from error

    @functools.cached_property
    def index(self) -> StoreIndex:
        """Ids and checksums of all records.

        Raises:
          ValueError: the file is not that of this store.
        """
        path = index_path(self.path, self._split)
        with np.load(path, allow_pickle=False) as arrays:
            index = StoreIndex(arrays["ids"], arrays["checksums"])
        if index.digest() != self.meta.digest:
            raise ValueError(f"{path} is not the index of this store: make it anew with {COMMAND}.")
        return index

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.index.ids)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("index", "_order")}


def open_store(
    config: LatentsConfig, source: TripleSource, geometry: GeometryConfig, text: TextConfig
) -> LatentStore:
    """The store of a data set, if it is what the settings ask for.

    Args:
      config: where it is, and what is read of it.
      source: the data set.
      geometry: of the rows.
      text: how the run reads prompts; the teacher must have read those of its samples so too.

    Raises:
      FileNotFoundError: it is missing or incomplete.
      ValueError: it was made of other data, for another geometry, or with other samples.
    """
    store = LatentStore(config.path, source.split)
    made = store.meta.settings
    if made.data != source.fingerprint:
        raise ValueError(
            f'The latents in {config.path} are not of "{source.split}" of {source.path} as it is '
            f"now: make new ones with {COMMAND} and another data.latents.path."
        )
    changed = ["geometry"] if made.geometry != plain(geometry) else []
    if config.samples and made.sampling is None:
        raise ValueError(
            f"data.latents.samples is {config.samples:g}, but {config.path} holds no samples: make "
            f"them with {COMMAND} and another data.latents.path."
        )
    if config.samples:
        wanted = config.sampling() | {"text": text.lengths()}
        changed += [name for name in wanted if wanted[name] != made.sampling.get(name)]
    if changed:
        raise ValueError(
            f"The latents in {config.path} were made with another {' and '.join(changed)}: take "
            f"the settings they were made with, or make others with {COMMAND} and another "
            "data.latents.path."
        )
    return store


def check_networks(
    meta: Meta, config: LatentsConfig, networks: Mapping[str, list], usage: Mapping[str, str]
) -> None:
    """Refuses a run whose networks are not those that its latents were made with.

    Args:
      meta: of the store.
      config: how the run reads it; where it reads no samples, only the autoencoder matters.
      networks: identity of the run's networks, by name; what the run does not have is not asked.
      usage: how the run uses them (`places.usage_of`); the same holds.

    Raises:
      ValueError: one of them is another, or used in another way.
    """
    made = meta.settings.networks | meta.settings.usage
    names = [name for name in made if config.samples or name.startswith("autoencoder")]
    now = {**networks, **usage}
    changed = [name for name in names if name in now and now[name] != made[name]]
    if changed:
        raise ValueError(
            f"The latents in {config.path} were made with another {' and '.join(changed)} than "
            f"this run has: use that, or make new latents with {COMMAND} and another "
            "data.latents.path."
        )


def write_chunk(path: Path, examples: Iterable[Encoded | None]) -> None:
    """Writes one file of a store: all of it or, on failure, nothing.

    Args:
      path: see `chunk_path`.
      examples: consumed lazily; None is one that could not be read.
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
            part = {"ids": ids, "checksums": checksums, "unreadable": unreadable}
            writer.write(json.dumps(part).encode())
        finally:
            writer.close()


def read_part(path: Path) -> dict[str, Any]:
    """The part of the index that a complete file carries: "ids", "checksums", "unreadable".

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
            f"{path} is damaged ({error}): delete it and start {COMMAND} again."
        ) from error


def finish(folder: os.PathLike | str, settings: Settings, channels: int, num_chunks: int) -> Meta:
    """Joins the indices of all chunks and writes the meta: the store is complete then."""
    split = settings.split
    parts = [read_part(chunk_path(folder, split, i, num_chunks)) for i in range(num_chunks)]
    index = StoreIndex(
        np.array([example_id for part in parts for example_id in part["ids"]], np.str_),
        np.array([checksum for part in parts for checksum in part["checksums"]], np.uint32),
    )
    with (
        atomic_path(index_path(folder, split), shared=False) as temporary,
        temporary.open("wb") as file,
    ):
        np.savez_compressed(file, **index._asdict())
    meta = Meta(
        settings=settings,
        channels=channels,
        records=tuple(len(part["ids"]) for part in parts),
        unreadable=sum(part["unreadable"] for part in parts),
        digest=index.digest(),
    )
    meta.save(meta_path(folder, split))
    return meta


def to_bytes(example: Encoded) -> bytes:
    """A record, see the module's docstring."""
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


def from_bytes(data: bytes, channels: int) -> Encoded:
    """The example of a record; its arrays are views of ``data``.

    Raises:
      ValueError: the record is of another length than it says.
    """
    end = data.index(b"\n")
    header = json.loads(data[:end])
    counts = header["tokens"] + header["tokens"][:1] * header["sample"]
    tokens = np.frombuffer(data, DTYPE, offset=end + 1).reshape(-1, channels)
    if len(tokens) != sum(counts):
        raise ValueError(f"it has {len(tokens)} tokens in place of {sum(counts)}")
    parts = np.split(tokens, np.cumsum(counts)[:-1])
    sizes = [tuple(size) for size in header["sizes"]]
    target, *contexts = (Latents(size, part) for size, part in zip(sizes, parts, strict=False))
    sample = Latents(sizes[0], parts[-1]) if header["sample"] else None
    return Encoded(header["id"], target, tuple(contexts), sample)


def chunk_path(folder: os.PathLike | str, split: str, chunk: int, num_chunks: int) -> Path:
    """Where a chunk of a split lies."""
    return Path(folder) / f"latents-{split}-{chunk:05}-of-{num_chunks:05}.array_record"


def index_path(folder: os.PathLike | str, split: str) -> Path:
    """Where the index of a split lies."""
    return Path(folder) / f"latents-{split}.npz"


def meta_path(folder: os.PathLike | str, split: str) -> Path:
    """Where the meta of a split lies, once its store is complete."""
    return Path(folder) / f"latents-{split}.json"


def job_path(folder: os.PathLike | str, split: str) -> Path:
    """Where it says what is to be made, from before the first chunk."""
    return Path(folder) / f"latents-{split}.job.json"


def plain(value) -> Any:
    """Dataclasses and tuples as the JSON values that reading them back would give."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file, all of it or nothing."""
    write_text(path, json.dumps(values, indent=2) + "\n")
