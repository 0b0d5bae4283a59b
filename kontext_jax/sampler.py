"""From noise to an image: Euler steps of the flow along FLUX's schedule, or a student's few calls.

A step from time t to s, with the velocity v at x_t, is one of

    euler         x_s = x_t + (s - t) v
    consistency   x_s = (1 - s) x + s e,   x = x_t - t v,   e new noise of its own

The second is how a student of ``objectives/ladd.py`` is trained to be used (arXiv 2403.12015): it
makes an image, which is noised anew to the next time. The last step, to s = 0, is the same in both.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kontext_jax import flow
from kontext_jax.models.flux import Flux
from kontext_jax.settings import Settings, check_choices, check_least
from kontext_jax.types import Tokens

METHODS = ("euler", "consistency")


@dataclass(kw_only=True, unsafe_hash=True)
class SamplerConfig(Settings):
    """How to sample.

    Attributes:
      num_steps: evaluations of the transformer (two each with ``cfg_scale``).
      method: "euler" or "consistency", see the module's docstring.
      guidance: the distilled guidance scale, for transformers that have the input.
      cfg_scale: classifier-free scale; 1 is off. ``v = v_neg + scale (v_pos - v_neg)``.
      strength: share of the steps that are run. Below 1 sampling starts from the targets' own
        latents, noised as far as the first of these steps expects (SDEdit, arXiv 2108.01073).
    """

    num_steps: int = 28
    method: str = "euler"
    guidance: float = 2.5
    cfg_scale: float = 1.0
    strength: float = 1.0

    def __post_init__(self):
        check_choices(self, method=METHODS)
        check_least(self, num_steps=1)
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength} must be above 0 and at most 1.")
        if self.num_steps * self.strength < 1:
            raise ValueError(
                f"strength {self.strength} leaves none of {self.num_steps} steps; give at least "
                f"1/{self.num_steps}, or more steps."
            )

    @property
    def first_step(self) -> int:
        """Index in the schedule where sampling begins (diffusers' rule, its rounding included)."""
        return int(self.num_steps - self.num_steps * self.strength)


def check_blind(sampler: SamplerConfig, name: str) -> None:
    """Refuses to start from the truth where pictures are judged by it.

    Args:
      sampler: how they are to be made.
      name: of the setting, for the message.

    Raises:
      ValueError: it starts from the targets.
    """
    if sampler.strength < 1:
        raise ValueError(f"{name}.strength below 1 would start from the truth; set 1.")


def sample(
    transformer: Flux,
    tokens: Tokens,
    key: Key[Array, ""],
    config: SamplerConfig,
    time: flow.TimeConfig,
    negative: Tokens | None = None,
) -> Float[Array, "B S C"]:
    """Latents of the targets; contexts keep their clean latents.

    Sampling begins at pure noise or, past the schedule's first step, on the straight path between
    the targets' clean latents and the noise, at the first time that is left (equation 1 of `flow`).
    Each example's noise depends on ``key``, its id and the step alone. Targets of different size
    in one row follow schedules of their own.

    Args:
      transformer: the velocity.
      tokens: contexts, text and layout; the targets' latents are looked at only if
        ``config.first_step`` is above 0.
      key: of all noise.
      config: steps, guidance and strength.
      time: the shift of the schedule.
      negative: the same rows with the negative prompt; needed if ``cfg_scale`` is not 1.

    Raises:
      ValueError: ``negative`` is missing or not used.
    """
    if (negative is not None) != (config.cfg_scale != 1.0):
        raise ValueError("A negative prompt goes with a cfg_scale other than 1, and only with it.")
    num_examples = tokens.example_ids.shape[1]
    member = jax.nn.one_hot(tokens.segments - 1, num_examples)
    is_target = tokens.is_target[:, :, None]
    counts = jnp.sum(jnp.where(is_target, member, 0.0), axis=1).astype(jnp.int32)
    times = flow.schedule(config.num_steps, counts, time)
    guided = transformer.config.guidance_embed
    keys = flow.example_keys(key, tokens.example_ids)

    def noise_of(keys):
        return flow.token_noise(keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])

    def velocity(x, t, given):
        return transformer(
            x,
            given.text,
            given.pooled,
            t,
            positions=given.positions,
            segments=given.segments,
            text_segments=given.text_segments,
            guidance=jnp.full_like(t, config.guidance) if guided else None,
        )

    def step(x, interval):
        number, t, t_next = interval
        v = velocity(x, t, tokens)
        if negative is not None:
            v_negative = velocity(x, t, negative)
            v = v_negative + config.cfg_scale * (v - v_negative)
        t, t_next = (flow.at_tokens(time, tokens.segments) for time in (t, t_next))
        if config.method == "consistency":
            # The first noise has the examples' own keys; a later step's is folded in from 1 on.
            fresh = noise_of(flow.fold_keys(keys, number))
            moved = flow.interpolate(flow.denoise(x, v, t), fresh, t_next)
        else:
            moved = x + (t_next - t) * v
        return jnp.where(is_target, moved, x), None

    noise = noise_of(keys)
    times = times[config.first_step :]
    if config.first_step:
        noise = flow.interpolate(tokens.latents, noise, flow.at_tokens(times[0], tokens.segments))
    x = jnp.where(is_target, noise, tokens.latents)
    numbers = jnp.arange(1, len(times))
    x, _ = jax.lax.scan(step, x, (numbers, times[:-1], times[1:]))
    return x
