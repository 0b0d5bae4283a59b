"""Discriminators of distillation: small independent heads on the features of a frozen network.

LADD's look at the teacher's image tokens, one after each attention block (arXiv 2403.12015), and
know the noise level and the prompt's pooled vector. ADD's look at the maps of a feature network
(arXiv 2311.17042), and know the prompt's vector and the real image's. Both see the image that
their tokens are, by a 3 x 3 convolution. What LADD's heads are made of the paper does not tell;
here it is, with c = `HeadsConfig.width`,

    h = in_layer(norm(tokens))                                 D -> c
    (shift, scale) = modulation(silu(condition_in(given)))     FiLM (arXiv 1709.07871)
    h = h + conv(silu((1 + scale) norm(h) + shift))            3 x 3
    logit = out_layer(silu(norm(h)))                           c -> 1, one logit a token

Norms are LayerNorms of one token: nothing here mixes the examples of a batch.

A row may hold targets of several sizes, which no convolution takes. So each token gathers its eight
neighbours, wherever they are in the row, and the convolution is a product of matrices; on CPUs it
is many times as fast as XLA's own in a loop.
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
"""Of a token on its grid, itself included: three rows of three."""


@dataclass(kw_only=True, unsafe_hash=True)
class HeadsConfig(Settings):
    """The heads.

    Attributes:
      width: channels of a head.
      tap_every: blocks from one head to the next; 1, a head after every block, is the paper's.
      dtype: compute dtype; parameters and logits are float32.
    """

    width: int = 256
    tap_every: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_least(self, tap_every=1)


class Head(nnx.Module):
    """Logits of the image tokens of one block or map."""

    def __init__(self, config: HeadsConfig, features: int, given: int, *, rngs: nnx.Rngs):
        """``features``: channels of a token; ``given``: of what is known of its example."""
        width, dtype = config.width, jnp.dtype(config.dtype)

        def linear(inputs, outputs, axes, init, dtype=dtype):
            return Linear(inputs, outputs, axes, rngs=rngs, dtype=dtype, init=init)

        fan_in = initializers.lecun_normal()
        self.in_layer = linear(features, width, ("embed", "mlp"), fan_in)
        self.condition_in = linear(given, width, ("embed", "mlp"), fan_in)
        self.modulation = linear(width, 2 * width, ("embed", "mlp"), normal)
        self.conv = linear(NEIGHBOURS * width, width, ("embed", "mlp"), fan_in)
        # The hinge has its corners at 1 and -1, where bfloat16 is coarse.
        self.out_layer = linear(width, 1, ("embed", "channels"), fan_in, jnp.dtype("float32"))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        given: Float[Array, "B N E"],
        segments: Int[Array, "B S"],
        neighbours: Int[Array, "B S 9"],
    ) -> Float[Array, "B S"]:
        h = self.in_layer(layer_norm(x))
        vec = self.modulation(jax.nn.silu(self.condition_in(given)))
        shift, scale = (per_token(part, segments) for part in jnp.split(vec, 2, axis=-1))
        around = gather(jax.nn.silu(modulate(h, shift, scale)), neighbours)
        h = h + self.conv(around.reshape(*around.shape[:2], -1))
        h = jax.nn.silu(layer_norm(h.astype(jnp.float32)))
        with jax.default_matmul_precision("highest"):  # a TPU would round its factors to bfloat16
            return self.out_layer(h)[:, :, 0]


class BlockHeads(nnx.Module):
    """Heads on a transformer's blocks, stacked as these are."""

    def __init__(self, config: HeadsConfig, transformer: FluxConfig, *, rngs: nnx.Rngs):
        """
        Raises:
          ValueError: no block would have a head.
        """
        self.config = config
        numbers = [
            num_taps(depth, config.tap_every)
            for depth in (transformer.depth, transformer.depth_single)
        ]
        if not any(numbers):
            raise ValueError(
                f"tap_every {config.tap_every} leaves no head on {transformer.depth} double and "
                f"{transformer.depth_single} single blocks; lower it."
            )

        def make(rngs):
            given = TIME_EMBED_DIM + transformer.vec_in_dim
            return Head(config, transformer.hidden_size, given, rngs=rngs)

        self.double, self.single = (
            nnx.data(stack(make, number, rngs) if number else None) for number in numbers
        )

    def taps(self, tokens: Tokens, t: Float[Array, "B N"], read=None, remat: str = "") -> Taps:
        """Where and how these heads look at a transformer that runs on ``tokens`` at noise ``t``.

        Args:
          tokens: the layout, the targets' places and the prompts' pooled vectors.
          t: noise level of each example.
          read: ``(function tokens -> logits, tokens) -> pytree``, what is wanted of each head; its
            logits [B S] if left out.
          remat: see `Taps`.
        """
        neighbours = neighbours_of(tokens)
        pooled = tokens.pooled.astype(jnp.float32)
        given = jnp.concatenate([timestep_embedding(1000.0 * t), pooled], axis=-1)

        def look(head, x):
            def logits(x):
                return head(x, given, tokens.segments, neighbours)

            return logits(x) if read is None else read(logits, x)

        return Taps(self.double, self.single, look, self.config.tap_every, remat)


