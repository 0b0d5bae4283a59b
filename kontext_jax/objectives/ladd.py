r"""Latent adversarial diffusion distillation (LADD): from fifty steps to four, two or one.

Sauer et al., arXiv 2403.12015. The student is initialised from the teacher. It generates an image
in one call, from a latent x noised to one of a few times t,

    (1)  x_t = (1 - t) x + t e,        x' = x_t - t v_student(x_t, t).

The generated latent x' and the real latent x are noised again, to a level s ~ logit-normal(1, 1),
and passed through the *frozen teacher*. Discriminator heads on the teacher's blocks learn to tell
them apart; the student learns to fool the heads, with gradients through the teacher,

    (2)  L_discriminator = mean max(0, 1 - D(x_s)) + mean max(0, 1 + D(x'_s)),
    (3)  L_student       = - mean D(x'_s).

Means are over heads and over target tokens: every head has one logit per token. Nothing is decoded,
and no other network is involved. Real latents are best sampled from the teacher beforehand
(``kontext_jax.encode``); then (3) needs no other term. In editing, the clean contexts condition the
student and the teacher, and the heads do not see context tokens.

Where the paper is silent, we choose: the heads (``models/discriminator.py``), and one level s for
the real and the generated latent of an example, each with its own noise.
"""

import functools
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kontext_jax import flow
from kontext_jax.encoders import encode_images
from kontext_jax.flops import forward_flops, training_flops
from kontext_jax.models.discriminator import BlockHeads
from kontext_jax.models.flux import Flux
from kontext_jax.objectives import Sums
from kontext_jax.objectives.adversarial import (
    LOSSES,
    discriminator_loss,
    generator_loss,
    logits_and_r1,
    logits_only,
)
from kontext_jax.objectives.student import StudentConfig, generate_images, noise_like
from kontext_jax.objectives.transformer import (
    NetworksInit,
    inputs_at,
    lengths_of,
    per_example,
    target_membership,
)
from kontext_jax.settings import check_choices, check_least
from kontext_jax.types import Batch, Tokens


@dataclass(kw_only=True, unsafe_hash=True)
class LaddConfig(StudentConfig):
    """The student, its teacher and the heads. Student and teacher start from the same checkpoint.

    Attributes:
      init_from: locations of the networks; ``init_from.transformer`` is the teacher.
      renoise: distribution of the levels s.
      adversarial: "hinge", equations (2) and (3), or "non_saturating" (softplus).
      r1_weight: weight of R1, the heads' squared gradient by the real features; 0 is off.
      distillation_weight: weight of ADD's term in latent space: the mean squared distance of x' to
        the teacher's one-step denoising of x'_s, times 1 - s; 0 is off.
      student_every: updates of the heads per update of the student.
    """

    kind: str = "ladd"
    init_from: NetworksInit = field(default_factory=NetworksInit)
    renoise: flow.TimeConfig = field(
        default_factory=lambda: flow.TimeConfig(mean=1.0, std=1.0, shift="none")
    )
    adversarial: str = "hinge"
    r1_weight: float = 0.0
    distillation_weight: float = 0.0
    student_every: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, adversarial=LOSSES)
        check_least(self, student_every=1)


