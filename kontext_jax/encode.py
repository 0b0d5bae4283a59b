"""Encodes a data set: ``python -m kontext_jax.encode --config=configs/X.py[:variant]``.

A run with a ``data.latents.path`` reads latents from that store instead of pixels. This command
writes the store, from the run's ``data.split`` and with its frozen networks. With
``data.latents.samples`` above 0 it also samples the teacher for every target, to make the synthetic
data set of distillation.

Started again with the same arguments, on any number of devices, it resumes with the missing chunks.
An example's latents depend on the example alone, not on its row. The first process writes the
files, and all processes must see them.
"""

import dataclasses
import itertools
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import config_flags

from kontext_jax import cli
from kontext_jax.config import Config
from kontext_jax.data import latents as store
from kontext_jax.data.latents import EncodedExample, LatentsConfig, StoreSettings
from kontext_jax.data.pipeline import (
    DataConfig,
    RowAssembler,
    batches_of,
    check_readable,
    noise_id,
    plan_of,
    shapes_of,
)
from kontext_jax.data.plan import Plan
from kontext_jax.data.sources import TripleSource
from kontext_jax.encoders import encode_images
from kontext_jax.flow import TimeConfig
from kontext_jax.geometry import num_tokens
from kontext_jax.loading.locations import identity_of, usage_of
from kontext_jax.loading.models import load_frozen, teacher_time
from kontext_jax.objectives import Network
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.settings import to_dict, validated
from kontext_jax.sharding import batch_part, batch_sharding, check_batch, make_mesh
from kontext_jax.types import Batch, Latents, unprompted

CHUNK_EXAMPLES = 1000
"""Approximate size of a file, and the most that a killed job loses."""

PADDING = -1  # number of a padding row


def encode(config: Config) -> None:
    """Writes the store of ``config.data.latents``, or its missing chunks.

    Raises:
      FileNotFoundError: the data set or a network is missing.
      ValueError: the config cannot make a store, the folder holds another store, or too many
        records cannot be read.
    """
    _check(config)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, 1, mesh)
    source = TripleSource(config.data.path, config.data.split)
    networks = load_frozen(config, mesh, only=required_networks(config))
    schedule = teacher_time(config) if config.data.latents.samples else None
    encode_with(networks, schedule, source, config, mesh)


def encode_with(
    networks: dict[str, Network],
    schedule: TimeConfig | None,
    source: TripleSource,
    config: Config,
    mesh: Mesh,
) -> None:
    """`encode` with given networks and data.

    Args:
      networks: frozen networks by name, on the mesh.
      schedule: the teacher's schedule; None without samples.
      source: the data set.
      config: settings of the store.
      mesh: devices that each batch is split over.

    Raises:
      ValueError: the folder holds another store, or too many records cannot be read.
    """
    folder, data = Path(config.data.latents.path), _reading_config(config.data)
    settings = store_settings(networks, schedule, source, config)
    if _from_first_process(store.meta_path(folder, data.split).exists()):
        meta = store.Meta.load(store.meta_path(folder, data.split))
        _check_same(folder, meta.settings.differences(settings))
        cli.say(f"{folder} is complete: nothing to do")
        return
    plan = plan_of(source, data, config.seed)
    job = begin_job(folder, settings, plan, data.batch_size)
    batches = [job.batches(chunk, data.batch_size) for chunk in job.missing]
    rows = [row for chunk in batches for batch in chunk for row in batch]
    progress = Progress(data, sum(len(plan[row][1]) for row in rows))
    encoder = Encoder(networks, schedule, source, plan, config, mesh)
    with closing(encoder(list(itertools.chain(*batches)))) as encoded:
        for chunk, chunk_batches in zip(job.missing, batches, strict=True):
            examples = itertools.chain.from_iterable(itertools.islice(encoded, len(chunk_batches)))
            path = store.chunk_path(folder, data.split, chunk, job.num_chunks)
            if jax.process_index() == 0:
                store.write_chunk(path, progress.count(examples))
            else:
                deque(progress.count(examples), maxlen=0)  # all processes compute
            cli.say(f"chunk {chunk + 1} of {job.num_chunks}: {progress}")
    if jax.process_index() == 0:
        channels = networks["autoencoder"].config.token_channels
        meta = store.finish(folder, settings, channels, job.num_chunks)
        cli.say(f"wrote {folder}: {sum(meta.records)} examples, {meta.unreadable} unreadable")


