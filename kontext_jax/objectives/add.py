r"""Adversarial diffusion distillation (ADD), in pixel space: the predecessor of LADD.

Sauer et al., arXiv 2311.17042. As in ``objectives/ladd.py``, the student generates an image x' in
one call. Here x' is *decoded* and passed through a pretrained image network; discriminator heads on
its feature maps F_k tell x' from the real image x,

    (1)  L_discriminator = sum_k mean max(0, 1 - D_k(F_k(x))) + mean max(0, 1 + D_k(F_k(x')))
                                 + r1_weight mean |grad D_k(F_k(x))|^2,
    (2)  L_student = - sum_k mean D_k(F_k(x')) + distillation_weight c(s) mean |x' - x'_teacher|^2.

Means are over the positions of a map, and over pixels in [-1, 1]. The gradient in (1) is by the
features that the head reads. x'_teacher is the teacher's one-step denoising of x' noised to a level
s, without gradient; c(s) = 1 - s, the share of the image at that level.

The feature network is DINOv2, as in the paper, or EfficientNet-Lite0, whose weights a package has.
Unlike the paper, we use our own heads (``models/discriminator.py``) and not StyleGAN-T's, and
distances are means over pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from kontext_jax import flow
from kontext_jax.encoders import encode_images
from kontext_jax.models.autoencoder import Autoencoder, to_pixels, unpack_latents
from kontext_jax.models.dino import Dino, DinoConfig
from kontext_jax.models.discriminator import MapHeads
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.models.features import Features
from kontext_jax.models.flux import Flux
from kontext_jax.objectives import Sums
from kontext_jax.objectives.adversarial import (
    discriminator_loss,
    generator_loss,
    logits_and_r1,
    logits_only,
)
from kontext_jax.objectives.student import (
    StudentConfig,
    StudentTimes,
    generate_images,
    noise_like,
)
from kontext_jax.objectives.transformer import (
    NetworksInit,
    inputs_at,
    target_membership,
)
from kontext_jax.settings import check_choices
from kontext_jax.types import Batch

FEATURES = {"dino": Dino, "efficientnet": EfficientNet}


@dataclass(kw_only=True, unsafe_hash=True)
class AddInit(NetworksInit):
    """`NetworksInit`, and the location of the feature network.

    Attributes:
      dino: a folder in transformers' layout, such as a copy of facebook/dinov2-small. The weights
        of EfficientNet come with the extra ``eval``.
    """

    dino: str = ""


@dataclass(kw_only=True, unsafe_hash=True)
class AddConfig(StudentConfig):
    """The student, its teacher and the feature network. The data must be pixels, not latents.

    Attributes:
      init_from: locations of the networks; ``init_from.transformer`` is the teacher.
      student_times: see `StudentTimes`; the paper draws its four times uniformly.
      teacher_levels: distribution of the levels s.
      features: "dino" or "efficientnet".
      reconstruct_real: whether the heads see the autoencoder's reconstructions of the real images.
        Then reconstruction errors, which no student can avoid, do not give its images away.
      r1_weight, distillation_weight: see the module's docstring.
    """

    kind: str = "add"
    init_from: AddInit = field(default_factory=AddInit)
    student_times: StudentTimes = field(
        default_factory=lambda: StudentTimes(probabilities=(0.25,) * 4, warmup_steps=0)
    )
    teacher_levels: flow.TimeConfig = field(
        default_factory=lambda: flow.TimeConfig(distribution="uniform", shift="none")
    )
    features: str = "dino"
    reconstruct_real: bool = False
    dino: DinoConfig = field(default_factory=DinoConfig)
    efficientnet: EfficientNetConfig = field(default_factory=EfficientNetConfig)
    r1_weight: float = 1e-5
    distillation_weight: float = 2.5

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, features=FEATURES)


class Targets(NamedTuple):
    """The target images of one size, with one entry for each example of each row.

    Attributes:
      present: whether the example exists and its target has this size.
      tokens: indices of its tokens in the row.
      pixels: the real images.
    """

    present: Bool[Array, "B N"]
    tokens: Int[Array, "B N T"]
    pixels: Float[Array, "B N h w 3"]


class Add:
    """Two players: ``student``, a transformer, and ``discriminator``, heads on feature maps."""

    players = ("student", "discriminator")
    generator = "student"
    every = start = MappingProxyType({})

    def __init__(self, config: AddConfig):
        self.config = config
        self.optim = MappingProxyType({"discriminator": config.heads_optim})

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        rngs, config = nnx.Rngs(key), self.config
        features = _abstract_features(config)
        condition = config.transformer.vec_in_dim + features.pooled.shape[-1]
        student = {"transformer": Flux(config.transformer, rngs=rngs)}
        heads = MapHeads(config.heads, [x.shape[-1] for x in features.maps], condition, rngs=rngs)
        return {"student": student, "discriminator": heads}

    def frozen(self) -> tuple[str, ...]:
        encoders = self.config.frozen_encoders()
        return ("autoencoder", "teacher", *encoders, self.config.features)

    def prepare(self, frozen: dict, batch: Batch) -> dict[str, Any]:
        if batch.latents is not None:
            raise ValueError("ADD needs pixels: leave data.latents.path empty.")
        latents = encode_images(frozen["autoencoder"], batch)
        tokens = self.config.tokens(frozen, batch, latents)
        targets = targets_by_size(batch, frozen["autoencoder"].config.downsample)
        if self.config.reconstruct_real:
            images = [decode(frozen["autoencoder"], t, latents) for t in targets]
        else:
            images = [t.pixels for t in targets]
        real = self._features(frozen, images)
        pooled = [tokens.pooled.astype(jnp.float32)] * len(targets)
        return {
            "tokens": tokens,
            "targets": targets,
            "real": real,
            "condition": jnp.concatenate([_flatten(pooled), real.pooled], axis=-1),
            "present": _flatten([t.present for t in targets]).astype(jnp.float32),
        }

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """Not modelled."""
        return jnp.zeros(())

    def loss(
        self,
        player: str,
        models: dict,
        frozen: dict,
        inputs: dict[str, Any],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sums over examples of equation (2) or (1); the student forwards its images' features."""
        if player == "discriminator":
            return self._discriminator_loss(models["discriminator"], inputs)
        config, tokens = self.config, inputs["tokens"]
        keys = flow.split_keys(flow.example_keys(key, tokens.example_ids), 3)
        generated, t = generate_images(
            models["student"]["transformer"],
            tokens,
            config.student_times,
            config.guidance,
            keys[0],
            step,
        )
        images = self._decode(frozen, inputs, generated)
        fake = self._features(frozen, images)
        logits = models["discriminator"](fake.maps, inputs["condition"], logits_only)
        square = self._distance(frozen, inputs, images, generated, keys[1:])
        present = inputs["present"]
        terms = {
            "adversarial": present * _over_maps([generator_loss(x, "hinge") for x, _ in logits]),
            "distillation": present * square,
        }
        loss = terms["adversarial"] + config.distillation_weight * terms["distillation"]
        sums = jax.tree.map(jnp.sum, terms)
        sums["t"] = jnp.sum(jnp.where(tokens.example_ids >= 0, t, 0.0))
        forwarded = {"fake": jax.lax.stop_gradient(fake.maps)}
        return jnp.sum(loss), Sums(jnp.sum(present), sums, forwarded)

    def _features(self, frozen: dict, images: list[Float[Array, "B N _ _ 3"]]) -> Features:
        """The features of images of all sizes, concatenated."""
        network = frozen[self.config.features]
        features = [network(x.reshape(-1, *x.shape[2:])) for x in images]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *features)

    def _decode(self, frozen: dict, inputs: dict, latents: Float[Array, "B S C"]) -> list[Array]:
        return [decode(frozen["autoencoder"], t, latents) for t in inputs["targets"]]

    def _distance(self, frozen, inputs, images, generated, keys) -> Float[Array, " B"]:
        """c(s) times the mean squared distance of each image to the teacher's."""
        tokens, teacher = inputs["tokens"], frozen["teacher"]
        _, counts = target_membership(tokens)
        s = flow.sample_times(keys[0], counts.astype(jnp.int32), self.config.teacher_levels)
        token_s = flow.at_tokens(s, tokens.segments)
        generated = jax.lax.stop_gradient(generated)
        x_s = flow.interpolate(generated, noise_like(tokens, keys[1]), token_s)
        v = teacher(**inputs_at(teacher, tokens, x_s, s, self.config.guidance))
        denoised = self._decode(frozen, inputs, flow.denoise(x_s, v, token_s))
        pairs = zip(images, jax.lax.stop_gradient(denoised), strict=True)
        squares = [jnp.mean(jnp.square(x - y), axis=(2, 3, 4)) for x, y in pairs]
        return _flatten([(1 - s) * square for square in squares])

    def _discriminator_loss(self, heads: MapHeads, inputs: dict) -> tuple[Float[Array, ""], Sums]:
        config, present = self.config, inputs["present"]
        condition, read = inputs["condition"], logits_and_r1 if config.r1_weight else logits_only
        real, r1 = zip(*heads(inputs["real"].maps, condition, read), strict=True)
        fake, _ = zip(*heads(inputs["fake"], condition, logits_only), strict=True)
        terms = {
            "real": _over_maps(real),
            "made": _over_maps(fake),
            "accuracy_real": _over_maps([(x > 0).astype(jnp.float32) / len(real) for x in real]),
            "accuracy_made": _over_maps([(x < 0).astype(jnp.float32) / len(fake) for x in fake]),
        }
        pairs = zip(real, fake, strict=True)
        loss = _over_maps([discriminator_loss(x, y, "hinge") for x, y in pairs])
        if config.r1_weight:
            terms["r1"] = _over_maps(r1)
            loss = loss + config.r1_weight * terms["r1"]
        sums = {name: jnp.sum(present * values) for name, values in terms.items()}
        return jnp.sum(present * loss), Sums(jnp.sum(present), sums)


