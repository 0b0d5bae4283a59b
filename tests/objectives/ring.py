"""A distribution in 2D for which the right result of a distillation is known.

It has eight narrow Gaussians on a ring, in two alternating classes. A point is one image token with
two channels; its class is a prompt of one token. Networks, losses, train step and sampler are those
of real runs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kontext_jax import flow
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config, T5Encoder
from kontext_jax.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from kontext_jax.objectives.ladd import Ladd
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.training.train_state import init_state, make_optimizers, make_train_step
from kontext_jax.types import Batch

MODES, RADIUS, SD = 8, 2.0, 0.08
CFG_SCALE = 1.5
NO_SHIFT = flow.TimeConfig(shift="none")
NETWORKS = dict(
    transformer=FluxConfig(
        in_channels=2, hidden_size=64, num_heads=2, depth=1, depth_single=2, vec_in_dim=16,
        context_in_dim=16, axes_dim=(8, 12, 12), mlp_ratio=2.0, guidance_embed=False,
        dtype="float32", remat="none",
    ),
    text_encoder=T5Config.tiny_bytes(d_model=16),
    pooled="mean",
)  # fmt: skip

# conftest.py turns XLA's optimisation off; these programs run long enough to need it.
compiled = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": "3", "xla_cpu_use_fusion_emitters": True},
)


class Classes(T5Encoder):
    """A text encoder with one vector for each of the two classes, and one for no class."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (3, 16)))

    def __call__(self, ids, segments):
        return self.embedding[...][ids]


CLASSES = Classes(rngs=nnx.Rngs(7))


class Points(NamedTuple):
    values: Any
    labels: Any  # 1 or 2, or 0 for no class


def centres() -> np.ndarray:
    angle = 2 * np.pi * np.arange(MODES) / MODES
    return RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def ring(key, number: int, _=None) -> Points:
    """Points of the ring; a tenth of them have no class."""
    mode_key, noise_key, drop_key = jax.random.split(key, 3)
    mode = jax.random.randint(mode_key, (number,), 0, MODES)
    noise = SD * jax.random.normal(noise_key, (number, 2))
    has_class = jax.random.uniform(drop_key, (number,)) > 0.1
    values = jnp.asarray(centres(), jnp.float32)[mode] + noise
    return Points(values, jnp.where(has_class, 1 + mode % 2, 0))


def batch_of(points: Points, first_id) -> Batch:
    number = len(points.labels)
    ones = jnp.ones((number, 1), jnp.int32)
    return Batch(
        images={},
        image_segments={},
        source=0 * ones,
        positions=jnp.zeros((number, 1, 3), jnp.int32),
        segments=ones,
        is_target=ones > 0,
        offsets=0 * ones,
        text_ids=points.labels[:, None],
        text_segments=ones,
        clip_ids=jnp.zeros((number, 1, 0), jnp.int32),
        example_ids=first_id + jnp.arange(number)[:, None],
        skipped=jnp.zeros(number, jnp.int32),
        latents=points.values[:, None],
    )


@functools.cache
def _compiled_run(objective, optim: OptimConfig, draw: Callable, num_steps: int, batch_size: int):
    """A program ``(state, frozen, data, seed) -> (state, metrics)``, the same for all seeds.

    Examples of different seeds have different ids, and thus different noise.
    """
    optimizers = make_optimizers(objective, optim, num_steps)
    train_step = make_train_step(objective, optimizers, optim, seed=0)

    @compiled
    def run(state, frozen, data, seed):
        data_key = jax.random.fold_in(jax.random.key(1), seed)

        def step(state, i):
            points = draw(jax.random.fold_in(data_key, i), batch_size, data)
            first_id = (seed * num_steps + i) * batch_size
            return train_step(state, frozen, batch_of(points, first_id))

        return jax.lax.scan(step, state, jnp.arange(num_steps))

    return run


