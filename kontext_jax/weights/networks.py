"""The networks that other libraries define too, and their names and classes there."""

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
from kontext_jax.weights.table import LayerKey, Table, in_layer_order

COMPUTE_SETTINGS = ("dtype", "timestep_dtype", "remat", "attention", "input_size", "taps")
"""Config fields that set how a network is computed; all others are its architecture."""


class Network(NamedTuple):
    """A network, here and in PyTorch's libraries.

    Attributes:
      name: our name of the network.
      model, config_class: our module and its config class.
      format: module with its name table and the conversion of its settings, e.g.
        ``weights/flux.py``.
      folder: folder in a diffusers pipeline; empty if it is not part of pipelines.
      library, class_name: PyTorch library and class, as in ``model_index.json``.
      stem: file name of its weights in that folder, without suffix.
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
        """Whether BFL has its own layout of this network; T5 and CLIP only have transformers'."""
        return hasattr(self.format, "is_bfl")

    def abstract(self, config):
        """Returns the network of this config with shapes for arrays."""
        return _abstract(self.model, config)

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of our parameters, by name."""
        return {name: leaf.shape for name, leaf in named_leaves(self.abstract(config)).items()}

    def layer_keys(self, config) -> list[LayerKey]:
        """Returns the keys of all layers of all parameters, in the order of files."""
        return in_layer_order(self.table(config, "bfl").pieces)

    def table(self, config, layout: str) -> Table:
        """Returns the name table for this config and layout ("bfl" or "diffusers")."""
        return Table(self.format.rows(config), self.shapes(config), layout)


@functools.lru_cache(maxsize=32)  # tracing an autoencoder takes a second
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
"""The networks of a pipeline, which are trained and converted."""

FEATURE_NETWORKS = {
    "dino": Network(
        "dino", Dino, DinoConfig, dino, "", "transformers", dino.TRANSFORMERS_CLASS, "model"
    )
}
"""Frozen feature networks of training, which are only read."""

ALL_NETWORKS = NETWORKS | FEATURE_NETWORKS


def architecture(config) -> dict[str, Any]:
    """Returns the settings of a config that define the network, without `COMPUTE_SETTINGS`."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in COMPUTE_SETTINGS}
