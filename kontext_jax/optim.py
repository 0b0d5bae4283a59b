"""Optimizers: AdamW, Muon or Adafactor from Optax, with warmup, weight decay and clipping."""

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import optax
from flax import nnx

from kontext_jax.models.layers import LowRank
from kontext_jax.models.moving_average import MovingAverage
from kontext_jax.settings import Settings, check_choices, check_least
from kontext_jax.tree_paths import named_leaves

MUON_RMS = 0.2
"""Muon's updates are scaled to the usual RMS of AdamW's (arXiv 2502.16982), so that learning rates
carry over."""

MIN_FACTORED = 128
"""Adafactor factors the second moment of arrays with two axes of at least this size (Optax's
default). Smaller in FLUX are norms, biases, adapters, and the maps from and to 64 channels."""


@dataclass(kw_only=True, unsafe_hash=True)
class OptimConfig(Settings):
    """The optimizer and its schedule.

    Attributes:
      optimizer: one of

        - "adamw".
        - "muon": orthogonalised momentum for the kernels of stacked blocks; Adam with Nesterov
          momentum and without weight decay for all other parameters.
        - "adafactor" (arXiv 1804.04235): the second moment of a kernel is a row and a column. It
          has AdamW's weight decay and a first moment, and its steps are not relative to the scale
          of the parameter (as in arXiv 2106.04560; relative steps would slow down parameters that
          start at zero), so that learning rates carry over. The decay of its second moment is
          1 - step^-0.8; ``b2`` and ``eps`` are not used.

      schedule: after the warmup, "constant" or "cosine" (to zero at the run's last step).
      warmup_steps: steps of linear warmup from zero.
      b1: decay of the first moment; with 0, AdamW and Adafactor do not store one.
      moments_dtype: dtype of the first moment, "float32" or "bfloat16", which saves 2 bytes per
        parameter. The second moment stays float32: in bfloat16, a decay by 0.999 rounds to no
        change.
      weight_decay: weight decay of kernels and low-rank adapters; norms, biases and embeddings have
        none.
      clip_norm: global norm to which larger gradients are scaled down.
      frozen: patterns (`fnmatch`) of the paths of parameters that are not trained, such as
        "encoder/*".
      ema_decay: decay of the averaged parameters; lower in early steps, see `ema_decay_at`.
      accumulate_steps: number of microbatches into which the batch of a step is split.
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
    frozen: tuple[str, ...] = ()
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
                f"optim.clip_norm {self.clip_norm} must be above 0; use inf to disable clipping."
            )


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step, in a run of ``num_steps`` steps."""
    if config.schedule == "cosine":
        decay_steps = max(num_steps - config.warmup_steps, 1)
        after_warmup = optax.cosine_decay_schedule(config.learning_rate, decay_steps)
    else:
        after_warmup = optax.constant_schedule(config.learning_rate)
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, after_warmup], [config.warmup_steps])


def last_learning_rate(config: OptimConfig, num_steps: int, opt_state: optax.OptState) -> float:
    """The learning rate of the last update in ``opt_state``; skipped steps are not updates."""
    # Every part of an optimizer has a counter, and all are equal.
    (_, num_updates), *_ = optax.tree.get_all_with_path(opt_state, "count")
    return float(learning_rate(config, num_steps)(max(int(num_updates) - 1, 0)))


def make_optimizer(
    config: OptimConfig, num_steps: int, has_averages: bool = False
) -> optax.GradientTransformation:
    """The optimizer: gradient clipping, then the update.

    With ``has_averages``, the parameters that are moving averages have an update of their own (see
    ``models/moving_average.py``); the optimizer does not see them.
    """
    if has_averages:
        follow = optax.sgd(1.0)
        return optax.partition({False: make_optimizer(config, num_steps), True: follow}, is_average)
    rate = learning_rate(config, num_steps)
    if config.optimizer == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_muon_dimensions,
            mu_dtype=config.moments_dtype,
        )
    elif config.optimizer == "adafactor":
        update = _with_named_axes(
            optax.adafactor(
                rate,
                min_dim_size_to_factor=MIN_FACTORED,
                multiply_by_parameter_scale=False,
                momentum=config.b1 or None,
                dtype_momentum=config.moments_dtype,
                # Unlike AdamW's, Optax does not multiply this weight decay by the learning rate.
                weight_decay_rate=lambda step: config.weight_decay * rate(step),
                weight_decay_mask=is_kernel,
            )
        )
    elif not config.b1:
        # AdamW without a first moment, which saves 4 bytes per parameter.
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
    steps = [optax.clip_by_global_norm(config.clip_norm), update]
    if config.frozen:  # weight decay would move them
        steps.append(optax.masked(optax.set_to_zero(), lambda x: is_frozen(x, config.frozen)))
    return optax.chain(*steps)


