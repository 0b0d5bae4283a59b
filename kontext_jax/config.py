"""A run's whole configuration, composed of the small dataclasses beside the code they configure."""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kontext_jax.checkpoint import CheckpointConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.losses import LossConfig
from kontext_jax.objectives import Objective
from kontext_jax.objectives.add import Add, AddConfig
from kontext_jax.objectives.autoencoder import AutoencoderObjective, AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from kontext_jax.objectives.guidance import Guidance, GuidanceConfig
from kontext_jax.objectives.ladd import Ladd, LaddConfig
from kontext_jax.objectives.student import StudentConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.ranges import check_least
from kontext_jax.sampler import SamplerConfig, check_blind
from kontext_jax.sharding import MeshConfig

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


@dataclass(kw_only=True, unsafe_hash=True)
class SheetConfig:
    """Pictures made during training: ``num_examples`` of split ``split`` every so many steps.

    ``every`` = 0 makes none.
    """

    every: int = 1000
    num_examples: int = 12
    split: str = "validation"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self):
        check_least(self, "sheets.", every=0, num_examples=1)
        check_blind(self.sampler, "sheets.sampler")


@dataclass(kw_only=True, unsafe_hash=True)
class ValidationConfig:
    """Numbers of held-out examples during training, see `validation`.

    Attributes:
      every: steps from one time to the next; 0 for never.
      num_examples: the first so many of ``split``; 0 for all.
      split: of the run's data.
      loss: the times and the noise of the held-out loss.
      num_pictures: of the examples, the first so many have a picture made and judged.
      sampler: how that is made.
    """

    every: int = 0
    num_examples: int = 256
    split: str = "validation"
    loss: LossConfig = field(default_factory=LossConfig)
    num_pictures: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self):
        check_least(self, "validation.", every=0, num_examples=0, num_pictures=0)
        check_blind(self.sampler, "validation.sampler")


@dataclass(kw_only=True, unsafe_hash=True)
class Config:
    """One run.

    Attributes:
      objective: what is trained and how; its ``kind`` picks the objective.
      num_steps: of the whole run, also for the learning rate's decay.
      max_skipped_in_a_row: steps without an example or a finite gradient, one after the other, that
        stop it.
      log_every: steps between two lines of the log; metrics are averaged over them.
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
                f"objective {self.objective.kind} looks at pixels: leave data.latents.path empty."
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
        """A student knows one value of the guidance input: that of its training."""
        objective, latents = self.objective, self.data.latents
        if not isinstance(objective, StudentConfig) or not objective.transformer.guidance_embed:
            return
        used = {"sheets.sampler.guidance": self.sheets.sampler.guidance}
        if self.validation.every:
            used["validation.sampler.guidance"] = self.validation.sampler.guidance
        if latents.samples:
            used["data.latents.guidance"] = latents.guidance
        for name, value in used.items():
            if value != objective.guidance:
                raise ValueError(
                    f"{name} is {value}, but the student is taught at objective.guidance "
                    f"{objective.guidance}: make them the same."
                )

    @property
    def profiled(self) -> range:
        """The steps of ``profile_steps``; empty if it names none."""
        match = re.fullmatch(r"([1-9]\d*):(\d+)", self.profile_steps)
        return range(int(match[1]), int(match[2])) if match else range(0)

    def make_objective(self) -> Objective:
        """The objective that ``objective.kind`` names."""
        return OBJECTIVES[self.objective.kind](self.objective)


def pick(variants: Mapping[str, Callable[[], Config]], name: str) -> Config:
    """The config that ``--config=file.py:name`` asks for.

    Raises:
      ValueError: the file has no such variant.
    """
    if name not in variants:
        raise ValueError(f"there is no variant {name!r}; there are {', '.join(variants)}.")
    return variants[name]()


def to_dict(config) -> dict[str, Any]:
    """Plain JSON values; `from_dict` undoes it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def validated(config):
    """A copy that has passed its checks anew; overrides on the command line bypass them.

    Raises:
      ValueError: a setting is wrong.
    """
    return from_dict(to_dict(config), type(config))


def from_dict(values: Mapping[str, Any], cls: type = Config):
    """A config from what `to_dict` gave.

    Raises:
      ValueError: a key that ``cls`` does not have.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}.")
    return cls(**{name: _value(value, hints[name]) for name, value in values.items()})


def _value(value, hint):
    if isinstance(hint, types.UnionType):  # the objectives, told apart by their kind
        by_kind = {cls.kind: cls for cls in typing.get_args(hint)}
        if value["kind"] not in by_kind:
            raise ValueError(f"kind {value['kind']!r} is not one of {', '.join(by_kind)}.")
        hint = by_kind[value["kind"]]
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint)
    if hasattr(hint, "_fields"):  # a named tuple
        return hint(*value)
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        return tuple(_value(v, typing.get_args(hint)[0]) for v in value)
    return _tuples(value)


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def fingerprint(config) -> str:
    """A short hash of all settings."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
