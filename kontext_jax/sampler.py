"""Sampling: Euler steps of the flow along FLUX's schedule, or few-step sampling with a student.

A step from time t to s, with the velocity v at x_t, is one of

    euler         x_s = x_t + (s - t) v
    consistency   x_s = (1 - s) x + s e,   x = x_t - t v,   with fresh noise e in each step

Students of ``objectives/ladd.py`` are trained for the second (arXiv 2403.12015): the student
predicts an image, which is noised again to the next time. The last step, to s = 0, is the same in
both.
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
      num_steps: steps of the schedule, each one evaluation of the transformer (two with CFG).
      method: "euler" or "consistency", see the module's docstring.
      guidance: distilled guidance scale, for transformers that have this input.
      cfg_scale: scale of classifier-free guidance, ``v = v_neg + scale (v_pos - v_neg)``; 1 = off.
      strength: fraction of the steps to run. Below 1, sampling starts from the targets' latents,
        noised to the level of the first of these steps (SDEdit, arXiv 2108.01073).
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
                f"strength {self.strength} leaves none of {self.num_steps} steps; set at least "
                f"1/{self.num_steps}, or more steps."
            )

    @property
    def first_step(self) -> int:
        """Index in the schedule of the first step to run, rounded as in diffusers."""
        return int(self.num_steps - self.num_steps * self.strength)


def check_starts_from_noise(sampler: SamplerConfig, name: str) -> None:
    """Checks that sampling does not start from the targets that evaluation compares with.

    Args:
      sampler: how the evaluated images are sampled.
      name: name of the sampler's setting, for the message.

    Raises:
      ValueError: ``strength`` is below 1.
    """
    if sampler.strength < 1:
        raise ValueError(f"{name}.strength below 1 would start from the target image; set it to 1.")


def sample(
    transformer: Flux,
    tokens: Tokens,
    key: Key[Array, ""],
    config: SamplerConfig,
    time: flow.TimeConfig,
    negative: Tokens | None = None,
) -> Float[Array, "B S C"]:
    """Samples the latents of targets; context tokens keep their clean latents.

    Sampling starts from pure noise or, if ``config.first_step`` is above 0, from the targets' clean
    latents, noised to the time of that step by equation (1) of `flow`. An example's noise depends
    only on ``key``, its id and the step. Each target follows the schedule for its size.

    Args:
      transformer: predicts the velocity.
      tokens: contexts, text and layout. The targets' latents are used only if
        ``config.first_step`` is above 0.
      key: random key of all noise.
      config: steps, guidance and strength.
      time: shift of the schedule.
      negative: the same rows with the negative prompt; needed if ``cfg_scale`` is not 1.

    Raises:
      ValueError: ``negative`` is missing, or given with a ``cfg_scale`` of 1.
    """
    if (negative is not None) != (config.cfg_scale != 1.0):
        raise ValueError("A negative prompt needs a cfg_scale other than 1, and vice versa.")
    num_examples = tokens.example_ids.shape[1]
    member = jax.nn.one_hot(tokens.segments - 1, num_examples)
    is_target = tokens.is_target[:, :, None]
    counts = jnp.sum(jnp.where(is_target, member, 0.0), axis=1).astype(jnp.int32)
    times = flow.schedule(config.num_steps, counts, time)
    has_guidance = transformer.config.guidance_embed
    keys = flow.example_keys(key, tokens.example_ids)

    def noise_of(keys):
        return flow.token_noise(keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])

    def velocity(x, t, tokens):
        return transformer(
            x,
            tokens.text,
            tokens.pooled,
            t,
            positions=tokens.positions,
            segments=tokens.segments,
            text_segments=tokens.text_segments,
            guidance=jnp.full_like(t, config.guidance) if has_guidance else None,
        )

    def step(x, interval):
        number, t, t_next = interval
        v = velocity(x, t, tokens)
        if negative is not None:
            v_negative = velocity(x, t, negative)
            v = v_negative + config.cfg_scale * (v - v_negative)
        t, t_next = (flow.at_tokens(time, tokens.segments) for time in (t, t_next))
        if config.method == "consistency":
            # The initial noise uses the examples' keys; steps fold in their number, from 1.
            fresh_noise = noise_of(flow.fold_keys(keys, number))
            x_next = flow.interpolate(flow.denoise(x, v, t), fresh_noise, t_next)
        else:
            x_next = x + (t_next - t) * v
        return jnp.where(is_target, x_next, x), None

    noise = noise_of(keys)
    times = times[config.first_step :]
    if config.first_step:
        noise = flow.interpolate(tokens.latents, noise, flow.at_tokens(times[0], tokens.segments))
    x = jnp.where(is_target, noise, tokens.latents)
    numbers = jnp.arange(1, len(times))
    x, _ = jax.lax.scan(step, x, (numbers, times[:-1], times[1:]))
    return x