class Job(NamedTuple):
    """Division of an epoch's rows into files, one chunk each.

    Attributes:
      num_rows: rows of the epoch.
      chunk_rows: rows of a chunk; the last chunk may have fewer.
      missing: chunks whose file does not exist yet.
    """

    num_rows: int
    chunk_rows: int
    missing: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        """Number of files."""
        return -(-self.num_rows // self.chunk_rows)

    def batches(self, chunk: int, batch_size: int) -> list[range]:
        """The rows of each batch of a chunk; the last batch may have fewer."""
        first = chunk * self.chunk_rows
        end = min(first + self.chunk_rows, self.num_rows)
        return [range(i, min(i + batch_size, end)) for i in range(first, end, batch_size)]


def begin_job(folder: Path, settings: StoreSettings, plan: Plan, batch_size: int) -> Job:
    """Writes the job description into the folder, or resumes the job described there.

    Raises:
      ValueError: the folder holds another store.
    """
    path, pattern = store.job_path(folder, settings.split), f"latents-{settings.split}-*"
    rows_per_example = plan.num_rows / plan.num_examples
    rows = batch_size * max(1, round(CHUNK_EXAMPLES * rows_per_example / batch_size))
    if _from_first_process(path.exists()):
        started = json.loads(path.read_text())
        changed = StoreSettings(**started["settings"]).differences(settings)
        _check_same(folder, changed + ["plan of rows"] * (started["plan"] != plan.fingerprint()))
        rows = started["chunk_rows"]
    elif _from_first_process(any(folder.glob(pattern))):
        raise ValueError(
            f"{folder} has files {pattern} but no {path.name} to say what they were made from: "
            "delete them or choose another data.latents.path."
        )
    elif jax.process_index() == 0:
        started = {"plan": plan.fingerprint(), "chunk_rows": rows, "settings": settings}
        store.write_json(path, store.as_json(started))
    job = Job(plan.num_rows, int(_from_first_process(rows)), ())
    paths = [
        store.chunk_path(folder, settings.split, chunk, job.num_chunks)
        for chunk in range(job.num_chunks)
    ]
    exists = _from_first_process([path.exists() for path in paths])
    return job._replace(missing=tuple(np.flatnonzero(~exists).tolist()))


def required_networks(config: Config) -> list[str]:
    """Names of the frozen networks that make the store."""
    if not config.data.latents.samples:
        return ["autoencoder"]
    return ["autoencoder", "teacher", *config.objective.frozen_encoders()]


def store_settings(
    networks: dict[str, Network],
    schedule: TimeConfig | None,
    source: TripleSource,
    config: Config,
) -> StoreSettings:
    """Everything that determines the contents of the store."""
    data, sampling = config.data, None
    networks = {name: networks[name] for name in required_networks(config)}
    if data.latents.samples:
        sampling = data.latents.sampling()
        sampling |= {"schedule": to_dict(schedule), "text": data.text.lengths()}
    return StoreSettings(
        data=source.fingerprint,
        split=data.split,
        geometry=store.as_json(data.geometry),
        networks=store.as_json(identity_of(networks)),
        usage=usage_of(networks, config.objective),
        sampling=store.as_json(sampling),
    )


class Encoder:
    """Encodes the examples of a plan's rows, one batch of rows at a time."""

    def __init__(
        self,
        networks: dict[str, Network],
        schedule: TimeConfig | None,
        source: TripleSource,
        plan: Plan,
        config: Config,
        mesh: Mesh,
    ):
        """Takes the arguments of `encode_with`, and the plan of the rows.

        Raises:
          ValueError: two examples have the same id.
        """
        self._networks, self._plan, self._mesh = networks, plan, mesh
        self._data, latents = _reading_config(config.data), config.data.latents
        self._rows = RowAssembler(source, plan, self._data, config.seed)
        self._ids = list(source.index.ids)
        if len(set(self._ids)) < len(self._ids):
            raise ValueError(
                f"{source.path} uses an id twice, but latents are stored by id: give each example "
                "a unique id."
            )
        self._noise_ids = np.array([noise_id(example_id) for example_id in self._ids], np.int32)
        self._shapes = shapes_of(source.index, self._data)
        self._key = jax.random.key(latents.seed)
        self._run = jax.jit(
            lambda networks, batch, key: encode_rows(
                networks, batch, key, config.objective, latents, schedule
            )
        )

    def __call__(self, batches: Sequence[range]) -> Iterator[list[EncodedExample | None]]:
        """Yields each batch's examples, in the plan's order; None for one that could not be read.

        Args:
          batches: row numbers of each batch; incomplete batches are padded.
        """
        numbers = [[*rows] + [PADDING] * (self._data.batch_size - len(rows)) for rows in batches]
        read = batches_of(
            _Rows(self._rows, list(itertools.chain(*numbers))),
            self._data,
            *batch_part(self._mesh, jax.process_index()),
        )
        with closing(iter(read)) as read:
            started = map(self._start, read)
            # Start the next batch before fetching one, so that devices do not wait for files.
            one_behind = itertools.pairwise(itertools.chain(started, [None]))
            for rows, (outputs, _) in zip(batches, one_behind, strict=True):
                yield self._examples(rows, *multihost_utils.process_allgather(outputs, tiled=True))

    def _start(self, local: Batch) -> tuple[Array | None, ...]:
        """Dispatches a batch; (example numbers, segments, latents, samples) on the devices."""
        numbers = local.example_ids
        local = local.replace(example_ids=np.where(numbers < 0, -1, self._noise_ids[numbers]))
        sharding = batch_sharding(self._mesh)
        numbers, batch = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), (numbers, local)
        )
        with jax.set_mesh(self._mesh):
            return numbers, batch.segments, *self._run(self._networks, batch, self._key)

    def _examples(
        self,
        rows: range,
        numbers: Int[np.ndarray, "B N"],
        segments: Int[np.ndarray, "B S"],
        latents: Float[np.ndarray, "B S C"],
        samples: Float[np.ndarray, "B S C"] | None,
    ) -> list[EncodedExample | None]:
        """Splits a batch into examples, found by number: the mesh decides the order of its rows."""
        positions = {number: index for index, number in np.ndenumerate(numbers) if number >= 0}
        examples: list[EncodedExample | None] = []
        for number in itertools.chain.from_iterable(self._plan[row][1] for row in rows):
            if number not in positions:
                examples.append(None)
                continue
            row, place = positions[number]
            in_example, shape = segments[row] == place + 1, self._shapes[number]
            sizes = (shape.target, *shape.contexts)
            ends = np.cumsum(
                [num_tokens(size, self._data.geometry.pixels_per_token) for size in sizes]
            )
            parts = np.split(latents[row, in_example], ends[:-1])
            target, *contexts = map(Latents, sizes, parts)
            sampled = None
            if samples is not None:
                sampled = Latents(shape.target, samples[row, in_example][: ends[0]])
            examples.append(EncodedExample(self._ids[number], target, tuple(contexts), sampled))
        return examples


