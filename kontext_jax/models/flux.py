"""FLUX.1: the rectified-flow transformer of text-to-image and, with context tokens, of Kontext.

Follows Black Forest Labs' ``flux/model.py`` name by name. A row's sequence is
``[text | image tokens]``; image tokens are the noisy target and its clean contexts, in any order,
told apart by their position ids alone. 19 double-stream blocks keep separate weights for text and
image and attend jointly; 38 single-stream blocks run attention and MLP in parallel on the joint
sequence. Each kind is one stacked module, scanned, and rematerialised in the backward pass.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kontext_jax.models.attention import KERNELS, attention
from kontext_jax.models.layers import (
    REMAT_POLICIES,
    Linear,
    MLPEmbedder,
    Modulation,
    QKNorm,
    apply_rope,
    modulate,
    per_token,
    remat,
    rope,
    stack,
    timestep_embedding,
    zeros,
)
from kontext_jax.settings import Settings, check_choices
from kontext_jax.sharding import constrain, platform

TIME_EMBED_DIM = 256

MAX_UNROLLED = 12
"""So many blocks are written out one by one on CPUs if their backward pass repeats nothing; it
compiles as fast."""


class Taps(NamedTuple):
    """Small networks that look at the image tokens after the blocks.

    Attributes:
      double, single: heads, stacked along a leading axis as the blocks are: one for every
        ``every``-th block of the kind, the last one included; None for none.
      read: ``(head, image tokens [B S D]) -> pytree``.
      every: blocks from one tap to the next.
      remat: what the backward pass recomputes of blocks and heads; the transformer's own policy
        where empty.
    """

    double: Any
    single: Any
    read: Callable[[Any, Float[Array, "B S D"]], Any] | None
    every: int = 1
    remat: str = ""


NO_TAPS = Taps(None, None, None)


@dataclass(kw_only=True, unsafe_hash=True)
class FluxConfig(Settings):
    """Sizes of the transformer; the defaults are FLUX.1 [dev] and Kontext [dev].

    Attributes:
      in_channels: channels of an image token: latent channels times the 2 x 2 patch.
      vec_in_dim: channels of the pooled text vector.
      context_in_dim: channels of a text token.
      axes_dim: channels of a head given to the position axes (image index, row, column).
      guidance_embed: whether the distilled guidance scale is an input ([dev], not [schnell]).
      dtype: compute dtype; parameters are float32.
      timestep_dtype: time and guidance are rounded to it first. PyTorch pipelines in bfloat16
        round so, which moves the output by more than all other rounding together.
      attention: implementation of attention, see `attention.attention`.
      remat: what the backward pass recomputes, see `layers.remat`. For each block,

          policy          keeps a token                   repeats of the forward's products
          full            1 h                             all
          save_attention  2 h                             all but weights times values
          save_named      11 h (double), 10 h (single)    queries times keys
          offload         1 h, and the rest on the host   queries times keys
          none            all, also attention's weights   none

        with h = hidden_size values of the compute dtype. In [dev], for a row of 8,704 tokens
        (1024 pixels, one context, text), 1 h of all blocks is 3.0 GB, and each of attention's two
        products 16 % of the forward pass. The last column is that of plain attention, which in
        bfloat16 keeps its result in float32, 2 h and not 1. A fused kernel keeps no weights and
        always repeats queries times keys; its forward pass is repeated by "full" alone, and
        cuDNN's by "offload" too.
    """

    in_channels: int = 64
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single: int = 38
    mlp_ratio: float = 4.0
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10000.0
    guidance_embed: bool = True
    dtype: str = "bfloat16"
    timestep_dtype: str = "float32"
    remat: str = "full"
    attention: str = "auto"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads."
            )
        if sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim} must be even numbers that add up to the head's "
                f"{self.head_dim} channels (hidden_size / num_heads)."
            )
        check_choices(self, remat=REMAT_POLICIES, attention=KERNELS)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def dev(cls, **kwargs) -> "FluxConfig":
        """FLUX.1 [dev] and Kontext [dev]: 11,901,408,320 parameters."""
        return cls(**kwargs)

    @classmethod
    def schnell(cls, **kwargs) -> "FluxConfig":
        """FLUX.1 [schnell]: as [dev] without the guidance input; 11,891,178,560 parameters."""
        return cls(guidance_embed=False, **kwargs)

    @classmethod
    def tiny(cls, **kwargs) -> "FluxConfig":
        """For laptops: learns the 32-pixel world on two CPU cores in minutes."""
        sizes = dict(
            in_channels=24,
            hidden_size=128,
            num_heads=4,
            depth=2,
            depth_single=4,
            vec_in_dim=64,
            context_in_dim=64,
            axes_dim=(8, 12, 12),
            guidance_embed=False,
            dtype="float32",
            remat="full",
        )
        return cls(**(sizes | kwargs))


class SelfAttention(nnx.Module):
    """One stream's projections around the joint attention of a double block."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.dtype)
        self.num_heads = config.num_heads
        self.qkv = Linear(size, 3 * size, ("embed", "heads"), rngs=rngs, dtype=dtype)
        self.norm = QKNorm(config.head_dim, rngs=rngs)
        self.proj = Linear(size, size, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def project(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S H K"], ...]:
        """Normalised queries and keys, and values."""
        q, k, v = (_split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, -1))
        return *self.norm(q, k), v


class MLP(nnx.Module):
    """Linear, GELU (tanh), Linear. BFL names the layers by their place: 0 and 2."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        size, mlp_dim, dtype = config.hidden_size, config.mlp_dim, jnp.dtype(config.dtype)
        self.in_layer = Linear(size, mlp_dim, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.out_layer = Linear(mlp_dim, size, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.out_layer(jax.nn.gelu(self.in_layer(x), approximate=True))


class DoubleStreamBlock(nnx.Module):
    """Text and image with weights of their own, attending to one another."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.kernel = config.attention
        self.img_mod = Modulation(config.hidden_size, 2, rngs=rngs, dtype=dtype)
        self.img_attn = SelfAttention(config, rngs=rngs)
        self.img_mlp = MLP(config, rngs=rngs)
        self.txt_mod = Modulation(config.hidden_size, 2, rngs=rngs, dtype=dtype)
        self.txt_attn = SelfAttention(config, rngs=rngs)
        self.txt_mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        img: Float[Array, "B S D"],
        txt: Float[Array, "B L D"],
        vec: Float[Array, "B N D"],
        rotation: Float[Array, "2 B LS 1 K"],
        segments: Int[Array, "B LS"],
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B L D"]]:
        num_text = txt.shape[1]
        img_mod = self.img_mod(vec, segments[:, num_text:])
        txt_mod = self.txt_mod(vec, segments[:, :num_text])
        img_qkv = self.img_attn.project(modulate(img, *img_mod[:2]))
        txt_qkv = self.txt_attn.project(modulate(txt, *txt_mod[:2]))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        out = _attend(q, k, v, rotation, segments, self.kernel)
        txt_out, img_out = out[:, :num_text], out[:, num_text:]

        img = img + img_mod[2] * self.img_attn.proj(img_out)
        img = img + img_mod[5] * self.img_mlp(modulate(img, *img_mod[3:5]))
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, *txt_mod[3:5]))
        return constrain(img, "batch seq act_embed"), constrain(txt, "batch seq act_embed")


