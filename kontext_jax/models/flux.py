"""FLUX.1: the rectified-flow transformer for text-to-image and, with context tokens, for Kontext.

Follows Black Forest Labs' ``flux/model.py``, with the same names. A row's sequence is
``[text | image tokens]``; image tokens are the noisy target and its clean contexts, in any order,
distinguished only by their position ids. 19 double-stream blocks have separate weights for text and
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
"""Models with at most this many blocks are unrolled on CPUs if their backward pass recomputes
nothing; they compile as fast as a loop."""


class Taps(NamedTuple):
    """Small networks (heads) that see the image tokens after the blocks.

    Attributes:
      double, single: heads of each kind of block, stacked along a leading axis like the blocks: one
        for every ``every``-th block, counted back from the last; None if the kind has no heads.
      read: ``(head, image tokens [B S D]) -> pytree``, applies a head.
      every: number of blocks from one head to the next.
      remat: what the backward pass recomputes of blocks and heads; empty for the transformer's own
        policy.
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
      axes_dim: channels of a head for each position axis (image index, row, column).
      guidance_embed: whether the distilled guidance scale is an input ([dev], not [schnell]).
      dtype: compute dtype; parameters are float32.
      timestep_dtype: dtype to which time and guidance are rounded. PyTorch pipelines in bfloat16
        round them too, which changes the output more than all other rounding together.
      attention: implementation of attention, see `attention.attention`.
      remat: what the backward pass recomputes, see `layers.remat`. For each block,

          policy          saved per token                 recomputed matmuls of the forward pass
          full            1 h                             all
          save_attention  2 h                             all but weights times values
          save_named      11 h (double), 10 h (single)    queries times keys
          offload         1 h, and the rest on the host   queries times keys
          none            all, also attention's weights   none

        with h = hidden_size values of the compute dtype. In [dev], for a row of 8,704 tokens
        (1024 pixels, one context, text), 1 h of all blocks is 3.0 GB, and each of attention's two
        matmuls is 16 % of the forward pass. The last column is for plain attention, which in
        bfloat16 saves its result in float32: 2 h instead of 1. A fused kernel saves no weights and
        always recomputes queries times keys; only "full" repeats its forward pass, and for cuDNN
        also "offload".
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
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}."
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
        """For laptops: learns the 32-pixel toy data on two CPU cores in minutes."""
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
    """Projections of one stream before and after a double block's joint attention."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.dtype)
        self.num_heads = config.num_heads
        self.qkv = Linear(size, 3 * size, ("embed", "heads"), rngs=rngs, dtype=dtype)
        self.norm = QKNorm(config.head_dim, rngs=rngs)
        self.proj = Linear(size, size, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def project(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S H K"], ...]:
        """Queries, keys and values; queries and keys are normalised."""
        q, k, v = (_split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, -1))
        return *self.norm(q, k), v


class MLP(nnx.Module):
    """Linear, GELU (tanh), Linear. BFL names the layers by their index: 0 and 2."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        size, mlp_dim, dtype = config.hidden_size, config.mlp_dim, jnp.dtype(config.dtype)
        self.in_layer = Linear(size, mlp_dim, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.out_layer = Linear(mlp_dim, size, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.out_layer(jax.nn.gelu(self.in_layer(x), approximate=True))


class DoubleStreamBlock(nnx.Module):
    """Joint attention of text and image, then an MLP each; the streams share no weights."""

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
    """Attention and MLP in parallel on the joint sequence; input and output maps are fused."""

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
    """adaLN (shift, scale: BFL's order; diffusers stores scale, shift), then Linear to channels."""

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
    """Predicts the velocity of image tokens from text, its pooled vector, and time."""

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
          text, pooled: text tokens, and one pooled text vector per example.
          t: time of each example in [0, 1]; 1 is pure noise.
          positions: (image index, row, column) of each image token; text is at (0, 0, 0).
          segments, text_segments: example of each token, counted from 1; 0 = padding.
          guidance: distilled guidance scale of each example, if the model has the input.

        Raises:
          ValueError: guidance is missing, or the model has no guidance input.
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
        """The velocity, and the outputs of the heads ``taps`` in the order of their blocks.

        Heads run inside the loops over the blocks, so that no block's tokens have to be kept. The
        other arguments are those of `__call__`.
        """
        x, vec, readings = self._run(
            latents, text, pooled, t, positions, segments, text_segments, guidance, taps
        )
        return self.final_layer(x, vec, segments).astype(jnp.float32), readings

    def _run(
        self, latents, text, pooled, t, positions, segments, text_segments, guidance, taps=NO_TAPS
    ):
        """Image tokens after the last block, conditioning vector, and outputs of the heads."""
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
        # A loop copies once more what it saves for its backward pass: a tenth of a step on CPUs.
        # If it saves next to nothing, the loop is faster than unrolled blocks.
        is_small = self.config.depth + self.config.depth_single <= MAX_UNROLLED
        unroll = is_small and policy == "none" and platform() == "cpu"
        run = functools.partial(_run_blocks, every=taps.every, policy=policy, unroll=unroll)
        read = taps.read
        (img, txt), double_readings = run(
            double, (img, txt), self.double_blocks, taps.double, lambda head, x: read(head, x[0])
        )
        x, single_readings = run(
            single,
            jnp.concatenate([txt, img], axis=1),
            self.single_blocks,
            taps.single,
            lambda head, x: read(head, x[:, txt_len:]),
        )
        readings = [r for r in (double_readings, single_readings) if r is not None]
        if readings:
            readings = jax.tree.map(lambda *parts: jnp.concatenate(parts), *readings)
        return x[:, txt_len:], vec, readings

    def _conditioning(self, t, guidance, pooled) -> Float[Array, "B N D"]:
        if (guidance is not None) != self.config.guidance_embed:
            verb = "needs a" if self.config.guidance_embed else "has no"
            raise ValueError(f"This FLUX {verb} guidance input (guidance_embed in its config).")
        rounded = jnp.finfo(self.config.timestep_dtype)
        dtype = jnp.dtype(self.config.dtype)

        def round_off(x):  # not a cast and back, which XLA would remove
            return jax.lax.reduce_precision(x, rounded.nexp, rounded.nmant)

        def embed(x):
            # As in PyTorch pipelines, the factor 1000 is applied after rounding.
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
    """Carry after all blocks, and the outputs of the heads, or None without heads.

    A head reads the carry after every ``every``-th block, counted back from the last one. Blocks at
    the front that do not fill a group have no head.
    """
    scan = functools.partial(jax.lax.scan, unroll=unroll)

    def untapped(carry, block):
        return step(carry, block), None

    def tapped(carry, block_and_head):
        block, head = block_and_head
        carry = step(carry, block)
        return carry, read(head, carry)

    def group(carry, blocks_and_head):
        members, head = blocks_and_head
        *before, last = (jax.tree.map(lambda x, i=i: x[i], members) for i in range(every))
        for block in before:
            carry, _ = remat(untapped, policy)(carry, block)
        return remat(tapped, policy)(carry, (last, head))

    if heads is None:
        return scan(remat(untapped, policy), carry, blocks)
    num_blocks = len(jax.tree.leaves(blocks)[0])
    groups = num_taps(num_blocks, every)
    rest = num_blocks - groups * every
    if rest:
        carry, _ = scan(remat(untapped, policy), carry, jax.tree.map(lambda x: x[:rest], blocks))
    grouped = jax.tree.map(lambda x: x[rest:].reshape(groups, every, *x.shape[1:]), blocks)
    return scan(group, carry, (grouped, heads))


def num_taps(num_blocks: int, every: int) -> int:
    """Number of heads on ``num_blocks`` blocks if every ``every``-th block has one."""
    return num_blocks // every


def _split_heads(x: Float[Array, "B S D"], num_heads: int) -> Float[Array, "B S H K"]:
    heads = x.reshape(*x.shape[:-1], num_heads, -1)
    if platform() == "tpu":
        # The kernel needs the head axis before the token axis. Without the barrier XLA transposes
        # later, in float32 between norm and rotation, which doubles the memory traffic.
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
    """Attention with RoPE; the logits' scale is part of the queries' rotation, rounded with it."""
    q, k = apply_rope(q, rotation * q.shape[-1] ** -0.5), apply_rope(k, rotation)
    out = attention(q, k, v, segments, scale=1.0, kernel=kernel)
    return out.reshape(*out.shape[:-2], -1)
