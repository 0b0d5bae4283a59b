"""Cells of an evaluation: several runs and samplers, side by side on the same examples.

All cells get the same pixels and prompts, in the same batches, and each example the same initial
noise; so a difference between two cells is one of their networks and samplers.
"""

import dataclasses
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from kontext_jax.config import to_dict
from kontext_jax.evaluator import Generator, Image, reconstruct
from kontext_jax.flow import SHIFTS
from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.objectives import Network
from kontext_jax.places import PARAMS
from kontext_jax.runs import Run
from kontext_jax.sampler import SamplerConfig, check_blind
from kontext_jax.scores import FD_INPUT, efflite0_features, score, summarise
from kontext_jax.types import Example, Triple

TIMED = (
    "Seconds per image are wall time of one pass over all examples in batches, by their number. "
    "They include encoding contexts and prompts, all sampling steps, decoding, and the way to the "
    "devices and back; not compiling, which is done before, nor loading networks and "
    "preparing the examples."
)


@dataclass(kw_only=True, unsafe_hash=True)
class Cell:
    """One run and one way to sample from it.

    Attributes:
      name: what results call it; short, for it heads a column of pictures.
      checkpoint: workdir of the run; that of the evaluation if empty.
      params: "ema" or "params", the averaged or the raw parameters.
      shift: "none" or "resolution", of the sampler's schedule; the run's own if empty. A teacher
        that stands in for its untrained student needs the student's.
    """

    name: str
    checkpoint: str = ""
    params: str = "ema"
    shift: str = ""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self):
        if self.params not in PARAMS:
            raise ValueError(
                f"cell {self.name!r}: params {self.params!r} is not one of {', '.join(PARAMS)}."
            )
        if self.shift not in ("", *SHIFTS):
            raise ValueError(
                f"cell {self.name!r}: shift {self.shift!r} is not one of {', '.join(SHIFTS)}."
            )
        check_blind(self.sampler, f"cell {self.name!r}: sampler")


class Played(NamedTuple):
    """What became of the cells.

    Attributes:
      images: by cell, in the order of the examples.
      results: by cell, see `scores.score`.
      summary: JSON; its ``scores`` are by cell.
    """

    images: dict[str, list[Image]]
    results: dict[str, list[dict]]
    summary: dict[str, Any]


def load_cells(cells: Sequence[Cell], main: Run, load: Callable[[str, str], Run]) -> dict[str, Run]:
    """Each cell's run, by the cell's name.

    Args:
      cells: of one evaluation.
      main: the run that the examples are prepared for.
      load: a run of (checkpoint, params); if it remembers, cells of one run share the networks.

    Raises:
      ValueError: a cell's run is missing, makes no pictures, or takes other examples.
    """
    runs = {}
    for cell in cells:
        checkpoint = cell.checkpoint or main.checkpoint
        try:
            run = load(checkpoint, cell.params)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"cell {cell.name!r}: {error}") from error
        mine, others = run.config.data, main.config.data
        if (mine.geometry, mine.text) != (others.geometry, others.text):
            raise ValueError(
                f"cell {cell.name!r}: {checkpoint} takes other examples than {main.checkpoint} "
                "(data.geometry or data.text differs); evaluate it by itself."
            )
        runs[cell.name] = run
    return runs


def play(
    cells: Sequence[Cell],
    runs: Mapping[str, Run],
    main: Run,
    triples: Sequence[Triple],
    examples: Sequence[Example],
    mesh: Mesh,
    seed: int,
) -> Played:
    """Samples, times and scores every cell.

    Args:
      cells: one or more.
      runs: by cell, see `load_cells`.
      main: the run that the examples are prepared for; its config also says how to pack them.
      triples, examples: the same ones, as they are stored and prepared.
      mesh: where the networks are.
      seed: of the initial noise.

    Raises:
      ValueError: there are too few examples for a Frechet distance.
    """
    images, seconds = {}, {}
    for cell in cells:
        run = runs[cell.name]
        objective = run.config.objective
        if cell.shift:
            time = dataclasses.replace(objective.time, shift=cell.shift)
            objective = dataclasses.replace(objective, time=time)
        generate = Generator(examples, main.config.data, objective, cell.sampler, mesh, seed)
        images[cell.name], seconds[cell.name] = _timed(generate, run.networks)
    results = {name: score(triples, made) for name, made in images.items()}
    about_fd, distances = _distances(triples, images, main, mesh)
    scores = {
        cell.name: {
            "checkpoint": runs[cell.name].checkpoint,
            "params": cell.params,
            "sampler": to_dict(cell.sampler),
            "shift": cell.shift or runs[cell.name].config.objective.time.shift,
            **summarise(results[cell.name]),
            **distances.get(cell.name, {}),
            "seconds_per_image": float(f"{seconds[cell.name]:.4g}"),
        }
        for cell in cells
    }
    summary = {
        "num_examples": len(triples),
        "timed": TIMED,
        "fd_efflite0": about_fd,
        "scores": scores,
    }
    return Played(images, results, summary)


def _timed(generate: Generator, networks: dict[str, Network]) -> tuple[list[Image], float]:
    """(the pictures, seconds for each), see `TIMED`."""
    generate.warm_up(networks)
    began = clock.perf_counter()
    images = generate(networks)
    return images, (clock.perf_counter() - began) / len(images)


def _distances(
    triples: Sequence[Triple], images: Mapping[str, list[Image]], main: Run, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """(how distances were measured, each cell's); why there are none, if weights are missing.

    Those to the truths are in large part the autoencoder's doing, and no sampler's: so those to
    the truths as it reconstructs them go with them.
    """
    truths = [triple.target for triple in triples]
    with jax.set_mesh(mesh):
        reconstructed = reconstruct(main.frozen["autoencoder"], truths)
    try:
        wanted, floor, *found = efflite0_features([truths, reconstructed, *images.values()], mesh)
    except FileNotFoundError as error:
        return {"left_out": str(error)}, {}

    def distance(first, second):
        return round(frechet_distance(first, second), 3)

    about = {"input_size": FD_INPUT, "reconstructed_targets": distance(wanted, floor)}
    return about, {
        name: {
            "fd_efflite0": distance(wanted, features),
            "fd_efflite0_reconstructed": distance(floor, features),
        }
        for name, features in zip(images, found, strict=True)
    }
