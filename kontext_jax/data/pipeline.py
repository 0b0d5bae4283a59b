"""From a data set on disk to packed batches: plan, read, resize, tokenise, assemble.

With a store of latents (``latents.py``), rows hold latents from the store instead of pixels.
Prompts still come from the data set, and the rows are otherwise the same.

All randomness is a pure function of (seed, epoch, example), so the position in the data is one
integer, whatever the number of hosts and workers.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

from kontext_jax.data.index import Index
from kontext_jax.data.latents import (
    DTYPE,
    LatentsConfig,
    LatentStore,
    check_networks,
    open_store,
)
from kontext_jax.data.layout import VERSION, Cache
from kontext_jax.data.packing import PackingConfig, size_key
from kontext_jax.data.plan import Plan
from kontext_jax.data.shapes import Shapes
from kontext_jax.data.sources import CorruptRecordError, TripleSource
from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.files import short_digest
from kontext_jax.geometry import (
    GeometryConfig,
    fit,
    nearest_size,
    num_tokens,
    position_ids,
    size_of,
)
from kontext_jax.settings import Settings, check_least
from kontext_jax.types import Batch, Example, Latents, Prompts, Triple

ENDLESS = 2**40  # rows; Grain requires a length
MAX_EXAMPLE_ID = 2**31  # example ids are int32 on the device
MIN_RECORDS = 1000  # the share of unreadable records is not meaningful for fewer


@dataclass(kw_only=True, unsafe_hash=True)
class DataConfig(Settings):
    """Settings of the data set and the loader.

    Attributes:
      path: folder of the data set, as `data.build` writes it.
      split: split to read.
      batch_size: rows per step, over all devices.
      caption_dropout: probability of dropping an example's prompt.
      context_dropout: probability of dropping an example's contexts, independent of its prompt.
        Classifier-free guidance needs both dropouts. Both must be 0 with ``latents.samples``,
        because a teacher's sample depends on its prompt and contexts.
      num_workers: reader processes; 0 reads in threads of this process.
      prefetch: batches to read ahead, one thread each, if ``num_workers`` is 0.
      max_skipped: a run stops if a larger share of the records read so far is unreadable.
      negatives: whether batches also carry empty prompts, see `Batch.negative`.
      latents: store of latents to read instead of pixels.
      geometry: sizes and positions of images.
      packing: capacity of a row.
      text: tokenisation of prompts.
    """

    path: str = ""
    split: str = "train"
    batch_size: int = 16
    caption_dropout: float = 0.1
    context_dropout: float = 0.0
    num_workers: int = 0
    prefetch: int = 4
    max_skipped: float = 0.01
    negatives: bool = False
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self):
        check_least(self, "data.", batch_size=1, num_workers=0, prefetch=0)
        for name in ("caption_dropout", "context_dropout", "max_skipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} {getattr(self, name)} must be from 0 to 1.")
        for name in ("caption_dropout", "context_dropout"):
            if self.latents.samples and getattr(self, name):
                raise ValueError(
                    f"data.{name} is {getattr(self, name):g}, but a teacher's samples depend on "
                    f"their prompts and contexts: set data.{name} or data.latents.samples to 0."
                )


class RowAssembler(Sequence):
    """Endless sequence of packed rows, each a `Batch` without its row axis."""

    def __init__(
        self,
        source: TripleSource,
        plan: Plan,
        config: DataConfig,
        seed: int,
        latents: LatentStore | None = None,
    ):
        """Reads images from ``latents`` if given, else from ``source``."""
        self._source = source
        self._plan = plan
        self._config = config
        self._seed = seed
        self._latents = latents
        self._tokenizer = Tokenizer(config.text)
        self._empty_prompt = self._tokenised("")

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, row: int) -> Batch:
        epoch, indices = self._plan[row]
        first_id = epoch * len(self._source) % MAX_EXAMPLE_ID
        examples: list[Example | None] = []
        for index in indices:
            try:
                examples.append(self._example(epoch, index))
            except CorruptRecordError as error:
                logging.warning("Skipped a record. %s", error)
                examples.append(None)
        return self._assemble(examples, [(first_id + index) % MAX_EXAMPLE_ID for index in indices])

    def empty(self) -> Batch:
        """A row of padding, to complete a batch."""
        return self._assemble([], [])

    def _assemble(self, examples: Sequence[Example | None], ids: Sequence[int]) -> Batch:
        if self._latents is None:
            row = assemble(examples, ids, self._plan.slots, self._config)
        else:
            row = assemble(examples, ids, {}, self._config, self._latents.meta.channels)
        return row.replace(
            negative=empty_prompts(row, **self._empty_prompt) if self._config.negatives else None
        )

    def _example(self, epoch: int, index: int) -> Example:
        rng = np.random.default_rng((self._seed, epoch, index))
        caption_draw, context_draw, sample_draw = rng.random(3).tolist()
        example = self._read(index, sample_draw < self._config.latents.samples)
        if caption_draw < self._config.caption_dropout:
            example = example._replace(**self._empty_prompt)
        if context_draw < self._config.context_dropout:
            example = example._replace(contexts=())
        return example

    def _read(self, index: int, synthetic: bool) -> Example:
        """Reads one example without dropout; the target is the teacher's if ``synthetic``."""
        if self._latents is None:
            return prepare(self._source[index], self._tokenizer, self._config.geometry)
        record = self._source.record(index)
        stored = self._latents[record["id"]]
        target = stored.sample if synthetic else stored.target
        return Example(stored.id, target, stored.contexts, **self._tokenised(record["prompt"]))

    def _tokenised(self, prompt: str) -> dict[str, Int[np.ndarray, " _"]]:
        return {"text_ids": self._tokenizer(prompt), "clip_ids": self._tokenizer.clip(prompt)}


