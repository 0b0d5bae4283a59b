"""Makes the pictures of a sweep: one cell, one set, what is missing."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kontext_jax.chips import num_chips
from kontext_jax.evaluation.cell_folder import CellFolder
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import Set, examples_of
from kontext_jax.geometry import fit, resize
from kontext_jax.loading.locations import identity_of, load_config, open_network, usage_of
from kontext_jax.loading.models import Model, load_model
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampling.generator import Generator, reconstruct, with_room
from kontext_jax.settings import to_dict
from kontext_jax.sharding import shardings_of
from kontext_jax.types import RGBImage, Task

OF_MODELS = ("weights", "settings")
"""What of a record is known once the networks are."""


def load_networks(cell: Cell, mesh: Mesh, seed: int, batch_size: int = 0) -> Model | None:
    """The networks of a cell; None for a copy, which needs none.

    Args:
      cell: one that `cells.resolve` has seen.
      mesh: the networks' place.
      seed: of new parameters, where they are untrained.
      batch_size: rows sampled at once; 0 for as many as the run trains on.

    Raises:
      ValueError: they are missing or damaged; it names the cell.
    """
    if cell.baseline == "copy":
        return None
    try:
        model = load_model(cell.checkpoint, mesh, cell.params)
        model = _anew(cell, model, mesh, seed) if cell.baseline == "untrained" else model
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"cell {cell.name!r}: {error}") from error
    rows = batch_size or model.data.batch_size
    return model._replace(data=dataclasses.replace(model.data, batch_size=rows))


def _anew(cell: Cell, model: Model, mesh: Mesh, seed: int) -> Model:
    """With new networks in the place of those that the run trained."""
    objective, key = load_config(cell.checkpoint).make_objective(), jax.random.key(seed)

    def init(key):
        return objective.init(key)[objective.generator]

    shardings = shardings_of(jax.eval_shape(init, key), mesh)
    fresh = jax.jit(init, out_shardings=shardings)(key)
    if "lora" in fresh:
        raise ValueError("new adapters change nothing; compare with what they are adapters of.")
    networks = networks_of(fresh, model.networks)
    return model._replace(networks=networks, identity=identity_of(networks))


def record_of(cell: Cell, each: Set, model: Model | None, seed: int) -> dict[str, Any]:
    """All that decides what a cell's pictures look like; the weights stand for the checkpoint.

    Without the model it lacks what only that knows, `OF_MODELS`.
    """
    names = ("params", "shift", "baseline", "sampler")
    return {
        **{name: value for name, value in to_dict(cell).items() if name in names},
        "weights": model.identity if model else {},
        "settings": _settings(model) if model else {},
        "tasks": each.fingerprint,
        "seed": seed,
    }


def _settings(model: Model) -> dict[str, Any]:
    """How a model's networks are used. Where its tokenizers are says nothing."""
    text = to_dict(model.data.text)
    return usage_of(model.networks, model.objective) | {
        "pooled": model.objective.pooled,
        "time": to_dict(model.objective.time),
        "geometry": to_dict(model.data.geometry),
        "text": {name: text[name] for name in ("max_tokens", "pad", "clip_max_tokens")},
    }


def takes_guidance(cell: Cell) -> bool:
    """Whether a cell's transformer has the guidance input, as its place says.

    Raises:
      ValueError: there is no transformer; it names the cell.
    """
    try:
        return open_network(cell.checkpoint, "transformer", cell.params).config.guidance_embed
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"cell {cell.name!r}: {error}") from error


def make(
    cell: Cell, model: Model | None, each: Set, folder: CellFolder, mesh: Mesh, seed: int
) -> list[RGBImage]:
    """A picture for each task: those that are in the folder, and those that are made now.

    Args:
      cell: whose pictures they are.
      model: from `load_networks`.
      each: the set, in the order of its turns.
      folder: where pictures are kept.
      mesh: the devices that share the work.
      seed: of the initial noise.

    Raises:
      ValueError: a picture cannot be decoded, or what was sampled is no picture.
    """
    made: dict[str, RGBImage] = {}
    for turn, group in itertools.groupby(each.tasks, key=lambda task: task.turn):
        tasks = list(group)
        seen = np.array([folder.has(task.id) for task in tasks])
        seen = np.asarray(multihost_utils.broadcast_one_to_all(seen))
        done = set(np.flatnonzero(seen).tolist())
        made.update((tasks[i].id, folder.load(tasks[i])) for i in done)
        if len(done) == len(tasks):
            continue
        if cell.baseline == "copy" or model is None:
            new = {task.id: _copy(task) for task in tasks}
            folder.save(new)
        elif cell.baseline == "reconstruction":
            new = _reconstructions(model, tasks, mesh)
            folder.save(new)
        else:
            new = _sample(cell, model, tasks, turn, made, done, folder, mesh, seed)
        made.update(new)
    return [made[task.id] for task in each.tasks]


def _copy(task: Task) -> RGBImage:
    """The context as it is; grey where there is none."""
    if task.contexts:
        return resize(task.contexts[0], task.size)
    return np.full((task.size[1], task.size[0], 3), 128, np.uint8)


def _reconstructions(model: Model, tasks: Sequence[Task], mesh: Mesh) -> dict[str, RGBImage]:
    """The truths through the autoencoder: what no sampler can be better than."""
    sizes = model.data.geometry.sizes
    truths = [fit(task.truth, sizes) for task in tasks if task.truth is not None]
    images = reconstruct(model.networks["autoencoder"], truths, mesh)
    return {task.id: image for task, image in zip(tasks, images, strict=True)}


def _sample(
    cell: Cell,
    model: Model,
    tasks: Sequence[Task],
    turn: int,
    made: Mapping[str, RGBImage],
    done: set[int],
    folder: CellFolder,
    mesh: Mesh,
    seed: int,
) -> dict[str, RGBImage]:
    """Makes the pictures of one turn that are missing; some that are not, in the same batches."""
    objective = model.objective
    if cell.shift:
        objective = dataclasses.replace(
            objective, time=dataclasses.replace(objective.time, shift=cell.shift)
        )
    examples = examples_of(tasks, made, model.data)
    data = with_room(model.data, examples)
    generate = Generator(examples, data, objective, cell.sampler, mesh, seed)
    kind = mesh.devices.flat[0].device_kind
    about = {"turn": turn, "device": kind, "chips": num_chips(mesh.size, kind)}
    folder.log(about | {"compile_seconds": generate.warm_up(model.networks)})
    new = {}
    for batch in generate.batches(model.networks, done):
        images = zip(batch.indices, batch.images, strict=True)
        pictures = {tasks[i].id: image for i, image in images}
        if not batch.finite:
            raise ValueError(
                f"cell {cell.name!r}: the numbers that it samples for {next(iter(pictures))!r} are "
                f"not finite. The weights of {cell.checkpoint} are damaged, or its training "
                "diverged: take another checkpoint, or leave the cell out."
            )
        folder.save(pictures)
        line = {"batch": batch.number, "images": len(pictures), "seconds": batch.seconds}
        folder.log(about | line)
        new |= pictures
    return new
