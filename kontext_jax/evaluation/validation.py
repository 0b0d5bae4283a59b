"""Numbers of held-out examples while a run goes on: the loss by time level, and judged pictures.

All that is random here has keys of its own, and training's are made of its seed and step alone: a
run learns the same to the last bit, however often it is looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from kontext_jax.config import Config
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.evaluation.held_out_loss import held_out_loss, kinds_of, summarise_losses
from kontext_jax.evaluation.judges import Outputs, judge, judge_drift, judge_pixels, judge_world
from kontext_jax.evaluation.tasks.sets import examples_of, triples_of
from kontext_jax.evaluation.tasks.triples import triples
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampling.generator import Generator, reconstruct
from kontext_jax.types import RGBImage, Task

Validation = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, float]]


def make_validation(config: Config, mesh: Mesh) -> Validation:
    """A function (networks by player, frozen networks) -> numbers by name.

    Of an autoencoder these are how near its reconstructions come; of what makes pictures, the loss
    where it learns by flow matching, and what judges say of its pictures.

    Raises:
      FileNotFoundError, ValueError: the held-out data is missing or cannot be read.
    """
    settings, data = config.validation, config.data
    try:
        tasks = list(triples(data.path, settings.split, settings.num_examples))
    except ValueError as error:
        raise ValueError(f"validation.split {settings.split!r}: {error}") from error
    examples = prepare_all(triples_of(tasks), data)
    if config.objective.kind == "autoencoder":
        targets = [example.target for example in examples]

        def reconstructions(networks, frozen):
            made = reconstruct(networks["autoencoder"], targets, mesh)
            return _judged(tasks, made)

        return reconstructions

    player = config.make_objective().generator
    pictured = tasks[: settings.num_pictures]
    generate = None
    if pictured:
        generate = Generator(
            examples_of(pictured, {}, data), data, config.objective, settings.sampler, mesh
        )
    kinds = kinds_of(tasks)

    def validation(networks, frozen):
        whole = networks_of(networks[player], frozen)
        numbers = {}
        if config.objective.kind == "flow_matching":
            rows = held_out_loss(whole, examples, data, config.objective, settings.loss, mesh)
            numbers |= _losses(summarise_losses(rows, kinds))
        if generate is not None:
            numbers |= _judged(pictured, generate(whole))
        return numbers

    return validation


def _losses(summary: Mapping[str, Any]) -> dict[str, float]:
    levels = {f"loss_t{level['t']:.3g}": level["mean"] for level in summary["levels"]}
    kinds = {f"loss_{kind}": found["mean"] for kind, found in summary["kinds"].items()}
    return {"loss": summary["mean"]} | kinds | levels


def _judged(tasks: Sequence[Task], images: Sequence[RGBImage]) -> dict[str, float]:
    """The mean of each column that judges fill."""
    columns = judge([judge_pixels, judge_world, judge_drift], Outputs("", tasks, images)).columns
    values = {name: [x for x in column if x is not None] for name, column in columns.items()}
    return {name: float(np.mean(known)) for name, known in values.items() if known}
