"""Perceptual distances as losses: LPIPS, or one by EfficientNet-Lite0.

LPIPS (``models/lpips.py``) needs weights that have to be downloaded; those of EfficientNet-Lite0
come with a Python package. `FeatureDistance` is LPIPS's formula on that classifier, without learned
heads: with ``f`` and ``g`` the feature maps of two images after a tap, normalised to unit length at
each position,

    distance = mean over taps of the mean over positions of  |f - g|^2

It is always called ``distance_efflite0`` and never LPIPS, whose values differ. LPIPS's learned
heads follow human judgements more closely: use it where its weights are available.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.models.lpips import TRUNKS, Lpips, LpipsConfig, unit_vectors
from kontext_jax.settings import Settings, check_choices, check_least


@dataclass(kw_only=True, unsafe_hash=True)
class PerceptualConfig(Settings):
    """The network that compares images, and the weight of its distance in a loss.

    Attributes:
      weight: weight of the distance; 0 uses no network.
      network: "efficientnet" for `FeatureDistance`, or "alex" or "vgg" for LPIPS.
      input_size: side to which EfficientNet resizes images, in pixels; LPIPS does not resize.
      trunk, heads: LPIPS's files, see `weights.lpips.load_lpips`.
      dtype: compute dtype of the convolutions; distances are float32.
    """

    weight: float = 0.0
    network: str = "efficientnet"
    input_size: int = 224
    trunk: str = ""
    heads: str = ""
    dtype: str = "float32"

    def __post_init__(self):
        check_choices(self, "perceptual.", network=("efficientnet", *TRUNKS))
        check_least(self, "perceptual.", weight=0, input_size=32)

    @property
    def network_config(self) -> EfficientNetConfig | LpipsConfig:
        """The config of the network."""
        if self.network == "efficientnet":
            return EfficientNetConfig.lite0(input_size=self.input_size, dtype=self.dtype)
        return LpipsConfig(net=self.network, dtype=self.dtype)

    @property
    def metric(self) -> str:
        """The name of the distance."""
        return "distance_efflite0" if self.network == "efficientnet" else f"lpips_{self.network}"


class FeatureDistance(nnx.Module):
    """Distance of two images. See the module's docstring."""

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.network = EfficientNet(config, rngs=rngs)

    def __call__(
        self, first: Float[Array, "B h w 3"], second: Float[Array, "B h w 3"]
    ) -> Float[Array, " B"]:
        """The distance of each pair: 0 for equal images, at most 4; float32.

        Args:
          first, second: pixels in [-1, 1]; gradients flow to both.
        """
        pairs = zip(self.network(first).maps, self.network(second).maps, strict=True)
        distances = [
            jnp.mean(jnp.sum(jnp.square(unit_vectors(f) - unit_vectors(g)), axis=-1), axis=(1, 2))
            for f, g in pairs
        ]
        return jnp.mean(jnp.stack(distances), axis=0)


def abstract_distance(config: PerceptualConfig) -> FeatureDistance | Lpips:
    """The network that ``config`` describes, as shapes."""
    kind = FeatureDistance if config.network == "efficientnet" else Lpips
    return nnx.eval_shape(lambda: kind(config.network_config, rngs=nnx.Rngs(0)))