def prepare(triple: Triple, tokenizer: Tokenizer, geometry: GeometryConfig) -> Example:
    """Resizes each image to its nearest size and tokenises the prompt."""
    target, *contexts = (fit(image, geometry.sizes) for image in (triple.target, *triple.contexts))
    return Example(
        triple.id,
        target,
        tuple(contexts),
        tokenizer(triple.prompt),
        tokenizer.clip(triple.prompt),
    )


def prepare_all(triples: Sequence[Triple], config: DataConfig) -> list[Example]:
    """Applies `prepare` to every triple."""
    tokenizer = Tokenizer(config.text)
    return [prepare(triple, tokenizer, config.geometry) for triple in triples]


def assemble(
    examples: Sequence[Example | None],
    ids: Sequence[int],
    slots: dict[str, int],
    config: DataConfig,
    channels: int = 0,
) -> Batch:
    """Lays out examples in one row.

    Args:
      examples: examples of the row; None leaves a gap for a record that could not be read.
      ids: global indices of the examples; they key the noise.
      slots: capacity of the row in images of each size, see `Plan.slots`; empty for latents.
      config: capacities, geometry and CLIP length.
      channels: channels of a latent token; 0 for pixels.

    Returns:
      A `Batch` without its row axis.

    Raises:
      ValueError: the examples do not fit into the row.
    """
    geometry, packing = config.geometry, config.packing
    row = _empty_row(slots, packing, config.text.clip_length, channels)
    starts = _slot_starts(slots, geometry)
    filled = dict.fromkeys(slots, 0)
    token = text = 0
    for segment, (example, example_id) in enumerate(zip(examples, ids, strict=True), start=1):
        if example is None:
            row.skipped[...] += 1
            continue
        images = (example.target, *example.contexts)
        sizes = [image.size if isinstance(image, Latents) else size_of(image) for image in images]
        count = sum(num_tokens(size, geometry.pixels_per_token) for size in sizes)
        text_end = text + len(example.text_ids)
        if (
            token + count > packing.image_tokens
            or text_end > packing.text_tokens
            or segment > packing.max_examples
        ):
            raise ValueError(f"Example {example.id} does not fit into the rest of its row.")
        span = slice(token, token + count)
        row.positions[span] = position_ids(sizes[0], sizes[1:], geometry)
        row.segments[span] = segment
        row.offsets[span] = np.arange(count)
        row.is_target[token : token + num_tokens(sizes[0], geometry.pixels_per_token)] = True
        for image, size in zip(images, sizes, strict=True):
            key, tokens = size_key(size), num_tokens(size, geometry.pixels_per_token)
            if isinstance(image, Latents):
                row.latents[token : token + tokens] = image.tokens
            else:
                slot = filled[key]
                row.images[key][slot] = image
                row.image_segments[key][slot] = segment
                row.source[token : token + tokens] = starts[key] + slot * tokens + np.arange(tokens)
                filled[key] += 1
            token += tokens
        row.text_ids[text:text_end] = example.text_ids
        row.text_segments[text:text_end] = segment
        row.clip_ids[segment - 1] = example.clip_ids
        row.example_ids[segment - 1] = example_id
        text = text_end
    return row


