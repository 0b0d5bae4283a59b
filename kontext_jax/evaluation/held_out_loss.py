r"""The flow-matching loss of examples held out, at fixed times and with fixed noise.

Training losses are of random times, noise and dropped prompts. Here all of this is fixed, so that
two checkpoints differ by their weights alone. Of an example's target x and its noise e, at time t,
the loss is the mean over target tokens and channels (``flow.py`` has the line and its velocity)

    (1)  |v(x_t, t) - (e - x)|^2,    x_t = (1 - t) x + t e,

and times lie on a grid, which is not shifted: t = i / n or t = (i + 1/2) / n for *level* i of n
(Esser et al., arXiv 2403.03206, section 5.3, have n = 8). Prompts and contexts stay as they are.

MLPerf Training's text_to_image benchmark (FLUX.1, v5.1 to v6.1) is the case `MLPERF`: COCO 2014's
validation images, 256 pixels a side, sorted by the id of their annotation, example k at level
k mod 8. Its result is the mean over all examples: `summarise_losses`' "mean".
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
"""The (row, segment, example) of everything in a batch."""


MLPERF = LossConfig(num_times=8, grid="left", levels="index", sample_latents=True)
"""How MLPerf Training evaluates FLUX.1."""

MLPERF_SAMPLES = 29_696
"""A caption and its image from COCO 2014's validation set each."""

MLPERF_TARGET = 0.586
"""A run is done once the mean of all losses is this or below."""

MLPERF_EVERY = 262_144
"""Training examples from one evaluation to the next."""


def check_mlperf(num_examples: int) -> None:
    """Refuses a set of examples that cannot be MLPerf's.

    Raises:
      ValueError: there are more or fewer.
    """
    if num_examples != MLPERF_SAMPLES:
        raise ValueError(
            f"MLPerf's validation set has {MLPERF_SAMPLES} examples, this one {num_examples}: "
            "evaluate all of them, each once."
        )


def mlperf_eval_steps(batch_size: int) -> int:
    """Steps from one evaluation to the next, rounded up, with ``batch_size`` examples a step."""
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
    """The loss of each example at each of its levels: {"id", "index", "level", "t", "loss"}.

    A loss does not depend on the other examples, on the packing, or on the devices.

    Args:
      networks: all that the objective has, see ``flow_matching.networks_of``.
      examples: ids differ; "index" counts them from 0.
      data: rows a batch, and how they are packed.
      objective: how the networks are conditioned.
      config: times and noise.
      mesh: over which batches are split.
      file: a line of JSON for each loss, written batch by batch after a first line that says what
        they are of. What is there is not computed again, so that whoever was stopped goes on.
        Only the first process reads and writes it.

    Returns:
      Of every process, all losses, by index and then by level.

    Raises:
      ValueError: two examples have one id, or the file holds something else.
      RuntimeError: batches do not hold every example once.
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
        losses = _begin(file, header, keys)

    for number, layout in enumerate(layouts):
        here = [(i, level) for _, _, i in layout for level in config.levels_of(i)]
        if all(key in losses for key in here):
            continue
        found = _batch_losses(networks, batches[number], layout, ids, objective, config, mesh)
        new = {key: found[key] for key in here if key not in losses}
        losses |= new
        if file is not None and jax.process_index() == 0:
            rows = [_row(ids, config, key, loss) for key, loss in new.items()]
            with file.open("a") as lines:
                lines.write("".join(json.dumps(row) + "\n" for row in rows))
    return [_row(ids, config, key, losses[key]) for key in keys]


def kinds_of(tasks: Iterable[Task | Triple]) -> dict[str, str]:
    """Each one's kind by its id: edits have contexts."""
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
    """Means over examples, never means of means: {"sum", "count", "mean", "levels", "kinds"}.

    Args:
      rows: what `held_out_loss` returned.
      kinds: of each id, such as "text_to_image" or "edit".

    Returns:
      Sums are exact and rounded once. "levels" is a list with "level", "t", "sum", "count" and
      "mean" of each; "kinds", if given, has all of this by kind.

    Raises:
      ValueError: there are no rows, or the kind of one is unknown.
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
            raise ValueError(f"The kind of example {unknown[0]} is not known: add it to kinds.")
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
    again = [name for name in counts if counts[name] > 1]
    if again:
        raise ValueError(f"Example {again[0]} occurs {counts[again[0]]} times: ids must differ.")


def _check_layouts(ids: Sequence[str], layouts: Sequence[Layout]) -> None:
    """Refuses batches that do not hold every example once."""
    times = Counter(i for layout in layouts for _, _, i in layout)
    wrong = [f"{name} {times[i]} times" for i, name in enumerate(ids) if times[i] != 1]
    if wrong:
        raise RuntimeError(
            f"The batches hold {', '.join(wrong[:3])}, but each of the {len(ids)} examples counts "
            "once."
        )


def _check_batch(batch: Batch, layout: Layout, ids: Sequence[str]) -> None:
    """Refuses a batch that does not hold what its layout says."""
    said = {(row, segment - 1, noise_id(ids[i])) for row, segment, i in layout}
    places = np.argwhere(batch.example_ids >= 0).tolist()
    if said != {(row, place, int(batch.example_ids[row, place])) for row, place in places}:
        raise RuntimeError(f"A batch with {ids[layout[0][2]]} does not hold what its layout says.")


def _batch_losses(
    networks: dict[str, Network],
    batch: Batch,
    layout: Layout,
    ids: Sequence[str],
    objective: NetworksConfig,
    config: LossConfig,
    mesh: Mesh,
) -> dict[tuple[int, int], float]:
    """The losses of the examples in a batch, by index and level."""
    _check_batch(batch, layout, ids)
    passes = len(config.levels_of(0))
    levels = np.zeros((passes, *batch.example_ids.shape), np.int32)
    names = np.zeros((*batch.example_ids.shape, 2), np.int32)
    for row, segment, i in layout:
        levels[:, row, segment - 1] = config.levels_of(i)
        names[row, segment - 1] = _name(ids[i])
    with jax.set_mesh(mesh):
        rows = batch_sharding(mesh)
        batch, names = jax.device_put((batch, names), rows)
        on_device = jax.device_put(levels, NamedSharding(mesh, P(None, BATCH_AXES)))
        out = _losses(networks, batch, names, on_device, objective, config)
        out = np.asarray(multihost_utils.process_allgather(out, tiled=True))
    return {
        (i, level): float(out[number, row, segment - 1])
        for row, segment, i in layout
        for number, level in enumerate(config.levels_of(i))
    }


def _name(example_id: str) -> Int[np.ndarray, "2"]:
    """62 bits of an id for keys: 31 have two of MLPerf's examples share noise one time in five."""
    digest = hashlib.sha256(example_id.encode()).digest()
    return np.frombuffer(digest[:8], "<i4").astype(np.int32) & 0x7FFFFFFF


