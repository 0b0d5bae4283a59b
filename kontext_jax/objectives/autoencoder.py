r"""Training the latent autoencoder: reconstruction, perception, an adversary, and a weak prior.

For an image x, its reconstruction x' and its posterior q(z | x),

    L_fidelity = mean |x - x'| + mean (x - x')^2 + perceptual.weight d(x, x')
    L          = L_fidelity + kl_weight mean KL(q(z | x) || N(0, 1)) + lambda L_adversarial(D(x')).

This is the recipe of latent diffusion (Rombach et al., arXiv 2112.10752, section G; Esser et al.,
arXiv 2012.09841): the absolute error keeps edges sharp, the squared error keeps large errors rare,
d compares features of a classifier, and D, a patch discriminator, adds the texture that no distance
asks for. With the defaults, only the errors and the prior remain. Discrete latents
have no prior; those of a codebook have a commitment loss instead (``models/vq.py``).

The adversarial weight balances the gradients at the kernel W of the decoder's last layer (equation
7 of Esser et al.):

    lambda = adversarial.weight |dL_fidelity / dW| / (|dL_adversarial / dW| + 1e-4)

from ``adversarial.start`` on, and 0 before. Both gradients are of sums over the images of a
microbatch, on all devices. They follow from the gradients by x', which the train step needs anyway,
so that the backward pass runs through the decoder only once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kontext_jax.flops import traced_flops
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig, kl_divergence, to_pixels
from kontext_jax.models.moving_average import follow
from kontext_jax.models.patch_discriminator import PatchConfig, PatchDiscriminator
from kontext_jax.models.perceptual import PerceptualConfig, abstract_distance
from kontext_jax.objectives import Network, Sums
from kontext_jax.objectives.adversarial import LOSSES, discriminator_loss, generator_loss, lecam
from kontext_jax.optim import OptimConfig
from kontext_jax.settings import Settings, check_choices, check_least
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
class AdversarialConfig(Settings):
    """The discriminator, and its part in the autoencoder's loss.

    Attributes:
      weight: weight of the adversarial loss; 0 trains without a discriminator.
      adaptive: whether the weight is multiplied by the ratio of gradients, see the module's
        docstring.
      max_adaptive: largest value of that ratio.
      start: the step from which both players use the other; before it, the discriminator is not
        updated.
      loss: "hinge" or "non_saturating", see `objectives.adversarial`.
      lecam_weight: weight of `objectives.adversarial.lecam` in the discriminator's loss.
      lecam_decay: decay of its moving averages.
      r1_weight: weight of R1, the squared norm of the gradient of an image's mean logit by its
        pixels, on real images (arXiv 1801.04406).
      discriminator: sizes of the network.
      optim: optimizer of the discriminator.
    """

    weight: float = 0.0
    adaptive: bool = True
    max_adaptive: float = 1e4
    start: int = 0
    loss: str = "hinge"
    lecam_weight: float = 0.0
    lecam_decay: float = 0.99
    r1_weight: float = 0.0
    discriminator: PatchConfig = field(default_factory=PatchConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(b1=0.5, b2=0.9, weight_decay=0.0)
    )

    def __post_init__(self):
        check_choices(self, "adversarial.", loss=LOSSES)
        check_least(self, "adversarial.", weight=0, start=0, r1_weight=0, lecam_weight=0)
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(
                f"adversarial.lecam_decay {self.lecam_decay} must be from 0 to below 1."
            )


@dataclass(kw_only=True, unsafe_hash=True)
class AutoencoderObjectiveConfig(Settings):
    """The networks and the weights of the losses, see the module's docstring.

    To train only the decoder, as for a small or a sharper one with the same latents, set
    ``init_from`` and ``optim.frozen=("encoder/*",)``, with "quant_conv/*" if there is one.

    Attributes:
      kl_weight: weight of the KL divergence from N(0, 1), a mean over latent cells and channels;
        discrete latents have none.
      commitment_weight: weight of the squared distance between the encoder's cells and their codes'
        vectors, a mean over cells and channels; only for a codebook.
      perceptual: the perceptual distance.
      adversarial: the discriminator.
    """

    kind: str = "autoencoder"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    init_from: AutoencoderInit = field(default_factory=AutoencoderInit)
    kl_weight: float = 1e-6
    commitment_weight: float = 0.25
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    @classmethod
    def tiny(cls, start: int, **kwargs) -> "AutoencoderObjectiveConfig":
        """All losses, for images of 32 to 64 pixels and a few minutes on a CPU.

        Args:
          start: the discriminator's first step.
          kwargs: other settings.
        """
        optim = OptimConfig(learning_rate=1e-3, b1=0.5, b2=0.9, warmup_steps=20, weight_decay=0.0)
        adversarial = AdversarialConfig(
            weight=0.1, start=start, discriminator=PatchConfig.tiny(), optim=optim
        )
        perceptual = PerceptualConfig(weight=0.2, input_size=64)
        return cls(perceptual=perceptual, adversarial=adversarial, **kwargs)


class Images(NamedTuple):
    """All images of one size, targets and contexts alike.

    Attributes:
      pixels: in [-1, 1].
      used: 1 for an image, and 0 for an empty slot.
    """

    pixels: Float[Array, "B h w 3"]
    used: Float[Array, " B"]


class AutoencoderObjective:
    """Reconstructs every image of the batch; ``discriminator`` is a second player if it has weight.

    The perceptual distance is a frozen network.
    """

    generator = "autoencoder"
    every = MappingProxyType({})

    def __init__(self, config: AutoencoderObjectiveConfig):
        self.config = config
        adversarial = config.adversarial
        self.players: tuple[str, ...] = ("autoencoder",)
        self.optim = self.start = MappingProxyType({})
        if adversarial.weight:
            self.players += ("discriminator",)
            self.optim = MappingProxyType({"discriminator": adversarial.optim})
            self.start = MappingProxyType({"discriminator": adversarial.start})

    def init(self, key: Key[Array, ""]) -> dict[str, Network]:
        rngs = nnx.Rngs(key)
        networks: dict[str, Network] = {
            "autoencoder": Autoencoder(self.config.autoencoder, rngs=rngs)
        }
        if "discriminator" in self.players:
            config = self.config.adversarial
            networks["discriminator"] = PatchDiscriminator(
                config.discriminator, average_logits=config.lecam_weight > 0, rngs=rngs
            )
        return networks

    def frozen(self) -> tuple[str, ...]:
        return ("perceptual",) if self.config.perceptual.weight else ()

    def prepare(self, frozen: dict, batch: Batch) -> dict[str, Batch]:
        return {"batch": batch}

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """Matmuls and convolutions of the networks; a full backward pass is two forward passes.

        One that only leads to pixels, through the distance or the discriminator, is a single one.
        R1 is not counted.
        """
        total = jnp.zeros(())
        for size in batch.images:
            shape = (1, *batch.images[size].shape[2:])
            count = jnp.sum(batch.image_segments[size] > 0).astype(jnp.float32)
            total += count * self._flops(shape)
        return total

    def _flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of a step for one image."""
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        networks = jax.eval_shape(self.init, jax.random.key(0))
        reconstruct = lambda model, x: model.decode(model.encode(x))  # noqa: E731
        total = 3 * traced_flops(reconstruct, networks["autoencoder"], image)
        if self.config.perceptual.weight:
            # Both forward passes, and a backward pass by the pixels of one.
            distance = abstract_distance(self.config.perceptual)
            total += 1.5 * traced_flops(lambda d, x: d(x, x), distance, image)
        if "discriminator" in networks:
            once = traced_flops(lambda d, x: d(x), networks["discriminator"], image)
            # A forward pass and one back to the pixels; then, for its own update, a forward and a
            # full backward pass on each of the two images.
            total += (2 + 2 * 3) * once
        return total

    def loss(
        self,
        player: str,
        models: dict,
        frozen: dict,
        inputs: dict[str, Any],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sum over images; the autoencoder forwards its reconstructions."""
        groups = images_of(inputs["batch"])
        weight = sum(jnp.sum(group.used) for group in groups)
        if player == "discriminator":
            reconstructions = inputs["reconstructions"]
            loss, sums = self._discriminator_loss(models["discriminator"], groups, reconstructions)
            return loss, Sums(weight, sums)

        model = models["autoencoder"]
        keys = _keys(key, inputs["batch"])
        encode = functools.partial(self._encode, model)
        latents, terms = zip(*map(encode, groups, keys), strict=True)
        prior = {name: sum(term[name] for term in terms) for name in terms[0]}
        features = [model.decode_features(z) for z in latents]
        outputs = [model.decoder.conv_out(h).astype(jnp.float32) for h in features]
        fidelity = functools.partial(self._fidelity, frozen, groups)
        if "discriminator" in models:
            adversary = functools.partial(self._adversary, models["discriminator"], groups)
            loss, sums = self._balanced(model, features, outputs, fidelity, adversary, weight, step)
        else:
            loss, sums = fidelity(outputs)
        forwarded = {"reconstructions": jax.lax.stop_gradient(outputs)}
        if "kl" in prior:
            loss += self.config.kl_weight * prior["kl"]
        if model.codebook is not None:
            loss += self.config.commitment_weight * prior["commitment"] + prior.pop("averages")
            prior["perplexity"] = weight * model.codebook.perplexity()
        return loss, Sums(weight, sums | prior, forwarded if "discriminator" in models else {})

    def _encode(self, model: Autoencoder, group: Images, keys: Key[Array, " B"]):
        """Scaled samples of the posterior, and sums over images of the terms that need no decoder.

        The terms are means over the cells of an image.
        """
        if model.config.is_discrete:
            return self._quantize(model, group)
        mean, logvar = model.moments(group.pixels)
        terms = {"latent_mean": mean, "latent_square": jnp.square(mean)}
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        terms["kl"] = kl_divergence(mean, logvar)
        return model.scaled(mean + jnp.exp(0.5 * logvar) * noise), _sums(terms, group)

    def _quantize(self, model: Autoencoder, group: Images):
        """As `_encode`; "averages" is the codebook's step, see ``models/vq.py``."""
        cells = model.cells(group.pixels)
        z = model.quantize(cells)
        terms = {"latent_mean": z, "latent_square": jnp.square(z)}
        if model.codebook is None:
            return model.scaled(z), _sums(terms, group)
        error = cells.astype(jnp.float32) - jax.lax.stop_gradient(z)
        sums = _sums(terms | {"commitment": jnp.square(error)}, group)
        return model.scaled(z), sums | {"averages": model.codebook.follow(cells, group.used)}

    def _fidelity(self, frozen: dict, groups: Sequence[Images], outputs: Sequence[Array]):
        """(L_fidelity, its terms), as sums over images."""
        sums: dict[str, Float[Array, ""]] = {}
        for group, output in zip(groups, outputs, strict=True):
            error = output - group.pixels
            terms = {"l1": jnp.abs(error), "l2": jnp.square(error)}
            if self.config.perceptual.weight:
                terms["perceptual"] = frozen["perceptual"](output, group.pixels)
            for name, value in _sums(terms, group).items():
                sums[name] = sums.get(name, 0.0) + value
        loss = sums["l1"] + sums["l2"]
        if self.config.perceptual.weight:
            loss += self.config.perceptual.weight * sums["perceptual"]
        return loss, sums

    def _adversary(
        self,
        discriminator: PatchDiscriminator,
        groups: Sequence[Images],
        outputs: Sequence[Array],
    ) -> Float[Array, ""]:
        """L_adversarial, a mean over the patches of an image, as a sum over images."""
        kind = self.config.adversarial.loss
        return sum(
            jnp.sum(group.used * _over_patches(discriminator(x), lambda y: generator_loss(y, kind)))
            for group, x in zip(groups, outputs, strict=True)
        )

    def _balanced(self, model, features, outputs, fidelity, adversary, weight, step):
        """L_fidelity + lambda L_adversarial, and the metrics.

        The gradient of the returned value by ``outputs`` is that of the formula for a constant
        lambda.
        """
        config, images = self.config.adversarial, jax.lax.stop_gradient(outputs)
        (fidelity_loss, sums), by_fidelity = jax.value_and_grad(fidelity, has_aux=True)(images)
        adversarial_loss, by_adversary = jax.value_and_grad(adversary)(images)
        factor = jnp.asarray(config.weight, jnp.float32)
        if config.adaptive:
            norms = [_last_layer_norm(model, features, by) for by in (by_fidelity, by_adversary)]
            factor *= jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, config.max_adaptive)
        factor = jnp.where(step >= config.start, factor, 0.0)
        value = fidelity_loss + factor * adversarial_loss
        linear = sum(
            jnp.sum(x * (a + factor * b))
            for x, a, b in zip(outputs, by_fidelity, by_adversary, strict=True)
        )
        loss = jax.lax.stop_gradient(value - linear) + linear
        return loss, sums | {"adversarial": adversarial_loss, "adaptive_weight": weight * factor}

    def _discriminator_loss(
        self,
        discriminator: PatchDiscriminator,
        groups: Sequence[Images],
        reconstructions: Sequence[Array],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        config, total, sums = self.config.adversarial, 0.0, {}
        for group, fake_images in zip(groups, reconstructions, strict=True):
            real, fake = discriminator(group.pixels), discriminator(fake_images)
            pairs = list(zip(real, fake, strict=True))
            loss = _over_patches([discriminator_loss(x, y, config.loss) for x, y in pairs])
            terms = {
                "real": _over_patches(real),
                "made": _over_patches(fake),
                "accuracy_real": _over_patches(real, lambda x: (x > 0).astype(jnp.float32)),
                "accuracy_made": _over_patches(fake, lambda x: (x < 0).astype(jnp.float32)),
            }
            if config.r1_weight:
                terms["r1"] = r1_penalty(discriminator, group.pixels)
                loss += config.r1_weight * terms["r1"]
            if discriminator.logits is not None:
                averages = jax.lax.stop_gradient(discriminator.logits[...])
                terms["lecam"] = _over_patches([lecam(x, y, averages) for x, y in pairs])
                loss += config.lecam_weight * terms["lecam"]
            total += jnp.sum(group.used * loss)
            for name, value in _sums(terms, group).items():
                sums[name] = sums.get(name, 0.0) + value
        if discriminator.logits is not None:
            means = jnp.stack([sums["real"], sums["made"]])
            weight = sum(jnp.sum(group.used) for group in groups)
            total += follow(
                discriminator.logits, jax.lax.stop_gradient(means), weight, config.lecam_decay
            )
        return total, sums


def images_of(batch: Batch) -> list[Images]:
    """The images of a batch, by size."""
    groups = []
    for size in sorted(batch.images):
        images = batch.images[size]
        used = (batch.image_segments[size].reshape(-1) > 0).astype(jnp.float32)
        groups.append(Images(to_pixels(images.reshape(-1, *images.shape[2:])), used))
    return groups


def r1_penalty(
    discriminator: PatchDiscriminator, images: Float[Array, "B h w 3"]
) -> Float[Array, " B"]:
    """The squared norm of the gradient of each image's mean logit by its pixels."""
    gradient = jax.grad(lambda x: jnp.sum(_over_patches(discriminator(x))))(images)
    return jnp.sum(jnp.square(gradient), axis=(1, 2, 3))


def _over_patches(logits: Sequence[Float[Array, "B _ _"]], function=lambda x: x):
    """``function`` of the logits: the mean over an image's patches, then over scales; [B]."""
    means = [jnp.mean(function(x), axis=(1, 2)) for x in logits]
    return sum(means) / len(means)


def _sums(terms: dict[str, Float[Array, "B ..."]], group: Images) -> dict[str, Float[Array, ""]]:
    """Sums over images of the means over each image."""
    count = len(group.used)
    return {
        name: jnp.sum(group.used * jnp.mean(x.reshape(count, -1), axis=1))
        for name, x in terms.items()
    }


def _last_layer_norm(model: Autoencoder, features, cotangents) -> Float[Array, ""]:
    """The norm of a loss's gradient by the last kernel, from its gradients by the outputs."""

    def outputs(kernel):
        last = jax.tree.map(lambda x: x, model.decoder.conv_out)
        last.kernel[...] = kernel
        return [last(jax.lax.stop_gradient(h)).astype(jnp.float32) for h in features]

    kernel = jax.lax.stop_gradient(model.decoder.conv_out.kernel[...])
    (gradient,) = jax.vjp(outputs, kernel)[1](cotangents)
    return jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32))))


def _keys(key: Key[Array, ""], batch: Batch) -> list[Key[Array, " B"]]:
    """A key per image, by size."""
    return [
        _slot_keys(jax.random.fold_in(key, i), batch, size).reshape(-1)
        for i, size in enumerate(sorted(batch.images))
    ]


def _slot_keys(key: Key[Array, ""], batch: Batch, size: str) -> Key[Array, "B M"]:
    """A key per image, from its example's id and its index among that example's images."""
    segments = batch.image_segments[size]
    examples = jnp.take_along_axis(batch.example_ids, jnp.maximum(segments - 1, 0), axis=1)
    same = segments[:, :, None] == segments[:, None, :]
    before = jnp.sum(jnp.tril(same, -1), axis=-1)

    def fold(example, nth):
        return jax.random.fold_in(jax.random.fold_in(key, example), nth)

    return jax.vmap(jax.vmap(fold))(examples, before)
