"""The grid of a sweep: each cell is one checkpoint with one sampler setting.

All cells get the same tasks, and each task gets the same initial noise, so two cells differ only by
their networks and samplers. A checkpoint of an autoencoder alone needs no sampler: its cell
reconstructs the targets.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kontext_jax.flow import SHIFTS
from kontext_jax.loading.locations import PARAMETER_SETS, is_run, split_step, step_at, steps_at
from kontext_jax.sampler import SamplerConfig, check_starts_from_noise
from kontext_jax.settings import Settings, check_choices

ALL_STEPS = "@all"
"""Suffix of a run's workdir that stands for all of its checkpoints."""


@dataclass(kw_only=True, unsafe_hash=True)
class Cell(Settings):
    """One cell of a sweep's grid: a checkpoint and a sampler setting.

    Attributes:
      name: label in all results; keep it short, because it heads a column of images.
      checkpoint: a location that `sample` accepts: a run's workdir (``DIR@STEP`` for one of its
        checkpoints, ``DIR@all`` for one cell per checkpoint), or a pipeline. Or an autoencoder: a
        run that trains one, or the file or folder of one, such as a pipeline's ``vae``.
      params: "ema" or "params", the averaged or the raw parameters of a run.
      shift: "none" or "resolution", for the sampler's schedule; if empty, that of the run. A
        teacher that stands in for its untrained student needs the student's.
      baseline: "copy" returns the context; "reconstruction" passes the target through the
        checkpoint's autoencoder; "untrained" uses freshly initialised networks of the same sizes.
        An autoencoder alone needs none of them.
      sets: names of the task sets to evaluate on; all if empty.
      sampler: steps, method and guidance.
    """

    name: str
    checkpoint: str = ""
    params: str = "ema"
    shift: str = ""
    baseline: str = ""
    sets: tuple[str, ...] = ()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self):
        where = f"cell {self.name!r}: "
        check_choices(
            self,
            where,
            params=PARAMETER_SETS,
            shift=("", *SHIFTS),
            baseline=("", "copy", "reconstruction", "untrained"),
        )
        if self.baseline == "copy" and self.checkpoint:
            raise ValueError(f"{where}a copy uses no checkpoint; leave it empty.")
        if self.baseline != "copy" and not self.checkpoint:
            raise ValueError(f"cell {self.name!r} needs a checkpoint.")
        check_starts_from_noise(self.sampler, f"{where}sampler")

    @property
    def networks_key(self) -> tuple[str, str, bool]:
        """Equal for cells that can share loaded networks."""
        return self.checkpoint, self.params, self.baseline == "untrained"


def grid(
    checkpoint: str,
    *,
    params: Sequence[str] = ("ema",),
    num_steps: Sequence[int] = (28,),
    guidance: Sequence[float] = (2.5,),
    cfg_scale: Sequence[float] = (1.0,),
    methods: Sequence[str] = ("euler",),
) -> tuple[Cell, ...]:
    """One cell per combination of settings, named by the settings that vary.

    ``checkpoint`` may end in ``@all``.
    """
    axes = {
        "params": params,
        "method": methods,
        "num_steps": num_steps,
        "guidance": guidance,
        "cfg_scale": cfg_scale,
    }
    labels = {"num_steps": "{} steps", "guidance": "guidance {:g}", "cfg_scale": "cfg {:g}"}
    path, step = split_step(checkpoint.removesuffix(ALL_STEPS))
    run = path.name if step is None else f"{path.name}@{step}"
    cells = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        varying = [
            labels.get(name, "{}").format(value)
            for name, value in settings.items()
            if len(axes[name]) > 1
        ]
        cells.append(
            Cell(
                name=" ".join([run, *varying]),
                checkpoint=checkpoint,
                params=settings.pop("params"),
                sampler=SamplerConfig(**settings),
            )
        )
    return tuple(cells)


def resolve(cells: Sequence[Cell]) -> list[Cell]:
    """Pins every run to a step: its latest, or one cell per step for ``@all``.

    A run that is still training then does not change what is evaluated.

    Raises:
      FileNotFoundError: a checkpoint does not exist.
      ValueError: two names clash, or a cell needs a run but its location is not one.
    """
    resolved = []
    for cell in cells:
        try:
            resolved += _resolve(cell)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"cell {cell.name!r}: {error}") from error
    check_names([cell.name for cell in resolved], "cell")
    return resolved


def _resolve(cell: Cell) -> list[Cell]:
    location = cell.checkpoint
    if not location:
        return [cell]
    if location.endswith(ALL_STEPS):
        workdir = location.removesuffix(ALL_STEPS)
        step_at(workdir)  # raises if the run has no checkpoint yet
        return [
            dataclasses.replace(
                cell, name=f"{cell.name} @{step}", checkpoint=f"{Path(workdir)}@{step}"
            )
            for step in steps_at(workdir)
        ]
    path, step = split_step(location)
    if is_run(location) or step is not None:
        return [dataclasses.replace(cell, checkpoint=f"{path}@{step_at(location)}")]
    if not path.exists():
        raise FileNotFoundError(f"{location} does not exist.")
    if cell.baseline == "untrained":
        raise ValueError(
            f"cell {cell.name!r}: {location} is not a run, so its networks cannot be "
            "re-initialised."
        )
    if cell.params != "ema":
        raise ValueError(
            f"cell {cell.name!r}: {location} is not a run and has only one set of parameters; "
            "leave params unset."
        )
    return [dataclasses.replace(cell, checkpoint=str(path))]


def folder_name(name: str) -> str:
    """The name with every run of characters that are unsafe in a folder name replaced by "_"."""
    return re.sub(r"[^\w.@-]+", "_", name)


def check_names(names: Sequence[str], what: str) -> None:
    """Refuses names that make invalid or clashing folder names.

    Raises:
      ValueError: a name starts with another character than a letter, digit, "_" or "-", or two
        names have the same `folder_name`.
    """
    for name in names:
        if not re.match(r"[\w-]", folder_name(name)):
            raise ValueError(f"{what} {name!r} needs a name that begins with a letter or digit.")
    folders = [folder_name(name) for name in names]
    clashing = sorted(name for name in names if folders.count(folder_name(name)) > 1)
    if clashing:
        raise ValueError(
            f"{what} names must be unique; {clashing[0]!r} is used twice, or differs from another "
            "name only in special characters."
        )