def encode_rows(
    networks: dict[str, Network],
    batch: Batch,
    key: Key[Array, ""],
    objective: NetworksConfig,
    latents: LatentsConfig,
    schedule: TimeConfig | None,
) -> tuple[Float[Array, "B S C"], Float[Array, "B S C"] | None]:
    """(clean latents of all images, the teacher's samples of the targets or None), in bfloat16.

    Args:
      networks: frozen networks by name.
      batch: rows of pixels; their ``example_ids`` key the samples' noise.
      key: random key of that noise.
      objective: how prompts are encoded.
      latents: sampler settings; nothing is sampled if ``latents.samples`` is 0.
      schedule: the teacher's schedule.
    """
    clean = encode_images(networks["autoencoder"], batch)
    if not latents.samples:
        return clean.astype(jnp.bfloat16), None
    sampler = SamplerConfig(
        num_steps=latents.num_steps, guidance=latents.guidance, cfg_scale=latents.cfg_scale
    )
    tokens, negative = objective.tokens(networks, batch, clean), None
    if batch.negative is not None:
        negative = objective.tokens(networks, unprompted(batch), clean)
    samples = sample(networks["teacher"], tokens, key, sampler, schedule, negative)
    return clean.astype(jnp.bfloat16), samples.astype(jnp.bfloat16)


