"""Cells of a sweep: one checkpoint and one way to sample from it, to be set beside others.

All cells get the same tasks, and each task the same initial noise; so a difference between two
cells is one of their networks and samplers.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kontext_jax.flow import SHIFTS
from kontext_jax.loading.locations import PARAMETER_SETS, is_run, split_step, step_at, steps_at
from kontext_jax.sampler import SamplerConfig, check_blind
from kontext_jax.settings import Settings, check_choices

EVERY_STEP = "@all"
"""Behind a run's workdir: each of its checkpoints."""


@dataclass(kw_only=True, unsafe_hash=True)
class Cell(Settings):
    """One run and one way to sample from it.

    Attributes:
      name: what results call it; short, for it heads a column of pictures.
      checkpoint: a place that `sample` takes: a run's workdir (``DIR@STEP`` for one of its
        checkpoints, ``DIR@all`` for a cell of each), or a pipeline.
      params: "ema" or "params", the averaged or the raw parameters of a run.
      shift: "none" or "resolution", of the sampler's schedule; the run's own if empty. A teacher
        that stands in for its untrained student needs the student's.
      baseline: "copy" gives the context back; "reconstruction" gives the truth, as the checkpoint's
        autoencoder has it; "untrained" has new networks of the run's sizes.
      sets: names of the sets that it makes pictures for; all if empty.
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
        if bool(self.checkpoint) == (self.baseline == "copy"):
            raise ValueError(
                f"cell {self.name!r} needs a checkpoint."
                if self.baseline != "copy"
                else f"cell {self.name!r}: a copy has no checkpoint; leave it empty."
            )
        check_blind(self.sampler, f"{where}sampler")

    @property
    def networks(self) -> tuple[str, str, bool]:
        """What its networks are: cells of the same can share them."""
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
    """Every combination, each named by those settings that differ among them.

    ``checkpoint`` may end in ``@all``.
    """
    axes = {
        "params": params,
        "method": methods,
        "num_steps": num_steps,
        "guidance": guidance,
        "cfg_scale": cfg_scale,
    }
    words = {"params": "{}", "method": "{}", "num_steps": "{} steps", "guidance": "guidance {:g}"}
    combinations: list[dict] = [{}]
    for name, values in axes.items():
        combinations = [one | {name: value} for one in combinations for value in values]
    cells = []
    for settings in combinations:
        differing = [
            words.get(name, "cfg {:g}").format(value)
            for name, value in settings.items()
            if len(axes[name]) > 1
        ]
        path, step = split_step(checkpoint.removesuffix(EVERY_STEP))
        run = path.name if step is None else f"{path.name}@{step}"
        sampler = {name: value for name, value in settings.items() if name != "params"}
        cells.append(
            Cell(
                name=" ".join([run, *differing]),
                checkpoint=checkpoint,
                params=settings["params"],
                sampler=SamplerConfig(**sampler),
            )
        )
    return tuple(cells)


def resolve(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, ``@all`` spelled out, every run's place with the step that it has now.

    A run that goes on training meanwhile does not change what is evaluated.

    Raises:
      FileNotFoundError: a run has no such checkpoint.
      ValueError: names are not different, or a place is no run and would have to be one.
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
    place = cell.checkpoint
    if not place:
        return [cell]
    if place.endswith(EVERY_STEP):
        workdir = place.removesuffix(EVERY_STEP)
        step_at(workdir)  # refuses a run that has none yet
        return [
            dataclasses.replace(
                cell, name=f"{cell.name} @{step}", checkpoint=f"{Path(workdir)}@{step}"
            )
            for step in steps_at(workdir)
        ]
    path, step = split_step(place)
    if is_run(place) or step is not None:
        return [dataclasses.replace(cell, checkpoint=f"{path}@{step_at(place)}")]
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {place}.")
    if cell.baseline == "untrained":
        raise ValueError(
            f"cell {cell.name!r}: {place} is no run, whose networks could be made anew."
        )
    if cell.params != "ema":
        raise ValueError(
            f"cell {cell.name!r}: {place} is no run, and has no raw parameters beside its own; "
            "leave params out."
        )
    return [dataclasses.replace(cell, checkpoint=str(path))]


def folder_name(name: str) -> str:
    """A name as a folder may be called."""
    return re.sub(r"[^\w.@-]+", "_", name)


def check_names(names: Sequence[str], what: str) -> None:
    """Refuses names that folders cannot have, or could not tell apart.

    Raises:
      ValueError: one is, or two are the same but for signs that folders cannot have.
    """
    for name in names:
        if not re.match(r"[\w-]", folder_name(name)):
            raise ValueError(f"{what} {name!r} needs a name that begins with a letter or digit.")
    folders = [folder_name(name) for name in names]
    twice = sorted({name for name in names if folders.count(folder_name(name)) > 1})
    if twice:
        raise ValueError(
            f"{what}s need names of their own; {twice[0]!r} is there twice, or looks too much like "
            "another."
        )
