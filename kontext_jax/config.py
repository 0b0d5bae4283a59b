"""The configuration of a run, composed of the dataclasses beside the code that they configure."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kontext_jax.data.pipeline import DataConfig
from kontext_jax.objectives import Objective
from kontext_jax.objectives.add import Add, AddConfig
from kontext_jax.objectives.autoencoder import AutoencoderObjective, AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from kontext_jax.objectives.guidance import Guidance, GuidanceConfig
from kontext_jax.objectives.ladd import Ladd, LaddConfig
from kontext_jax.objectives.student import StudentConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig, check_starts_from_noise
from kontext_jax.settings import Settings, check_choices, check_least
from kontext_jax.sharding import MeshConfig
from kontext_jax.training.checkpoint import CheckpointConfig

ObjectiveConfig = (
    AutoencoderObjectiveConfig | FlowMatchingConfig | LaddConfig | AddConfig | GuidanceConfig
)

OBJECTIVES = {
    "autoencoder": AutoencoderObjective,
    "flow_matching": FlowMatching,
    "ladd": Ladd,
    "add": Add,
    "guidance": Guidance,
}


GRIDS = {"left": 0.0, "middle": 0.5}
"""Offset of a time within its level's interval."""


@dataclass(kw_only=True, unsafe_hash=True)
class LossConfig(Settings):
    """Times and noise of the held-out loss, see `evaluation.held_out_loss`.

    Attributes:
      num_times: n, the number of noise levels.
      grid: "middle", t = (i + 1/2) / n, as in torchtitan, or "left", t = i / n, as in MLPerf.
      levels: "all" evaluates every example at every level, so that categories and checkpoints can
        be compared at any sample size; "index" evaluates example k at level k mod n, as in MLPerf.
      seed: seed of the noise, which otherwise depends only on the example's id and the level.
      sample_latents: whether to draw target latents from the autoencoder's posterior, as in MLPerf;
        otherwise they are its mean, as in training here.
    """

    num_times: int = 8
    grid: str = "middle"
    levels: str = "all"
    seed: int = 0
    sample_latents: bool = False

    def __post_init__(self):
        check_least(self, num_times=1)
        check_choices(self, grid=GRIDS, levels=("index", "all"))

    @property
    def times(self) -> tuple[float, ...]:
        """The time t of each level."""
        return tuple((i + GRIDS[self.grid]) / self.num_times for i in range(self.num_times))

    def levels_of(self, index: int) -> tuple[int, ...]:
        """The levels at which example ``index`` of the set is evaluated."""
        every = tuple(range(self.num_times))
        return every if self.levels == "all" else (index % self.num_times,)


@dataclass(kw_only=True, unsafe_hash=True)
class SheetConfig(Settings):
    """Sheets of sampled images during training.

    Attributes:
      every: steps between sheets; 0 for none.
      num_examples: number of examples, spread evenly over ``split``.
      split: split of the run's data.
      sampler: how images are sampled.
    """

    every: int = 1000
    num_examples: int = 12
    split: str = "validation"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self):
        check_least(self, "sheets.", every=0, num_examples=1)
        check_starts_from_noise(self.sampler, "sheets.sampler")


@dataclass(kw_only=True, unsafe_hash=True)
class ValidationConfig(Settings):
    """Metrics of held-out examples during training, see `evaluation.validation`.

    Attributes:
      every: steps between validations; 0 for none.
      num_examples: number of examples, from the start of ``split``; 0 for all.
      split: split of the run's data.
      loss: times and noise of the held-out loss.
      num_pictures: number of these examples for which an image is sampled and scored.
      sampler: how images are sampled.
      inception: file of FID's InceptionV3, for the FID of an autoencoder's reconstructions; without
        it, only EfficientNet-Lite0's distance is measured.
    """

    every: int = 0
    num_examples: int = 256
    split: str = "validation"
    loss: LossConfig = field(default_factory=LossConfig)
    num_pictures: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    inception: str = ""

    def __post_init__(self):
        check_least(self, "validation.", every=0, num_examples=0, num_pictures=0)
        check_starts_from_noise(self.sampler, "validation.sampler")


@dataclass(kw_only=True, unsafe_hash=True)
class Config(Settings):
    """One run.

    Attributes:
      objective: what is trained, and how; its ``kind`` selects the objective.
      data: the data set, and how it is packed.
      optim: optimizer and schedule of all players that have none of their own.
      mesh: sizes of the mesh axes.
      checkpoint, sheets, validation: what happens every so many steps.
      seed: seed of initialisation, data order, noise and times.
      num_steps: total number of steps; learning rate schedules end there.
      log_every: steps between log lines; metrics are averaged over them.
      max_skipped_in_a_row: number of consecutive skipped steps that stops the run.
      compilation_cache: folder that keeps compiled programs between runs; empty for none.
      profile_steps: "10:13" traces steps 10, 11 and 12 for xprof; empty for none. Steps count
        from 1, as in the log.
    """

    objective: ObjectiveConfig = field(default_factory=FlowMatchingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sheets: SheetConfig = field(default_factory=SheetConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    seed: int = 0
    num_steps: int = 10_000
    log_every: int = 50
    max_skipped_in_a_row: int = 20
    compilation_cache: str = ""
    profile_steps: str = ""

    def __post_init__(self):
        check_least(self, seed=0, num_steps=1, log_every=1, max_skipped_in_a_row=1)
        if self.data.latents.path and self.objective.kind in ("autoencoder", "add"):
            raise ValueError(
                f"objective {self.objective.kind} needs pixels: leave data.latents.path empty."
            )
        if self.objective.kind == "guidance" and not self.data.negatives:
            raise ValueError("objective guidance needs empty prompts too: set data.negatives=True.")
        self._check_guidance()
        if self.profile_steps and not self.profiled:
            raise ValueError(
                f"profile_steps {self.profile_steps!r} must be first:end with 0 < first < end, "
                "such as 10:13 for steps 10, 11 and 12."
            )

    def _check_guidance(self) -> None:
        """A student can only be used with the guidance that it is trained with."""
        objective, latents = self.objective, self.data.latents
        if not isinstance(objective, StudentConfig) or not objective.transformer.guidance_embed:
            return
        settings = {"sheets.sampler.guidance": self.sheets.sampler.guidance}
        if self.validation.every:
            settings["validation.sampler.guidance"] = self.validation.sampler.guidance
        if latents.samples:
            settings["data.latents.guidance"] = latents.guidance
        for name, value in settings.items():
            if value != objective.guidance:
                raise ValueError(
                    f"{name} is {value}, but the student is trained with objective.guidance "
                    f"{objective.guidance}: make them the same."
                )

    @property
    def profiled(self) -> range:
        """The steps of ``profile_steps``; empty if it is empty or malformed."""
        match = re.fullmatch(r"([1-9]\d*):(\d+)", self.profile_steps)
        return range(int(match[1]), int(match[2])) if match else range(0)

    def make_objective(self) -> Objective:
        """The objective selected by ``objective.kind``."""
        return OBJECTIVES[self.objective.kind](self.objective)


def pick(variants: Mapping[str, Callable[[], Config]], name: str) -> Config:
    """The config selected by ``--config=file.py:name``.

    Raises:
      ValueError: the file has no such variant.
    """
    if name not in variants:
        raise ValueError(f"there is no variant {name!r}; there are {', '.join(variants)}.")
    return variants[name]()
