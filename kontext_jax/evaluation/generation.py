"""Generates the missing images of one cell on one task set."""

import dataclasses
import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kontext_jax.chips import num_chips
from kontext_jax.evaluation.cell_folder import CellFolder
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import TaskSet, examples_of
from kontext_jax.geometry import fit, resize, size_of, whole_cells
from kontext_jax.loading.locations import (
    identity_of,
    is_autoencoder,
    load_config,
    open_network,
    usage_of,
)
from kontext_jax.loading.models import AutoencoderModel, Model, load_autoencoder, load_model
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampling.generator import Generator, reconstruct, with_room
from kontext_jax.settings import to_dict
from kontext_jax.sharding import shardings_of
from kontext_jax.types import RGBImage, Task

MODEL_KEYS = ("weights", "settings")
"""Keys of a cell's record that are known only once its networks are loaded."""

CHUNK = 64
"""Images that are reconstructed before they are saved."""


def reconstructs(cell: Cell) -> bool:
    """Whether a cell's images are the targets, reconstructed.

    Raises:
      ValueError: there are no weights, or they are damaged; the message names the cell.
    """
    return cell.baseline == "reconstruction" or _is_autoencoder(cell)


def _is_autoencoder(cell: Cell) -> bool:
    try:
        return bool(cell.checkpoint) and is_autoencoder(cell.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"cell {cell.name!r}: {error}") from error


def load_networks(
    cell: Cell, mesh: Mesh, seed: int, batch_size: int = 0
) -> Model | AutoencoderModel | None:
    """Loads the networks of a cell; None for a copy, which needs none.

    Args:
      cell: a cell returned by `sweep.resolve`.
      mesh: devices that hold the networks.
      seed: seed of the parameters, if the cell is untrained.
      batch_size: rows sampled at once; 0 for the run's training batch size.

    Raises:
      ValueError: the networks are missing or damaged; the message names the cell.
    """
    if cell.baseline == "copy":
        return None
    if _is_autoencoder(cell) and cell.baseline == "untrained":
        raise ValueError(f"cell {cell.name!r}: an autoencoder has no untrained baseline.")
    try:
        if _is_autoencoder(cell):
            return load_autoencoder(cell.checkpoint, mesh, cell.params)
        model = load_model(cell.checkpoint, mesh, cell.params)
        if cell.baseline == "untrained":
            model = _reinitialised(cell, model, mesh, seed)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"cell {cell.name!r}: {error}") from error
    rows = batch_size or model.data.batch_size
    return model._replace(data=dataclasses.replace(model.data, batch_size=rows))


def _reinitialised(cell: Cell, model: Model, mesh: Mesh, seed: int) -> Model:
    """The model with freshly initialised networks in place of the trained ones."""
    objective, key = load_config(cell.checkpoint).make_objective(), jax.random.key(seed)

    def init(key):
        return objective.init(key)[objective.generator]

    shardings = shardings_of(jax.eval_shape(init, key), mesh)
    fresh = jax.jit(init, out_shardings=shardings)(key)
    if "lora" in fresh:
        raise ValueError("new adapters change nothing; compare with the model they adapt.")
    networks = networks_of(fresh, model.networks)
    return model._replace(networks=networks, identity=identity_of(networks))


def cell_record(
    cell: Cell, task_set: TaskSet, model: Model | AutoencoderModel | None, seed: int
) -> dict[str, Any]:
    """Everything that determines a cell's images; the weights stand for the checkpoint.

    Without the model, the values of `MODEL_KEYS` are empty.
    """
    names = ("params", "shift", "baseline", "sampler")
    return {
        **{name: value for name, value in to_dict(cell).items() if name in names},
        "weights": model.identity if model else {},
        "settings": _settings(model) if model else {},
        "tasks": task_set.fingerprint,
        "seed": seed,
    }


def _settings(model: Model | AutoencoderModel) -> dict[str, Any]:
    """The settings that a model's networks are used with, without the paths of its tokenizers."""
    if isinstance(model, AutoencoderModel):
        return usage_of({"autoencoder": model.autoencoder}, None)
    text = to_dict(model.data.text)
    return usage_of(model.networks, model.objective) | {
        "pooled": model.objective.pooled,
        "time": to_dict(model.objective.time),
        "geometry": to_dict(model.data.geometry),
        "text": {name: text[name] for name in ("max_tokens", "pad", "clip_max_tokens")},
    }


def takes_guidance(cell: Cell) -> bool:
    """Whether the cell's transformer has a guidance input, according to its config.

    Raises:
      ValueError: the checkpoint has no transformer; the message names the cell.
    """
    try:
        return open_network(cell.checkpoint, "transformer", cell.params).config.guidance_embed
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"cell {cell.name!r}: {error}") from error


