import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kontext_jax import optim
from kontext_jax.models.layers import LowRank
from kontext_jax.optim import OptimConfig


def test_constant_schedule_after_a_linear_warmup():
    rate = optim.learning_rate(OptimConfig(learning_rate=0.4, warmup_steps=4), num_steps=20)
    np.testing.assert_allclose(
        [rate(step) for step in (0, 1, 2, 4, 5, 19)], [0, 0.1, 0.2, 0.4, 0.4, 0.4], rtol=1e-6
    )


def test_cosine_schedule_ends_at_zero_with_the_run():
    config = OptimConfig(learning_rate=0.4, warmup_steps=4, schedule="cosine")
    rate = optim.learning_rate(config, num_steps=24)
    expected = [0.2] + [0.2 * (1 + np.cos(np.pi * done)) for done in (0, 0.25, 0.5, 0.95, 1)]
    np.testing.assert_allclose(
        [rate(step) for step in (2, 4, 9, 14, 23, 24)], expected, rtol=1e-5, atol=1e-8
    )


def test_without_warmup_the_first_step_is_whole():
    rate = optim.learning_rate(OptimConfig(learning_rate=0.4, warmup_steps=0), num_steps=10)
    np.testing.assert_allclose([rate(0), rate(9)], 0.4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule 'linear' is not one of constant, cosine"):
        OptimConfig(schedule="linear")


def test_kernels_are_matrices_and_no_tables(recipe):
    found = jax.tree.leaves_with_path(optim.is_kernel(recipe.params))
    for (path, is_kernel), x in zip(found, jax.tree.leaves(recipe.params), strict=True):
        name = jax.tree_util.keystr(path)
        other = x.ndim < 2 or any(word in name for word in ("embedding", "bias", "scale"))
        assert is_kernel != other, name
    assert sum(is_kernel for _, is_kernel in found) > 20


def test_kernels_alone_decay():
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.2)
    optimizer = optim.make_optimizer(config, num_steps=10)
    linear = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
    params = {"a": linear, "b": {"scale": jnp.ones(2)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.5 * 0.2 * 3.0, rtol=1e-6)
    assert not np.any(updates["a"]["bias"]) and not np.any(updates["b"]["scale"])


def adapter():
    """Under names that do not give it away."""
    lora = LowRank(4, 6, 2, ("embed", "mlp"), rngs=nnx.Rngs(0), scale=1.0)
    lora.b[...] = jnp.ones((2, 6))
    return {"blocks/qkv": lora}


def test_adapters_decay_as_kernels_do():
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.2)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = {"adapters": adapter(), "norm": {"scale": jnp.ones(2)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    old, new = params["adapters"]["blocks/qkv"], updates["adapters"]["blocks/qkv"]
    np.testing.assert_allclose(new.a[...], -0.1 * old.a[...], rtol=1e-6)
    np.testing.assert_allclose(new.b[...], -0.1, rtol=1e-6)
    assert not np.any(updates["norm"]["scale"])


def test_muon_leaves_adapters_to_adam():
    config = OptimConfig(optimizer="muon", learning_rate=0.1, warmup_steps=0, clip_norm=1e9)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = jax.tree.map(lambda x: x[None], adapter())  # a stack of one layer
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
    for update, x in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        # Adam's first step: of one size everywhere, which no orthogonal matrix of this shape is.
        size = np.abs(update).max()
        np.testing.assert_allclose(update, -size * np.sign(x), rtol=1e-3)


@pytest.mark.parametrize(("norm", "clipped"), [(10.0, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_to_their_global_norm(norm, clipped):
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, clip_norm=1.0, b1=0.9)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"bias": jnp.ones(5)}}
    grads = jax.tree.map(lambda x: x * norm / 3, params)  # 9 numbers of norm / 3
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree.get(state, "mu")
    for moment in jax.tree.leaves(moments):
        np.testing.assert_allclose(moment, 0.1 * clipped / 3, rtol=1e-5)


def test_adamw_s_first_step_is_the_learning_rate():
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = {"bias": jnp.zeros(3)}
    updates, _ = optimizer.update(
        {"bias": jnp.array([1.0, -2.0, 0.5])}, optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["bias"], [-0.1, 0.1, -0.1], rtol=1e-5)


def test_early_averages_forget():
    decay = [optim.ema_decay_at(jnp.asarray(step), 0.99) for step in (0, 9, 989, 10_000)]
    np.testing.assert_allclose(decay, [1 / 10, 10 / 19, 0.99, 0.99], rtol=1e-6)
