r"""Guidance distillation: one call where classifier-free guidance takes two.

Meng et al., arXiv 2210.03142, stage one; FLUX.1 [dev] was distilled this way. The student takes the
scale w as an input, and learns the guided velocity of a teacher that does not,

    v_student(x_t, t, w)  ~  v(x_t, t, no prompt) + w (v(x_t, t, prompt) - v(x_t, t, no prompt)),

at the times of flow matching. It starts from the teacher's parameters. The last layer of the new
input's embedder starts at zero, so that the student initially equals the teacher.
"""

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kontext_jax import flow
from kontext_jax.encoders import encode_images
from kontext_jax.flops import forward_flops, training_flops
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.objectives import Sums
from kontext_jax.objectives.student import noise_like
from kontext_jax.objectives.transformer import (
    NetworksConfig,
    NetworksInit,
    inputs_at,
    lengths_of,
    per_example,
    target_membership,
)
from kontext_jax.types import Batch, Tokens, unprompted


@dataclass(kw_only=True, unsafe_hash=True)
class GuidanceConfig(NetworksConfig):
    """The student, which needs ``transformer.guidance_embed``; the teacher lacks that input.

    The data needs ``data.negatives``.

    Attributes:
      init_from: locations of the networks; ``transformer`` is the teacher and initialises the
        student.
      time: distribution of training times, and the shift of both training and sampling times.
      scales: bounds of the uniform distribution of w.
    """

    kind: str = "guidance"
    init_from: NetworksInit = field(default_factory=NetworksInit)
    scales: tuple[float, float] = (1.0, 6.0)

    def __post_init__(self):
        super().__post_init__()
        if not self.transformer.guidance_embed:
            raise ValueError("the student takes the scale as an input: set guidance_embed=True.")
        if not self.scales[0] < self.scales[1]:
            raise ValueError(f"scales {self.scales} must be increasing.")

    @property
    def teacher(self) -> FluxConfig:
        return dataclasses.replace(self.transformer, guidance_embed=False)


class Guidance:
    """One player, ``student``."""

    players = ("student",)
    generator = "student"
    optim = every = start = MappingProxyType({})

    def __init__(self, config: GuidanceConfig):
        self.config = config

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        student = Flux(self.config.transformer, rngs=nnx.Rngs(key))
        kernel = student.guidance_in.out_layer.kernel
        kernel[...] = jnp.zeros_like(kernel[...])
        return {"student": {"transformer": student}}

    def frozen(self) -> tuple[str, ...]:
        return ("autoencoder", "teacher", *self.config.frozen_encoders())

    def prepare(self, frozen: dict, batch: Batch) -> dict[str, Tokens]:
        latents = encode_images(frozen.get("autoencoder"), batch)
        return {
            "tokens": self.config.tokens(frozen, batch, latents),
            "negative": self.config.tokens(frozen, unprompted(batch), latents),
        }

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """FLOPs of the student's training and of the teacher's two forward passes."""
        lengths, config = lengths_of(batch), self.config
        flops = training_flops(config.transformer, **lengths)
        flops = flops + 2.0 * forward_flops(config.teacher, **lengths)
        return jnp.sum(jnp.where(lengths["target"] > 0, flops, 0.0))

    def loss(
        self,
        player: str,
        models: dict,
        frozen: dict,
        inputs: dict[str, Tokens],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sum over examples of the mean squared error of the target tokens' velocity."""
        tokens, negative = inputs["tokens"], inputs["negative"]
        student, teacher = models["student"]["transformer"], frozen["teacher"]
        member, counts = target_membership(tokens)
        keys = flow.example_keys(key, tokens.example_ids)
        time_keys, noise_keys, scale_keys = flow.split_keys(keys, 3)
        t = flow.sample_times(time_keys, counts.astype(jnp.int32), self.config.time)
        low, high = self.config.scales
        draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high)))
        scale = draw(scale_keys)
        noise = noise_like(tokens, noise_keys)
        x_t = flow.interpolate(tokens.latents, noise, flow.at_tokens(t, tokens.segments))

        positive, unconditional = (
            teacher(**inputs_at(teacher, conditions, x_t, t, 0.0))
            for conditions in (tokens, negative)
        )
        token_scale = flow.at_tokens(scale, tokens.segments)
        guided = unconditional + token_scale * (positive - unconditional)
        velocity = student(**inputs_at(student, tokens, x_t, t, scale))
        square = jnp.mean(jnp.square(velocity - jax.lax.stop_gradient(guided)), axis=-1)
        present = (counts > 0).astype(jnp.float32)
        losses = per_example(square, member, counts)
        return jnp.sum(losses), Sums(jnp.sum(present), {"t": jnp.sum(t * present)})