@functools.partial(jax.jit, static_argnames=("objective", "config"))
def _losses(
    networks: dict[str, Network],
    batch: Batch,
    names: Int[Array, "B N 2"],
    levels: Int[Array, "passes B N"],
    objective: NetworksConfig,
    config: LossConfig,
) -> Float[Array, "passes B N"]:
    """Of every place for an example, once for each array of levels; 0 where there is none."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    keys = flow.example_keys(jax.random.key(config.seed), names[:, :, 0])
    noise_keys, latent_keys = flow.split_keys(fold(keys, names[:, :, 1]), 2)
    latents = encode_images(networks["autoencoder"], batch)
    if config.sample_latents:
        latents = latents + _deviation(networks["autoencoder"], batch, latent_keys)
    tokens = objective.tokens(networks, batch, latents)
    member, counts = target_membership(tokens)
    times = jnp.asarray(config.times, jnp.float32)

    def at(levels: Int[Array, "B N"]) -> Float[Array, "B N"]:
        square = square_error(
            networks["transformer"],
            tokens,
            times[levels],
            fold(noise_keys, levels),
            objective.guidance,
        )
        return per_example(square, member, counts)

    return jax.lax.map(at, levels)


def _deviation(
    autoencoder: Autoencoder, batch: Batch, keys: Key[Array, "B N"]
) -> Float[Array, "B S C"]:
    """What targets' latents, drawn from the encoder's distribution, are away from its mean."""

    def deviation(pixels: Float[Array, "n h w 3"]) -> Float[Array, "n _ _ _"]:
        _, logvar = autoencoder.moments(pixels)
        return autoencoder.config.scale_factor * jnp.exp(0.5 * logvar)

    std = image_tokens(deviation, batch)
    noise = flow.token_noise(keys, batch.segments, batch.offsets, std.shape[-1])
    return jnp.where(batch.is_target[:, :, None], std * noise, 0.0)


def _header(
    networks: dict[str, Network],
    examples: Sequence[Example],
    objective: NetworksConfig,
    config: LossConfig,
    geometry: GeometryConfig,
) -> dict[str, Any]:
    """All that decides the losses, save for rounding."""
    digest = hashlib.sha256()
    for example in examples:
        for leaf in jax.tree.leaves(example):
            said = leaf.encode() if isinstance(leaf, str) else np.ascontiguousarray(leaf).tobytes()
            digest.update(f"{np.shape(leaf)} {len(said)} ".encode() + said)
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


def _begin(
    file: Path, header: dict[str, Any], keys: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """What the file holds, as the first process reads it; all processes get the same."""
    losses: dict[tuple[int, int], float] = {}
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            losses = _read(file, header)
        except (OSError, ValueError) as problem:  # the others wait to be told
            error = problem
    known = np.array([key in losses for key in keys])
    values = np.array([losses.get(key, 0.0) for key in keys], np.float32)
    told = multihost_utils.broadcast_one_to_all((np.array(error is None), known, values))
    is_good, known, values = map(np.asarray, told)
    if not is_good:
        raise error or ValueError(f"The first process cannot go on with {file}: see what it says.")
    return {
        key: float(value)
        for key, is_known, value in zip(keys, known, values, strict=True)
        if is_known
    }


def _read(file: Path, header: dict[str, Any]) -> dict[tuple[int, int], float]:
    """The losses in a file, of which a torn last line is cut off; a new file gets its header."""
    first = (json.dumps(header) + "\n").encode()
    stored = file.read_bytes() if file.exists() else b""
    if first.startswith(stored):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(first)
        return {}
    begun, *lines = stored[: stored.rfind(b"\n") + 1].splitlines() or [b""]
    try:
        begun = json.loads(begun)
        rows = [json.loads(line) for line in lines]
        losses = {(row["index"], row["level"]): row["loss"] for row in rows}
        changed = [key for key, value in json.loads(first).items() if begun.get(key) != value]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a file of held-out losses, or is damaged: delete it, and it is made "
            "anew."
        ) from error
    if changed:
        raise ValueError(
            f"{file} holds losses of another {' and '.join(changed)}: delete it, and it is made "
            "anew, or write to another folder."
        )
    os.truncate(file, stored.rfind(b"\n") + 1)
    return losses
