"""From settings to an optax optimizer: AdamW, Muon, Adafactor, with warmup, decay and clipping."""

import functools
from dataclasses import dataclass

import jax
import numpy as np
import optax
from flax import nnx

from kontext_jax.models.layers import LowRank
from kontext_jax.settings import Settings, check_choices, check_least

MUON_RMS = 0.2
"""Muon's updates are scaled to AdamW's usual size (arXiv 2502.16982), so that rates carry over."""

MIN_FACTORED = 128
"""Adafactor factors the second moment of arrays with two axes of at least this size, Optax's
default. What is smaller in FLUX: norms, biases, adapters, the maps from and to 64 channels."""


@dataclass(kw_only=True, unsafe_hash=True)
class OptimConfig(Settings):
    """The optimizer and its schedule.

    Attributes:
      optimizer: "adamw", or "muon": momentum made orthogonal for the kernels of stacked blocks;
        all else is left to Adam with Nesterov momentum and without decay; or "adafactor"
        (arXiv 1804.04235), whose second moment of a kernel is a row and a column. With AdamW's
        decay, a first moment, and steps that are not relative to the parameter's size (as in arXiv
        2106.04560; they would hold back what starts at zero), rates carry over. Its second moment
        keeps 1 - step^-0.8 of itself: ``b2`` and ``eps`` have no part in it.
      schedule: after the warmup, "constant" or "cosine" (to zero at the run's last step).
      warmup_steps: linear from zero.
      b1: of the first moment; 0 leaves AdamW and Adafactor without one.
      moments_dtype: of the first moment, "float32" or "bfloat16", which is 2 bytes a parameter
        less. The second one stays float32: in bfloat16, 0.999 of it would round back to itself.
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
    moments_dtype: str = "float32"

    def __post_init__(self):
        check_choices(
            self,
            "optim.",
            optimizer=("adamw", "muon", "adafactor"),
            schedule=("constant", "cosine"),
            moments_dtype=("float32", "bfloat16"),
        )
        check_least(self, "optim.", warmup_steps=0, weight_decay=0, accumulate_steps=1)
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name} {getattr(self, name)} must be above 0.")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} {getattr(self, name)} must be from 0 to below 1.")
        if self.clip_norm <= 0:
            raise ValueError(
                f"optim.clip_norm {self.clip_norm} must be above 0; inf leaves gradients alone."
            )


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step."""
    after = max(num_steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, after)
    else:
        rest = optax.constant_schedule(config.learning_rate)
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def last_learning_rate(config: OptimConfig, num_steps: int, opt_state: optax.OptState) -> float:
    """The rate of the last update in ``opt_state``; a skipped step was none."""
    # Every part of an optimizer counts, and all count the same.
    (_, updates), *_ = optax.tree.get_all_with_path(opt_state, "count")
    return float(learning_rate(config, num_steps)(max(int(updates) - 1, 0)))


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
            mu_dtype=config.moments_dtype,
        )
    elif config.optimizer == "adafactor":
        update = _naming_factored_axes(
            optax.adafactor(
                rate,
                min_dim_size_to_factor=MIN_FACTORED,
                multiply_by_parameter_scale=False,
                momentum=config.b1 or None,
                dtype_momentum=config.moments_dtype,
                # It is not multiplied by the rate in there, as AdamW's is.
                weight_decay_rate=lambda step: config.weight_decay * rate(step),
                weight_decay_mask=is_kernel,
            )
        )
    elif not config.b1:
        # AdamW without a first moment to keep: 4 bytes a parameter less.
        update = optax.chain(
            optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(config.weight_decay, is_kernel),
            optax.scale_by_learning_rate(rate),
        )
    else:
        update = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_kernel,
            mu_dtype=config.moments_dtype,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _naming_factored_axes(adafactor: optax.GradientTransformation) -> optax.GradientTransformation:
    """``adafactor``, whose rows and columns carry the names of the axes that are left to them.

    Optax copies all of a parameter's metadata to them, by which `sharding` would split wrong axes;
    inside of Optax it has to be the parameter's.
    """

    def with_moments(state, change):
        factored, *rest = state
        moments = {name: change(name, getattr(factored, name)) for name in ("v_row", "v_col", "v")}
        return (factored._replace(**moments), *rest)

    def named(state, params):
        def change(name, tree):
            rename = functools.partial(_name_what_is_left, name)
            return jax.tree.map(rename, tree, params, is_leaf=lambda x: isinstance(x, nnx.Variable))

        return with_moments(state, change)

    def init(params):
        return named(adafactor.init(params), params)

    def update(grads, state, params):
        structure = jax.tree.structure(params)
        inside = with_moments(
            state, lambda _, tree: jax.tree.unflatten(structure, jax.tree.leaves(tree))
        )
        updates, new_state = adafactor.update(grads, inside, params)
        return updates, named(new_state, params)

    return optax.GradientTransformation(init, update)


def _name_what_is_left(kind: str, moment, parameter):
    """A row, column or whole second moment under the names of its own axes."""
    if not isinstance(parameter, nnx.Variable) or moment.shape == parameter.shape:
        return moment
    if moment.shape == (1,):  # Optax's sign that there is none of this kind
        return moment.replace(axes=())
    names = parameter.get_metadata().get("axes", ())
    names = [None] * (parameter.ndim - len(names)) + list(names)
    # A row is the mean over the largest axis, a column over the second largest; Optax's own order.
    del names[np.argsort(parameter.shape)[-1 if kind == "v_row" else -2]]
    return moment.replace(axes=tuple(names))


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
