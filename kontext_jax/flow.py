r"""Rectified flow: paths, velocities, training times, schedules and noise.

Time t runs from 0 (data) to 1 (noise). The path between latents x and noise e is a straight line,

    (1)  x_t = (1 - t) x + t e,            (2)  dx_t / dt = e - x,

and the network regresses the velocity (2) at x_t (Liu et al., arXiv 2209.03003; Esser et al.,
arXiv 2403.03206, eq. 13). Given a velocity v, the clean end of the path is (3) x = x_t - t v.

At equal t, larger images retain more signal, because adjacent pixels are correlated. FLUX therefore
shifts times towards noise as the number of target tokens n grows (Black Forest Labs
``sampling.py``):

    (4)  shift(t) = e^mu t / (1 + (e^mu - 1) t),
    (5)  mu(n) = 0.5 + (1.15 - 0.5) (n - 256) / (4096 - 256).

In logits, (4) is a translation: logit(shift(t)) = logit(t) + mu. Training times are logit-normal or
uniform (with logistic logits), and shifted by the same mu as the sampler's schedule.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kontext_jax.settings import Settings

SHIFTS = ("resolution", "none")


@dataclass(kw_only=True, unsafe_hash=True)
class TimeConfig(Settings):
    """The distribution of training times, and the shift of training times and schedules.

    Attributes:
      distribution: "logit_normal", sigmoid(N(mean, std^2)), or "uniform" in (0, 1).
      mean, std: mean and standard deviation of the normal distribution of logits.
      shift: "resolution" shifts by mu(number of target tokens); "none" does not shift.
      base_tokens, max_tokens, base_shift, max_shift: the two points that define the line (5).
    """

    distribution: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: str = "resolution"
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self):
        if self.distribution not in ("logit_normal", "uniform"):
            raise ValueError(
                f"time distribution {self.distribution!r} is not 'logit_normal' or 'uniform'."
            )
        if self.shift not in SHIFTS:
            raise ValueError(f"time shift {self.shift!r} is not 'resolution' or 'none'.")

    def mu(self, num_tokens: Int[Array, "*n"] | int) -> Float[Array, "*n"]:
        """Equation (5); zero if ``shift`` is "none"."""
        tokens = jnp.asarray(num_tokens, jnp.float32)
        if self.shift == "none":
            return jnp.zeros_like(tokens)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)


def interpolate(
    latents: Float[Array, "*b"], noise: Float[Array, "*b"], t: Float[Array, "*#b"]
) -> Float[Array, "*b"]:
    """Equation (1)."""
    return (1 - t) * latents + t * noise


def velocity(latents: Float[Array, "*b"], noise: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Equation (2)."""
    return noise - latents


def denoise(
    x_t: Float[Array, "*b"], v: Float[Array, "*b"], t: Float[Array, "*#b"]
) -> Float[Array, "*b"]:
    """Equation (3)."""
    return x_t - t * v


def shift_time(t: Float[Array, "*b"], mu: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Equation (4); leaves 0 and 1 unchanged."""
    factor = jnp.exp(mu)
    return factor * t / (1 + (factor - 1) * t)


def sample_time(
    key: Key[Array, ""], num_tokens: Int[Array, ""], config: TimeConfig
) -> Float[Array, ""]:
    """One training time for an example with ``num_tokens`` target tokens."""
    if config.distribution == "uniform":
        logit = jax.random.logistic(key)
    else:
        logit = config.mean + config.std * jax.random.normal(key)
    return jax.nn.sigmoid(logit + config.mu(num_tokens))


def sample_times(
    keys: Key[Array, "B N"], num_tokens: Int[Array, "B N"], config: TimeConfig
) -> Float[Array, "B N"]:
    """`sample_time` for each example of each row."""
    return jax.vmap(jax.vmap(lambda key, n: sample_time(key, n, config)))(keys, num_tokens)


def at_tokens(t: Float[Array, "B N"], segments: Int[Array, "B S"]) -> Float[Array, "B S 1"]:
    """The time of each token's example; padding gets the first example's."""
    return jnp.take_along_axis(t, jnp.maximum(segments - 1, 0), axis=1)[:, :, None]


def fold_keys(keys: Key[Array, "B N"], tag: Int[Array, ""] | int) -> Key[Array, "B N"]:
    """``keys`` with ``tag`` folded into each."""
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, tag)))(keys)


def split_keys(keys: Key[Array, "B N"], number: int) -> list[Key[Array, "B N"]]:
    """``number`` independent keys for each of ``keys``."""
    return [fold_keys(keys, tag) for tag in range(number)]


def example_keys(key: Key[Array, ""], example_ids: Int[Array, "B N"]) -> Key[Array, "B N"]:
    """A key for each example; it does not depend on the row, device or host of the example."""
    return jax.vmap(jax.vmap(lambda example: jax.random.fold_in(key, example)))(example_ids)


def token_noise(
    keys: Key[Array, "B N"],
    segments: Int[Array, "B S"],
    offsets: Int[Array, "B S"],
    channels: int,
) -> Float[Array, "B S C"]:
    """Standard normal noise that depends only on the example and the token's index in it.

    An example thus gets the same noise however it is packed, and on any mesh.

    Args:
      keys: keys of the examples, see `example_keys`.
      segments: example of each token, counted from 1.
      offsets: index of each token within its example.
      channels: number of channels C.
    """

    def row(row_keys, row_segments, row_offsets):
        token_keys = jax.vmap(jax.random.fold_in)(
            row_keys[jnp.maximum(row_segments - 1, 0)], row_offsets
        )
        return jax.vmap(lambda key: jax.random.normal(key, (channels,)))(token_keys)

    return jax.vmap(row)(keys, segments, offsets)


def schedule(
    num_steps: int, num_tokens: Int[Array, "*n"] | int, config: TimeConfig
) -> Float[Array, " steps *n"]:
    """The sampler's ``num_steps + 1`` times from 1 to 0, evenly spaced and then shifted by mu."""
    mu = config.mu(num_tokens)
    times = jnp.linspace(1.0, 0.0, num_steps + 1, dtype=jnp.float32)
    return jax.vmap(lambda t: shift_time(jnp.broadcast_to(t, mu.shape), mu))(times)
