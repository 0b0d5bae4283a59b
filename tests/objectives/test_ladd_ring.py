"""LADD works, and the gate that says so sees what is wrong with it.

The limits leave room below what students of several seeds reach here: in one step a distance of
.03 to .05, where the teacher has 1.11, and .87 to .91 of its share for the rarest mode; in four
steps .997 and more on the ring. A distance at four steps is not among them: an adversarial loss
matches what each call makes as a whole, and nothing ties the image to the noise that it was made
from, so that the weights of the modes drift.

What no gate can see here has tests of its own in ``test_ladd.py``: a level told the wrong way
round, and images that are not noised.
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
    """A teacher, a bank of its samples by 50 guided steps, and how well it does in fewer."""
    teacher = ring.train_teacher()
    reference = np.asarray(ring.draw(teacher, LABELS, 1, guided(50)))
    labels = 1 + jnp.arange(32768) % 2
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
    # On the plane a level around 1 leaves no signal: neighbouring pixels would share it.
    renoise=flow.TimeConfig(mean=-1.0, std=1.0, shift="none"),
    student_times=StudentTimes(warmup_steps=200),
)


def distil(setup: Setup, objective: Ladd, seed: int) -> dict[int, Score]:
    transformer, _ = ring.train_student(objective, setup.teacher, setup.bank, seed)
    samplers = {n: SamplerConfig(num_steps=n, method="consistency") for n in STEPS}
    return {
        number: ring.score(ring.draw(transformer, LABELS, 3, sampler), LABELS, setup.reference)
        for number, sampler in samplers.items()
    }


def gate(scores: dict[int, Score], teacher: dict[int, Score]) -> list[str]:
    """What is wrong with a student; nothing, if it passes."""
    checks = {
        "distance in 1 step": scores[1].distance <= 0.1 * teacher[1].distance,
        "distance in 2 steps": scores[2].distance <= 0.4 * teacher[2].distance,
        "rarest mode in 1 step": scores[1].rarest >= 0.7,
        "on the ring in 4 steps": scores[4].on_ring >= max(0.97, teacher[4].on_ring),
        "class in 1 step": scores[1].right_class >= 0.97,
    }
    return [name for name, good in checks.items() if not good]


def test_the_teacher_needs_its_steps(setup):
    one, two, four = (setup.teacher_scores[number] for number in STEPS)
    assert one.on_ring < 0.05 and two.on_ring < 0.5 and four.on_ring < 0.9
    assert one.distance > 0.9
    again = ring.score(ring.draw(setup.teacher, LABELS, 4, guided(50)), LABELS, setup.reference)
    assert again.distance < 0.05 and again.on_ring > 0.97


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_student_needs_one(setup, seed):
    scores = distil(setup, Ladd(CONFIG), seed)
    assert not gate(scores, setup.teacher_scores), scores


class WithoutAdversary(Ladd):
    """Learns the mean image by its square."""

    def student_loss(self, heads, teacher, tokens, made, keys):
        loss, sums = super().student_loss(heads, teacher, tokens, made, keys)
        return 0.0 * loss + jnp.sum(jnp.square(made - tokens.latents)), sums


class DetachedTeacher(Ladd):
    """Nothing flows back through the features."""

    def student_loss(self, heads, teacher, tokens, made, keys):
        return super().student_loss(heads, teacher, tokens, jax.lax.stop_gradient(made), keys)


class NoiseAsReal(Ladd):
    """The heads are shown noise for the real image."""

    def heads_loss(self, heads, teacher, tokens, made, keys):
        noise = student.noise_like(tokens, keys)
        return super().heads_loss(heads, teacher, tokens.replace(latents=noise), made, keys)


class RawVelocity(Ladd):
    """Takes the velocity for the image, in training; the sampler does not."""

    def make(self, network, tokens, keys, step):
        made, t = super().make(network, tokens, keys, step)
        noise = student.noise_like(tokens, flow.split_keys(keys, 2)[1])
        token_t = flow.at_tokens(t, tokens.segments)
        x_t = flow.interpolate(tokens.latents, noise, token_t)
        return (x_t - made) / token_t, t


@pytest.mark.parametrize("sabotaged", [WithoutAdversary, DetachedTeacher, NoiseAsReal, RawVelocity])
def test_the_gate_sees_what_is_wrong(setup, sabotaged):
    scores = distil(setup, sabotaged(CONFIG), seed=0)
    assert gate(scores, setup.teacher_scores), scores