def empty_prompts(
    row: Batch, text_ids: Int[np.ndarray, " l"], clip_ids: Int[np.ndarray, " q"]
) -> Prompts:
    """An empty prompt for each example of a row, laid out as in `assemble`.

    They always fit, because no prompt has fewer tokens than the empty one.

    Args:
      row: a row from `assemble`.
      text_ids: T5 token ids of the empty prompt.
      clip_ids: CLIP token ids of the empty prompt.
    """
    fields = (row.text_ids, row.text_segments, row.clip_ids)
    prompts = Prompts(*(np.zeros_like(field) for field in fields))
    text = 0
    for i in np.flatnonzero(row.example_ids >= 0):
        text_end = text + len(text_ids)
        prompts.text_ids[text:text_end] = text_ids
        prompts.text_segments[text:text_end] = i + 1
        prompts.clip_ids[i] = clip_ids
        text = text_end
    return prompts


def noise_id(example_id: str) -> int:
    """Integer that keys an example's noise, whatever list or row the example is in."""
    return zlib.crc32(example_id.encode()) % MAX_EXAMPLE_ID


def check_readable(unreadable: int, total: int, config: DataConfig) -> None:
    """Refuses data with too many unreadable records.

    Args:
      unreadable: records that could not be read.
      total: records read so far, including unreadable ones; at least `MIN_RECORDS` are assumed.
      config: limit of the unreadable share.

    Raises:
      ValueError: the share of unreadable records exceeds ``config.max_skipped``.
    """
    if unreadable > config.max_skipped * max(total, MIN_RECORDS):
        raise ValueError(
            f"{unreadable} of {total} records could not be read, more than data.max_skipped = "
            f"{config.max_skipped}. Fix {config.path} or raise data.max_skipped."
        )


def _empty_row(
    slots: dict[str, int], packing: PackingConfig, clip_length: int, channels: int
) -> Batch:
    tokens, text_tokens = packing.image_tokens, packing.text_tokens
    return Batch(
        images={
            key: np.zeros((count, *map(int, key.split("x")), 3), np.uint8)
            for key, count in slots.items()
        },
        image_segments={key: np.zeros(count, np.int32) for key, count in slots.items()},
        source=np.zeros(tokens, np.int32),
        positions=np.zeros((tokens, 3), np.int32),
        segments=np.zeros(tokens, np.int32),
        is_target=np.zeros(tokens, bool),
        offsets=np.zeros(tokens, np.int32),
        text_ids=np.zeros(text_tokens, np.int32),
        text_segments=np.zeros(text_tokens, np.int32),
        clip_ids=np.zeros((packing.max_examples, clip_length), np.int32),
        example_ids=np.full(packing.max_examples, -1, np.int32),
        skipped=np.zeros((), np.int32),
        latents=np.zeros((tokens, channels), DTYPE) if channels else None,
    )


def _order_settings(config: DataConfig) -> dict[str, str]:
    """The settings that decide which examples come when, and what they look like."""
    names = ("split", "caption_dropout", "context_dropout", "geometry", "packing", "text")
    return {name: repr(getattr(config, name)) for name in names}


def _slot_starts(slots: dict[str, int], geometry: GeometryConfig) -> dict[str, int]:
    """Index of each size's first token among all encoded tokens of a row."""
    starts, total = {}, 0
    for key in sorted(slots):
        starts[key] = total
        height, width = map(int, key.split("x"))
        total += slots[key] * num_tokens((width, height), geometry.pixels_per_token)
    return starts