class MapHeads(nnx.Module):
    """Heads on the maps of a feature network."""

    def __init__(self, config: HeadsConfig, channels: Sequence[int], given: int, *, rngs: nnx.Rngs):
        """``channels``: of each map; ``given``: of what is known of each image."""
        self.heads = nnx.List([Head(config, width, given, rngs=rngs) for width in channels])

    def __call__(
        self,
        maps: Sequence[Float[Array, "B _ _ _"]],
        given: Float[Array, "B E"],
        read: Callable[[Callable, Float[Array, "B S D"]], Any],
    ) -> list[Any]:
        """What ``read(function tokens -> logits [B S], tokens)`` gives for each map."""
        readings = []
        for head, features in zip(self.heads, maps, strict=True):
            batch, height, width, channels = features.shape
            tokens = features.reshape(batch, height * width, channels)
            segments = jnp.ones(tokens.shape[:2], jnp.int32)
            neighbours = jnp.broadcast_to(
                grid_neighbours(height, width)[None], (*tokens.shape[:2], NEIGHBOURS)
            )
            logits = functools.partial(
                head, given=given[:, None], segments=segments, neighbours=neighbours
            )
            readings.append(read(logits, tokens))
        return readings


def grid_neighbours(height: int, width: int) -> Int[np.ndarray, "S 9"]:
    """`neighbours_of` a whole grid, in reading order."""
    places = np.pad(np.arange(height * width).reshape(height, width), 1, constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(places, (3, 3))
    return windows.reshape(height * width, NEIGHBOURS).astype(np.int32)


def neighbours_of(tokens: Tokens) -> Int[Array, "B S 9"]:
    """The places in the row of each target token's neighbours on its grid; -1 where there is none.

    In reading order, the token itself in the middle. Tokens that are no target's have none. Rows
    of a target's tokens follow one another (``geometry.position_ids``), so a neighbour below is one
    width of the grid further on.
    """
    num_examples = tokens.example_ids.shape[1]
    row, column = (jnp.where(tokens.is_target, tokens.positions[..., i], 0) for i in (1, 2))
    member = tokens.segments[:, :, None] == jnp.arange(1, num_examples + 1)[None, None]
    index = jnp.maximum(tokens.segments - 1, 0)

    def size(ordinate):  # of each token's own target
        last = jnp.max(jnp.where(member, ordinate[:, :, None], 0), axis=1)
        return 1 + jnp.take_along_axis(last, index, axis=1)

    height, width = size(row), size(column)
    here = jnp.arange(row.shape[1])[None]
    places = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            y, x = row + down, column + right
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & tokens.is_target
            places.append(jnp.where(inside, here + down * width + right, -1))
    return jnp.stack(places, axis=-1)


@jax.custom_vjp
def gather(x: Float[Array, "B S c"], neighbours: Int[Array, "B S 9"]) -> Float[Array, "B S 9 c"]:
    """Each token's neighbours; zeros where there is none.

    Its gradient would be a scatter. But whose neighbour I am is my own neighbour, on the opposite
    side: so the gradient gathers too.
    """
    return _fetch(x, neighbours, neighbours)


def _fetch(x, places, neighbours):
    """``x`` [B _ c] at ``places`` [B S 9]; zeros where there is no neighbour."""
    flat = jnp.maximum(places, 0).reshape(len(x), -1, 1)
    found = jnp.take_along_axis(x, flat, axis=1).reshape(*places.shape, x.shape[-1])
    return jnp.where(neighbours[..., None] >= 0, found, jnp.zeros((), x.dtype))


def _gather_forward(x, neighbours):
    return gather(x, neighbours), neighbours


def _gather_backward(neighbours, grads):
    opposite = jnp.arange(NEIGHBOURS)[None, None, ::-1]
    mine = _fetch(
        grads.reshape(len(grads), -1, grads.shape[-1]),
        NEIGHBOURS * neighbours + opposite,
        neighbours,
    )
    return jnp.sum(mine, axis=2), None


gather.defvjp(_gather_forward, _gather_backward)
