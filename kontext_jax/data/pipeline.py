"""From a data set on disk to packed batches: plan, read, resize, tokenise, assemble.

With a store of latents (``latents.py``) no image is read: what an encoder made of them comes from
there, and prompts from the data set; all else is the same, row by row.

Everything random here is a pure function of (seed, epoch, example), so that the position in the
data is one integer, whatever the number of hosts and workers.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

from kontext_jax.data.latents import (
    DTYPE,
    LatentsConfig,
    LatentStore,
    check_networks,
    open_store,
)
from kontext_jax.data.packing import PackingConfig, Plan, Shape, size_key
from kontext_jax.data.sources import CorruptRecordError, TripleSource
from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.geometry import (
    GeometryConfig,
    Size,
    fit,
    nearest_size,
    num_tokens,
    position_ids,
    size_of,
)
from kontext_jax.settings import Settings, check_least
from kontext_jax.types import Batch, Example, Latents, Prompts, Triple

ENDLESS = 2**40  # rows; Grain wants a length
MAX_EXAMPLE_ID = 2**31  # example ids are int32 on the device
MIN_SEEN = 1000  # records after which the share of unreadable ones means something


@dataclass(kw_only=True, unsafe_hash=True)
class DataConfig(Settings):
    """What to read and how to feed it.

    Attributes:
      path, split: the data set, as `data.build` writes it.
      batch_size: rows a step, over all devices.
      caption_dropout: probability that an example is shown without its prompt.
      context_dropout: probability that an example is shown without its contexts. Both are what
        classifier-free guidance needs; they are drawn independently. With ``latents.samples``
        neither may be: a teacher's sample was made with its prompt and its contexts.
      num_workers: reading processes; 0 reads in threads of this one.
      prefetch: batches read ahead, a thread each, where ``num_workers`` is 0.
      max_skipped: share of unreadable records, of those seen, at which a run stops.
      negatives: whether batches carry empty prompts beside their own, see `Batch.negative`.
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
                    f"data.{name} is {getattr(self, name):g}, but a teacher's samples were made "
                    "with their prompts and contexts: set it, or data.latents.samples, to 0."
                )


class RowAssembler(Sequence):
    """Row k of an endless run, as a `Batch` without its row axis."""

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
        self._no_prompt = self._tokenized("")

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, row: int) -> Batch:
        epoch, indices = self._plan[row]
        first = epoch * len(self._source) % MAX_EXAMPLE_ID
        examples: list[Example | None] = []
        for index in indices:
            try:
                examples.append(self._example(epoch, index))
            except CorruptRecordError as error:
                logging.warning("Skipped a record. %s", error)
                examples.append(None)
        return self._assembled(examples, [(first + index) % MAX_EXAMPLE_ID for index in indices])

    def empty(self) -> Batch:
        """A row of padding, for batches that the plan does not fill."""
        return self._assembled([], [])

    def _assembled(self, examples: Sequence[Example | None], ids: Sequence[int]) -> Batch:
        if self._latents is None:
            row = assemble(examples, ids, self._plan.slots, self._config)
        else:
            row = assemble(examples, ids, {}, self._config, self._latents.meta.channels)
        return row.replace(
            negative=negatives(row, **self._no_prompt) if self._config.negatives else None
        )

    def _example(self, epoch: int, index: int) -> Example:
        rng = np.random.default_rng((self._seed, epoch, index))
        draw_caption, draw_context, draw_sample = rng.random(3).tolist()
        example = self._read(index, draw_sample < self._config.latents.samples)
        if draw_caption < self._config.caption_dropout:
            example = example._replace(**self._no_prompt)
        if draw_context < self._config.context_dropout:
            example = example._replace(contexts=())
        return example

    def _read(self, index: int, synthetic: bool) -> Example:
        """One example, nothing dropped; if ``synthetic``, with the teacher's target."""
        if self._latents is None:
            return prepare(self._source[index], self._tokenizer, self._config.geometry)
        record = self._source.record(index)
        stored = self._latents[record["id"]]
        target = stored.sample if synthetic else stored.target
        return Example(stored.id, target, stored.contexts, **self._tokenized(record["prompt"]))

    def _tokenized(self, prompt: str) -> dict[str, Int[np.ndarray, " _"]]:
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
    """`prepare` for each of some triples."""
    tokenizer = Tokenizer(config.text)
    return [prepare(triple, tokenizer, config.geometry) for triple in triples]


