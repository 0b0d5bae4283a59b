"""The networks that exist outside this package, and what each is called there."""

import dataclasses
import functools
from types import ModuleType
from typing import Any, NamedTuple

from flax import nnx

from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.clip import ClipConfig, ClipText
from kontext_jax.models.dino import Dino, DinoConfig
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.t5 import T5Config, T5Encoder
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights import autoencoder, clip, dino, flux, t5
from kontext_jax.weights.table import Place, Table, in_layer_order

COMPUTE_SETTINGS = ("dtype", "timestep_dtype", "remat", "attention", "input_size", "taps")
"""Fields of a network's config that say how it is computed and not what it is."""


class Network(NamedTuple):
    """One of them.

    Attributes:
      name: what it is called here.
      model, config_class: our module and its config.
      format: its name table and settings (``weights/flux.py`` and the like).
      folder: of a diffusers pipeline; empty if it is part of none.
      library, class_name: what ``model_index.json`` says of it.
      stem: of its files in such a folder.
    """

    name: str
    model: type[nnx.Module]
    config_class: type
    format: ModuleType
    folder: str
    library: str
    class_name: str
    stem: str

    @property
    def has_bfl_layout(self) -> bool:
        """Black Forest Labs' code itself reads T5 and CLIP through transformers."""
        return hasattr(self.format, "is_bfl")

    def abstract(self, config):
        """The network of this config, as shapes."""
        return _abstract(self.model, config)

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        """Of our parameters."""
        return {name: leaf.shape for name, leaf in named_leaves(self.abstract(config)).items()}

    def places(self, config) -> list[Place]:
        """Every layer of every parameter, in the order in which files have them."""
        return in_layer_order(self.table(config, "bfl").pieces)

    def table(self, config, layout: str) -> Table:
        """Its name table, laid out for this config."""
        return Table(self.format.rows(config), self.shapes(config), layout)


@functools.lru_cache(maxsize=32)  # an autoencoder takes a second
def _abstract(model: type[nnx.Module], config):
    return nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))


NETWORKS = {
    network.name: network
    for network in (
        Network(
            "transformer",
            Flux,
            FluxConfig,
            flux,
            "transformer",
            "diffusers",
            flux.DIFFUSERS_CLASS,
            "diffusion_pytorch_model",
        ),
        Network(
            "autoencoder",
            Autoencoder,
            AutoencoderConfig,
            autoencoder,
            "vae",
            "diffusers",
            autoencoder.DIFFUSERS_CLASS,
            "diffusion_pytorch_model",
        ),
        Network(
            "text_encoder",
            T5Encoder,
            T5Config,
            t5,
            "text_encoder_2",
            "transformers",
            t5.TRANSFORMERS_CLASS,
            "model",
        ),
        Network(
            "clip",
            ClipText,
            ClipConfig,
            clip,
            "text_encoder",
            "transformers",
            clip.TRANSFORMERS_CLASS,
            "model",
        ),
    )
}
"""Those that make up a pipeline: what training makes, and what is converted."""

FEATURE_NETWORKS = {
    "dino": Network(
        "dino", Dino, DinoConfig, dino, "", "transformers", dino.TRANSFORMERS_CLASS, "model"
    )
}
"""Those that training looks at images through: read, and no part of what it makes."""

ALL_NETWORKS = NETWORKS | FEATURE_NETWORKS


def architecture(config) -> dict[str, Any]:
    """What a network is, without how it is computed."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in COMPUTE_SETTINGS}
