"""Moving averages as parameters: their update is the same for every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kontext_jax.models.moving_average import MovingAverage, follow
from kontext_jax.optim import OptimConfig, is_average, make_optimizer, without_averages


class Network(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((4, 3)), axes=(None, None))
        self.mean = MovingAverage(jnp.zeros((3,)), axes=(None,))

    def loss(self, x):
        """The sum over examples, with the average of ``x``."""
        weight = jnp.asarray(len(x), jnp.float32)
        return jnp.sum(x @ self.kernel[...].T) + follow(self.mean, jnp.sum(x, axis=0), weight, 0.9)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_averages_follow_and_the_rest_is_optimised(optimizer):
    """Adding an average changes neither the loss nor the update of the other parameters."""
    config = OptimConfig(optimizer=optimizer, warmup_steps=0, clip_norm=0.1, weight_decay=0.1)
    network, rng = Network(), np.random.default_rng(0)
    tx, plain = make_optimizer(config, 9, has_averages=True), make_optimizer(config, 9)
    state, mean = tx.init(network), np.zeros(3)
    kernel = {"kernel": network.kernel[...]}
    plain_state = plain.init(kernel)
    for _ in range(3):
        x = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
        value, grads = jax.value_and_grad(lambda n, x=x: n.loss(x))(network)
        np.testing.assert_allclose(value, jnp.sum(x @ network.kernel[...].T), rtol=1e-6)
        grads = jax.tree.map(lambda g: g / 5, grads)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = tx.update(grads, state, network)
        network = optax.apply_updates(network, updates)
        gradient = {"kernel": grads.kernel[...]}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, plain_state = plain.update(gradient, plain_state, kernel)
        kernel = optax.apply_updates(kernel, updates)
        mean = 0.9 * mean + 0.1 * np.asarray(x, np.float64).mean(axis=0)
    np.testing.assert_allclose(network.mean[...], mean, atol=1e-6)
    np.testing.assert_allclose(network.kernel[...], kernel["kernel"], rtol=1e-6)


def test_norms_leave_averages_out():
    network = Network()
    assert jax.tree.leaves(is_average(network)) == [False, True]
    only = without_averages(jax.tree.map(jnp.ones_like, network))
    np.testing.assert_allclose(optax.tree.norm(only), np.sqrt(12))
