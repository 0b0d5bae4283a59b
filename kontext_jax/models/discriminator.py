"""Discriminators for distillation: small independent heads on the features of a frozen network.

LADD's heads see the teacher's image tokens, one head after each attention block (arXiv 2403.12015),
and are conditioned on the noise level and the prompt's pooled vector. ADD's heads see the maps of a
feature network (arXiv 2311.17042), and are conditioned on the vectors of the prompt and of the real
image. Both treat their tokens as an image, with a 3 x 3 convolution. The LADD paper does not
specify its heads; here a head is, with c = `HeadsConfig.width`,

    h = in_layer(norm(tokens))                                 D -> c
    (shift, scale) = modulation(silu(condition_in(condition))) FiLM (arXiv 1709.07871)
    h = h + conv(silu((1 + scale) norm(h) + shift))            3 x 3
    logit = out_layer(silu(norm(h)))                           c -> 1, one logit per token

Norms are LayerNorms over one token, so nothing mixes the examples of a batch.

A row may hold targets of several sizes, which a convolution does not support. Instead each token
gathers its eight neighbours, wherever they are in the row, and the convolution is a matmul. On CPUs
this is also many times as fast as XLA's convolution in a loop.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kontext_jax.models.flux import TIME_EMBED_DIM, FluxConfig, Taps, num_taps
from kontext_jax.models.layers import (
    Linear,
    layer_norm,
    modulate,
    normal,
    per_token,
    stack,
    timestep_embedding,
)
from kontext_jax.settings import Settings, check_least
from kontext_jax.types import Tokens

NEIGHBOURS = 9
"""Number of neighbours of a token on its grid, including itself: three rows of three."""


@dataclass(kw_only=True, unsafe_hash=True)
class HeadsConfig(Settings):
    """Sizes of the heads.

    Attributes:
      width: channels of a head.
      tap_every: number of blocks from one head to the next; 1, as in the paper, puts a head after
        every block.
      dtype: compute dtype; parameters and logits are float32.
    """

    width: int = 256
    tap_every: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_least(self, tap_every=1)


class Head(nnx.Module):
    """One head: logits of the image tokens of one block or map."""

    def __init__(self, config: HeadsConfig, features: int, condition: int, *, rngs: nnx.Rngs):
        """``features``: channels of a token; ``condition``: channels of an example's condition."""
        width, dtype = config.width, jnp.dtype(config.dtype)

        def linear(inputs, outputs, axes, init, dtype=dtype):
            return Linear(inputs, outputs, axes, rngs=rngs, dtype=dtype, init=init)

        fan_in = initializers.lecun_normal()
        self.in_layer = linear(features, width, ("embed", "mlp"), fan_in)
        self.condition_in = linear(condition, width, ("embed", "mlp"), fan_in)
        self.modulation = linear(width, 2 * width, ("embed", "mlp"), normal)
        self.conv = linear(NEIGHBOURS * width, width, ("embed", "mlp"), fan_in)
        # float32, because the hinge loss has its kinks at 1 and -1, where bfloat16 is coarse.
        self.out_layer = linear(width, 1, ("embed", "channels"), fan_in, jnp.dtype("float32"))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        condition: Float[Array, "B N E"],
        segments: Int[Array, "B S"],
        neighbours: Int[Array, "B S 9"],
    ) -> Float[Array, "B S"]:
        h = self.in_layer(layer_norm(x))
        vec = self.modulation(jax.nn.silu(self.condition_in(condition)))
        shift, scale = (per_token(part, segments) for part in jnp.split(vec, 2, axis=-1))
        patches = gather_neighbours(jax.nn.silu(modulate(h, shift, scale)), neighbours)
        h = h + self.conv(patches.reshape(*patches.shape[:2], -1))
        h = jax.nn.silu(layer_norm(h.astype(jnp.float32)))
        with jax.default_matmul_precision("highest"):  # TPUs would round the operands to bfloat16
            return self.out_layer(h)[:, :, 0]


class BlockHeads(nnx.Module):
    """Heads on a transformer's blocks, stacked like the blocks."""

    def __init__(self, config: HeadsConfig, transformer: FluxConfig, *, rngs: nnx.Rngs):
        """
        Raises:
          ValueError: ``tap_every`` leaves no block with a head.
        """
        self.config = config
        num_heads = [
            num_taps(depth, config.tap_every)
            for depth in (transformer.depth, transformer.depth_single)
        ]
        if not any(num_heads):
            raise ValueError(
                f"tap_every {config.tap_every} leaves no head on {transformer.depth} double and "
                f"{transformer.depth_single} single blocks; lower it."
            )

        def make(rngs):
            condition = TIME_EMBED_DIM + transformer.vec_in_dim
            return Head(config, transformer.hidden_size, condition, rngs=rngs)

        self.double, self.single = (
            nnx.data(stack(make, num, rngs) if num else None) for num in num_heads
        )

    def taps(self, tokens: Tokens, t: Float[Array, "B N"], read=None, remat: str = "") -> Taps:
        """Taps that apply these heads to a transformer running on ``tokens`` at noise level ``t``.

        Args:
          tokens: rows with the layout, the positions of targets, and the prompts' pooled vectors.
          t: noise level of each example.
          read: ``(function tokens -> logits, tokens) -> pytree``, computes the output of a head;
            default: its logits [B S].
          remat: see `Taps`.
        """
        neighbours = target_neighbours(tokens)
        pooled = tokens.pooled.astype(jnp.float32)
        condition = jnp.concatenate([timestep_embedding(1000.0 * t), pooled], axis=-1)

        def read_head(head, x):
            def logits(x):
                return head(x, condition, tokens.segments, neighbours)

            return logits(x) if read is None else read(logits, x)

        return Taps(self.double, self.single, read_head, self.config.tap_every, remat)


