"""Rectified flow matching on packed triples: text-to-image and editing in one loss.

The target's tokens are moved along the line to noise, its contexts stay clean; the transformer
sees both and predicts a velocity everywhere, and only the target's counts (``flow.py`` has the
equations). Each example weighs the same, whatever its size.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from kontext_jax import flow
from kontext_jax.encoders import encode_images, encode_text, to_tokens
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.t5 import T5Config, T5Encoder
from kontext_jax.types import Batch, Metrics, Tokens


@dataclass(kw_only=True, unsafe_hash=True)
class FlowMatchingConfig:
    """The networks and how times are drawn.

    Attributes:
      autoencoder_from: the workdir of the autoencoder's run; its EMA weights are used.
      pooled: the transformer's pooled text vector: "mean" of the text encoder's vectors, or
        "zeros", for FLUX's own widths, whose vector is CLIP's.
      guidance: the value fed to the guidance input, where the transformer has one.
    """

    kind: str = "flow_matching"
    transformer: FluxConfig = field(default_factory=FluxConfig)
    text_encoder: T5Config = field(default_factory=T5Config)
    pooled: str = "zeros"
    autoencoder_from: str = ""
    time: flow.TimeConfig = field(default_factory=flow.TimeConfig)
    guidance: float = 1.0

    def __post_init__(self):
        if self.pooled not in ("mean", "zeros"):
            raise ValueError(f"pooled {self.pooled!r} is not 'mean' or 'zeros'.")
        names = ["context_in_dim"] + ["vec_in_dim"] * (self.pooled == "mean")
        for name in names:
            width = getattr(self.transformer, name)
            if width != self.text_encoder.d_model:
                raise ValueError(
                    f"transformer.{name} is {width}, but the text encoder's vectors have "
                    f"{self.text_encoder.d_model} channels (text_encoder.d_model)."
                )

    def encode_text(
        self, text_encoder: T5Encoder, batch: Batch
    ) -> tuple[Float[Array, "B L T"], Float[Array, "B N P"]]:
        """The prompts' token vectors and pooled vectors, as the transformer takes them."""
        text, pooled = encode_text(text_encoder, batch)
        if self.pooled == "zeros":
            pooled = jnp.zeros((*pooled.shape[:2], self.transformer.vec_in_dim), pooled.dtype)
        return text, pooled


class FlowMatching:
    """One player, ``model``: the transformer together with a text encoder trained from scratch."""

    players = ("model",)

    def __init__(self, config: FlowMatchingConfig):
        self.config = config

    def init(self, key: Key[Array, ""]) -> dict[str, dict[str, nnx.Module]]:
        rngs = nnx.Rngs(key)
        return {
            "model": {
                "transformer": Flux(self.config.transformer, rngs=rngs),
                "text_encoder": T5Encoder(self.config.text_encoder, rngs=rngs),
            }
        }

    def frozen(self) -> dict[str, str]:
        return {"autoencoder": self.config.autoencoder_from}

    def prepare(self, frozen: dict, batch: Batch) -> tuple[Batch, Float[Array, "B S C"]]:
        return batch, encode_images(frozen["autoencoder"], batch)

    def loss(
        self,
        player: str,
        models: dict,
        frozen: dict,
        inputs: tuple[Batch, Float[Array, "B S C"]],
        key: Key[Array, ""],
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Metrics]]:
        """Sums over examples of the mean square error of their target tokens' velocity."""
        batch, latents = inputs
        model = models["model"]
        text, pooled = self.config.encode_text(model["text_encoder"], batch)
        tokens = to_tokens(batch, latents, text, pooled)
        losses, t, present = per_example_loss(
            model["transformer"], tokens, self.config.time, self.config.guidance, key
        )
        metrics = {"t": jnp.sum(t * present)}
        return jnp.sum(losses), (jnp.sum(present), metrics)


def per_example_loss(
    transformer: Flux,
    tokens: Tokens,
    time: flow.TimeConfig,
    guidance: float,
    key: Key[Array, ""],
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """(loss, time, 1 where there is an example) of every example; absent ones are 0.

    Times and noise depend on ``key`` and the example's id alone, not on how rows are packed.
    """
    num_examples = tokens.example_ids.shape[1]
    member = jax.nn.one_hot(tokens.segments - 1, num_examples)  # [B S N]; padding: all zero
    target = jnp.where(tokens.is_target[:, :, None], member, 0.0)
    counts = jnp.sum(target, axis=1)

    keys = flow.example_keys(key, tokens.example_ids)
    time_keys, noise_keys = (
        jax.vmap(jax.vmap(lambda k, tag=tag: jax.random.fold_in(k, tag)))(keys) for tag in (0, 1)
    )
    sample_time = jax.vmap(jax.vmap(lambda k, n: flow.sample_time(k, n, time)))
    t = sample_time(time_keys, counts.astype(jnp.int32))
    noise = flow.token_noise(noise_keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])
    velocity = predict_velocity(transformer, tokens, noise, t, guidance)
    square = jnp.mean(jnp.square(velocity - flow.velocity(tokens.latents, noise)), axis=-1)
    present = (counts > 0).astype(jnp.float32)
    losses = jnp.einsum("bs,bsn->bn", square, target) / jnp.maximum(counts, 1.0)
    return losses, t * present, present


def predict_velocity(
    transformer: Flux,
    tokens: Tokens,
    noise: Float[Array, "B S C"],
    t: Float[Array, "B N"],
    guidance: float,
) -> Float[Array, "B S C"]:
    """The transformer on targets at time ``t`` of their example, and clean contexts."""
    index = jnp.maximum(tokens.segments - 1, 0)
    token_t = jnp.take_along_axis(t, index, axis=1)[:, :, None]
    noisy = flow.interpolate(tokens.latents, noise, token_t)
    has_guidance = transformer.config.guidance_embed
    return transformer(
        jnp.where(tokens.is_target[:, :, None], noisy, tokens.latents),
        tokens.text,
        tokens.pooled,
        t,
        positions=tokens.positions,
        segments=tokens.segments,
        text_segments=tokens.text_segments,
        guidance=jnp.full_like(t, guidance) if has_guidance else None,
    )
