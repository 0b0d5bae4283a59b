"""From settings to an optax optimizer: AdamW or Muon, with warmup, decay and clipping."""

from dataclasses import dataclass

import jax
import optax

from kontext_jax.models.layers import LowRank

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine")

MUON_RMS = 0.2
"""Muon's updates are scaled to AdamW's usual size (arXiv 2502.16982), so that rates carry over."""


@dataclass(kw_only=True, unsafe_hash=True)
class OptimConfig:
    """The optimizer and its schedule.

    Attributes:
      optimizer: "adamw", or "muon": momentum made orthogonal for the kernels of stacked blocks;
        all else is left to Adam with Nesterov momentum and without decay.
      schedule: after the warmup, "constant" or "cosine" (to zero at the run's last step).
      warmup_steps: linear from zero.
      weight_decay: on kernels and low-rank adapters only; norms, biases and embeddings are left
        alone.
      clip_norm: gradients of larger global norm are scaled down to it.
      ema_decay: of the averaged parameters; the average starts faster, see `ema_decay_at`.
      accumulate_steps: microbatches a step; the batch is split into so many.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 500
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    accumulate_steps: int = 1

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}.")


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step."""
    after = max(num_steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, after)
    else:
        rest = optax.constant_schedule(config.learning_rate)
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then the update."""
    rate = learning_rate(config, num_steps)
    if config.optimizer == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_block_kernels,
        )
    else:
        update = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_kernel,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _block_kernels(params):
    """How Muon reads each parameter: a stack of (in, out) matrices, or None for AdamW.

    Stacked blocks alone: the maps in and out of the network are better off with AdamW. So are
    low-rank adapters, whose product is what would have to be orthogonal.
    """

    def dimensions(path, x):
        stacked = "kernel" in jax.tree_util.keystr(path) and x.ndim == 3
        return optax.contrib.MuonDimensionNumbers(-2, -1) if stacked else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def is_kernel(params):
    """A tree of bools: which parameters are kernels of linear maps, adapters or convolutions."""

    def answer(path, node):
        if isinstance(node, LowRank):
            return jax.tree.map(lambda _: True, node)
        return "kernel" in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(
        answer, params, is_leaf=lambda node: isinstance(node, LowRank)
    )


def ema_decay_at(step, decay: float):
    """min(decay, (1 + step) / (10 + step)): early averages forget the initial parameters."""
    step = step.astype("float32")
    return jax.numpy.minimum(decay, (1 + step) / (10 + step))
