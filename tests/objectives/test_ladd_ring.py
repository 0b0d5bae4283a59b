"""LADD distils a toy distribution, and the gate that checks this detects deliberate mistakes.

The gate's limits leave a margin to the results of several seeds, here after 2,000 steps: in one
step, a distance of .04 to .06 (the teacher's is 1.06) and .85 to .90 of its share for the rarest
mode; in four steps, at least .991 on the ring. The distance in four steps has no limit: an
adversarial loss matches the distribution of each call's images, and nothing ties an image to its
noise, so the weights of the modes drift.

Two mistakes that this gate cannot detect have tests in ``test_ladd.py``: a reversed level, and
images that are not noised.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import flow
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.models.flux import Flux
from kontext_jax.objectives import student
from kontext_jax.objectives.ladd import Ladd, LaddConfig
from kontext_jax.objectives.student import StudentTimes
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from tests.objectives import ring
from tests.objectives.ring import Points, Score

pytestmark = pytest.mark.slow

LABELS = 1 + jnp.arange(8192) % 2
STEPS = (1, 2, 4)


class Setup(NamedTuple):
    teacher: Flux
    bank: Points
    reference: np.ndarray
    teacher_scores: dict[int, Score]


def guided(num_steps: int) -> SamplerConfig:
    return SamplerConfig(num_steps=num_steps, cfg_scale=ring.CFG_SCALE)


@pytest.fixture(scope="module")
def setup() -> Setup:
    """A teacher, a bank of its samples in 50 guided steps, and its scores in fewer steps."""
    teacher = ring.train_teacher()
    reference = np.asarray(ring.draw(teacher, LABELS, 1, guided(50)))
    labels = 1 + jnp.arange(16384) % 2
    bank = Points(ring.draw(teacher, labels, 2, guided(50)), labels)
    scores = {
        number: ring.score(ring.draw(teacher, LABELS, 3, guided(number)), LABELS, reference)
        for number in STEPS
    }
    return Setup(teacher, bank, reference, scores)


CONFIG = LaddConfig(
    **ring.NETWORKS,
    heads=HeadsConfig(width=64, dtype="float32"),
    heads_optim=OptimConfig(learning_rate=1e-3, b1=0.0, b2=0.99, warmup_steps=0, weight_decay=0.0),
    # In 2D a level near 1 leaves no signal; in an image, neighbouring pixels share it.
    renoise=flow.TimeConfig(mean=-1.0, std=1.0, shift="none"),
    student_times=StudentTimes(warmup_steps=200),
)

LADD = Ladd(CONFIG)


def distil(setup: Setup, objective: Ladd, seed: int) -> dict[int, Score]:
    transformer, _ = ring.train_student(objective, setup.teacher, setup.bank, seed)
    samplers = {n: SamplerConfig(num_steps=n, method="consistency") for n in STEPS}
    return {
        number: ring.score(ring.draw(transformer, LABELS, 3, sampler), LABELS, setup.reference)
        for number, sampler in samplers.items()
    }


def gate(scores: dict[int, Score], teacher: dict[int, Score]) -> list[str]:
    """The names of the checks that a student fails."""
    checks = {
        "distance in 1 step": scores[1].distance <= 0.1 * teacher[1].distance,
        "distance in 2 steps": scores[2].distance <= 0.4 * teacher[2].distance,
        "rarest mode in 1 step": scores[1].rarest >= 0.7,
        "on the ring in 4 steps": scores[4].on_ring >= max(0.97, teacher[4].on_ring),
        "class in 1 step": scores[1].right_class >= 0.97,
    }
    return [name for name, passed in checks.items() if not passed]


def test_teacher_needs_many_steps(setup):
    one, two, four = (setup.teacher_scores[number] for number in STEPS)
    assert one.on_ring < 0.05 and two.on_ring < 0.5 and four.on_ring < 0.9
    assert one.distance > 0.9
    resampled = ring.score(ring.draw(setup.teacher, LABELS, 4, guided(50)), LABELS, setup.reference)
    assert resampled.distance < 0.05 and resampled.on_ring > 0.97


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_student_needs_one_step(setup, seed):
    scores = distil(setup, LADD, seed)
    assert not gate(scores, setup.teacher_scores), scores


class WithoutAdversary(Ladd):
    """Learns the mean image, from the squared error alone."""

    def student_loss(self, heads, teacher, tokens, generated, keys):
        loss, sums = super().student_loss(heads, teacher, tokens, generated, keys)
        return 0.0 * loss + jnp.sum(jnp.square(generated - tokens.latents)), sums


class DetachedTeacher(Ladd):
    """Stops the gradient at the teacher's input."""

    def student_loss(self, heads, teacher, tokens, generated, keys):
        return super().student_loss(heads, teacher, tokens, jax.lax.stop_gradient(generated), keys)


class NoiseAsReal(Ladd):
    """Shows the heads noise in place of the real image."""

    def discriminator_loss(self, heads, teacher, tokens, generated, keys):
        noise = student.noise_like(tokens, keys)
        return super().discriminator_loss(
            heads, teacher, tokens.replace(latents=noise), generated, keys
        )


class RawVelocity(Ladd):
    """Uses the velocity as the image in training, but not in the sampler."""

    def generate(self, network, tokens, keys, step):
        generated, t = super().generate(network, tokens, keys, step)
        noise = student.noise_like(tokens, flow.split_keys(keys, 2)[1])
        token_t = flow.at_tokens(t, tokens.segments)
        x_t = flow.interpolate(tokens.latents, noise, token_t)
        return (x_t - generated) / token_t, t


@pytest.mark.parametrize("mistake", [WithoutAdversary, DetachedTeacher, NoiseAsReal, RawVelocity])
def test_gate_detects_mistakes(setup, mistake):
    scores = distil(setup, mistake(CONFIG), seed=0)
    assert gate(scores, setup.teacher_scores), scores