def _abstract_features(config: AddConfig) -> Features:
    """The shapes of the feature network's output for one image."""
    network, settings = FEATURES[config.features], getattr(config, config.features)
    return nnx.eval_shape(lambda: network(settings, rngs=nnx.Rngs(0))(jnp.zeros((1, 32, 32, 3))))


def targets_by_size(batch: Batch, cell: int) -> list[Targets]:
    """The target images of a batch, size by size; each size has an entry for every example.

    Args:
      batch: with pixels.
      cell: side of a latent cell in pixels.
    """
    rows, row_length = batch.segments.shape
    num_examples = batch.example_ids.shape[1]
    tokens_of = {key: _num_tokens(batch.images[key].shape, cell) for key in sorted(batch.images)}
    slots = {key: batch.images[key].shape[1] for key in tokens_of}
    total = sum(slots[key] * tokens_of[key] for key in tokens_of)
    # The position in the row of each encoded token: the inverse of `Batch.source`.
    positions = jnp.broadcast_to(jnp.arange(row_length)[None], (rows, row_length))
    source = jnp.where(batch.segments > 0, batch.source, total)
    position = jnp.zeros((rows, total), jnp.int32)
    position = position.at[jnp.arange(rows)[:, None], source].set(positions, mode="drop")
    targets, start = [], 0
    for key, count in tokens_of.items():
        segments = batch.image_segments[key]
        member = segments[:, None, :] == jnp.arange(1, num_examples + 1)[None, :, None]
        slot = jnp.argmax(member, axis=2)  # an example's target precedes its contexts
        first = start + slot * count
        tokens = jnp.take_along_axis(
            position[:, None], first[:, :, None] + jnp.arange(count)[None, None], axis=2
        )
        is_target = jnp.take_along_axis(batch.is_target, tokens[:, :, 0], axis=1)
        images = jnp.asarray(batch.images[key])
        pixels = jnp.take_along_axis(images, slot[:, :, None, None, None], axis=1)
        targets.append(
            Targets(
                present=jnp.any(member, axis=2) & is_target,
                tokens=tokens,
                pixels=to_pixels(pixels),
            )
        )
        start += slots[key] * count
    return targets


