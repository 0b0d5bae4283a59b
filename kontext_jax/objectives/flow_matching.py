"""Rectified flow matching on packed triples: text-to-image and editing in one loss.

The target's tokens are moved along the line to noise, its contexts stay clean; the transformer
sees both and predicts a velocity everywhere, and only the target's counts (``flow.py`` has the
equations). Each example weighs the same, whatever its size.
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
    """As `NetworksInit`; ``lora`` is a file of adapters in diffusers' layout, to start from."""

    lora: str = ""


@dataclass(kw_only=True, unsafe_hash=True)
class FlowMatchingConfig(NetworksConfig):
    """The networks and how times are drawn.

    Attributes:
      train_text_encoder: whether the text encoder learns together with the transformer, or is
        frozen, as T5 is in FLUX.
      lora: adapters to train in place of the whole transformer, if they have a rank.
      time: how training times are drawn, and the shift of these and of the sampler's schedule.
    """

    kind: str = "flow_matching"
    train_text_encoder: bool = False
    init_from: FlowInit = field(default_factory=FlowInit)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.init_from.lora and not self.lora.rank:
            raise ValueError("init_from.lora needs adapters to fill: set lora.rank.")


def networks_of(model: dict[str, Any], frozen: dict[str, Network]) -> dict[str, Network]:
    """All networks by name, trained and frozen, with the adapters at work in the transformer."""
    networks = frozen | model
    if "lora" in networks:
        networks["transformer"] = lora.attach(networks["transformer"], networks.pop("lora"))
    return networks


class FlowMatching:
    """One player, ``model``: the transformer, or adapters of it; the text encoder if trained."""

    players = ("model",)
    generator = "model"
    optim = every = MappingProxyType({})

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
        """Of the transformer, on the examples' own tokens (``flops.py`` says what counts)."""
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
        """Sums over examples of the mean square error of their target tokens' velocity."""
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
    """(loss, time, 1 where there is an example) of every example; absent ones are 0.

    Times and noise depend on ``key`` and the example's id alone, not on how rows are packed.
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
    """Of each token's velocity, a mean over channels, at given times and with given noise.

    It means something for tokens of targets alone: `per_example` leaves the others out.
    """
    noise = flow.token_noise(noise_keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])
    noisy = flow.interpolate(tokens.latents, noise, flow.at_tokens(t, tokens.segments))
    velocity = transformer(**inputs_at(transformer, tokens, noisy, t, guidance))
    return jnp.mean(jnp.square(velocity - flow.velocity(tokens.latents, noise)), axis=-1)
