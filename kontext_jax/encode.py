"""Makes a store of latents: ``python -m kontext_jax.encode --config=configs/X.py[:variant]``.

A run with a ``data.latents.path`` reads latents from there in place of pixels; this makes what it
asks for, of its ``data.split`` and by its frozen networks. With ``data.latents.samples`` above 0 it
also samples the teacher for every target: the synthetic data set of distillation.

Started again with the same arguments it goes on with the chunks that are not there yet, on any
number of devices. What is stored of an example depends on the example alone, not on its row. The
first process writes the files, and all must see them.
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
from kontext_jax.data.latents import Encoded, LatentsConfig, Settings
from kontext_jax.data.packing import Plan
from kontext_jax.data.pipeline import (
    DataConfig,
    RowAssembler,
    batches_of,
    check_readable,
    noise_id,
    plan_of,
    shapes_of,
)
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
"""About so many go into a file; the most that a job loses when it is killed."""

PADDING = -1  # in place of a row's number


def encode(config: Config) -> None:
    """Makes the store that ``config.data.latents`` asks for, or what is missing of it.

    Raises:
      FileNotFoundError: the data set or a network is missing.
      ValueError: the settings do not go together, another store is at the path, or too many
        records cannot be read.
    """
    _check(config)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, 1, mesh)
    source = TripleSource(config.data.path, config.data.split)
    networks = load_frozen(config, mesh, only=needed(config))
    schedule = teacher_time(config) if config.data.latents.samples else None
    encode_with(networks, schedule, source, config, mesh)


def encode_with(
    networks: dict[str, Network],
    schedule: TimeConfig | None,
    source: TripleSource,
    config: Config,
    mesh: Mesh,
) -> None:
    """`encode` with what it loads.

    Args:
      networks: frozen ones by name, on the mesh.
      schedule: the teacher's own; None where nothing is sampled.
      source: the data set.
      config: what to make.
      mesh: over which each batch is split.

    Raises:
      ValueError: another store is at the path, or too many records cannot be read.
    """
    folder, data = Path(config.data.latents.path), _undisturbed(config.data)
    settings = settings_of(networks, schedule, source, config)
    if _agreed(store.meta_path(folder, data.split).exists()):
        meta = store.Meta.load(store.meta_path(folder, data.split))
        _check_same(folder, meta.settings.changes(settings))
        cli.say(f"{folder} is complete: there is nothing to do")
        return
    plan = plan_of(source, data, config.seed)
    job = begin(folder, settings, plan, data.batch_size)
    batches = [job.batches(chunk, data.batch_size) for chunk in job.todo]
    rows = [row for chunk in batches for batch in chunk for row in batch]
    progress = Progress(data, sum(len(plan[row][1]) for row in rows))
    encoder = Encoder(networks, schedule, source, plan, config, mesh)
    with closing(encoder(list(itertools.chain(*batches)))) as made:
        for chunk, its_batches in zip(job.todo, batches, strict=True):
            examples = itertools.chain.from_iterable(itertools.islice(made, len(its_batches)))
            path = store.chunk_path(folder, data.split, chunk, job.num_chunks)
            if jax.process_index() == 0:
                store.write_chunk(path, progress.watch(examples))
            else:
                deque(progress.watch(examples), maxlen=0)  # computes along
            cli.say(f"chunk {chunk + 1} of {job.num_chunks}: {progress}")
    if jax.process_index() == 0:
        channels = networks["autoencoder"].config.token_channels
        meta = store.finish(folder, settings, channels, job.num_chunks)
        cli.say(f"wrote {folder}: {sum(meta.records)} examples, {meta.unreadable} unreadable")


class Job(NamedTuple):
    """How the rows of an epoch are divided into files.

    Attributes:
      num_rows: of the epoch.
      chunk_rows: of a chunk; the last one may have fewer.
      todo: the chunks that are not there.
    """

    num_rows: int
    chunk_rows: int
    todo: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        """Number of files."""
        return -(-self.num_rows // self.chunk_rows)

    def batches(self, chunk: int, batch_size: int) -> list[range]:
        """The rows of each batch of a chunk; of the last one there may be fewer."""
        first = chunk * self.chunk_rows
        end = min(first + self.chunk_rows, self.num_rows)
        return [range(i, min(i + batch_size, end)) for i in range(first, end, batch_size)]


def begin(folder: Path, settings: Settings, plan: Plan, batch_size: int) -> Job:
    """Says in the folder what is to be made there, or goes on with what a job before this one said.

    Raises:
      ValueError: the folder holds something else.
    """
    path, strays = store.job_path(folder, settings.split), f"latents-{settings.split}-*"
    rows_per_example = plan.num_rows / plan.num_examples
    rows = batch_size * max(1, round(CHUNK_EXAMPLES * rows_per_example / batch_size))
    if _agreed(path.exists()):
        begun = json.loads(path.read_text())
        changed = Settings(**begun["settings"]).changes(settings)
        _check_same(folder, changed + ["plan of rows"] * (begun["plan"] != plan.fingerprint()))
        rows = begun["chunk_rows"]
    elif _agreed(any(folder.glob(strays))):
        raise ValueError(
            f"{folder} has files {strays} and no {path.name}, which would tell what they were made "
            "from: delete them, or choose another data.latents.path."
        )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        begun = {"plan": plan.fingerprint(), "chunk_rows": rows, "settings": settings}
        store.write_json(path, store.plain(begun))
    job = Job(plan.num_rows, int(_agreed(rows)), ())
    files = [
        store.chunk_path(folder, settings.split, chunk, job.num_chunks)
        for chunk in range(job.num_chunks)
    ]
    is_there = _agreed([file.exists() for file in files])
    return job._replace(todo=tuple(np.flatnonzero(~is_there).tolist()))


def needed(config: Config) -> list[str]:
    """The frozen networks that the store is made with."""
    if not config.data.latents.samples:
        return ["autoencoder"]
    return ["autoencoder", "teacher", *config.objective.frozen_encoders()]


def settings_of(
    networks: dict[str, Network],
    schedule: TimeConfig | None,
    source: TripleSource,
    config: Config,
) -> Settings:
    """All that decides what is stored."""
    data, sampling = config.data, None
    networks = {name: networks[name] for name in needed(config)}
    if data.latents.samples:
        decided = {"schedule": to_dict(schedule), "text": data.text.lengths()}
        sampling = data.latents.sampling() | decided
    return Settings(
        data=source.fingerprint,
        split=data.split,
        geometry=store.plain(data.geometry),
        networks=store.plain(identity_of(networks)),
        usage=usage_of(networks, config.objective),
        sampling=store.plain(sampling),
    )


class Encoder:
    """From the numbers of a plan's rows to the examples in them, a batch at a time."""

    def __init__(
        self,
        networks: dict[str, Network],
        schedule: TimeConfig | None,
        source: TripleSource,
        plan: Plan,
        config: Config,
        mesh: Mesh,
    ):
        """The arguments are those of `encode_with`, and the plan.

        Raises:
          ValueError: an id is not the only one of its kind.
        """
        self._networks, self._plan, self._mesh = networks, plan, mesh
        self._data, latents = _undisturbed(config.data), config.data.latents
        self._rows = RowAssembler(source, plan, self._data, config.seed)
        self._ids = [str(example_id) for example_id in source.index.ids]
        if len(set(self._ids)) < len(self._ids):
            raise ValueError(f"{source.path} uses an id twice, and latents go by the ids: mend it.")
        self._noise_ids = np.array([noise_id(example_id) for example_id in self._ids], np.int32)
        self._shapes = shapes_of(source, self._data)
        self._key = jax.random.key(latents.seed)
        self._run = jax.jit(
            lambda networks, batch, key: encode_rows(
                networks, batch, key, config.objective, latents, schedule
            )
        )

    def __call__(self, batches: Sequence[range]) -> Iterator[list[Encoded | None]]:
        """The examples of each batch, in the plan's order; None for one that could not be read.

        Args:
          batches: numbers of rows; a batch that is not full is filled up with padding.
        """
        numbers = [[*rows] + [PADDING] * (self._data.batch_size - len(rows)) for rows in batches]
        read = batches_of(
            _Rows(self._rows, list(itertools.chain(*numbers))),
            self._data,
            *batch_part(self._mesh, jax.process_index()),
        )
        with closing(iter(read)) as read:
            started = map(self._start, read)
            # A batch is fetched once the next one is started: the device need not wait for files.
            one_behind = itertools.pairwise(itertools.chain(started, [None]))
            for rows, (made, _) in zip(batches, one_behind, strict=True):
                yield self._examples(rows, *multihost_utils.process_allgather(made, tiled=True))

    def _start(self, local: Batch) -> tuple[Array | None, ...]:
        """Numbers of the examples, segments, and what is made of them, on the devices."""
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
    ) -> list[Encoded | None]:
        """Takes a batch apart. Where in it a row lies is up to the mesh, so examples are found."""
        places = {number: place for place, number in np.ndenumerate(numbers) if number >= 0}
        examples: list[Encoded | None] = []
        for number in itertools.chain.from_iterable(self._plan[row][1] for row in rows):
            if number not in places:
                examples.append(None)
                continue
            row, place = places[number]
            mine, shape = segments[row] == place + 1, self._shapes[number]
            sizes = (shape.target, *shape.contexts)
            ends = np.cumsum(
                [num_tokens(size, self._data.geometry.pixels_per_token) for size in sizes]
            )
            parts = np.split(latents[row, mine], ends[:-1])
            target, *contexts = map(Latents, sizes, parts)
            sampled = None
            if samples is not None:
                sampled = Latents(shape.target, samples[row, mine][: ends[0]])
            examples.append(Encoded(self._ids[number], target, tuple(contexts), sampled))
        return examples