def is_average(params):
    """A tree of bools: whether a parameter is a moving average."""
    return jax.tree.map(
        lambda x: jax.tree.map(lambda _: isinstance(x, MovingAverage), x),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def without_averages(params):
    """``params`` with zeros in place of moving averages."""
    return jax.tree.map(
        lambda average, x: jax.numpy.zeros_like(x) if average else x, is_average(params), params
    )


def is_frozen(params, patterns: Sequence[str]):
    """A tree of bools: whether the path of a parameter matches one of the patterns.

    Raises:
      ValueError: a pattern matches no parameter.
    """
    paths = list(named_leaves(params))
    matches = {x: set(fnmatch.filter(paths, x)) for x in patterns}
    for pattern, matching in matches.items():
        if not matching:
            raise ValueError(f"optim.frozen {pattern!r} matches no parameter, such as {paths[0]}.")
    frozen = set().union(*matches.values())
    return jax.tree.unflatten(jax.tree.structure(params), [path in frozen for path in paths])


def stop_frozen(params, patterns: Sequence[str]):
    """``params``, without gradients of those that match a pattern."""
    if not patterns:
        return params
    return jax.tree.map(
        lambda frozen, x: jax.lax.stop_gradient(x) if frozen else x,
        is_frozen(params, patterns),
        params,
    )


def _with_named_axes(adafactor: optax.GradientTransformation) -> optax.GradientTransformation:
    """``adafactor`` with the right axis names on the rows and columns of its second moment.

    Optax copies the metadata of the parameter to them, so that `sharding` would split the wrong
    axes. Within Optax's update the metadata must be the parameter's.
    """

    def map_moments(change, state):
        factored, *rest = state
        moments = {name: change(name, getattr(factored, name)) for name in ("v_row", "v_col", "v")}
        return (factored._replace(**moments), *rest)

    def named(state, params):
        def change(name, tree):
            rename = functools.partial(_name_axes, name)
            return jax.tree.map(rename, tree, params, is_leaf=lambda x: isinstance(x, nnx.Variable))

        return map_moments(change, state)

    def init(params):
        return named(adafactor.init(params), params)

    def update(grads, state, params):
        structure = jax.tree.structure(params)
        state = map_moments(
            lambda _, tree: jax.tree.unflatten(structure, jax.tree.leaves(tree)), state
        )
        updates, new_state = adafactor.update(grads, state, params)
        return updates, named(new_state, params)

    return optax.GradientTransformation(init, update)


def _name_axes(kind: str, moment, parameter):
    """``moment`` with the names of its axes; ``kind`` is "v_row", "v_col" or "v" (unfactored)."""
    is_masked = not jax.tree.leaves(parameter)
    if is_masked or not isinstance(parameter, nnx.Variable) or moment.shape == parameter.shape:
        return moment
    if moment.shape == (1,):  # Optax's placeholder for no moment of this kind
        return moment.replace(axes=())
    names = parameter.get_metadata().get("axes", ())
    names = [None] * (parameter.ndim - len(names)) + list(names)
    # In Optax a row is the mean over the largest axis, and a column over the second largest.
    del names[np.argsort(parameter.shape)[-1 if kind == "v_row" else -2]]
    return moment.replace(axes=tuple(names))


def _muon_dimensions(params):
    """The axes of each parameter's (in, out) matrices for Muon, or None for AdamW.

    Muon is only for stacked blocks; AdamW suits the maps in and out of the network better. It also
    suits low-rank adapters better, where the product of the two matrices should be orthogonal.
    """

    def dimensions(path, x):
        stacked = "kernel" in jax.tree_util.keystr(path) and x.ndim == 3
        return optax.contrib.MuonDimensionNumbers(-2, -1) if stacked else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def is_kernel(params):
    """A tree of bools: whether a parameter is a kernel or belongs to a low-rank adapter."""

    def decide(path, node):
        if isinstance(node, LowRank):
            return jax.tree.map(lambda _: True, node)
        return "kernel" in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(
        decide, params, is_leaf=lambda node: isinstance(node, LowRank)
    )


def ema_decay_at(step, decay: float):
    """min(decay, (1 + step) / (10 + step)), so that early averages forget the initial values."""
    step = step.astype("float32")
    return jax.numpy.minimum(decay, (1 + step) / (10 + step))
