r"""Latent adversarial diffusion distillation: from fifty steps to four, two or one.

Sauer et al., arXiv 2403.12015. The student starts as the teacher, and makes an image in one call
from a latent x that is noised to one of a few times,

    (1)  x_t = (1 - t) x + t e,        x' = x_t - t v_student(x_t, t).

Its image x' and the real one x are noised once more, to a level s ~ logit-normal(1, 1), and shown
to the *frozen teacher*; heads on its blocks tell the two apart, and the student learns to fool
them, through the teacher,

    (2)  L_heads   = mean max(0, 1 - D(x_s)) + mean max(0, 1 + D(x'_s)),
    (3)  L_student = - mean D(x'_s).

Means are over heads and the target's tokens, each with a logit of its own. Nothing is decoded and
no other network looks. What is "real" is best made by the teacher (``kontext_jax.encode``): then
(3) is all it takes. In editing, the clean contexts are conditions of the student and the teacher,
and no head sees their tokens.

Ours, where the paper is silent: heads (``models/discriminator.py``); one level s for both images of
an example, with noise of their own.
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
from kontext_jax.objectives.student import StudentConfig, make_images, noise_like
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
    """The student, its teacher and the heads. Student and teacher start from one checkpoint.

    Attributes:
      init_from: where the networks come from; the teacher is ``init_from.transformer``.
      renoise: how the levels s are drawn.
      adversarial: "hinge", equations (2) and (3), or "non_saturating", softplus in their place.
      r1_weight: of the heads' squared gradient by the real image's features; 0 is off.
      distillation_weight: of the mean square between x' and what the teacher makes of its noised
        self in one step, times 1 - s (ADD's term, in latent space); 0 is off.
      student_every: steps of the heads for one of the student.
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
        check_choices(self, adversarial=("hinge", "non_saturating"))
        check_least(self, student_every=1)


class Ladd:
    """Two players: ``student``, a transformer, and ``discriminator``, the heads."""

    players = ("student", "discriminator")
    generator = "student"

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
        """Of student and teacher; those of the heads are 1 % at FLUX's sizes and left out.

        The student is trained. The teacher has gradients by its input once, as a transformer whose
        adapters have no rank, and two plain passes for the heads' loss.
        """
        lengths, config = lengths_of(batch), self.config.transformer
        forward = forward_flops(config, **lengths)
        trained = training_flops(config, **lengths)
        through = training_flops(config, **lengths, frozen=True)
        update = (trained + through) / self.config.student_every
        again = forward if self.config.student_every > 1 else 0.0
        flops = update + 2.0 * forward + again
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
        """Sums over examples of equation (3) or (2); the student hands on its images."""
        tokens, teacher = inputs["tokens"], frozen["teacher"]
        student, heads = models["student"]["transformer"], models["discriminator"]
        make_keys, judge_keys = flow.split_keys(flow.example_keys(key, tokens.example_ids), 2)
        if player == "student":
            made, t = self.make(student, tokens, make_keys, step)
            loss, sums = self.student_loss(heads, teacher, tokens, made, judge_keys)
            forwarded = {"made": jax.lax.stop_gradient(made)} if self._hands_on else {}
            t = jnp.sum(jnp.where(tokens.example_ids >= 0, t, 0.0))
            return loss, Sums(sums.weight, sums.metrics | {"t": t}, forwarded)
        made = inputs.get("made")
        if made is None:
            made, _ = self.make(student, tokens, make_keys, step)
        return self.heads_loss(heads, teacher, tokens, made, judge_keys)

    @property
    def _hands_on(self) -> bool:
        """Whether the student's images are there in every step."""
        return self.config.student_every == 1

    def make(
        self, student: Flux, tokens: Tokens, keys: Key[Array, "B N"], step: Int[Array, ""]
    ) -> tuple[Float[Array, "B S C"], Float[Array, "B N"]]:
        """Equation (1): see `make_images`; the student's times go by its own updates."""
        config = self.config
        updates = step // config.student_every
        return make_images(student, tokens, config.student_times, config.guidance, keys, updates)

    def student_loss(
        self,
        heads: BlockHeads,
        teacher: Flux,
        tokens: Tokens,
        made: Float[Array, "B S C"],
        keys: Key[Array, "B N"],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sums of equation (3) and the distillation term; gradients flow through the teacher."""
        config = self.config
        member, counts = target_membership(tokens)
        level_keys, noise_keys = flow.split_keys(keys, 2)
        s = flow.sample_times(level_keys, counts.astype(jnp.int32), config.renoise)
        token_s = flow.at_tokens(s, tokens.segments)
        x_s = flow.interpolate(made, noise_like(tokens, noise_keys), token_s)
        inputs = inputs_at(teacher, tokens, x_s, s, config.guidance)
        v, logits = teacher.tapped(**inputs, taps=heads.taps(tokens, s))
        if config.adversarial == "hinge":
            fooled = -logits
        else:
            fooled = jax.nn.softplus(-logits)
        present = (counts > 0).astype(jnp.float32)
        terms = {
            "adversarial": per_example(jnp.mean(fooled, axis=0), member, counts),
            "rms": jnp.sqrt(per_example(jnp.mean(jnp.square(made), axis=-1), member, counts)),
        }
        loss = terms["adversarial"]
        if config.distillation_weight:
            aim = jax.lax.stop_gradient(flow.denoise(x_s, v, token_s))
            square = jnp.mean(jnp.square(made - aim), axis=-1)
            terms["distillation"] = (1 - s) * per_example(square, member, counts)
            loss = loss + config.distillation_weight * terms["distillation"]
        return jnp.sum(loss), Sums(jnp.sum(present), jax.tree.map(jnp.sum, terms))

    def heads_loss(
        self,
        heads: BlockHeads,
        teacher: Flux,
        tokens: Tokens,
        made: Float[Array, "B S C"],
        keys: Key[Array, "B N"],
    ) -> tuple[Float[Array, ""], Sums]:
        """Sums of equation (2) and R1."""
        config = self.config
        member, counts = target_membership(tokens)
        level_keys, real_keys, made_keys = flow.split_keys(keys, 3)
        s = flow.sample_times(level_keys, counts.astype(jnp.int32), config.renoise)
        token_s = flow.at_tokens(s, tokens.segments)

        def judge(x, noise_keys, read):
            x_s = flow.interpolate(x, noise_like(tokens, noise_keys), token_s)
            inputs = inputs_at(teacher, tokens, x_s, s, config.guidance)
            # Blocks have no gradient here. Heads keep what they read, and nothing of their insides.
            taps = heads.taps(
                tokens,
                s,
                lambda logits, x: jax.checkpoint(functools.partial(read, logits))(x),
                remat="none",
            )
            return teacher.tapped(**inputs, taps=taps)[1]

        def over_targets(values):
            return per_example(jnp.mean(values, axis=0), member, counts)

        real, slope = judge(tokens.latents, real_keys, with_slope if config.r1_weight else plain)
        fake, _ = judge(made, made_keys, plain)
        if config.adversarial == "hinge":
            wrong = jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)
        else:
            wrong = jax.nn.softplus(-real) + jax.nn.softplus(fake)
        terms = {
            "real": over_targets(real),
            "made": over_targets(fake),
            "accuracy_real": over_targets((real > 0).astype(jnp.float32)),
            "accuracy_made": over_targets((fake < 0).astype(jnp.float32)),
        }
        loss = over_targets(wrong)
        if config.r1_weight:
            terms["r1"] = over_targets(slope)
            loss = loss + config.r1_weight * terms["r1"]
        return jnp.sum(loss), Sums(
            jnp.sum(counts > 0, dtype=jnp.float32), jax.tree.map(jnp.sum, terms)
        )


def plain(logits, x):
    """A head's logits, and no slope."""
    return logits(x), jnp.zeros(())


def with_slope(logits, x):
    """A head's logits, and the squared gradient of their sum by each token that it reads (R1)."""
    values, backward = jax.vjp(logits, x)
    (gradient,) = backward(jnp.ones_like(values))
    return values, jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=-1)