def decode(
    autoencoder: Autoencoder, targets: Targets, latents: Float[Array, "B S C"]
) -> Float[Array, "B N h w 3"]:
    """The target images that a row's latents decode to, in [-1, 1]."""
    rows, examples, count = targets.tokens.shape
    flat = targets.tokens.reshape(rows, examples * count, 1)
    tokens = jnp.take_along_axis(latents, flat, axis=1).reshape(rows * examples, count, -1)
    grid = tuple(side // autoencoder.config.downsample for side in targets.pixels.shape[2:4])
    images = autoencoder.decode(unpack_latents(tokens, grid))
    return images.astype(jnp.float32).reshape(rows, examples, *images.shape[1:])


def _num_tokens(shape: tuple[int, ...], cell: int) -> int:
    """Tokens of one image, given the shape [B M h w 3]; a token is 2 x 2 cells."""
    return (shape[2] // (2 * cell)) * (shape[3] // (2 * cell))


def _flatten(by_size: list[Array]) -> Array:
    """The [B N ...] arrays of all sizes as one [B*N*sizes ...] array."""
    flat = [x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in by_size]
    return jnp.concatenate(flat)


def _over_maps(values: Sequence[Float[Array, "B _"]]) -> Float[Array, " B"]:
    """The sum over maps of the mean over each map's positions."""
    return sum(jnp.mean(x, axis=1) for x in values)