class SingleStreamBlock(nnx.Module):
    """Attention and MLP in parallel on the joint sequence, sharing one input and output map."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.dtype)
        self.num_heads, self.kernel = config.num_heads, config.attention
        self.modulation = Modulation(size, 1, rngs=rngs, dtype=dtype)
        joint = 3 * size + config.mlp_dim
        self.linear1 = Linear(size, joint, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.linear2 = Linear(size + config.mlp_dim, size, ("mlp", "embed"), rngs=rngs, dtype=dtype)
        self.norm = QKNorm(config.head_dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B LS D"],
        vec: Float[Array, "B N D"],
        rotation: Float[Array, "2 B LS 1 K"],
        segments: Int[Array, "B LS"],
    ) -> Float[Array, "B LS D"]:
        size = x.shape[-1]
        shift, scale, gate = self.modulation(vec, segments)
        joint = self.linear1(modulate(x, shift, scale))
        *qkv, mlp = jnp.split(joint, [size, 2 * size, 3 * size], axis=-1)
        q, k, v = (_split_heads(part, self.num_heads) for part in qkv)
        q, k = self.norm(q, k)
        out = _attend(q, k, v, rotation, segments, self.kernel)
        joint = jnp.concatenate([out, jax.nn.gelu(mlp, approximate=True)], axis=-1)
        return constrain(x + gate * self.linear2(joint), "batch seq act_embed")


class LastLayer(nnx.Module):
    """adaLN (shift, scale: BFL's order; diffusers stores scale, shift) and the map to channels."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.dtype)
        make = functools.partial(Linear, rngs=rngs, dtype=dtype, init=zeros)
        self.linear = make(size, config.in_channels, ("embed", "channels"))
        self.adaLN_modulation = make(size, 2 * size, ("embed", "mlp"))

    def __call__(
        self, x: Float[Array, "B S D"], vec: Float[Array, "B N D"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S C"]:
        shift, scale = jnp.split(self.adaLN_modulation(jax.nn.silu(vec)), 2, axis=-1)
        return self.linear(modulate(x, per_token(shift, segments), per_token(scale, segments)))


class Flux(nnx.Module):
    """The velocity of image tokens, given text, its pooled vector, and time."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.dtype)
        self.config = config
        embedder = functools.partial(MLPEmbedder, hidden_size=size, rngs=rngs, dtype=dtype)
        self.img_in = Linear(
            config.in_channels, size, ("channels", "embed"), rngs=rngs, dtype=dtype
        )
        self.txt_in = Linear(
            config.context_in_dim, size, ("channels", "embed"), rngs=rngs, dtype=dtype
        )
        self.time_in = embedder(TIME_EMBED_DIM)
        self.vector_in = embedder(config.vec_in_dim)
        self.guidance_in = embedder(TIME_EMBED_DIM) if config.guidance_embed else None
        self.double_blocks = stack(lambda r: DoubleStreamBlock(config, rngs=r), config.depth, rngs)
        self.single_blocks = stack(
            lambda r: SingleStreamBlock(config, rngs=r), config.depth_single, rngs
        )
        self.final_layer = LastLayer(config, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "B S C"],
        text: Float[Array, "B L T"],
        pooled: Float[Array, "B N P"],
        t: Float[Array, "B N"],
        *,
        positions: Int[Array, "B S A"],
        segments: Int[Array, "B S"],
        text_segments: Int[Array, "B L"],
        guidance: Float[Array, "B N"] | None = None,
    ) -> Float[Array, "B S C"]:
        """Predicts ``noise - latents`` for every image token, in float32.

        Args:
          latents: noisy target tokens and clean context tokens.
          text, pooled: the encoders' sequence, and one vector an example.
          t: time of each example in [0, 1], 1 = noise.
          positions: (image index, row, column) of the image tokens; text sits at (0, 0, 0).
          segments, text_segments: example of each token, counted from 1; 0 = padding.
          guidance: the distilled guidance scale; given if and only if the model has the input.

        Raises:
          ValueError: guidance is missing or not wanted.
        """
        x, vec, _ = self._run(
            latents, text, pooled, t, positions, segments, text_segments, guidance
        )
        return self.final_layer(x, vec, segments).astype(jnp.float32)

    def tapped(
        self,
        latents: Float[Array, "B S C"],
        text: Float[Array, "B L T"],
        pooled: Float[Array, "B N P"],
        t: Float[Array, "B N"],
        *,
        positions: Int[Array, "B S A"],
        segments: Int[Array, "B S"],
        text_segments: Int[Array, "B L"],
        guidance: Float[Array, "B N"] | None = None,
        taps: Taps,
    ) -> tuple[Float[Array, "B S C"], Any]:
        """(velocity, what the heads read off the image tokens after each tapped block, in order).

        Heads run within the loops over the blocks, so that no block's tokens outlive it. Arguments
        are those of a call, and ``taps``.
        """
        x, vec, readings = self._run(
            latents, text, pooled, t, positions, segments, text_segments, guidance, taps
        )
        return self.final_layer(x, vec, segments).astype(jnp.float32), readings

    def _run(
        self, latents, text, pooled, t, positions, segments, text_segments, guidance, taps=NO_TAPS
    ):
        """(image tokens after the last block, conditioning vector, readings of the taps)."""
        txt_len = text.shape[1]
        img = constrain(self.img_in(latents), "batch seq act_embed")
        txt = constrain(self.txt_in(text), "batch seq act_embed")
        vec = self._conditioning(t, guidance, pooled)
        joint_segments = jnp.concatenate([text_segments, segments], axis=1)
        rotation = self._rotation(positions, txt_len)

        def double(carry, block):
            return block(*carry, vec, rotation, joint_segments)

        def single(x, block):
            return block(x, vec, rotation, joint_segments)

        policy = taps.remat or self.config.remat
        # What a loop keeps for its backward pass is copied once more, which is a tenth of a step on
        # CPUs. One that keeps next to nothing is the faster.
        few = self.config.depth + self.config.depth_single <= MAX_UNROLLED
        unroll = few and policy == "none" and platform() == "cpu"
        run = functools.partial(_run_blocks, every=taps.every, policy=policy, unroll=unroll)
        read = taps.read
        (img, txt), first = run(
            double, (img, txt), self.double_blocks, taps.double, lambda head, x: read(head, x[0])
        )
        x, second = run(
            single,
            jnp.concatenate([txt, img], axis=1),
            self.single_blocks,
            taps.single,
            lambda head, x: read(head, x[:, txt_len:]),
        )
        readings = [reading for reading in (first, second) if reading is not None]
        if readings:
            readings = jax.tree.map(lambda *parts: jnp.concatenate(parts), *readings)
        return x[:, txt_len:], vec, readings

    def _conditioning(self, t, guidance, pooled) -> Float[Array, "B N D"]:
        if (guidance is not None) != self.config.guidance_embed:
            wants = "needs" if self.config.guidance_embed else "has no"
            raise ValueError(f"This FLUX {wants} guidance input (guidance_embed in its config).")
        rounded = jnp.finfo(self.config.timestep_dtype)
        dtype = jnp.dtype(self.config.dtype)

        def round_off(x):  # XLA would drop a cast there and back
            return jax.lax.reduce_precision(x, rounded.nexp, rounded.nmant)

        def embed(x):
            # As PyTorch pipelines do, the factor 1000 is applied after the rounding.
            scaled = round_off(round_off(x.astype(jnp.float32)) * 1000.0)
            return timestep_embedding(scaled).astype(dtype)

        vec = self.time_in(embed(t))
        if guidance is not None:
            vec = vec + self.guidance_in(embed(guidance))
        return vec + self.vector_in(pooled.astype(dtype))

    def _rotation(self, positions, txt_len) -> Float[Array, "2 B LS 1 K"]:
        text_positions = jnp.zeros((positions.shape[0], txt_len, positions.shape[2]), jnp.int32)
        joint = jnp.concatenate([text_positions, positions], axis=1)
        return rope(joint, self.config.axes_dim, self.config.theta)


def _run_blocks(step, carry, blocks, heads, read, *, every, policy, unroll):
    """(carry after all blocks, readings): a head reads the carry after every ``every``-th block.

    Counted from the last block on; those in front that fill no group are not read.
    """
    scan = functools.partial(jax.lax.scan, unroll=unroll)

    def alone(carry, block):
        return step(carry, block), None

    def tapped(carry, block_and_head):
        block, head = block_and_head
        carry = step(carry, block)
        return carry, read(head, carry)

    def group(carry, blocks_and_head):
        members, head = blocks_and_head
        *before, last = (jax.tree.map(lambda x, i=i: x[i], members) for i in range(every))
        for block in before:
            carry, _ = remat(alone, policy)(carry, block)
        return remat(tapped, policy)(carry, (last, head))

    if heads is None:
        return scan(remat(alone, policy), carry, blocks)
    num_blocks = len(jax.tree.leaves(blocks)[0])
    groups = num_taps(num_blocks, every)
    before = num_blocks - groups * every
    if before:
        carry, _ = scan(remat(alone, policy), carry, jax.tree.map(lambda x: x[:before], blocks))
    grouped = jax.tree.map(lambda x: x[before:].reshape(groups, every, *x.shape[1:]), blocks)
    return scan(group, carry, (grouped, heads))


def num_taps(num_blocks: int, every: int) -> int:
    """How many of a kind's blocks have a head, if every ``every``-th has one."""
    return num_blocks // every


def _split_heads(x: Float[Array, "B S D"], num_heads: int) -> Float[Array, "B S H K"]:
    heads = x.reshape(*x.shape[:-1], num_heads, -1)
    if platform() == "tpu":
        # The kernel wants heads before tokens. Left to itself XLA transposes later, in float32,
        # amid norm and rotation, at twice the traffic.
        heads = jax.lax.optimization_barrier(heads.swapaxes(1, 2)).swapaxes(1, 2)
    return heads


def _attend(
    q: Float[Array, "B LS H K"],
    k: Float[Array, "B LS H K"],
    v: Float[Array, "B LS H K"],
    rotation: Float[Array, "2 B LS 1 K"],
    segments: Int[Array, "B LS"],
    kernel: str,
) -> Float[Array, "B LS D"]:
    """Attention of rotated queries and keys; the logits' scale is rounded with the rotation."""
    q, k = apply_rope(q, rotation * q.shape[-1] ** -0.5), apply_rope(k, rotation)
    out = attention(q, k, v, segments, scale=1.0, kernel=kernel)
    return out.reshape(*out.shape[:-2], -1)