class MapHeads(nnx.Module):
    """Heads on the maps of a feature network."""

    def __init__(
        self, config: HeadsConfig, channels: Sequence[int], condition: int, *, rngs: nnx.Rngs
    ):
        """``channels``: channels of each map; ``condition``: channels of an image's condition."""
        self.heads = nnx.List([Head(config, width, condition, rngs=rngs) for width in channels])

    def __call__(
        self,
        maps: Sequence[Float[Array, "B _ _ _"]],
        condition: Float[Array, "B E"],
        read: Callable[[Callable, Float[Array, "B S D"]], Any],
    ) -> list[Any]:
        """The results of ``read(function tokens -> logits [B S], tokens)`` for each map."""
        readings = []
        for head, features in zip(self.heads, maps, strict=True):
            batch, height, width, channels = features.shape
            tokens = features.reshape(batch, height * width, channels)
            segments = jnp.ones(tokens.shape[:2], jnp.int32)
            neighbours = jnp.broadcast_to(
                grid_neighbours(height, width)[None], (*tokens.shape[:2], NEIGHBOURS)
            )
            logits = functools.partial(
                head, condition=condition[:, None], segments=segments, neighbours=neighbours
            )
            readings.append(read(logits, tokens))
        return readings


def grid_neighbours(height: int, width: int) -> Int[np.ndarray, "S 9"]:
    """The indices of each token's neighbours in a grid in raster order; see `target_neighbours`."""
    indices = np.pad(np.arange(height * width).reshape(height, width), 1, constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(indices, (3, 3))
    return windows.reshape(height * width, NEIGHBOURS).astype(np.int32)


def target_neighbours(tokens: Tokens) -> Int[Array, "B S 9"]:
    """The row indices of each target token's neighbours on its grid; -1 outside the grid.

    Neighbours are in raster order, with the token itself in the middle. All entries of context
    tokens and padding are -1. A target's tokens are contiguous and in raster order
    (``geometry.position_ids``), so the neighbour below is one grid width later in the row.
    """
    num_examples = tokens.example_ids.shape[1]
    row, column = (jnp.where(tokens.is_target, tokens.positions[..., i], 0) for i in (1, 2))
    member = tokens.segments[:, :, None] == jnp.arange(1, num_examples + 1)[None, None]
    index = jnp.maximum(tokens.segments - 1, 0)

    def size(coordinate):  # of the target of each token
        last = jnp.max(jnp.where(member, coordinate[:, :, None], 0), axis=1)
        return 1 + jnp.take_along_axis(last, index, axis=1)

    height, width = size(row), size(column)
    own = jnp.arange(row.shape[1])[None]
    indices = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            y, x = row + down, column + right
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & tokens.is_target
            indices.append(jnp.where(inside, own + down * width + right, -1))
    return jnp.stack(indices, axis=-1)


@jax.custom_vjp
def gather_neighbours(
    x: Float[Array, "B S c"], neighbours: Int[Array, "B S 9"]
) -> Float[Array, "B S 9 c"]:
    """The vectors of each token's neighbours; zeros for neighbours outside the grid.

    The gradient would be a scatter. But neighbourhood is symmetric: if a is b's neighbour on one
    side, b is a's neighbour on the opposite side. So the gradient is a gather too.
    """
    return _gather_at(x, neighbours, neighbours)


def _gather_at(x, indices, neighbours):
    """``x`` [B _ c] at ``indices`` [B S 9]; zeros where ``neighbours`` is -1."""
    flat = jnp.maximum(indices, 0).reshape(len(x), -1, 1)
    gathered = jnp.take_along_axis(x, flat, axis=1).reshape(*indices.shape, x.shape[-1])
    return jnp.where(neighbours[..., None] >= 0, gathered, jnp.zeros((), x.dtype))


def _gather_forward(x, neighbours):
    return gather_neighbours(x, neighbours), neighbours


def _gather_backward(neighbours, grads):
    opposite = jnp.arange(NEIGHBOURS)[None, None, ::-1]
    gathered = _gather_at(
        grads.reshape(len(grads), -1, grads.shape[-1]),
        NEIGHBOURS * neighbours + opposite,
        neighbours,
    )
    return jnp.sum(gathered, axis=2), None


gather_neighbours.defvjp(_gather_forward, _gather_backward)