def train(
    objective,
    optim: OptimConfig,
    draw: Callable,
    num_steps: int,
    batch_size: int,
    seed: int,
    data=None,
    frozen=None,
    initial=None,
):
    """(averaged networks after the last step, metrics); ``draw(key, number, data)`` has points."""
    optimizers = make_optimizers(objective, optim, num_steps)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(objective, optimizers, mesh, seed, initial)
    frozen = {"autoencoder": None, "text_encoder": CLASSES} | (frozen or {})
    run = _compiled_run(objective, optim, draw, num_steps, batch_size)
    state, metrics = run(state, frozen, data, seed)
    assert not state.skipped
    return state.ema, metrics


def train_teacher(seed: int = 0, num_steps: int = 4000):
    objective = FlowMatching(FlowMatchingConfig(**NETWORKS, time=NO_SHIFT))
    optim = OptimConfig(
        learning_rate=2e-3, b2=0.99, warmup_steps=100, schedule="cosine", ema_decay=0.995,
        weight_decay=0.0,
    )  # fmt: skip
    ema, _ = train(objective, optim, ring, num_steps, 256, seed)
    return ema["model"]["transformer"]


def from_bank(key, number: int, bank: Points) -> Points:
    """Random points of the bank."""
    chosen = jax.random.randint(key, (number,), 0, len(bank.labels))
    return Points(bank.values[chosen], bank.labels[chosen])


def train_student(objective: Ladd, teacher, bank: Points, seed: int, num_steps: int = 1600):
    optim = OptimConfig(
        learning_rate=5e-4, b1=0.0, b2=0.99, warmup_steps=0, schedule="cosine", ema_decay=0.995,
        weight_decay=0.0,
    )  # fmt: skip
    initial = {"student": {"transformer": jax.tree.map(jnp.copy, teacher)}}
    frozen = {"teacher": teacher}
    ema, metrics = train(objective, optim, from_bank, num_steps, 128, seed, bank, frozen, initial)
    return ema["student"]["transformer"], metrics


@functools.partial(compiled, static_argnames="sampler")
def draw(transformer, labels, seed, sampler: SamplerConfig):
    """One sampled point for each label."""
    points = Points(jnp.zeros((len(labels), 2)), labels)
    config = FlowMatchingConfig(**NETWORKS)

    def tokens_of(batch):
        return config.tokens({"text_encoder": CLASSES}, batch, batch.latents)

    batch = batch_of(points, 0)
    negative = None
    if sampler.cfg_scale != 1:
        negative = tokens_of(batch.replace(text_ids=0 * batch.text_ids))
    out = sample(transformer, tokens_of(batch), jax.random.key(seed), sampler, NO_SHIFT, negative)
    return out[:, 0]


class Score(NamedTuple):
    """How sampled points compare with reference points.

    Attributes:
      distance: sliced Wasserstein-1 distance, over 64 directions.
      on_ring: share of points within three standard deviations of a mode.
      right_class: share of points whose nearest mode has their class.
      rarest: number of points at the rarest mode, as a multiple of an eighth of all points.
    """

    distance: float
    on_ring: float
    right_class: float
    rarest: float


def score(values, labels, reference) -> Score:
    values, reference = (np.asarray(x, np.float64) for x in (values, reference))
    directions = np.random.default_rng(0).standard_normal((2, 64))
    directions /= np.linalg.norm(directions, axis=0)
    gap = np.sort(values @ directions, axis=0) - np.sort(reference @ directions, axis=0)
    distances = np.linalg.norm(values[:, None] - centres()[None], axis=-1)
    nearest, on_ring = distances.argmin(axis=1), distances.min(axis=1) < 3 * SD
    counts = np.bincount(nearest[on_ring], minlength=MODES)
    return Score(
        distance=float(np.abs(gap).mean()),
        on_ring=float(on_ring.mean()),
        right_class=float(np.mean(nearest % 2 + 1 == np.asarray(labels))),
        rarest=float(counts.min() * MODES / len(values)),
    )
