"""Rectified flow matching on packed triples: text-to-image and editing in one loss.

Target tokens are interpolated towards noise; context tokens stay clean. The transformer sees both
and predicts a velocity for every token, and the loss is that of the target tokens (``flow.py`` has
the equations). Every example has the same weight, whatever its size.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kontext_jax import flow
from kontext_jax.encoders import encode_images
from kontext_jax.flops import training_flops
from kontext_jax.models import lora
from kontext_jax.models.flux import Flux
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.objectives import Network, Sums
from kontext_jax.objectives.transformer import (
    NetworksConfig,
    NetworksInit,
    inputs_at,
    lengths_of,
    per_example,
    target_membership,
)
from kontext_jax.types import Batch, Tokens


@dataclass(kw_only=True, unsafe_hash=True)
class FlowInit(NetworksInit):
    """`NetworksInit`, and ``lora``: initial adapters, a file in diffusers' layout."""

    lora: str = ""


@dataclass(kw_only=True, unsafe_hash=True)
class FlowMatchingConfig(NetworksConfig):
    """The networks and the distribution of times.

    Attributes:
      train_text_encoder: whether to train the text encoder with the transformer; FLUX freezes T5.
      lora: adapters to train instead of the transformer, if their rank is above 0.
      time: distribution of training times, and the shift of both training and sampling times.
    """

    kind: str = "flow_matching"
    train_text_encoder: bool = False
    init_from: FlowInit = field(default_factory=FlowInit)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.init_from.lora and not self.lora.rank:
            raise ValueError("init_from.lora needs adapters to initialise: set lora.rank.")


def networks_of(model: dict[str, Any], frozen: dict[str, Network]) -> dict[str, Network]:
    """All networks by name, trained and frozen, with adapters attached to the transformer."""
    networks = frozen | model
    if "lora" in networks:
        networks["transformer"] = lora.attach(networks["transformer"], networks.pop("lora"))
    return networks


class FlowMatching:
    """One player, ``model``: the transformer or its adapters, and the text encoder if trained."""

    players = ("model",)
    generator = "model"
    optim = every = start = MappingProxyType({})

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

    def prepare(self, frozen: dict, batch: Batch) -> dict[str, Any]:
        return {"batch": batch, "latents": encode_images(frozen.get("autoencoder"), batch)}

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """FLOPs of the transformer on the examples' tokens; ``flops.py`` says what is counted."""
        lengths = lengths_of(batch)
        flops = training_flops(self.config.transformer, **lengths, lora=self.config.lora)
        return jnp.sum(jnp.where(lengths["target"] > 0, flops, 0.0))

    def loss(
        self,
        player: str,
        models: dict,
        frozen: dict,
        inputs: dict[str, Any],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sum over examples of the mean squared error of the target tokens' velocity."""
        networks = networks_of(models["model"], frozen)
        tokens = self.config.tokens(networks, inputs["batch"], inputs["latents"])
        losses, t, present = per_example_loss(
            networks["transformer"], tokens, self.config.time, self.config.guidance, key
        )
        return jnp.sum(losses), Sums(jnp.sum(present), {"t": jnp.sum(t * present)})


def per_example_loss(
    transformer: Flux,
    tokens: Tokens,
    time: flow.TimeConfig,
    guidance: float,
    key: Key[Array, ""],
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """(loss, time, 1.0) of every example, and zeros for absent ones.

    Times and noise depend only on ``key`` and the example's id, not on how rows are packed.
    """
    member, counts = target_membership(tokens)
    keys = flow.example_keys(key, tokens.example_ids)
    time_keys, noise_keys = flow.split_keys(keys, 2)
    t = flow.sample_times(time_keys, counts.astype(jnp.int32), time)
    square = square_error(transformer, tokens, t, noise_keys, guidance)
    present = (counts > 0).astype(jnp.float32)
    return per_example(square, member, counts), t * present, present


def square_error(
    transformer: Flux,
    tokens: Tokens,
    t: Float[Array, "B N"],
    noise_keys: Key[Array, "B N"],
    guidance: float,
) -> Float[Array, "B S"]:
    """Squared error of each token's velocity, a mean over channels, at given times and noise.

    Only target tokens have a meaningful value; `per_example` ignores the others.
    """
    noise = flow.token_noise(noise_keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])
    noisy = flow.interpolate(tokens.latents, noise, flow.at_tokens(t, tokens.segments))
    velocity = transformer(**inputs_at(transformer, tokens, noisy, t, guidance))
    return jnp.mean(jnp.square(velocity - flow.velocity(tokens.latents, noise)), axis=-1)
