"""Moving averages among a network's parameters, updated by the train step like all others.

An average a follows a quantity v by a <- decay a + (1 - decay) v. This is a step of gradient
descent with learning rate 1 on the loss of `follow`. So averages need no state of their own beside
the parameters: they are summed over microbatches and devices as gradients are, skipped with a bad
step, saved, and restored. `optim.make_optimizer` gives them this update, whatever the optimizer of
the other parameters.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class MovingAverage(nnx.Param):
    """A parameter that follows a quantity instead of descending a loss."""


def follow(
    average: MovingAverage,
    total: Float[Array, "*shape"],
    weight: Float[Array, ""],
    decay: float,
) -> Float[Array, ""]:
    """0, with the gradient that moves ``average`` towards the mean ``total / weight``.

    The gradient is that of a sum with total weight ``weight``, as objectives return it.

    Args:
      average: the average.
      total: weighted sum of the quantity.
      weight: sum of the weights.
      decay: share of the old value that a step keeps.
    """
    value = average[...]
    gradient = (1 - decay) * jax.lax.stop_gradient(weight * value - total)
    return jnp.sum(gradient * (value - jax.lax.stop_gradient(value)))
