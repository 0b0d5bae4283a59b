"""The state of a run, and the train step of every objective."""

import functools
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int

from kontext_jax.objectives import Network, Objective
from kontext_jax.optim import (
    OptimConfig,
    ema_decay_at,
    is_average,
    last_learning_rate,
    make_optimizer,
    stop_frozen,
    without_averages,
)
from kontext_jax.sharding import shardings_of
from kontext_jax.types import Batch, Metrics


@no_type_check  # trees of its structure also hold shapes and shardings
@struct.dataclass
class TrainState:
    """Everything that changes during a run. Random keys are derived from the seed and ``step``.

    Attributes:
      step: number of steps so far, including skipped ones.
      skipped: number of skipped steps: without an example, or with a loss or gradient that is not
        finite. They change no parameter.
      skipped_in_a_row: number of skipped steps since the last good one.
      params, opt_state, ema: parameters, optimizer state and averaged parameters, by player.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    params: dict[str, Network]
    opt_state: dict[str, optax.OptState]
    ema: dict[str, Network]


def abstract_state(
    objective: Objective, optimizers: dict[str, optax.GradientTransformation], mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of a state; nothing is computed."""
    state = jax.eval_shape(lambda: _new_state(objective, optimizers, jax.random.key(0)))
    return state, shardings_of(state, mesh)


def init_state(
    objective: Objective,
    optimizers: dict[str, optax.GradientTransformation],
    mesh: Mesh,
    seed: int,
    initial: dict[str, dict[str, Network]] | None = None,
) -> TrainState:
    """A new state, created sharded.

    Args:
      objective: defines the networks.
      optimizers: by player.
      mesh: the devices.
      seed: seed of random networks.
      initial: pretrained networks, by player and name; donated.
    """
    # Without explicit shardings, `jit(optimizer.init)` leaves the moments replicated.
    _, shardings = abstract_state(objective, optimizers, mesh)
    make = jax.jit(
        lambda key, initial: _new_state(objective, optimizers, key, initial),
        out_shardings=shardings,
        donate_argnums=1,
    )
    return make(jax.random.key(seed), initial or {})


def _new_state(objective, optimizers, key, initial=None) -> TrainState:
    params = objective.init(key)
    for player, networks in (initial or {}).items():  # XLA drops what they replace
        one_network = not isinstance(params[player], dict)
        params[player] = networks[player] if one_network else params[player] | networks
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        skipped=zero,
        skipped_in_a_row=zero,
        params=params,
        opt_state={player: optimizers[player].init(params[player]) for player in params},
        ema=jax.tree.map(jnp.copy, params),
    )


def make_optimizers(
    objective: Objective, config: OptimConfig, num_steps: int
) -> dict[str, optax.GradientTransformation]:
    """Each player's optimizer for a run of ``num_steps``; schedules count the player's updates."""
    schedules = _schedules(objective, config, num_steps)
    networks = jax.eval_shape(objective.init, jax.random.key(0))
    return {
        player: make_optimizer(*schedule, any(jax.tree.leaves(is_average(networks[player]))))
        for player, schedule in schedules.items()
    }


def learning_rates(
    objective: Objective, config: OptimConfig, num_steps: int, state: TrainState
) -> dict[str, float]:
    """The learning rate of each player's last update, as metrics."""
    schedules = _schedules(objective, config, num_steps)
    return {
        f"{player}/learning_rate": last_learning_rate(*schedule, state.opt_state[player])
        for player, schedule in schedules.items()
    }


def _schedules(
    objective: Objective, config: OptimConfig, num_steps: int
) -> dict[str, tuple[OptimConfig, int]]:
    """Each player's optimizer settings, and its number of updates in ``num_steps``."""
    return {
        player: (
            objective.optim.get(player, config),
            max(_num_updates(objective, player, num_steps), 0),
        )
        for player in objective.players
    }