def generate_images(
    cell: Cell,
    model: Model | AutoencoderModel | None,
    task_set: TaskSet,
    folder: CellFolder,
    mesh: Mesh,
    seed: int,
) -> list[RGBImage]:
    """One image per task; generates and saves those that the folder does not have.

    Args:
      cell: the cell to sample.
      model: the cell's networks, from `load_networks`.
      task_set: tasks in the order of their turns.
      folder: folder of the cell on this set.
      mesh: devices to sample on.
      seed: seed of the initial noise.

    Raises:
      ValueError: a stored image cannot be decoded, or a sampled one is not finite.
    """
    images: dict[str, RGBImage] = {}
    for turn, group in itertools.groupby(task_set.tasks, key=lambda task: task.turn):
        tasks = list(group)
        stored = np.array([folder.has(task.id) for task in tasks])
        stored = np.asarray(multihost_utils.broadcast_one_to_all(stored))
        done = set(np.flatnonzero(stored).tolist())
        images.update((tasks[i].id, folder.load(tasks[i])) for i in done)
        if len(done) == len(tasks):
            continue
        if cell.baseline == "copy" or model is None:
            new = {task.id: _copy(task) for task in tasks}
            folder.save(new)
        elif cell.baseline == "reconstruction" or isinstance(model, AutoencoderModel):
            new = _reconstruct(model, tasks, done, folder, mesh)
        else:
            new = _sample(cell, model, tasks, turn, images, done, folder, mesh, seed)
        images.update(new)
    return [images[task.id] for task in task_set.tasks]


def _copy(task: Task) -> RGBImage:
    """The first context, unchanged; grey if the task has none."""
    if task.contexts:
        return resize(task.contexts[0], task.size)
    return np.full((task.size[1], task.size[0], 3), 128, np.uint8)


def _reconstruct(
    model: Model | AutoencoderModel,
    tasks: Sequence[Task],
    done: Container[int],
    folder: CellFolder,
    mesh: Mesh,
) -> dict[str, RGBImage]:
    """Passes the targets through the autoencoder, and saves them chunk by chunk.

    An autoencoder alone gets them at their own sizes. As an upper bound for samplers, a model's
    autoencoder gets them at the sizes that the model generates.

    Chunks hold the same images whatever is done, so that a resumed sweep gets the same bits.
    """
    if isinstance(model, AutoencoderModel):
        autoencoder, side = model.autoencoder, model.autoencoder.config.downsample
        targets = [whole_cells(task.truth, side) for task in tasks]
    else:
        autoencoder = model.networks["autoencoder"]
        targets = [fit(task.truth, model.data.geometry.sizes) for task in tasks]
    # Images of one size together, because each size of a chunk compiles once.
    order = sorted(range(len(tasks)), key=lambda i: size_of(targets[i]))
    new = {}
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        if all(i in done for i in chunk):
            continue
        images = reconstruct(autoencoder, [targets[i] for i in chunk], mesh)
        named = {tasks[i].id: image for i, image in zip(chunk, images, strict=True)}
        folder.save(named)
        new |= named
    return new


def _sample(
    cell: Cell,
    model: Model,
    tasks: Sequence[Task],
    turn: int,
    previous: Mapping[str, RGBImage],
    done: set[int],
    folder: CellFolder,
    mesh: Mesh,
    seed: int,
) -> dict[str, RGBImage]:
    """Samples the batches of one turn that have a missing image, and saves all their images.

    Args:
      cell, model, folder, mesh, seed: as in `generate_images`.
      tasks: all tasks of the turn.
      turn: number of the turn, for the log.
      previous: images of earlier turns, by task id.
      done: indices of the tasks whose images are stored.
    """
    objective = model.objective
    if cell.shift:
        objective = dataclasses.replace(
            objective, time=dataclasses.replace(objective.time, shift=cell.shift)
        )
    examples = examples_of(tasks, previous, model.data)
    data = with_room(model.data, examples)
    generate = Generator(examples, data, objective, cell.sampler, mesh, seed)
    kind = mesh.devices.flat[0].device_kind
    common = {"turn": turn, "device": kind, "chips": num_chips(mesh.size, kind)}
    folder.log(common | {"compile_seconds": generate.warm_up(model.networks)})
    new = {}
    for batch in generate.batches(model.networks, done):
        pairs = zip(batch.indices, batch.images, strict=True)
        images = {tasks[i].id: image for i, image in pairs}
        if not batch.finite:
            raise ValueError(
                f"cell {cell.name!r}: the sampled latents for {next(iter(images))!r} are not "
                f"finite. The weights of {cell.checkpoint} are damaged, or its training diverged: "
                "use another checkpoint, or leave the cell out."
            )
        folder.save(images)
        line = {"batch": batch.number, "images": len(images), "seconds": batch.seconds}
        folder.log(common | line)
        new |= images
    return new
