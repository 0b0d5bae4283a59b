"""The student of a distillation: it generates images in one call, from one of a few times.

A latent x is noised to time t by equation (1) of ``flow.py``; the student's velocity there gives
its image by equation (3), x' = x_t - t v(x_t, t).
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
    """The times from which a student learns to generate an image in one call.

    Attributes:
      values: the times; 1 is pure noise.
      warmup: probability of each time during the student's first ``warmup_steps`` updates.
      probabilities: probability of each time after the warm-up.
    """

    values: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    warmup: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)
    probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    warmup_steps: int = 500

    def __post_init__(self):
        if not all(0 < t <= 1 for t in self.values):
            raise ValueError(f"student times {self.values} must be above 0 and at most 1.")
        for name in ("warmup", "probabilities"):
            values = getattr(self, name)
            if len(values) != len(self.values) or min(values) < 0 or abs(sum(values) - 1) > 1e-6:
                raise ValueError(
                    f"{name} {values} must be {len(self.values)} probabilities that add up to 1."
                )

    def sample(self, keys: Key[Array, "B N"], updates: Int[Array, ""]) -> Float[Array, "B N"]:
        """A time for each example; ``updates`` counts the student's updates so far."""
        probabilities = jnp.where(
            updates < self.warmup_steps, jnp.array(self.warmup), jnp.array(self.probabilities)
        )
        draw = jax.vmap(jax.vmap(lambda key: jax.random.categorical(key, jnp.log(probabilities))))
        return jnp.array(self.values, jnp.float32)[draw(keys)]


@dataclass(kw_only=True, unsafe_hash=True)
class StudentConfig(NetworksConfig):
    """A few-step student, and the discriminator heads.

    Attributes:
      time: shift of the student's schedule: none, since it samples at the times it is trained at.
      student_times: see `StudentTimes`.
      heads: sizes of the discriminator.
      heads_optim: optimizer of the discriminator.
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


def generate_images(
    student: Flux,
    tokens: Tokens,
    times: StudentTimes,
    guidance: float,
    keys: Key[Array, "B N"],
    updates: Int[Array, ""],
) -> tuple[Float[Array, "B S C"], Float[Array, "B N"]]:
    """(the student's images x' at the target tokens, the times t that they start from)."""
    time_keys, noise_keys = flow.split_keys(keys, 2)
    t = times.sample(time_keys, updates)
    token_t = flow.at_tokens(t, tokens.segments)
    x_t = flow.interpolate(tokens.latents, noise_like(tokens, noise_keys), token_t)
    v = student(**inputs_at(student, tokens, x_t, t, guidance))
    return flow.denoise(x_t, v, token_t), t


def noise_like(tokens: Tokens, keys: Key[Array, "B N"]) -> Float[Array, "B S C"]:
    """Noise for every token, from its example's key."""
    return flow.token_noise(keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])
