"""Training the latent autoencoder: reconstruction, and a weak KL term towards a normal prior.

    L = mean |x - x'| + mean (x - x')^2 + kl_weight * KL(q(z | x) || N(0, 1)) / cells

The absolute error keeps edges sharp, and the squared error keeps large errors rare (Rombach et al.,
arXiv 2112.10752, section G, without the perceptual and adversarial terms).
"""

from dataclasses import dataclass, field
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig, to_pixels
from kontext_jax.objectives import Sums
from kontext_jax.settings import Settings
from kontext_jax.types import Batch


@dataclass(kw_only=True, unsafe_hash=True)
class AutoencoderInit(Settings):
    """The location of the initial weights, as in `objectives.transformer.NetworksInit`.

    Attributes:
      autoencoder: the location; random weights if empty.
      except_for: patterns of tensors that may be missing, or are to be ignored.
    """

    autoencoder: str = ""
    except_for: tuple[str, ...] = ()


@dataclass(kw_only=True, unsafe_hash=True)
class AutoencoderObjectiveConfig(Settings):
    """The network and the weight of its regularisation.

    Attributes:
      kl_weight: weight of the KL divergence from N(0, 1), a mean over latent cells and channels.
    """

    kind: str = "autoencoder"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    init_from: AutoencoderInit = field(default_factory=AutoencoderInit)
    kl_weight: float = 1e-6


class AutoencoderObjective:
    """Reconstructs every image of the batch, targets and contexts alike."""

    players = ("autoencoder",)
    generator = "autoencoder"
    optim = every = MappingProxyType({})

    def __init__(self, config: AutoencoderObjectiveConfig):
        self.config = config

    def init(self, key: Key[Array, ""]) -> dict[str, Autoencoder]:
        return {"autoencoder": Autoencoder(self.config.autoencoder, rngs=nnx.Rngs(key))}

    def frozen(self) -> tuple[str, ...]:
        return ()

    def prepare(self, frozen: dict, batch: Batch) -> dict[str, Batch]:
        return {"batch": batch}

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """Not modelled."""
        return jnp.zeros(())

    def loss(
        self,
        player: str,
        models: dict,
        frozen: dict,
        inputs: dict[str, Batch],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sum over images; the weight is the number of images."""
        batch = inputs["batch"]
        sums: dict[str, Float[Array, ""]] = {}
        for i, size in enumerate(sorted(batch.images)):
            images = batch.images[size]
            used = (batch.image_segments[size].reshape(-1) > 0).astype(jnp.float32)
            terms = self._terms(
                models["autoencoder"],
                to_pixels(images.reshape(-1, *images.shape[2:])),
                _slot_keys(jax.random.fold_in(key, i), batch, size).reshape(-1),
            )
            for name, per_image in terms.items():
                sums[name] = sums.get(name, 0.0) + jnp.sum(per_image * used)
            sums["weight"] = sums.get("weight", 0.0) + jnp.sum(used)
        weight = sums.pop("weight")
        loss = sums["l1"] + sums["l2"] + self.config.kl_weight * sums["kl"]
        return loss, Sums(weight, sums)

    def _terms(
        self, model: Autoencoder, images: Float[Array, "B h w 3"], keys: Key[Array, " B"]
    ) -> dict[str, Float[Array, " B"]]:
        """Means over the pixels or the latent cells of each image."""
        mean, logvar = model.moments(images)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        z = mean + jnp.exp(0.5 * logvar) * noise
        scale, shift = self.config.autoencoder.scale_factor, self.config.autoencoder.shift_factor
        error = model.decode(scale * (z - shift)) - images
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        axes = (1, 2, 3)
        return {
            "l1": jnp.mean(jnp.abs(error), axes),
            "l2": jnp.mean(jnp.square(error), axes),
            "kl": jnp.mean(kl, axes),
            "latent_mean": jnp.mean(mean, axes),
            "latent_square": jnp.mean(jnp.square(mean), axes),
        }


def _slot_keys(key: Key[Array, ""], batch: Batch, size: str) -> Key[Array, "B M"]:
    """A key per image, from its example's id and its index among that example's images."""
    segments = batch.image_segments[size]
    examples = jnp.take_along_axis(batch.example_ids, jnp.maximum(segments - 1, 0), axis=1)
    same = segments[:, :, None] == segments[:, None, :]
    before = jnp.sum(jnp.tril(same, -1), axis=-1)

    def fold(example, nth):
        return jax.random.fold_in(jax.random.fold_in(key, example), nth)

    return jax.vmap(jax.vmap(fold))(examples, before)
