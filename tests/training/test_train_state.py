"""One train step: exact updates of a toy with two players, and accumulation on packed rows."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kontext_jax.objectives import Sums
from kontext_jax.optim import OptimConfig, make_optimizer
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.training.train_state import (
    TrainState,
    init_state,
    learning_rates,
    make_optimizers,
    make_train_step,
)


class Chase:
    """``leader`` chases a target, ``follower`` the leader; a loss is half the squared distance."""

    players = ("leader", "follower")
    generator = "leader"
    optim = MappingProxyType({})
    every: Mapping[str, int] = MappingProxyType({})
    start: Mapping[str, int] = MappingProxyType({})
    forwarded: Mapping[str, Any] = MappingProxyType({})

    def init(self, key):
        return {"leader": {"kernel": jnp.zeros((2, 1))}, "follower": {"bias": jnp.ones(2)}}

    def frozen(self):
        return {}

    def prepare(self, frozen, batch):
        weight = jnp.sum(batch.example_ids >= 0).astype(jnp.float32)
        return {"target": frozen["target"], "weight": weight}

    def flops(self, batch):
        return jnp.zeros(())

    def loss(self, player, models, frozen, inputs, key, step):
        target, weight = inputs["target"], inputs["weight"]
        leader, follower = models["leader"]["kernel"][:, 0], models["follower"]["bias"]
        gap = leader - target if player == "leader" else follower - leader
        sums = Sums(weight, {"gap": weight * jnp.sum(gap)}, dict(self.forwarded))
        return weight * 0.5 * jnp.sum(jnp.square(gap)), sums


class RareLeader(Chase):
    """The leader is updated in every second step."""

    every = MappingProxyType({"leader": 2})


class LateFollower(Chase):
    """The follower is updated in every second step from the third on."""

    every = MappingProxyType({"follower": 2})
    start = MappingProxyType({"follower": 3})


class FrozenLeader(Chase):
    """The leader is not trained."""

    optim = MappingProxyType({"leader": OptimConfig(warmup_steps=0, frozen=("kern*",))})


class LightExamples(Chase):
    """Each example has a weight of 1/8."""

    def prepare(self, frozen, batch):
        inputs = super().prepare(frozen, batch)
        return inputs | {"weight": inputs["weight"] / 8}


class ForwardingRareLeader(RareLeader):
    """Forwards an input that later players would miss in every second step."""

    forwarded = MappingProxyType({"extra": jnp.ones(())})


class Setup(NamedTuple):
    state: TrainState
    step: object
    batch: object


def start(recipe, optimizer, objective=Chase, **config) -> Setup:
    """``optimizer`` is that of both players, or of each by name."""
    shared = dict.fromkeys(Chase.players, optimizer)
    optimizers = optimizer if isinstance(optimizer, dict) else shared
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(objective(), optimizers, mesh, seed=0)
    step = jax.jit(make_train_step(objective(), optimizers, OptimConfig(**config), seed=0))
    return Setup(state, step, recipe.rows([1, 3]))


def target(value):
    return {"target": jnp.full(2, value)}


def test_players_are_updated_in_turn_and_averages_follow(recipe):
    state, step, batch = start(recipe, optax.sgd(0.5), ema_decay=0.9)
    state, metrics = step(state, target(4.0), batch)
    np.testing.assert_allclose(state.params["leader"]["kernel"], 2.0)  # halfway to 4
    np.testing.assert_allclose(state.params["follower"]["bias"], 1.5)  # halfway to the new leader
    np.testing.assert_allclose(state.ema["leader"]["kernel"], 0.9 * 2.0)  # decay 1 / 10
    np.testing.assert_allclose(state.ema["follower"]["bias"], 0.1 * 1.0 + 0.9 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["leader/loss"], 16)
    np.testing.assert_allclose(metrics["leader/grad_norm"], 4 * np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["follower/gap"], -2)
    state, _ = step(state, target(4.0), batch)
    decay = 2 / 11
    np.testing.assert_allclose(
        state.ema["leader"]["kernel"], decay * 1.8 + (1 - decay) * 3.0, rtol=1e-6
    )
    assert (state.step, state.skipped) == (2, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_bad_batch_changes_only_the_counters(recipe, bad):
    """1e30 and its gradient are finite, but the loss is not."""
    optimizer = make_optimizer(OptimConfig(warmup_steps=0), num_steps=10)
    state, step, batch = start(recipe, optimizer)
    good, _ = step(state, target(1.0), batch)
    state, metrics = step(good, target(bad), batch)
    for name in ("params", "opt_state", "ema"):
        before, after = getattr(good, name)["leader"], getattr(state, name)["leader"]
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (2, 1, 1)
    assert metrics["skipped_in_a_row"] == 1

    state, _ = step(state, target(bad), batch)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 2, 2)
    state, metrics = step(state, target(1.0), batch)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (4, 2, 0)
    assert np.isfinite(metrics["leader/loss"])
    assert np.any(state.params["leader"]["kernel"] != good.params["leader"]["kernel"])


def test_bad_updates_count_in_a_row_across_steps_without_an_update(recipe):
    """The good steps in which it is not due do not reset the count."""
    state, step, batch = start(recipe, optax.sgd(0.5), RareLeader)
    counts = []
    for _ in range(5):
        state, metrics = step(state, target(np.nan), batch)
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert counts == [(1, 1), (0, 1), (1, 2), (0, 2), (1, 3)]
    assert (state.step, state.skipped, state.skipped_in_a_row) == (5, 3, 3)


def test_learning_rate_of_each_player_follows_its_own_updates(recipe):
    """The leader has one update in two steps, and a bad step has none."""
    config = OptimConfig(learning_rate=0.8, warmup_steps=4)
    optimizers = make_optimizers(RareLeader(), config, num_steps=8)
    state, step, batch = start(recipe, optimizers["leader"], RareLeader)
    logged = []
    for value in (1.0, 1.0, 1.0, np.nan, 1.0):
        state, _ = step(state, target(value), batch)
        logged.append(learning_rates(RareLeader(), config, 8, state))
    leader, follower = (
        [rates[f"{p}/learning_rate"] for rates in logged] for p in RareLeader.players
    )
    np.testing.assert_allclose(leader, [0, 0, 0.2, 0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose(follower, [0, 0.2, 0.4, 0.6, 0.8], rtol=1e-6)


def test_player_that_starts_later_is_unchanged_before(recipe):
    """Its learning rate counts from its own first update, here in step 4."""
    config = OptimConfig(learning_rate=0.8, warmup_steps=2, ema_decay=0.9)
    optimizers = make_optimizers(LateFollower(), config, num_steps=9)
    state, step, batch = start(recipe, optimizers["follower"], LateFollower, ema_decay=0.9)
    updated, rates = [], []
    for i in range(9):
        before = state
        state, metrics = step(state, target(4.0), batch)
        if not np.isnan(metrics["follower/loss"]):
            updated.append(i)
        same = jax.tree.map(np.array_equal, before.opt_state, state.opt_state)
        assert all(jax.tree.leaves(same["follower"])) == (i not in updated)
        rates.append(learning_rates(LateFollower(), config, 9, state)["follower/learning_rate"])
    assert updated == [4, 6, 8]
    np.testing.assert_allclose(rates, [0] * 6 + [0.4, 0.4, 0.8], rtol=1e-6)


def test_frozen_parameters_and_their_averages_are_unchanged(recipe):
    """Their gradients are not in the norm either."""
    optimizers = make_optimizers(FrozenLeader(), OptimConfig(warmup_steps=0), num_steps=9)
    state, step, batch = start(recipe, optimizers, FrozenLeader)
    after, metrics = step(state, target(4.0), batch)
    for name in ("params", "ema"):
        before, now = getattr(state, name), getattr(after, name)
        np.testing.assert_array_equal(now["leader"]["kernel"], before["leader"]["kernel"])
        assert np.all(now["follower"]["bias"] != before["follower"]["bias"])
    assert metrics["leader/grad_norm"] == 0 and metrics["leader/loss"] > 0


def test_batch_without_examples_changes_only_the_counters(recipe):
    """Everything is finite, but momentum, weight decay, schedule and average must not advance."""
    optimizer = make_optimizer(OptimConfig(warmup_steps=0), num_steps=10)
    state, step, batch = start(recipe, optimizer)
    good, _ = step(state, target(1.0), batch)
    state = good
    for count in (1, 2):
        state, metrics = step(state, target(1.0), recipe.rows([0, 0]))
        for name in ("params", "opt_state", "ema"):
            before, after = getattr(good, name), getattr(state, name)
            jax.tree.map(np.testing.assert_array_equal, before, after)
        assert (state.step, state.skipped, state.skipped_in_a_row) == (1 + count, count, count)
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, count)
        assert (metrics["examples"], metrics["leader/loss"]) == (0, 0)
        assert all(np.isfinite(value) for value in metrics.values())

    state, metrics = step(state, target(1.0), batch)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (4, 2, 0)
    expected, _ = step(good, target(1.0), batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


def test_steps_without_examples_are_skipped_whichever_player_is_due(recipe):
    state, step, _ = start(recipe, optax.sgd(0.5), RareLeader)
    before = state.params
    for count in (1, 2, 3):
        state, metrics = step(state, target(1.0), recipe.rows([0, 0]))
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, count)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_rows_without_examples_change_nothing(recipe, accumulate_steps):
    """Nor do microbatches without examples, if other microbatches have some."""
    optimizer = make_optimizer(OptimConfig(warmup_steps=0), num_steps=10)
    state, step, batch = start(recipe, optimizer)
    expected, expected_metrics = step(state, target(1.0), batch)
    *_, step, _ = start(recipe, optimizer, accumulate_steps=accumulate_steps)
    result, metrics = step(state, target(1.0), recipe.rows([1, 0, 3]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, (result, metrics), (expected, expected_metrics))
    assert (result.skipped, metrics["skipped"], metrics["examples"]) == (0, 0, 4)


def test_total_weight_may_be_below_one(recipe):
    """Sums are divided by their total weight, here 1/2."""
    (state, step, batch), light = (
        start(recipe, optax.sgd(0.5), kind) for kind in (Chase, LightExamples)
    )
    expected, _ = step(state, target(4.0), batch)
    result, metrics = light.step(state, target(4.0), batch)
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    assert metrics["leader/loss"] == 16


def test_player_that_forwards_must_be_updated_in_every_step(recipe):
    state, step, batch = start(recipe, optax.sgd(0.5), ForwardingRareLeader)
    with pytest.raises(
        ValueError, match="leader forwards inputs, so it must be updated in every step"
    ):
        step(state, target(1.0), batch)


def test_unreadable_records_are_counted(recipe):
    state, step, batch = start(recipe, optax.sgd(0.5))
    _, metrics = step(state, target(0.0), batch.replace(skipped=np.array([2, 3], np.int32)))
    assert metrics["skipped_records"] == 5


@pytest.fixture(scope="module")
def packed_step(recipe):
    """A function ``(accumulate_steps, batch) -> (state, metrics)`` of one step."""
    optimizers = {"model": make_optimizer(OptimConfig(warmup_steps=0, eps=1e-3), num_steps=10)}
    zero = jnp.zeros((), jnp.int32)
    moments = {"model": optimizers["model"].init(recipe.params["model"])}
    state = TrainState(zero, zero, zero, recipe.params, moments, recipe.params)

    @functools.cache
    def compiled(accumulate_steps):
        config = OptimConfig(accumulate_steps=accumulate_steps)
        return jax.jit(make_train_step(recipe.objective, optimizers, config, seed=0))

    def run(accumulate_steps, batch):
        return compiled(accumulate_steps)(state, recipe.frozen, batch)

    return run


@pytest.mark.parametrize("accumulate_steps", [4])
def test_accumulation_weighs_examples_not_rows(recipe, packed_step, accumulate_steps):
    """Rows of 3, 0, 1 and 2 examples: averaging the rows' means would give another update."""
    batch = recipe.rows([3, 0, 1, 2])
    state, metrics = packed_step(1, batch)
    split_state, split_metrics = packed_step(accumulate_steps, batch)
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-5, err_msg=name)
    changed = False
    for leaf, split, old in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((split_state.params, split_state.opt_state)),
        jax.tree.leaves((recipe.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_allclose(split, leaf, rtol=1e-4, atol=1e-6)
        changed |= bool(np.abs(leaf - old).max() > 1e-5)
    assert changed


def test_batch_of_padding_leaves_a_network_unchanged(recipe, packed_step):
    """Such as rows that the packing plan leaves empty."""
    state, metrics = packed_step(1, recipe.rows([0, 0, 0, 0]))
    jax.tree.map(np.testing.assert_array_equal, state.params, recipe.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert (state.step, state.skipped, metrics["model/loss"]) == (1, 1, 0)
    assert all(np.isfinite(value) for value in metrics.values())