def plan_of(source: TripleSource, config: DataConfig, seed: int) -> Plan:
    """Packing plan of a data set, from the sizes and prompt lengths in its index.

    The examples of large data sets are sorted once, in a folder beside the data set or, if that
    cannot be written to, in the user's cache. It may be deleted.
    """
    shapes = shapes_of(source.index, config)
    settings = (source.fingerprint, config.geometry, config.packing, config.text)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Cache(
        folders=(source.path / "plans", home / "kontext_jax" / "plans"),
        key=f"{source.split}-{short_digest(repr((VERSION, settings)))}",
    )
    ids = source.index.ids
    return Plan(shapes, ids, config.packing, config.geometry, seed, cache)


def shapes_of(index: Index, config: DataConfig) -> Shapes:
    """Shapes of all examples of a data set, from its index."""
    columns = index.columns
    heights, widths = columns.sizes.T.astype(np.int64)
    raw, raw_of = np.unique(heights << 32 | widths, return_inverse=True)
    sizes = config.geometry.sizes
    nearest = [sizes.index(nearest_size(int(x % 2**32), int(x >> 32), sizes)) for x in raw]
    return Shapes(
        sizes=sizes,
        images=np.array(nearest)[raw_of],
        ends=columns.shape_ends,
        entries=columns.shapes,
        lengths=columns.prompt_bytes,
        text_tokens=Tokenizer(config.text).max_lengths,
    )


def batches_of(
    rows: Sequence, config: DataConfig, process_index: int, process_count: int
) -> grain.experimental.ElasticIterator:
    """Iterates over this process's share of each batch of ``config.batch_size`` rows."""
    workers = None
    if config.num_workers:
        workers = grain.MultiprocessingOptions(num_workers=config.num_workers)
    threads = max(1, config.prefetch)
    return grain.experimental.ElasticIterator(
        grain.MapDataset.source(rows),
        config.batch_size,
        grain.sharding.ShardOptions(process_index, process_count),
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads),
        multiprocessing_options=workers,
    )


class Loader:
    """Endless batches of this process's rows; the state is one integer, equal on all processes.

    Attributes:
      source: the data set.
      plan: the packed rows.
      latents: the store that images are read from instead of ``source``, or None.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens the data set and plans its rows.

        Raises:
          FileNotFoundError: the data set or the store of latents is missing or incomplete.
          ValueError: the data set is empty or damaged, or the store was made from other data or
            with other settings.
        """
        self.source = TripleSource(config.path, config.split)
        self.plan = plan_of(self.source, config, seed)
        self.latents = None
        if config.latents.path:
            self.latents = open_store(config.latents, self.source, config.geometry, config.text)
        self._config = config
        self._identity = {
            "data": self.source.fingerprint,
            "seed": seed,
            "plan": self.plan.fingerprint(),
            "latents": self._latents_identity(),
        } | _order_settings(config)
        rows = RowAssembler(self.source, self.plan, config, seed, self.latents)
        self._rows = iter(batches_of(rows, config, process_index, process_count))

    def _latents_identity(self) -> list | None:
        if self.latents is None:
            return None
        return [self._config.latents.samples, self.latents.meta.fingerprint()]

    def check_networks(self, networks: Mapping[str, list], usage: Mapping[str, str]) -> None:
        """Refuses networks other than those that made the latents.

        Args:
          networks: identity of the run's networks, by name (`locations.identity_of`).
          usage: how the run uses them (`locations.usage_of`).

        Raises:
          ValueError: a network or its usage differs.
        """
        if self.latents is not None:
            check_networks(self.latents.meta, self._config.latents, networks, usage)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return next(self._rows)

    def state(self) -> dict:
        """The current position, for `restore`: JSON values, equal on all processes."""
        return {"position": self._rows.get_state(), "identity": self._identity}

    def restore(self, state: dict) -> None:
        """Continues from the position in ``state``.

        Raises:
          ValueError: the data or the settings that decide its order differ from those of ``state``.
        """
        changed = [k for k, v in self._identity.items() if state["identity"].get(k) != v]
        if changed:
            raise ValueError(
                "The checkpoint's position in the data was saved with a different "
                f"{' and '.join(changed)}, so the order of examples would change: use the same "
                "data settings or a new --workdir."
            )
        self._rows.set_state(state["position"])

    def close(self) -> None:
        """Stops the reader threads or processes."""
        self._rows.close()