def assemble(
    examples: Sequence[Example | None],
    ids: Sequence[int],
    slots: dict[str, int],
    config: DataConfig,
    channels: int = 0,
) -> Batch:
    """Lays examples out in one row; None leaves a gap, for a record that could not be read.

    Args:
      examples: what the row holds.
      ids: their global indices; they key the noise.
      slots: images of each size that the row has room for, see `Plan.slots`; none for latents.
      config: capacities, geometry, and how many CLIP ids a prompt takes.
      channels: of the tokens, where the examples' images are latents.

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
            raise ValueError(f"Example {example.id} does not fit into what is left of its row.")
        place = slice(token, token + count)
        row.positions[place] = position_ids(sizes[0], sizes[1:], geometry)
        row.segments[place] = segment
        row.offsets[place] = np.arange(count)
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


def negatives(
    row: Batch, text_ids: Int[np.ndarray, " l"], clip_ids: Int[np.ndarray, " q"]
) -> Prompts:
    """An empty prompt for each example of a row, laid out as `assemble` does.

    There is room for them, for no prompt takes fewer tokens than the empty one.

    Args:
      row: what `assemble` made.
      text_ids, clip_ids: of the empty prompt.
    """
    fields = (row.text_ids, row.text_segments, row.clip_ids)
    prompts = Prompts(*(np.zeros_like(field) for field in fields))
    text = 0
    for place in np.flatnonzero(row.example_ids >= 0):
        text_end = text + len(text_ids)
        prompts.text_ids[text:text_end] = text_ids
        prompts.text_segments[text:text_end] = place + 1
        prompts.clip_ids[place] = clip_ids
        text = text_end
    return prompts


def noise_id(example_id: str) -> int:
    """Keys an example's noise by its own id, whatever list or row it is in."""
    return zlib.crc32(example_id.encode()) % MAX_EXAMPLE_ID


def check_readable(unreadable: int, seen: int, config: DataConfig) -> None:
    """Refuses to go on with data of which too much is lost.

    Raises:
      ValueError: more than ``config.max_skipped`` of the records seen could not be read.
    """
    if unreadable > config.max_skipped * max(seen, MIN_SEEN):
        raise ValueError(
            f"{unreadable} of {seen} records could not be read, more than data.max_skipped = "
            f"{config.max_skipped}. Mend {config.path} or raise the limit."
        )


def _empty_row(
    slots: dict[str, int], packing: PackingConfig, clip_length: int, channels: int
) -> Batch:
    places, text_places = packing.image_tokens, packing.text_tokens
    return Batch(
        images={
            key: np.zeros((count, *map(int, key.split("x")), 3), np.uint8)
            for key, count in slots.items()
        },
        image_segments={key: np.zeros(count, np.int32) for key, count in slots.items()},
        source=np.zeros(places, np.int32),
        positions=np.zeros((places, 3), np.int32),
        segments=np.zeros(places, np.int32),
        is_target=np.zeros(places, bool),
        offsets=np.zeros(places, np.int32),
        text_ids=np.zeros(text_places, np.int32),
        text_segments=np.zeros(text_places, np.int32),
        clip_ids=np.zeros((packing.max_examples, clip_length), np.int32),
        example_ids=np.full(packing.max_examples, -1, np.int32),
        skipped=np.zeros((), np.int32),
        latents=np.zeros((places, channels), DTYPE) if channels else None,
    )


