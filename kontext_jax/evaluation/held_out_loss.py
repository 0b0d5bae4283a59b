r"""The flow-matching loss of held-out examples, at fixed times and with fixed noise.

Training losses use random times, noise and dropped prompts. Here all of these are fixed, so that
two checkpoints differ only by their weights. For an example's target x and noise e at time t, the
loss is the mean over target tokens and channels of (see ``flow.py`` for the path and velocity)

    (1)  |v(x_t, t) - (e - x)|^2,    x_t = (1 - t) x + t e,

and times lie on an unshifted grid: t = i / n or t = (i + 1/2) / n for *level* i of n (Esser et al.,
arXiv 2403.03206, section 5.3, use n = 8). Prompts and contexts are never dropped.

MLPerf Training's text_to_image benchmark (FLUX.1, v5.1 to v6.1) is the case `MLPERF`: COCO 2014's
validation images, 256 pixels a side, sorted by annotation id, with example k at level k mod 8. Its
result is the mean over all examples: "mean" in `summarise_losses`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from kontext_jax import flow
from kontext_jax.config import LossConfig
from kontext_jax.data.pipeline import DataConfig, noise_id
from kontext_jax.encoders import encode_images, image_tokens
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import Autoencoder
from kontext_jax.objectives import Network
from kontext_jax.objectives.flow_matching import square_error
from kontext_jax.objectives.transformer import NetworksConfig, per_example, target_membership
from kontext_jax.sampling.generator import pack
from kontext_jax.sharding import BATCH_AXES, batch_sharding
from kontext_jax.types import Batch, Example, Task, Triple
from kontext_jax.weights.fingerprint import fingerprint

Layout = Sequence[tuple[int, int, int]]
"""(row, segment, example) of each example in a batch."""

MLPERF = LossConfig(num_times=8, grid="left", levels="index", sample_latents=True)
"""MLPerf Training's protocol for FLUX.1."""

MLPERF_SAMPLES = 29_696
"""Examples in MLPerf's validation set: captions of COCO 2014 with their images."""

MLPERF_TARGET = 0.586
"""A run is done once its mean loss is this or below."""

MLPERF_EVERY = 262_144
"""Training examples between evaluations."""


def check_mlperf(num_examples: int) -> None:
    """Refuses a set that is not of the size of MLPerf's.

    Raises:
      ValueError: the number of examples is wrong.
    """
    if num_examples != MLPERF_SAMPLES:
        raise ValueError(
            f"MLPerf's validation set has {MLPERF_SAMPLES} examples, but this one has "
            f"{num_examples}: evaluate each of MLPerf's once."
        )


