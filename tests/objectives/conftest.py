"""LADD with networks as small as can be."""

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
from kontext_jax.training.train_state import TrainState, make_train_step
from kontext_jax.types import Tokens


class LaddRecipe(NamedTuple):
    """An objective with networks for it; ``tokens``: rows of 1, 2 and no examples."""

    objective: Ladd
    params: dict
    frozen: dict
    batch: Any
    tokens: Tokens


@pytest.fixture(scope="session")
def make_ladd(recipe, random_network):
    """A function from settings of LADD to a recipe, on `recipe`'s encoders and batches."""
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
    """Which tokens are targets'."""
    return np.asarray(ladd.tokens.is_target)


@pytest.fixture(scope="session")
def make_descent():
    """A function from an objective to a step of plain gradient descent.

    The step goes from (parameters, frozen networks, batch, learning rates by player) to (parameters
    after it, metrics).
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
    """Of an objective's step: its parameters and metrics are those of the whole batch."""

    def check(objective, params, frozen, batch):
        rates = dict.fromkeys(objective.players, 0.1)
        whole, split = (
            jax.device_get(make_descent(objective, number)(params, frozen, batch, rates))
            for number in (1, 2)
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, split, whole)
        for player in objective.players:
            moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole[0][player], params[player])
            assert max(jax.tree.leaves(moved)) > 1e-3

    return check