def _order(config: DataConfig) -> dict[str, str]:
    """Every setting that decides which examples come when, and how they look."""
    names = ("split", "caption_dropout", "context_dropout", "geometry", "packing", "text")
    return {name: repr(getattr(config, name)) for name in names}


def _slot_starts(slots: dict[str, int], geometry: GeometryConfig) -> dict[str, int]:
    """Where each size's tokens begin among all encoded tokens of a row."""
    starts, total = {}, 0
    for key in sorted(slots):
        starts[key] = total
        height, width = map(int, key.split("x"))
        total += slots[key] * num_tokens((width, height), geometry.pixels_per_token)
    return starts


def plan_of(source: TripleSource, config: DataConfig, seed: int) -> Plan:
    """Packs a data set by the sizes and prompt lengths in its index."""
    names = [str(i) for i in source.index.ids]
    return Plan(shapes_of(source, config), names, config.packing, config.geometry, seed)


def shapes_of(source: TripleSource, config: DataConfig) -> list[Shape]:
    """What each example of a data set takes of a row, by the index."""
    index = source.index
    sizes = config.geometry.sizes
    text_tokens = Tokenizer(config.text).reserve(np.asarray(index.prompt_bytes))
    ends = np.cumsum(index.context_counts)
    # nearest_size is asked once for each size that occurs
    known: dict[tuple[int, int], Size] = {}

    def nearest(height_width: Int[np.ndarray, "2"]) -> Size:
        height, width = map(int, height_width)
        if (height, width) not in known:
            known[height, width] = nearest_size(width, height, sizes)
        return known[height, width]

    return [
        Shape(
            nearest(index.target_sizes[i]),
            tuple(nearest(s) for s in index.context_sizes[end - count : end]),
            int(text_tokens[i]),
        )
        for i, (end, count) in enumerate(zip(ends, index.context_counts, strict=True))
    ]


def batches_of(
    rows: Sequence, config: DataConfig, process_index: int, process_count: int
) -> grain.experimental.ElasticIterator:
    """This process's part of each batch of ``config.batch_size`` rows, read ahead."""
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
    """Batches of this process's rows, without end; its state is one integer for all processes.

    Attributes:
      source: the data set.
      plan: its rows.
      latents: the store that images are read from in place of ``source``, or None.
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
          FileNotFoundError, ValueError: the data set or the store of its latents is missing, empty,
            or not what ``config`` asks for.
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
        } | _order(config)
        rows = RowAssembler(self.source, self.plan, config, seed, self.latents)
        self._rows = iter(batches_of(rows, config, process_index, process_count))

    def _latents_identity(self) -> list | None:
        if self.latents is None:
            return None
        return [self._config.latents.samples, self.latents.meta.fingerprint()]

    def check_networks(self, networks: Mapping[str, list], usage: Mapping[str, str]) -> None:
        """Refuses a run whose networks are not those that its latents were made with.

        Args:
          networks: identity of what the run uses, by name (`places.identity_of`).
          usage: how it uses them (`places.usage_of`).

        Raises:
          ValueError: one of them is another, or used in another way.
        """
        if self.latents is not None:
            check_networks(self.latents.meta, self._config.latents, networks, usage)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return next(self._rows)

    def state(self) -> dict:
        """What `restore` needs to go on exactly here: JSON, the same on every process."""
        return {"position": self._rows.get_state(), "identity": self._identity}

    def restore(self, state: dict) -> None:
        """Goes on where ``state`` was taken.

        Raises:
          ValueError: the state is of other data, or of the same data fed in another way.
        """
        changed = [k for k, v in self._identity.items() if state["identity"].get(k) != v]
        if changed:
            raise ValueError(
                f"The checkpoint's position in the data is for another {' and '.join(changed)} "
                "than this run reads, so the order of examples would differ. Use the same data "
                "settings, or start a new --workdir."
            )
        self._rows.set_state(state["position"])

    def close(self) -> None:
        """Stops the reading threads or processes."""
        self._rows.close()
