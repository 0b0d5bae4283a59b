"""LADD with tiny networks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kontext_jax.encoders import encode_images
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.objectives.ladd import Ladd, LaddConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.training.train_state import (
    TrainState,
    abstract_state,
    init_state,
    jit_train_step,
    make_optimizers,
    make_train_step,
)
from kontext_jax.types import Tokens


class LaddRecipe(NamedTuple):
    """An objective, its networks, and a batch with 1, 2 and 0 examples in its rows."""

    objective: Ladd
    params: dict
    frozen: dict
    batch: Any
    tokens: Tokens


@pytest.fixture(scope="session")
def make_ladd(recipe, random_network):
    """A function from LADD settings to a recipe, with the encoders and batches of `recipe`."""
    config = recipe.objective.config
    common = {
        name: getattr(config, name)
        for name in ("transformer", "text_encoder", "pooled", "guidance")
    }
    frozen = recipe.frozen | {
        "text_encoder": recipe.params["model"]["text_encoder"],
        "teacher": recipe.params["model"]["transformer"],
    }
    batch = recipe.rows([1, 2, 0])

    @jax.jit
    def encode(frozen, batch):
        return config.tokens(frozen, batch, encode_images(frozen["autoencoder"], batch))

    tokens = encode(frozen, batch)

    def make(**settings) -> LaddRecipe:
        heads = HeadsConfig(width=8, dtype="float32")
        objective = Ladd(LaddConfig(**(common | {"heads": heads} | settings)))
        params = random_network(lambda: objective.init(jax.random.key(0)), seed=1)
        return LaddRecipe(objective, params, frozen, batch, tokens)

    return make


@pytest.fixture(scope="session")
def ladd(make_ladd) -> LaddRecipe:
    return make_ladd()


@pytest.fixture(scope="session")
def target(ladd) -> np.ndarray:
    """Which tokens are target tokens."""
    return np.asarray(ladd.tokens.is_target)


@pytest.fixture(scope="session")
def make_descent():
    """A function from an objective to a step of plain gradient descent.

    The step maps (parameters, frozen networks, batch, learning rates by player) to (new parameters,
    metrics).
    """

    def make(objective, accumulate_steps: int = 1):
        config = OptimConfig(accumulate_steps=accumulate_steps)

        @jax.jit
        def step(params, frozen, batch, rates):
            optimizers = {player: optax.sgd(rate) for player, rate in rates.items()}
            moments = {player: optimizers[player].init(params[player]) for player in params}
            zero = jnp.zeros((), jnp.int32)
            state = TrainState(zero, zero, zero, params, moments, params)
            train_step = make_train_step(objective, optimizers, config, seed=0)
            state, metrics = train_step(state, frozen, batch)
            return state.params, metrics

        return step

    return make


@pytest.fixture(scope="session")
def assert_same_in_microbatches(make_descent):
    """Checks that a step in two microbatches equals the step on the full batch."""

    def check(objective, params, frozen, batch):
        rates = dict.fromkeys(objective.players, 0.1)
        full, split = (
            jax.device_get(make_descent(objective, count)(params, frozen, batch, rates))
            for count in (1, 2)
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, split, full)
        for player in objective.players:
            change = jax.tree.map(lambda a, b: np.abs(a - b).max(), full[0][player], params[player])
            assert max(jax.tree.leaves(change)) > 1e-3

    return check


@pytest.fixture(scope="session")
def three_steps_on():
    """A function from an objective, its inputs and mesh sizes to (parameters, metrics).

    The parameters are those after three steps.
    """
    # A small eps would let Adam turn rounding errors of near-zero gradients into full steps.
    config = OptimConfig(learning_rate=0.01, warmup_steps=0, eps=1e-2, ema_decay=0.5)

    def run(objective, params, frozen, batch, sizes: dict[str, int]):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = make_mesh(MeshConfig(**({"data": 1, "fsdp": 1} | sizes)), devices)
        optimizers = make_optimizers(objective, config, num_steps=9)
        _, shardings = abstract_state(objective, optimizers, mesh)
        initial = jax.device_put(jax.tree.map(jnp.copy, params), shardings.params)
        initial = {p: x if isinstance(x, dict) else {p: x} for p, x in initial.items()}
        state = init_state(objective, optimizers, mesh, 0, initial)
        frozen = jax.device_put(frozen, shardings_of(frozen, mesh))
        step = jit_train_step(objective, optimizers, config, 0, shardings)
        with jax.set_mesh(mesh):
            for _ in range(3):
                state, metrics = step(state, frozen, batch)
        return jax.device_get((state.params, metrics))

    return run


@pytest.fixture(scope="session")
def assert_same_steps():
    """Checks two results of `three_steps_on`."""

    def check(actual, expected):
        (params, metrics), (expected_params, expected_metrics) = actual, expected
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
        jax.tree.map(close, params, expected_params)

    return check
