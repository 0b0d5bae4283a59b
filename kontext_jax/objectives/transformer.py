"""Shared by all objectives of the transformer: networks, conditioning, per-example means."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kontext_jax import flow
from kontext_jax.encoders import encode_clip, encode_text, to_tokens
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.clip import ClipConfig
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.t5 import T5Config, pool
from kontext_jax.objectives import Network
from kontext_jax.sampler import SamplerConfig
from kontext_jax.settings import Settings, check_choices
from kontext_jax.types import Batch, Tokens


@dataclass(kw_only=True, unsafe_hash=True)
class NetworksInit(Settings):
    """The location of each network's weights.

    A location is a run's workdir, a diffusers pipeline or one network's folder in it, a single file
    in Black Forest Labs' layout, or a folder written by `kontext_jax.convert`.

    Attributes:
      transformer, text_encoder: initial weights; random if empty. Frozen networks need a location.
      clip, autoencoder: always frozen.
      except_for: patterns of tensors that may be missing, or are to be ignored; missing parameters
        are initialised at random.
    """

    transformer: str = ""
    text_encoder: str = ""
    clip: str = ""
    autoencoder: str = ""
    except_for: tuple[str, ...] = ()


@dataclass(kw_only=True, unsafe_hash=True)
class NetworksConfig(Settings):
    """The networks and their conditioning.

    Attributes:
      autoencoder_dtype: compute dtype of the frozen autoencoder; that of its stored config if
        empty, which is float32 for FLUX.1's.
      pooled: source of the transformer's pooled text vector: "clip", "mean" of the text encoder's
        vectors, or "zeros".
      time: shift of the sampler's schedule.
      guidance: value of the guidance input, if the transformer has one.
    """

    transformer: FluxConfig = field(default_factory=FluxConfig)
    text_encoder: T5Config = field(default_factory=T5Config)
    clip: ClipConfig = field(default_factory=ClipConfig)
    autoencoder_dtype: str = ""
    pooled: str = "clip"
    time: flow.TimeConfig = field(default_factory=flow.TimeConfig)
    guidance: float = 1.0

    def __post_init__(self):
        check_choices(self, pooled=("clip", "mean", "zeros"))
        d_model = self.text_encoder.d_model
        widths = [("context_in_dim", d_model, "text_encoder.d_model")]
        if self.pooled == "mean":
            widths.append(("vec_in_dim", d_model, "text_encoder.d_model"))
        if self.pooled == "clip":
            widths.append(("vec_in_dim", self.clip.hidden_size, "clip.hidden_size"))
        for name, channels, source in widths:
            if getattr(self.transformer, name) != channels:
                raise ValueError(
                    f"transformer.{name} is {getattr(self.transformer, name)}, but the vectors it "
                    f"takes have {channels} channels ({source})."
                )

    @property
    def sampler(self) -> SamplerConfig:
        """The default sampler of these networks."""
        return SamplerConfig()

    @property
    def teacher(self) -> FluxConfig:
        """The config of a frozen teacher of this transformer."""
        return self.transformer

    def frozen_autoencoder(self, stored: AutoencoderConfig) -> AutoencoderConfig:
        """The config of the frozen autoencoder, given its stored one."""
        return replace(stored, dtype=self.autoencoder_dtype or stored.dtype)

    def encode_text(
        self, networks: dict[str, Network], batch: Batch
    ) -> tuple[Float[Array, "B L T"], Float[Array, "B N P"]]:
        """The prompts' token vectors and pooled vectors, as inputs of the transformer."""
        text = encode_text(networks["text_encoder"], batch)
        num_examples = batch.example_ids.shape[1]
        if self.pooled == "clip":
            return text, encode_clip(networks["clip"], batch)
        if self.pooled == "mean":
            return text, pool(text, batch.text_segments, num_examples)
        return text, jnp.zeros((len(text), num_examples, self.transformer.vec_in_dim), text.dtype)

    def tokens(
        self, networks: dict[str, Network], batch: Batch, latents: Float[Array, "B S C"]
    ) -> Tokens:
        """The transformer's inputs: clean latents and encoded prompts."""
        return to_tokens(batch, latents, *self.encode_text(networks, batch))

    def frozen_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders, if none of them is trained."""
        return ("text_encoder", "clip") if self.pooled == "clip" else ("text_encoder",)


def target_membership(tokens: Tokens) -> tuple[Float[Array, "B S N"], Float[Array, "B N"]]:
    """(1.0 where a token belongs to an example's target, number of target tokens)."""
    member = jax.nn.one_hot(tokens.segments - 1, tokens.example_ids.shape[1])  # padding: all zero
    member = jnp.where(tokens.is_target[:, :, None], member, 0.0)
    return member, jnp.sum(member, axis=1)


def per_example(
    values: Float[Array, "B S"], member: Float[Array, "B S N"], counts: Float[Array, "B N"]
) -> Float[Array, "B N"]:
    """The mean over each example's target tokens; 0 for absent examples."""
    # By default accelerators round the factors of a float32 product, TPUs to bfloat16: each value,
    # and each token's weight in the gradient, would be off by up to 0.2 %.
    sums = jnp.einsum("bs,bsn->bn", values, member, precision="highest")
    return sums / jnp.maximum(counts, 1.0)


def inputs_at(
    transformer: Flux,
    tokens: Tokens,
    x: Float[Array, "B S C"],
    t: Float[Array, "B N"],
    guidance: float | Float[Array, "B N"],
) -> dict[str, Any]:
    """The transformer's arguments: targets ``x`` at time ``t``, with clean contexts.

    ``guidance`` is one value, or one per example; it is ignored by transformers without the input.
    """
    has_guidance = transformer.config.guidance_embed
    return {
        "latents": jnp.where(tokens.is_target[:, :, None], x, tokens.latents),
        "text": tokens.text,
        "pooled": tokens.pooled,
        "t": t,
        "positions": tokens.positions,
        "segments": tokens.segments,
        "text_segments": tokens.text_segments,
        "guidance": jnp.broadcast_to(jnp.asarray(guidance, t.dtype), t.shape)
        if has_guidance
        else None,
    }


def lengths_of(batch: Batch) -> dict[str, Float[Array, "B N"]]:
    """Numbers of ``target``, ``contexts`` and ``text`` tokens of each example, for ``flops.py``."""
    numbers = 1 + jnp.arange(batch.example_ids.shape[1])

    def lengths(segments: Int[Array, "B S"]) -> Float[Array, "B N"]:
        member = segments[:, :, None] == numbers[None, None]
        return jnp.sum(member, axis=1, dtype=jnp.float32)

    target = lengths(jnp.where(batch.is_target, batch.segments, 0))
    return {
        "target": target,
        "contexts": lengths(batch.segments) - target,
        "text": lengths(batch.text_segments),
    }
