"""The student of a distillation: images made in one call, from a few times.

From a latent x, noised to time t by (1), and the student's velocity there, (3) of ``flow.py`` gives
its image x' = x_t - t v(x_t, t).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kontext_jax import flow
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.models.flux import Flux
from kontext_jax.objectives.transformer import NetworksConfig, inputs_at
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.settings import Settings
from kontext_jax.types import Tokens


@dataclass(kw_only=True, unsafe_hash=True)
class StudentTimes(Settings):
    """At which times a student learns to make an image in one call.

    Attributes:
      values: the times; 1 is pure noise.
      warmup: probability of each in the student's first ``warmup_steps`` updates.
      probabilities: of each from then on.
    """

    values: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    warmup: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)
    probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    warmup_steps: int = 500

    def __post_init__(self):
        if not all(0 < t <= 1 for t in self.values):
            raise ValueError(f"student times {self.values} must be above 0 and at most 1.")
        for name in ("warmup", "probabilities"):
            given = getattr(self, name)
            if len(given) != len(self.values) or min(given) < 0 or abs(sum(given) - 1) > 1e-6:
                raise ValueError(
                    f"{name} {given} must be {len(self.values)} probabilities that add up to 1."
                )

    def sample(self, keys: Key[Array, "B N"], updates: Int[Array, ""]) -> Float[Array, "B N"]:
        """A time for each example, after so many updates of the student."""
        chances = jnp.where(
            updates < self.warmup_steps, jnp.array(self.warmup), jnp.array(self.probabilities)
        )
        draw = jax.vmap(jax.vmap(lambda key: jax.random.categorical(key, jnp.log(chances))))
        return jnp.array(self.values, jnp.float32)[draw(keys)]


@dataclass(kw_only=True, unsafe_hash=True)
class StudentConfig(NetworksConfig):
    """A student of few steps, and the heads that judge its images.

    Attributes:
      time: the shift of the student's schedule; none, for its times are as it was trained.
      student_times: see `StudentTimes`.
      heads: the discriminator.
      heads_optim: how it is trained.
    """

    time: flow.TimeConfig = field(default_factory=lambda: flow.TimeConfig(shift="none"))
    student_times: StudentTimes = field(default_factory=StudentTimes)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    heads_optim: OptimConfig = field(default_factory=lambda: OptimConfig(b1=0.0))

    def __post_init__(self):
        super().__post_init__()
        if self.heads_optim.accumulate_steps != 1:
            raise ValueError(
                "heads_optim.accumulate_steps has no effect: set optim.accumulate_steps."
            )

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(num_steps=4, method="consistency", guidance=self.guidance)


def make_images(
    student: Flux,
    tokens: Tokens,
    times: StudentTimes,
    guidance: float,
    keys: Key[Array, "B N"],
    updates: Int[Array, ""],
) -> tuple[Float[Array, "B S C"], Float[Array, "B N"]]:
    """(the student's images x' in the places of the targets, the times t that they come from)."""
    time_keys, noise_keys = flow.split_keys(keys, 2)
    t = times.sample(time_keys, updates)
    token_t = flow.at_tokens(t, tokens.segments)
    x_t = flow.interpolate(tokens.latents, noise_like(tokens, noise_keys), token_t)
    v = student(**inputs_at(student, tokens, x_t, t, guidance))
    return flow.denoise(x_t, v, token_t), t


def noise_like(tokens: Tokens, keys: Key[Array, "B N"]) -> Float[Array, "B S C"]:
    """Noise for every token, by its example's key."""
    return flow.token_noise(keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])