def encode_rows(
    networks: dict[str, Network],
    batch: Batch,
    key: Key[Array, ""],
    objective: NetworksConfig,
    latents: LatentsConfig,
    schedule: TimeConfig | None,
) -> tuple[Float[Array, "B S C"], Float[Array, "B S C"] | None]:
    """(clean latents of all images, the teacher's samples of the targets), bfloat16.

    Args:
      networks: frozen ones by name.
      batch: pixels; its ``example_ids`` key the samples' noise.
      key: of that noise.
      objective: how prompts are encoded.
      latents: how to sample; nothing is sampled where it asks for no samples.
      schedule: the teacher's.
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
    """Counts examples, tells how fast they come, and stops the job if too many are unreadable."""

    def __init__(self, data: DataConfig, total: int):
        self._data, self._total = data, total
        self._seen = self._unreadable = 0
        self._began = time.monotonic()

    def watch(self, examples: Iterable[Encoded | None]) -> Iterator[Encoded | None]:
        """The examples as they are, each of them counted.

        Raises:
          ValueError: too many could not be read.
        """
        for example in examples:
            self._seen += 1
            self._unreadable += example is None
            check_readable(self._unreadable, self._seen, self._data)
            yield example

    def __str__(self) -> str:
        rate = self._seen / (time.monotonic() - self._began)
        left = (self._total - self._seen) / rate
        return (
            f"{self._seen:,} of {self._total:,} examples, {self._unreadable} unreadable, "
            f"{rate:.1f} examples/s, {left:.0f} s left"
        )


class _Rows(Sequence):
    """Rows of an assembler, or padding, by their numbers."""

    def __init__(self, rows: RowAssembler, numbers: list[int]):
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Batch:
        number = self._numbers[place]
        return self._rows.empty() if number == PADDING else self._rows[number]


def _undisturbed(data: DataConfig) -> DataConfig:
    """Pixels, with nothing dropped, and empty prompts where the sampler wants them."""
    negatives = bool(data.latents.samples) and data.latents.cfg_scale != 1.0
    return dataclasses.replace(
        data,
        caption_dropout=0.0,
        context_dropout=0.0,
        latents=LatentsConfig(),
        negatives=negatives,
    )


def _check(config: Config) -> None:
    """Refuses configs that say too little to make a store."""
    latents = config.data.latents
    if not latents.path:
        raise ValueError("data.latents.path is empty: name the folder that the latents go to.")
    if latents.samples and "teacher" not in config.make_objective().frozen():
        raise ValueError(
            f"A run of {config.objective.kind} has no frozen teacher to make samples with: take "
            "the config of another objective."
        )


def _check_same(folder: Path, changed: Sequence[str]) -> None:
    if changed:
        raise ValueError(
            f"{folder} holds latents made with another {' and '.join(changed)}: choose another "
            "data.latents.path, or delete it."
        )


def _agreed(value) -> np.ndarray:
    """What the first process, which writes the files, says of them."""
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
