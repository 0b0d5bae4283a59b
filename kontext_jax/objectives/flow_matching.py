"""Rectified flow matching on packed triples: text-to-image and editing in one loss.

The target's tokens are moved along the line to noise, its contexts stay clean; the transformer
sees both and predicts a velocity everywhere, and only the target's counts (``flow.py`` has the
equations). Each example weighs the same, whatever its size.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kontext_jax import flow
from kontext_jax.encoders import encode_clip, encode_images, encode_text, to_tokens
from kontext_jax.flops import training_flops
from kontext_jax.models import lora
from kontext_jax.models.clip import ClipConfig
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.t5 import T5Config, T5Encoder, pool
from kontext_jax.objectives import Network
from kontext_jax.types import Batch, Metrics, Tokens

POOLED = ("clip", "mean", "zeros")


@dataclass(kw_only=True, unsafe_hash=True)
class FlowInit:
    """Where each network's weights come from.

    A place is the workdir of a run, a diffusers pipeline or a network's folder in it, a single
    file of Black Forest Labs' layout, or a folder that `kontext_jax.convert` made.

    Attributes:
      transformer, text_encoder: initial weights; new ones where empty. Frozen networks need some.
      clip, autoencoder: never trained here.
      lora: adapters to start from, a file in diffusers' layout.
      except_for: patterns of tensors that may be missing, or are not to be read; parameters that
        are missing start anew.
    """

    transformer: str = ""
    text_encoder: str = ""
    clip: str = ""
    autoencoder: str = ""
    lora: str = ""
    except_for: tuple[str, ...] = ()


@dataclass(kw_only=True, unsafe_hash=True)
class FlowMatchingConfig:
    """The networks and how times are drawn.

    Attributes:
      train_text_encoder: whether the text encoder learns together with the transformer, or is
        frozen, as T5 is in FLUX.
      pooled: the transformer's pooled text vector: "clip", "mean" of the text encoder's vectors,
        or "zeros".
      lora: adapters to train in place of the whole transformer, if they have a rank.
      guidance: the value fed to the guidance input, where the transformer has one.
    """

    kind: str = "flow_matching"
    transformer: FluxConfig = field(default_factory=FluxConfig)
    text_encoder: T5Config = field(default_factory=T5Config)
    clip: ClipConfig = field(default_factory=ClipConfig)
    train_text_encoder: bool = False
    pooled: str = "clip"
    init_from: FlowInit = field(default_factory=FlowInit)
    lora: LoraConfig = field(default_factory=LoraConfig)
    time: flow.TimeConfig = field(default_factory=flow.TimeConfig)
    guidance: float = 1.0

    def __post_init__(self):
        if self.pooled not in POOLED:
            raise ValueError(f"pooled {self.pooled!r} is not one of {', '.join(POOLED)}.")
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
        if self.init_from.lora and not self.lora.rank:
            raise ValueError("init_from.lora needs adapters to fill: set lora.rank.")

    def encode_text(
        self, networks: dict[str, Network], batch: Batch
    ) -> tuple[Float[Array, "B L T"], Float[Array, "B N P"]]:
        """The prompts' token vectors and pooled vectors, as the transformer takes them."""
        text = encode_text(networks["text_encoder"], batch)
        num_examples = batch.example_ids.shape[1]
        if self.pooled == "clip":
            return text, encode_clip(networks["clip"], batch)
        if self.pooled == "mean":
            return text, pool(text, batch.text_segments, num_examples)
        return text, jnp.zeros((len(text), num_examples, self.transformer.vec_in_dim), text.dtype)


def networks_of(model: dict[str, Any], frozen: dict[str, Network]) -> dict[str, Network]:
    """All networks by name, trained and frozen, with the adapters at work in the transformer."""
    networks = frozen | model
    if "lora" in networks:
        networks["transformer"] = lora.attach(networks["transformer"], networks.pop("lora"))
    return networks


class FlowMatching:
    """One player, ``model``: the transformer, or adapters of it; the text encoder if trained."""

    players = ("model",)

    def __init__(self, config: FlowMatchingConfig):
        self.config = config

    def init(self, key: Key[Array, ""]) -> dict[str, dict[str, Any]]:
        rngs, config = nnx.Rngs(key), self.config
        model: dict[str, Any] = {}
        if config.lora.rank:
            base = nnx.eval_shape(lambda: Flux(config.transformer, rngs=nnx.Rngs(0)))
            model["lora"] = lora.init(base, config.lora, rngs.params())
        else:
            model["transformer"] = Flux(config.transformer, rngs=rngs)
        if config.train_text_encoder:
            model["text_encoder"] = T5Encoder(config.text_encoder, rngs=rngs)
        return {"model": model}

    def frozen(self) -> tuple[str, ...]:
        config = self.config
        return (
            "autoencoder",
            *(["transformer"] if config.lora.rank else []),
            *([] if config.train_text_encoder else ["text_encoder"]),
            *(["clip"] if config.pooled == "clip" else []),
        )

    def prepare(self, frozen: dict, batch: Batch) -> tuple[Batch, Float[Array, "B S C"]]:
        return batch, encode_images(frozen["autoencoder"], batch)

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """Of the transformer, on the examples' own tokens (``flops.py`` says what counts)."""
        numbers = 1 + jnp.arange(batch.example_ids.shape[1])

        def lengths(segments: Int[Array, "B S"]) -> Float[Array, "B N"]:
            member = segments[:, :, None] == numbers[None, None]
            return jnp.sum(member, axis=1, dtype=jnp.float32)

        target = lengths(jnp.where(batch.is_target, batch.segments, 0))
        per_example = training_flops(
            self.config.transformer,
            target=target,
            contexts=lengths(batch.segments) - target,
            text=lengths(batch.text_segments),
            lora=self.config.lora,
        )
        return jnp.sum(jnp.where(target > 0, per_example, 0.0))

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
        networks = networks_of(models["model"], frozen)
        text, pooled = self.config.encode_text(networks, batch)
        tokens = to_tokens(batch, latents, text, pooled)
        losses, t, present = per_example_loss(
            networks["transformer"], tokens, self.config.time, self.config.guidance, key
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