class Ladd:
    """Two players: ``student``, a transformer, and ``discriminator``, the heads."""

    players = ("student", "discriminator")
    generator = "student"
    start = MappingProxyType({})

    def __init__(self, config: LaddConfig):
        self.config = config
        self.optim = MappingProxyType({"discriminator": config.heads_optim})
        self.every = MappingProxyType({"student": config.student_every})

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        rngs, config = nnx.Rngs(key), self.config
        student = {"transformer": Flux(config.transformer, rngs=rngs)}
        heads = BlockHeads(config.heads, config.transformer, rngs=rngs)
        return {"student": student, "discriminator": heads}

    def frozen(self) -> tuple[str, ...]:
        return ("autoencoder", "teacher", *self.config.frozen_encoders())

    def prepare(self, frozen: dict, batch: Batch) -> dict[str, Tokens]:
        latents = encode_images(frozen.get("autoencoder"), batch)
        return {"tokens": self.config.tokens(frozen, batch, latents)}

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """FLOPs of student and teacher. The heads are left out: 1 % at FLUX's sizes.

        The student has a forward and a backward pass. The teacher has one forward pass with
        gradients by its input only, and two forward passes for the discriminator's loss.
        """
        lengths, config = lengths_of(batch), self.config.transformer
        forward = forward_flops(config, **lengths)
        student = training_flops(config, **lengths)
        through_teacher = training_flops(config, **lengths, frozen=True)
        update = (student + through_teacher) / self.config.student_every
        generation = forward if self.config.student_every > 1 else 0.0
        flops = update + 2.0 * forward + generation
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
        """Sums over examples of equation (3) or (2); the student forwards its images."""
        tokens, teacher = inputs["tokens"], frozen["teacher"]
        student, heads = models["student"]["transformer"], models["discriminator"]
        generation_keys, renoise_keys = flow.split_keys(
            flow.example_keys(key, tokens.example_ids), 2
        )
        if player == "student":
            generated, t = self.generate(student, tokens, generation_keys, step)
            loss, sums = self.student_loss(heads, teacher, tokens, generated, renoise_keys)
            forwarded = {"generated": jax.lax.stop_gradient(generated)} if self._forwards else {}
            t = jnp.sum(jnp.where(tokens.example_ids >= 0, t, 0.0))
            return loss, Sums(sums.weight, sums.metrics | {"t": t}, forwarded)
        generated = inputs.get("generated")
        if generated is None:
            generated, _ = self.generate(student, tokens, generation_keys, step)
        return self.discriminator_loss(heads, teacher, tokens, generated, renoise_keys)

    @property
    def _forwards(self) -> bool:
        """Whether every step updates the student, so that its images can be forwarded."""
        return self.config.student_every == 1

    def generate(
        self, student: Flux, tokens: Tokens, keys: Key[Array, "B N"], step: Int[Array, ""]
    ) -> tuple[Float[Array, "B S C"], Float[Array, "B N"]]:
        """Equation (1), see `generate_images`; the warm-up of times counts student updates."""
        config = self.config
        updates = step // config.student_every
        return generate_images(
            student, tokens, config.student_times, config.guidance, keys, updates
        )

    def student_loss(
        self,
        heads: BlockHeads,
        teacher: Flux,
        tokens: Tokens,
        generated: Float[Array, "B S C"],
        keys: Key[Array, "B N"],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sums of equation (3) and the distillation term, with gradients through the teacher."""
        config = self.config
        member, counts = target_membership(tokens)
        level_keys, noise_keys = flow.split_keys(keys, 2)
        s = flow.sample_times(level_keys, counts.astype(jnp.int32), config.renoise)
        token_s = flow.at_tokens(s, tokens.segments)
        x_s = flow.interpolate(generated, noise_like(tokens, noise_keys), token_s)
        inputs = inputs_at(teacher, tokens, x_s, s, config.guidance)
        v, logits = teacher.tapped(**inputs, taps=heads.taps(tokens, s))
        adversarial = jnp.mean(generator_loss(logits, config.adversarial), axis=0)
        present = (counts > 0).astype(jnp.float32)
        terms = {
            "adversarial": per_example(adversarial, member, counts),
            "rms": jnp.sqrt(per_example(jnp.mean(jnp.square(generated), axis=-1), member, counts)),
        }
        loss = terms["adversarial"]
        if config.distillation_weight:
            denoised = jax.lax.stop_gradient(flow.denoise(x_s, v, token_s))
            square = jnp.mean(jnp.square(generated - denoised), axis=-1)
            terms["distillation"] = (1 - s) * per_example(square, member, counts)
            loss = loss + config.distillation_weight * terms["distillation"]
        return jnp.sum(loss), Sums(jnp.sum(present), jax.tree.map(jnp.sum, terms))

    def discriminator_loss(
        self,
        heads: BlockHeads,
        teacher: Flux,
        tokens: Tokens,
        generated: Float[Array, "B S C"],
        keys: Key[Array, "B N"],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sums of equation (2) and R1."""
        config = self.config
        member, counts = target_membership(tokens)
        level_keys, real_keys, fake_keys = flow.split_keys(keys, 3)
        s = flow.sample_times(level_keys, counts.astype(jnp.int32), config.renoise)
        token_s = flow.at_tokens(s, tokens.segments)

        def discriminate(x, noise_keys, read):
            x_s = flow.interpolate(x, noise_like(tokens, noise_keys), token_s)
            inputs = inputs_at(teacher, tokens, x_s, s, config.guidance)
            # The blocks need no gradient here. Of the heads, only the inputs are kept for it.
            taps = heads.taps(
                tokens,
                s,
                lambda logits, x: jax.checkpoint(functools.partial(read, logits))(x),
                remat="none",
            )
            return teacher.tapped(**inputs, taps=taps)[1]

        def over_targets(values):
            return per_example(jnp.mean(values, axis=0), member, counts)

        real, r1 = discriminate(
            tokens.latents, real_keys, logits_and_r1 if config.r1_weight else logits_only
        )
        fake, _ = discriminate(generated, fake_keys, logits_only)
        terms = {
            "real": over_targets(real),
            "made": over_targets(fake),
            "accuracy_real": over_targets((real > 0).astype(jnp.float32)),
            "accuracy_made": over_targets((fake < 0).astype(jnp.float32)),
        }
        loss = over_targets(discriminator_loss(real, fake, config.adversarial))
        if config.r1_weight:
            terms["r1"] = over_targets(r1)
            loss = loss + config.r1_weight * terms["r1"]
        return jnp.sum(loss), Sums(
            jnp.sum(counts > 0, dtype=jnp.float32), jax.tree.map(jnp.sum, terms)
        )
