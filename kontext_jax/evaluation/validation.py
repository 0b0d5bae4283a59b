"""Held-out metrics during training: the loss by noise level, and scores of generated images.

Validation has its own random keys, and training's keys depend only on the seed and the step: a run
trains the same to the last bit, however often it is validated.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from kontext_jax import cli
from kontext_jax.config import Config, ValidationConfig
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.evaluation.held_out_loss import held_out_loss, kinds_of, summarise_losses
from kontext_jax.evaluation.judge_panel import inception_judge, lite0_judge
from kontext_jax.evaluation.judges import (
    Judge,
    Outputs,
    judge_drift,
    judge_pixels,
    judge_world,
    run_judges,
)
from kontext_jax.evaluation.network_judges import CodeJudge, DistanceJudge
from kontext_jax.evaluation.tasks.sets import triples_of
from kontext_jax.evaluation.tasks.triples import triples
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampling.generator import Generator, reconstruct
from kontext_jax.types import RGBImage, Task

JUDGES = (judge_pixels, judge_world, judge_drift)

Validation = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, float]]


def make_validation(config: Config, mesh: Mesh) -> Validation:
    """Returns a function (networks by player, frozen networks) -> metrics by name.

    For an autoencoder, the metrics compare its reconstructions with their originals: by pixels, by
    the perceptual distance that it is trained with, and by Frechet distances between both sets of
    images; discrete latents also have the use of their codes. For objectives with a transformer,
    the metrics are the scores of generated images and, in flow matching, the loss.

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
        set_judges = _set_judges(settings, mesh)

        def compare(networks, frozen):
            autoencoder, judges = networks["autoencoder"], [*JUDGES, *set_judges]
            if "perceptual" in frozen:
                name = config.objective.perceptual.metric
                judges.append(DistanceJudge(name, frozen["perceptual"], mesh))
            if autoencoder.config.is_discrete:
                judges.append(CodeJudge(autoencoder, mesh))
            return _score(tasks, reconstruct(autoencoder, targets, mesh), judges)

        return compare

    player = config.make_objective().generator
    judged, generate = tasks[: settings.num_pictures], None
    if judged:
        generate = Generator(
            examples[: len(judged)], data, config.objective, settings.sampler, mesh
        )
    kinds = kinds_of(tasks)

    def validate(networks, frozen):
        networks = networks_of(networks[player], frozen)
        metrics = {}
        if config.objective.kind == "flow_matching":
            rows = held_out_loss(networks, examples, data, config.objective, settings.loss, mesh)
            metrics |= _loss_metrics(summarise_losses(rows, kinds))
        if generate is not None:
            metrics |= _score(judged, generate(networks))
        return metrics

    return validate


def _set_judges(settings: ValidationConfig, mesh: Mesh) -> list[Judge]:
    """Judges of the Frechet distance; they keep the features of the originals."""
    judges: list[Judge] = []
    try:
        judges.append(lite0_judge(mesh))
    except FileNotFoundError as error:
        cli.say(f"validation without fd_efflite0: {error}")
    if settings.inception:
        judges.append(inception_judge(Path(settings.inception), mesh))
    return judges


def _loss_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    levels = {f"loss_t{level['t']:.3g}": level["mean"] for level in summary["levels"]}
    kinds = {f"loss_{kind}": losses["mean"] for kind, losses in summary["kinds"].items()}
    return {"loss": summary["mean"]} | kinds | levels


def _score(
    tasks: Sequence[Task], images: Sequence[RGBImage], judges: Sequence[Judge] = JUDGES
) -> dict[str, float]:
    """Returns the mean of each score over the images that have it, and the scores of the set."""
    columns, set_scores = run_judges(judges, Outputs("", tasks, images))
    scores = {name: [x for x in column if x is not None] for name, column in columns.items()}
    return {name: float(np.mean(values)) for name, values in scores.items() if values} | set_scores
