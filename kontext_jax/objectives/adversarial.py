"""Discriminator losses, elementwise on logits: hinge or non-saturating, and the R1 penalty."""

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
