"""Discriminator losses, elementwise on logits: hinge or non-saturating, and R1 and LeCam."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOSSES = ("hinge", "non_saturating")


def discriminator_loss(
    real: Float[Array, "*shape"], fake: Float[Array, "*shape"], kind: str
) -> Float[Array, "*shape"]:
    """The discriminator's loss on its logits of real and of generated data.

    Hinge is max(0, 1 - real) + max(0, 1 + fake) (Lim and Ye, arXiv 1705.02894); non-saturating is
    softplus(-real) + softplus(fake) (Goodfellow et al., arXiv 1406.2661).
    """
    if kind == "hinge":
        return jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)
    return jax.nn.softplus(-real) + jax.nn.softplus(fake)


def generator_loss(fake: Float[Array, "*shape"], kind: str) -> Float[Array, "*shape"]:
    """The generator's loss on the discriminator's logits: -fake, or softplus(-fake)."""
    return -fake if kind == "hinge" else jax.nn.softplus(-fake)


def lecam(
    real: Float[Array, "*shape"], fake: Float[Array, "*shape"], averages: Float[Array, "2"]
) -> Float[Array, "*shape"]:
    """LeCam's penalty (Tseng et al., arXiv 2104.03310): logits do not run away from each other.

    max(0, real - average of fake)^2 + max(0, average of real - fake)^2, as in the authors' code.

    Args:
      real, fake: logits of real and of generated data.
      averages: moving averages of the mean logit of real and of generated data.
    """
    return jnp.square(jax.nn.relu(real - averages[1])) + jnp.square(jax.nn.relu(averages[0] - fake))


def logits_only(logits, x):
    """A head's logits; no penalty."""
    return logits(x), jnp.zeros(())


def logits_and_r1(logits, x):
    """A head's logits, and the squared norm of their sum's gradient by each input token.

    The mean of the latter is R1 (Mescheder et al., arXiv 1801.04406).
    """
    values, backward = jax.vjp(logits, x)
    (gradient,) = backward(jnp.ones_like(values))
    return values, jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=-1)
