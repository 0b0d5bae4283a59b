"""Vector quantisation (VQ): a latent cell is the nearest vector of a learned codebook.

Van den Oord et al., arXiv 1711.00937. The vectors are not trained by a loss. Each is the mean of
the cells that it stands for, as in appendix A.1 there: with the share n_i of the cells that code i
has in a batch, and the sum s_i of these cells divided by the number of all cells,

    N_i <- decay N_i + (1 - decay) n_i,   m_i <- decay m_i + (1 - decay) s_i,   e_i = m_i / N_i.

Gradients pass from the vector to the cell unchanged. The commitment loss keeps cells near their
vectors.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kontext_jax.models.moving_average import MovingAverage, follow

DECAY = 0.99

EPSILON = 1e-5
"""Smallest share of a code, relative to that of equally frequent codes: the vector of a code that
is no longer used goes to 0, where cells are, instead of staying behind."""


class Codebook(nnx.Module):
    """``num_codes`` vectors. All start equally frequent and normally distributed."""

    def __init__(self, num_codes: int, channels: int, *, rngs: nnx.Rngs):
        vectors = jax.random.normal(rngs.params(), (num_codes, channels), jnp.float32)
        self.shares = MovingAverage(jnp.full((num_codes,), 1 / num_codes), axes=(None,))
        self.sums = MovingAverage(vectors / num_codes, axes=(None, None))

    def vectors(self) -> Float[Array, "K z"]:
        """The codes' vectors, without gradient."""
        shares = jax.lax.stop_gradient(self.shares[...])
        least = EPSILON / shares.shape[0]
        return jax.lax.stop_gradient(self.sums[...]) / jnp.maximum(shares, least)[:, None]

    def codes(self, cells: Float[Array, "*b z"]) -> Int[Array, "*b"]:
        """The code whose vector is nearest to each cell."""
        vectors = self.vectors()
        products = jnp.einsum("...z,kz->...k", cells.astype(jnp.float32), vectors)
        norms = jnp.sum(jnp.square(vectors), axis=-1)
        norms = norms.reshape((1,) * (products.ndim - 1) + (-1,))
        return jnp.argmin(norms - 2 * products, axis=-1)

    def __call__(self, cells: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
        """The nearest vectors, float32, with straight-through gradients."""
        cells = cells.astype(jnp.float32)
        nearest = self.vectors()[self.codes(cells)]
        return nearest + (cells - jax.lax.stop_gradient(cells))  # exactly the vector

    def follow(self, cells: Float[Array, "B h w z"], used: Float[Array, " B"]) -> Float[Array, ""]:
        """0, with the gradient of the moving averages; images have equal weight.

        Args:
          cells: the encoder's cells, before quantisation.
          used: 1 for an image, 0 for an empty slot.
        """
        (count, channels), num_codes = (len(used), cells.shape[-1]), self.shares.shape[0]
        cells = jax.lax.stop_gradient(cells.astype(jnp.float32)).reshape(count, -1, channels)
        codes, share = self.codes(cells), used[:, None] / cells.shape[1]
        share = jnp.broadcast_to(share, codes.shape)
        shares = jnp.zeros((num_codes,)).at[codes].add(share)
        sums = jnp.zeros((num_codes, channels)).at[codes].add(share[..., None] * cells)
        weight = jnp.sum(used)
        return follow(self.shares, shares, weight, DECAY) + follow(self.sums, sums, weight, DECAY)

    def perplexity(self) -> Float[Array, ""]:
        """exp of the entropy of the shares: the number of codes if all are equally frequent."""
        shares = jax.lax.stop_gradient(self.shares[...])
        shares = shares / jnp.sum(shares)
        return jnp.exp(jnp.sum(jax.scipy.special.entr(shares)))