def _num_updates(objective: Objective, player: str, step):
    """The number of a player's updates before ``step``; negative long before its first one."""
    every, start = objective.every.get(player, 1), objective.start.get(player, 0)
    return -(-step // every) + (-start // every)


def make_train_step(
    objective: Objective,
    optimizers: dict[str, optax.GradientTransformation],
    config: OptimConfig,
    seed: int,
) -> Callable[[TrainState, dict[str, Network], Batch], tuple[TrainState, Metrics]]:
    """The train step of any objective: ``(state, frozen, batch) -> (state, metrics)``.

    For each player in turn: the gradient of its loss over all microbatches, clipping, the update,
    and the average. A player without an example, or with a loss or gradient that is not finite,
    keeps its state, and the step counts as skipped. A player that is not due (`Objective.every`,
    `Objective.start`) keeps its state too; its metrics are NaN.
    """

    def train_step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        params, opt_state, ema = dict(state.params), dict(state.opt_state), dict(state.ema)
        metrics, all_good, all_due = {}, jnp.asarray(True), jnp.asarray(True)
        inputs = _over_microbatches(
            lambda microbatch: objective.prepare(frozen, microbatch),
            _split(batch, config.accumulate_steps),
        )
        for i, player in enumerate(objective.players):
            player_optim = objective.optim.get(player, config)

            def loss_fn(network, inputs, player=player, i=i, frozen_names=player_optim.frozen):
                models = params | {player: stop_frozen(network, frozen_names)}
                player_key = jax.random.fold_in(key, i)
                return objective.loss(player, models, frozen, inputs, player_key, state.step)

            def gradient(inputs, player=player, loss_fn=loss_fn):
                return _accumulate(loss_fn, params[player], inputs)

            every, start = objective.every.get(player, 1), objective.start.get(player, 0)
            due = (state.step % every == 0) & (state.step >= start)
            if every == 1 and not start:
                loss, weight, sums, grads, forwarded = gradient(inputs)
            else:
                nothing = functools.partial(_nothing, jax.eval_shape(gradient, inputs))
                loss, weight, sums, grads, forwarded = jax.lax.cond(due, gradient, nothing, inputs)
            if forwarded and (every > 1 or start):
                raise ValueError(f"{player} forwards inputs, so it must be updated in every step.")
            inputs = inputs | forwarded
            grad_norm = optax.tree.norm(without_averages(grads))
            updates, new_opt_state = optimizers[player].update(
                grads, opt_state[player], params[player]
            )
            finite = jnp.isfinite(loss + grad_norm + optax.tree.norm(updates))
            # A zero gradient is finite, but momentum and weight decay would still move parameters.
            good = finite & (weight > 0)
            num_updates = _num_updates(objective, player, state.step)
            decay = ema_decay_at(jnp.maximum(num_updates, 0), player_optim.ema_decay)
            new = optax.apply_updates(params[player], updates)
            new_ema = optax.incremental_update(new, ema[player], 1 - decay)

            keep = lambda new, old, ok=good & due: jax.tree.map(  # noqa: E731
                lambda a, b: jnp.where(ok, a, b), new, old
            )
            params[player] = keep(new, params[player])
            opt_state[player] = keep(new_opt_state, opt_state[player])
            ema[player] = keep(new_ema, ema[player])
            all_good &= good | ~due
            all_due &= due
            named = {"loss": loss, "grad_norm": grad_norm} | sums
            metrics |= {
                f"{player}/{name}": jnp.where(due, value, jnp.nan) for name, value in named.items()
            }

        bad = 1 - all_good.astype(jnp.int32)
        # Only a step of all players resets the count: one that is not due may be bad every time.
        in_a_row = jnp.where(all_due, 0, state.skipped_in_a_row)
        skipped_in_a_row = jnp.where(all_good, in_a_row, state.skipped_in_a_row + 1)
        metrics |= {
            "examples": jnp.sum(batch.example_ids >= 0),
            "skipped_records": jnp.sum(batch.skipped),
            "model_flops": objective.flops(batch),
            "skipped": bad,
            "skipped_in_a_row": skipped_in_a_row,
        }
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=skipped_in_a_row,
            params=params,
            opt_state=opt_state,
            ema=ema,
        )
        return state, metrics

    return train_step


def jit_train_step(
    objective: Objective,
    optimizers: dict[str, optax.GradientTransformation],
    config: OptimConfig,
    seed: int,
    shardings: TrainState,
):
    """`make_train_step`, compiled on its first call; the state that it is given is donated.

    Its optional fourth argument says for each device whether its process was asked to stop; then
    the metrics have ``stop_requested``: whether any of them was.

    Args:
      objective, optimizers, config, seed: arguments of `make_train_step`.
      shardings: shardings of the state, see `abstract_state`.
    """
    step = make_train_step(objective, optimizers, config, seed)

    def train_step(state, frozen, batch, stop_requested=None):
        state, metrics = step(state, frozen, batch)
        if stop_requested is not None:
            metrics |= {"stop_requested": jnp.any(stop_requested)}
        return state, metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _split(batch: Batch, num_microbatches: int) -> Batch:
    """The batch with a leading axis of microbatches."""
    # Row r goes to microbatch r % num, so that rows stay on their devices.
    return jax.tree.map(
        lambda x: x.reshape(
            x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]
        ).swapaxes(0, 1),
        batch,
    )


def _over_microbatches(function, split):
    """``function`` of each microbatch, without a loop if there is only one."""
    if len(jax.tree.leaves(split)[0]) > 1:
        return jax.lax.map(function, split)
    result = function(jax.tree.map(lambda x: x[0], split))
    return jax.tree.map(lambda x: x[None], result)


def _accumulate(loss_fn, network, inputs):
    """(loss, weight, metrics, gradient, forwarded inputs), accumulated over microbatches.

    Sums are divided by the total weight once, so that the result does not depend on the split. If
    the total weight is 0, they stay 0.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def sums_of(microbatch):
        (loss, (weight, metrics, forwarded)), grads = grad_fn(network, microbatch)
        return (loss, weight, metrics, grads), dict(forwarded)

    first = jax.tree.map(lambda x: x[0], inputs)
    if len(jax.tree.leaves(inputs)[0]) == 1:
        sums, forwarded = sums_of(first)
        forwarded = jax.tree.map(lambda x: x[None], forwarded)
    else:
        shapes, _ = jax.eval_shape(sums_of, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total, microbatch):
            sums, forwarded = sums_of(microbatch)
            return jax.tree.map(jnp.add, total, sums), forwarded

        sums, forwarded = jax.lax.scan(add, zeros, inputs)
    loss, weight, metrics, grads = sums
    scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
    metrics, grads = jax.tree.map(lambda x: x * scale, (metrics, grads))
    return loss * scale, weight, metrics, grads, forwarded


def _nothing(shapes, inputs):
    """Zeros instead of a gradient that is not due."""
    del inputs
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
