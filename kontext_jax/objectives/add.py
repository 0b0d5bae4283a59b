r"""Adversarial diffusion distillation, in pixels: what LADD replaced.

Sauer et al., arXiv 2311.17042. As in ``objectives/ladd.py`` the student makes an image x' in one
call. But here it is *decoded*, and a network that was trained to understand images looks at it;
heads on its maps F_k tell it from the true image,

    (1)  L_heads   = sum_k mean max(0, 1 - D_k(F_k(x))) + mean max(0, 1 + D_k(F_k(x')))
                           + r1_weight mean |grad D_k(F_k(x))|^2,
    (2)  L_student = - sum_k mean D_k(F_k(x')) + distillation_weight c(s) mean |x' - x'_teacher|^2.

Means are over a map's places and over pixels, which are in [-1, 1]; the gradient in (1) is by what
a head reads. x'_teacher is what the teacher makes in one call of x', noised anew to a level s;
nothing flows back through it; c(s) = 1 - s, the share of the image at that level.

Feature networks: DINOv2, as in the paper, or EfficientNet-Lite0, whose weights a package has.
Ours: the heads (``models/discriminator.py``), where the paper has StyleGAN-T's, and that distances
are means over pixels.
"""

from collections.abc import Callable
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
from kontext_jax.objectives.ladd import plain, with_slope
from kontext_jax.objectives.student import StudentConfig, StudentTimes, make_images, noise_like
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
    """As `NetworksInit`, and the feature network's weights.

    Attributes:
      dino: a folder of transformers' layout, such as a copy of facebook/dinov2-small. A package
        brings EfficientNet's weights (the extra ``eval``).
    """

    dino: str = ""