class Progress:
    """Counts examples, measures the rate, and stops the job if too many are unreadable."""

    def __init__(self, data: DataConfig, total: int):
        self._data, self._total = data, total
        self._done = self._unreadable = 0
        self._start = time.monotonic()

    def count(self, examples: Iterable[EncodedExample | None]) -> Iterator[EncodedExample | None]:
        """Passes examples through and counts them.

        Raises:
          ValueError: too many examples could not be read.
        """
        for example in examples:
            self._done += 1
            self._unreadable += example is None
            check_readable(self._unreadable, self._done, self._data)
            yield example

    def __str__(self) -> str:
        rate = self._done / (time.monotonic() - self._start)
        left = (self._total - self._done) / rate
        return (
            f"{self._done:,} of {self._total:,} examples, {self._unreadable} unreadable, "
            f"{rate:.1f} examples/s, {left:.0f} s left"
        )


class _Rows(Sequence):
    """Rows of an assembler, or of padding, with the given numbers."""

    def __init__(self, rows: RowAssembler, numbers: list[int]):
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Batch:
        number = self._numbers[i]
        return self._rows.empty() if number == PADDING else self._rows[number]


def _reading_config(data: DataConfig) -> DataConfig:
    """Settings for reading pixels without dropout, with empty prompts if the sampler needs them."""
    negatives = bool(data.latents.samples) and data.latents.cfg_scale != 1.0
    return dataclasses.replace(
        data,
        caption_dropout=0.0,
        context_dropout=0.0,
        latents=LatentsConfig(),
        negatives=negatives,
    )


def _check(config: Config) -> None:
    """Refuses configs that cannot make a store."""
    latents = config.data.latents
    if not latents.path:
        raise ValueError("data.latents.path is empty: set it to the folder for the latents.")
    if latents.samples and "teacher" not in config.make_objective().frozen():
        raise ValueError(
            f"A run of {config.objective.kind} has no frozen teacher to make samples: use the "
            "config of another objective."
        )


def _check_same(folder: Path, changed: Sequence[str]) -> None:
    if changed:
        raise ValueError(
            f"{folder} holds latents made with a different {' and '.join(changed)}: choose another "
            "data.latents.path or delete the folder."
        )


def _from_first_process(value) -> np.ndarray:
    """The first process's value, on all processes, so that they agree about its files."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def main() -> None:
    options = flags.FLAGS
    if options.config is None:
        raise cli.UserError("give --config=configs/X.py[:variant].")
    cli.check_config(options.config, Config)
    if options.distributed:
        cli.join_processes()
    encode(validated(options.config))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/, :variant")
    flags.DEFINE_bool("distributed", False, "joins the processes of a pod (jax.distributed)")
    cli.run("encode", main)