def mlperf_eval_steps(batch_size: int) -> int:
    """Training steps between evaluations at ``batch_size`` examples per step, rounded up."""
    return -(-MLPERF_EVERY // batch_size)


def held_out_loss(
    networks: dict[str, Network],
    examples: Sequence[Example],
    data: DataConfig,
    objective: NetworksConfig,
    config: LossConfig,
    mesh: Mesh,
    file: Path | None = None,
) -> list[dict[str, Any]]:
    """One row per example and level: {"id", "index", "level", "t", "loss"}.

    A loss does not depend on the other examples, on the packing, or on the devices.

    Args:
      networks: all networks of the objective, see ``flow_matching.networks_of``.
      examples: examples with unique ids; "index" is an example's position.
      data: batch size and packing.
      objective: conditioning of the networks.
      config: times and noise.
      mesh: devices that batches are split over.
      file: JSON lines to resume from: a header that identifies the losses, then one line per loss,
        appended batch by batch. Only the first process reads and writes it.

    Returns:
      On every process, all rows by index, then by level.

    Raises:
      ValueError: ids repeat, or the file holds other losses.
      RuntimeError: the batches do not hold every example once.
      OSError: the file cannot be read or written.
    """
    ids = [example.id for example in examples]
    _check_ids(ids)
    batches, layouts = pack(examples, data, mesh, with_negatives=False)
    _check_layouts(ids, layouts)
    keys = [(i, level) for i in range(len(ids)) for level in config.levels_of(i)]
    losses: dict[tuple[int, int], float] = {}
    if file is not None:
        header = _header(networks, examples, objective, config, data.geometry)
        losses = _resume(file, header, keys)

    for number, layout in enumerate(layouts):
        batch_keys = [(i, level) for _, _, i in layout for level in config.levels_of(i)]
        if all(key in losses for key in batch_keys):
            continue
        computed = _batch_losses(networks, batches[number], layout, ids, objective, config, mesh)
        new = {key: computed[key] for key in batch_keys if key not in losses}
        losses |= new
        if file is not None and jax.process_index() == 0:
            rows = [_row(ids, config, key, loss) for key, loss in new.items()]
            with file.open("a") as lines:
                lines.write("".join(json.dumps(row) + "\n" for row in rows))
    return [_row(ids, config, key, losses[key]) for key in keys]


def kinds_of(tasks: Iterable[Task | Triple]) -> dict[str, str]:
    """id -> "edit" for tasks with contexts, otherwise "text_to_image"."""
    return {task.id: "edit" if task.contexts else "text_to_image" for task in tasks}


def _row(
    ids: Sequence[str], config: LossConfig, key: tuple[int, int], loss: float
) -> dict[str, Any]:
    index, level = key
    return {
        "id": ids[index],
        "index": index,
        "level": level,
        "t": config.times[level],
        "loss": loss,
    }


def summarise_losses(
    rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Means over examples: {"sum", "count", "mean", "levels", "kinds"}.

    Args:
      rows: rows returned by `held_out_loss`.
      kinds: kind of each id, such as "text_to_image" or "edit".

    Returns:
      Exact sums, rounded once, and means over rows, never means of means. "levels" lists the
      "level", "t", "sum", "count" and "mean" of each level; "kinds" is present if ``kinds`` is
      given, and has a summary of this form per kind.

    Raises:
      ValueError: there are no rows, or the kind of one is missing.
    """
    if not rows:
        raise ValueError("There are no losses to summarise.")
    times = {row["level"]: row["t"] for row in rows}
    levels = [
        {"level": level, "t": times[level]} | _mean([x for x in rows if x["level"] == level])
        for level in sorted(times)
    ]
    summary = _mean(rows) | {"levels": levels}
    if kinds is not None:
        unknown = [row["id"] for row in rows if row["id"] not in kinds]
        if unknown:
            raise ValueError(f"Example {unknown[0]} has no kind: add it to kinds.")
        summary["kinds"] = {
            kind: summarise_losses([row for row in rows if kinds[row["id"]] == kind])
            for kind in sorted({kinds[row["id"]] for row in rows})
        }
    return summary


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total = math.fsum(row["loss"] for row in rows)
    return {"sum": total, "count": len(rows), "mean": total / len(rows)}


def _check_ids(ids: Sequence[str]) -> None:
    counts = Counter(ids)
    repeated = [name for name in counts if counts[name] > 1]
    if repeated:
        name = repeated[0]
        raise ValueError(f"Example {name} occurs {counts[name]} times: ids must be unique.")


def _check_layouts(ids: Sequence[str], layouts: Sequence[Layout]) -> None:
    """Checks that the batches hold every example once."""
    times = Counter(i for layout in layouts for _, _, i in layout)
    wrong = [f"{name} {times[i]} times" for i, name in enumerate(ids) if times[i] != 1]
    if wrong:
        raise RuntimeError(
            f"The batches hold {', '.join(wrong[:3])}, but must hold each of the {len(ids)} "
            "examples once."
        )


def _check_batch(batch: Batch, layout: Layout, ids: Sequence[str]) -> None:
    """Checks that a batch matches its layout."""
    expected = {(row, segment - 1, noise_id(ids[i])) for row, segment, i in layout}
    slots = np.argwhere(batch.example_ids >= 0).tolist()
    if expected != {(row, slot, int(batch.example_ids[row, slot])) for row, slot in slots}:
        raise RuntimeError(f"The batch with {ids[layout[0][2]]} does not match its layout.")


def _batch_losses(
    networks: dict[str, Network],
    batch: Batch,
    layout: Layout,
    ids: Sequence[str],
    objective: NetworksConfig,
    config: LossConfig,
    mesh: Mesh,
) -> dict[tuple[int, int], float]:
    """(index, level) -> loss, for the examples of a batch."""
    _check_batch(batch, layout, ids)
    passes = len(config.levels_of(0))
    levels = np.zeros((passes, *batch.example_ids.shape), np.int32)
    hashes = np.zeros((*batch.example_ids.shape, 2), np.int32)
    for row, segment, i in layout:
        levels[:, row, segment - 1] = config.levels_of(i)
        hashes[row, segment - 1] = _hash(ids[i])
    with jax.set_mesh(mesh):
        batch, hashes = jax.device_put((batch, hashes), batch_sharding(mesh))
        levels = jax.device_put(levels, NamedSharding(mesh, P(None, BATCH_AXES)))
        losses = _losses(networks, batch, hashes, levels, objective, config)
        losses = np.asarray(multihost_utils.process_allgather(losses, tiled=True))
    return {
        (i, level): float(losses[number, row, segment - 1])
        for row, segment, i in layout
        for number, level in enumerate(config.levels_of(i))
    }


def _hash(example_id: str) -> Int[np.ndarray, "2"]:
    """62 bits of an id, for noise keys.

    With 31 bits, two of MLPerf's examples would share noise with a probability of one in five.
    """
    digest = hashlib.sha256(example_id.encode()).digest()
    return np.frombuffer(digest[:8], "<i4").astype(np.int32) & 0x7FFFFFFF


@functools.partial(jax.jit, static_argnames=("objective", "config"))
def _losses(
    networks: dict[str, Network],
    batch: Batch,
    hashes: Int[Array, "B N 2"],
    levels: Int[Array, "passes B N"],
    objective: NetworksConfig,
    config: LossConfig,
) -> Float[Array, "passes B N"]:
    """The loss of every example slot at each pass's levels; 0 in empty slots."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    keys = flow.example_keys(jax.random.key(config.seed), hashes[:, :, 0])
    noise_keys, latent_keys = flow.split_keys(fold(keys, hashes[:, :, 1]), 2)
    latents = encode_images(networks["autoencoder"], batch)
    if config.sample_latents:
        latents = latents + _latent_noise(networks["autoencoder"], batch, latent_keys)
    tokens = objective.tokens(networks, batch, latents)
    member, counts = target_membership(tokens)
    times = jnp.asarray(config.times, jnp.float32)

    def loss_at(levels: Int[Array, "B N"]) -> Float[Array, "B N"]:
        square = square_error(
            networks["transformer"],
            tokens,
            times[levels],
            fold(noise_keys, levels),
            objective.guidance,
        )
        return per_example(square, member, counts)

    return jax.lax.map(loss_at, levels)


def _latent_noise(
    autoencoder: Autoencoder, batch: Batch, keys: Key[Array, "B N"]
) -> Float[Array, "B S C"]:
    """The difference of sampled target latents from the mean of the encoder's distribution."""

    def scaled_std(pixels: Float[Array, "n h w 3"]) -> Float[Array, "n _ _ _"]:
        _, logvar = autoencoder.moments(pixels)
        return autoencoder.config.scale_factor * jnp.exp(0.5 * logvar)

    std = image_tokens(scaled_std, batch)
    noise = flow.token_noise(keys, batch.segments, batch.offsets, std.shape[-1])
    return jnp.where(batch.is_target[:, :, None], std * noise, 0.0)


def _header(
    networks: dict[str, Network],
    examples: Sequence[Example],
    objective: NetworksConfig,
    config: LossConfig,
    geometry: GeometryConfig,
) -> dict[str, Any]:
    """Everything that determines the losses, up to rounding."""
    digest = hashlib.sha256()
    for example in examples:
        for leaf in jax.tree.leaves(example):
            data = leaf.encode() if isinstance(leaf, str) else np.ascontiguousarray(leaf).tobytes()
            digest.update(f"{np.shape(leaf)} {len(data)} ".encode() + data)
    return dataclasses.asdict(config) | {
        "pooled": objective.pooled,
        "guidance": objective.guidance,
        "geometry": repr(geometry),
        "networks": {
            name: [fingerprint(network), repr(network.config)]
            for name, network in sorted(networks.items())
        },
        "examples": [len(examples), digest.hexdigest()],
    }


def _resume(
    file: Path, header: dict[str, Any], keys: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """Reads the stored losses on the first process and broadcasts them."""
    losses: dict[tuple[int, int], float] = {}
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            losses = _read(file, header)
        except (OSError, ValueError) as problem:  # the other processes wait for the broadcast
            error = problem
    known = np.array([key in losses for key in keys])
    values = np.array([losses.get(key, 0.0) for key in keys], np.float32)
    received = multihost_utils.broadcast_one_to_all((np.array(error is None), known, values))
    is_readable, known, values = map(np.asarray, received)
    if not is_readable:
        raise error or ValueError(f"The first process cannot resume {file}: see its error.")
    return {
        key: float(value)
        for key, is_known, value in zip(keys, known, values, strict=True)
        if is_known
    }


def _read(file: Path, header: dict[str, Any]) -> dict[tuple[int, int], float]:
    """The losses in a file; drops a truncated last line, and writes the header of a new file."""
    first = (json.dumps(header) + "\n").encode()
    stored = file.read_bytes() if file.exists() else b""
    if first.startswith(stored):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(first)
        return {}
    stored_header, *lines = stored[: stored.rfind(b"\n") + 1].splitlines() or [b""]
    try:
        stored_header = json.loads(stored_header)
        rows = [json.loads(line) for line in lines]
        losses = {(row["index"], row["level"]): row["loss"] for row in rows}
        current = json.loads(first)
        changed = [key for key in current if stored_header.get(key) != current[key]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a file of held-out losses, or is damaged: delete it and start again."
        ) from error
    if changed:
        raise ValueError(
            f"{file} holds losses computed with different {' and '.join(changed)}: delete it and "
            "start again, or write to another folder."
        )
    os.truncate(file, stored.rfind(b"\n") + 1)
    return losses