@dataclass(kw_only=True, unsafe_hash=True)
class AddConfig(StudentConfig):
    """The student, its teacher, and what looks at its images. The data must be pixels.

    Attributes:
      init_from: where the networks come from; the teacher is ``init_from.transformer``.
      student_times: see `StudentTimes`; the paper draws its four evenly.
      teacher_levels: how the levels s are drawn.
      features: "dino" or "efficientnet".
      reconstruct_real: whether the heads see the true images as the autoencoder gives them back.
        Then what it loses, which no student can mend, tells no image from another.
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
    """The images to make of one size, one place for each example of each row.

    Attributes:
      present: whether the example is there, and of this size.
      tokens: places of its tokens in the row.
      pixels: the true images.
    """

    present: Bool[Array, "B N"]
    tokens: Int[Array, "B N T"]
    pixels: Float[Array, "B N h w 3"]


class Add:
    """Two players: ``student``, a transformer, and ``discriminator``, heads on feature maps."""

    players = ("student", "discriminator")
    generator = "student"
    every = MappingProxyType({})

    def __init__(self, config: AddConfig):
        self.config = config
        self.optim = MappingProxyType({"discriminator": config.heads_optim})

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        rngs, config = nnx.Rngs(key), self.config
        seen = _abstract_features(config)
        given = config.transformer.vec_in_dim + seen.pooled.shape[-1]
        student = {"transformer": Flux(config.transformer, rngs=rngs)}
        heads = MapHeads(config.heads, [x.shape[-1] for x in seen.maps], given, rngs=rngs)
        return {"student": student, "discriminator": heads}

    def frozen(self) -> tuple[str, ...]:
        encoders = self.config.frozen_encoders()
        return ("autoencoder", "teacher", *encoders, self.config.features)

    def prepare(self, frozen: dict, batch: Batch) -> dict[str, Any]:
        if batch.latents is not None:
            raise ValueError("ADD looks at pixels: leave data.latents.path empty.")
        latents = encode_images(frozen["autoencoder"], batch)
        tokens = self.config.tokens(frozen, batch, latents)
        targets = targets_by_size(batch, frozen["autoencoder"].config.downsample)
        if self.config.reconstruct_real:
            images = [decode(frozen["autoencoder"], t, latents) for t in targets]
        else:
            images = [t.pixels for t in targets]
        real = self._look(frozen, images)
        pooled = [tokens.pooled.astype(jnp.float32)] * len(targets)
        return {
            "tokens": tokens,
            "targets": targets,
            "real": real,
            "given": jnp.concatenate([_together(pooled), real.pooled], axis=-1),
            "present": _together([t.present for t in targets]).astype(jnp.float32),
        }

    def flops(self, batch: Batch) -> Float[Array, ""]:
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
        """Sums over examples of equation (2) or (1); the student hands on its features."""
        if player == "discriminator":
            return self._heads_loss(models["discriminator"], inputs)
        config, tokens = self.config, inputs["tokens"]
        keys = flow.split_keys(flow.example_keys(key, tokens.example_ids), 3)
        made, t = make_images(
            models["student"]["transformer"],
            tokens,
            config.student_times,
            config.guidance,
            keys[0],
            step,
        )
        images = self._decode(frozen, inputs, made)
        seen = self._look(frozen, images)
        logits = models["discriminator"](seen.maps, inputs["given"], plain)
        square = self._distance(frozen, inputs, images, made, keys[1:])
        present = inputs["present"]
        terms = {
            "adversarial": present * _over_maps([-values for values, _ in logits]),
            "distillation": present * square,
        }
        loss = terms["adversarial"] + config.distillation_weight * terms["distillation"]
        sums = jax.tree.map(jnp.sum, terms)
        sums["t"] = jnp.sum(jnp.where(tokens.example_ids >= 0, t, 0.0))
        forwarded = {"made": jax.lax.stop_gradient(seen.maps)}
        return jnp.sum(loss), Sums(jnp.sum(present), sums, forwarded)

    def _look(self, frozen: dict, images: list[Float[Array, "B N _ _ 3"]]) -> Features:
        """The features of images of all sizes, one after the other."""
        network = frozen[self.config.features]
        seen = [network(x.reshape(-1, *x.shape[2:])) for x in images]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)

    def _decode(self, frozen: dict, inputs: dict, latents: Float[Array, "B S C"]) -> list[Array]:
        return [decode(frozen["autoencoder"], t, latents) for t in inputs["targets"]]

    def _distance(self, frozen, inputs, images, made, keys) -> Float[Array, " B"]:
        """c(s) times the mean square of each image's distance to the teacher's."""
        tokens, teacher = inputs["tokens"], frozen["teacher"]
        _, counts = target_membership(tokens)
        s = flow.sample_times(keys[0], counts.astype(jnp.int32), self.config.teacher_levels)
        token_s = flow.at_tokens(s, tokens.segments)
        made = jax.lax.stop_gradient(made)
        x_s = flow.interpolate(made, noise_like(tokens, keys[1]), token_s)
        v = teacher(**inputs_at(teacher, tokens, x_s, s, self.config.guidance))
        aims = self._decode(frozen, inputs, flow.denoise(x_s, v, token_s))
        aims = jax.lax.stop_gradient(aims)
        pairs = zip(images, aims, strict=True)
        squares = [jnp.mean(jnp.square(x - aim), axis=(2, 3, 4)) for x, aim in pairs]
        return _together([(1 - s) * square for square in squares])

    def _heads_loss(self, heads: MapHeads, inputs: dict) -> tuple[Float[Array, ""], Sums]:
        config, present = self.config, inputs["present"]
        read: Callable = with_slope if config.r1_weight else plain
        real = heads(inputs["real"].maps, inputs["given"], read)
        made = [values for values, _ in heads(inputs["made"], inputs["given"], plain)]
        slopes, real = [slope for _, slope in real], [values for values, _ in real]
        terms = {
            "real": _over_maps(real),
            "made": _over_maps(made),
            "accuracy_real": _over_maps([(x > 0).astype(jnp.float32) / len(real) for x in real]),
            "accuracy_made": _over_maps([(x < 0).astype(jnp.float32) / len(made) for x in made]),
        }
        loss = _over_maps([jax.nn.relu(1 - x) for x in real])
        loss = loss + _over_maps([jax.nn.relu(1 + x) for x in made])
        if config.r1_weight:
            terms["r1"] = _over_maps(slopes)
            loss = loss + config.r1_weight * terms["r1"]
        sums = {name: jnp.sum(present * values) for name, values in terms.items()}
        return jnp.sum(present * loss), Sums(jnp.sum(present), sums)


def _abstract_features(config: AddConfig) -> Features:
    """The shapes that the feature network gives for one image; computes nothing."""
    network, settings = FEATURES[config.features], getattr(config, config.features)

    def look() -> Features:
        return network(settings, rngs=nnx.Rngs(0))(jnp.zeros((1, 32, 32, 3)))

    return nnx.eval_shape(look)


def targets_by_size(batch: Batch, cell: int) -> list[Targets]:
    """The images to make, size by size; every example has a place in each.

    Args:
      batch: with pixels.
      cell: pixels a side of a latent cell.
    """
    rows, row_length = batch.segments.shape
    num_examples = batch.example_ids.shape[1]
    tokens_of = {key: _num_tokens(batch.images[key].shape, cell) for key in sorted(batch.images)}
    slots = {key: batch.images[key].shape[1] for key in tokens_of}
    total = sum(slots[key] * tokens_of[key] for key in tokens_of)
    # Where in the row each encoded token went, which `Batch.source` says the other way round.
    here = jnp.broadcast_to(jnp.arange(row_length)[None], (rows, row_length))
    source = jnp.where(batch.segments > 0, batch.source, total)
    place = jnp.zeros((rows, total), jnp.int32)
    place = place.at[jnp.arange(rows)[:, None], source].set(here, mode="drop")
    targets, start = [], 0
    for key, count in tokens_of.items():
        segments = batch.image_segments[key]
        member = segments[:, None, :] == jnp.arange(1, num_examples + 1)[None, :, None]
        slot = jnp.argmax(member, axis=2)  # an example's target comes before its contexts
        first = start + slot * count
        tokens = jnp.take_along_axis(
            place[:, None], first[:, :, None] + jnp.arange(count)[None, None], axis=2
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
    """The images that a row's latents are, in [-1, 1]."""
    rows, examples, count = targets.tokens.shape
    flat = targets.tokens.reshape(rows, examples * count, 1)
    tokens = jnp.take_along_axis(latents, flat, axis=1).reshape(rows * examples, count, -1)
    grid = tuple(side // autoencoder.config.downsample for side in targets.pixels.shape[2:4])
    images = autoencoder.decode(unpack_latents(tokens, grid))
    return images.astype(jnp.float32).reshape(rows, examples, *images.shape[1:])


def _num_tokens(shape: tuple[int, ...], cell: int) -> int:
    """Of an image of [B M h w 3]: a token is 2 x 2 cells."""
    return (shape[2] // (2 * cell)) * (shape[3] // (2 * cell))


def _together(by_size: list[Array]) -> Array:
    """[B N ...] of each size, one after the other and without rows."""
    flat = [x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in by_size]
    return jnp.concatenate(flat)


def _over_maps(values: list[Float[Array, "B _"]]) -> Float[Array, " B"]:
    """The sum over maps of the mean over each map's tokens."""
    return sum(jnp.mean(x, axis=1) for x in values)
