import dataclasses

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


def test_an_unknown_dtype_of_moments_is_refused():
    with pytest.raises(ValueError, match="moments_dtype 'int8' is not one of float32, bfloat16"):
        OptimConfig(moments_dtype="int8")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("clip_norm", 0.0, "above 0; inf leaves gradients alone"),
        ("learning_rate", 0.0, "above 0"),
        ("warmup_steps", -1, "0 or more"),
        ("ema_decay", 1.5, "from 0 to below 1"),
        ("b2", -0.1, "from 0 to below 1"),
        ("accumulate_steps", 0, "1 or more"),
    ],
)
def test_what_could_not_train_is_refused(name, value, rule):
    with pytest.raises(ValueError, match=f"^optim.{name} {value} must be {rule}"):
        OptimConfig(**{name: value})


def test_gradients_of_any_norm_may_be_left_alone():
    optimizer = optim.make_optimizer(OptimConfig(clip_norm=float("inf")), num_steps=10)
    grads = {"bias": jnp.array([3e5, 4e5])}
    state = optimizer.init(grads)
    _, state = optimizer.update(grads, state, grads)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["bias"], [3e4, 4e4], rtol=1e-6)


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


@pytest.mark.parametrize(
    ("name", "b1"), [("adamw", 0.9), ("adamw", 0.0), ("muon", 0.0), ("adafactor", 0.0)]
)
def test_the_rate_that_is_told_is_the_rate_of_the_last_update(name, b1):
    """Of a gradient that never changes each of them makes a step of the rate itself."""
    config = OptimConfig(
        optimizer=name,
        learning_rate=0.4,
        warmup_steps=4,
        schedule="cosine",
        weight_decay=0.0,
        b1=b1,
    )
    optimizer = optim.make_optimizer(config, num_steps=8)
    params = {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones(4)}
    grads = jax.tree.map(lambda x: 0.01 * x, params)
    state = optimizer.init(params)
    assert optim.last_learning_rate(config, 8, state) == 0
    told, moved = [], []
    for _ in range(8):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimizer.update(grads, state, params)
        told.append(optim.last_learning_rate(config, 8, state))
        moved.append(-updates["bias"][0])
    np.testing.assert_allclose(told, moved, rtol=1e-4)
    np.testing.assert_allclose(told[:5], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_without_a_first_moment_adamw_keeps_none_and_does_the_same():
    config = OptimConfig(learning_rate=0.1, b1=0.0, b2=0.9, weight_decay=0.3, warmup_steps=0)
    mine = optim.make_optimizer(dataclasses.replace(config, clip_norm=1e9), num_steps=10)
    theirs = optax.adamw(
        0.1, b1=0.0, b2=0.9, eps=config.eps, weight_decay=0.3, mask=optim.is_kernel
    )
    start = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    ours, expected = (start, mine.init(start)), (start, theirs.init(start))
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.cos((step + 1) * x), start)
        ours, expected = (_moved(o, s, grads) for o, s in ((mine, ours), (theirs, expected)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours[0], expected[0])
    assert optax.tree.get(ours[1], "mu", None) is None
    assert optax.tree.get(expected[1], "mu", None) is not None


def _moved(optimizer, state, grads):
    params, moments = state
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("adamw", "mu", "nu"), ("muon", "mu", "nu"), ("adafactor", "ema", "v")],
)
def test_the_first_moment_alone_has_the_dtype_that_is_asked_for(name, first, second, dtype):
    config = OptimConfig(optimizer=name, moments_dtype=dtype)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones(4)}
    old = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, new = optimizer.update(params, old, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    for state in (old, new):
        for moment, expected in ((first, dtype), (second, "float32")):
            found = optax.tree.get_all_with_path(state, moment)
            leaves = [x for _, tree in found for x in jax.tree.leaves(tree)]
            assert leaves and {x.dtype for x in leaves} == {jnp.dtype(expected)}, moment


def kernel_and_bias(depth: int, inputs: int, outputs: int) -> dict:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (depth, inputs, outputs), "bias": (depth, outputs)}
    axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    return {
        name: nnx.Param(jnp.asarray(rng.standard_normal(shape), jnp.float32), axes=axes[name])
        for name, shape in shapes.items()
    }


def test_two_adafactor_steps_are_its_formulas():
    """arXiv 1804.04235, algorithm 4, of a step size that is AdamW's."""
    config = OptimConfig(
        optimizer="adafactor", learning_rate=0.1, warmup_steps=0, weight_decay=0.2, clip_norm=1e9
    )
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = kernel_and_bias(2, 128, 130)
    x = {name: np.asarray(p[...], np.float64) for name, p in params.items()}
    state, row, column, whole = optimizer.init(params), 0, 0, 0
    momentum = {"kernel": 0, "bias": 0}
    for step in (1, 2):
        old = 1 - step**-0.8
        grads = jax.tree.map(lambda p, step=step: jnp.cos(step * p), params)
        updates, state = optimizer.update(grads, state, params)
        g = {name: np.asarray(p[...], np.float64) for name, p in grads.items()}
        row = old * row + (1 - old) * (g["kernel"] ** 2).mean(-1, keepdims=True)
        column = old * column + (1 - old) * (g["kernel"] ** 2).mean(-2, keepdims=True)
        whole = old * whole + (1 - old) * g["bias"] ** 2
        second = {"kernel": row * column / row.mean(-2, keepdims=True), "bias": whole}
        for name, decay in (("kernel", 0.2), ("bias", 0)):
            scaled = g[name] / np.sqrt(second[name])
            scaled /= max(1, np.sqrt((scaled**2).mean()))
            momentum[name] = 0.9 * momentum[name] + 0.1 * 0.1 * scaled
            expected = -momentum[name] - 0.1 * decay * x[name]
            np.testing.assert_allclose(updates[name][...], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("b1", [0.9, 0.0])
@pytest.mark.parametrize(
    ("shape", "row", "column"),
    [
        ((3, 128, 256), (None, "embed"), (None, "mlp")),
        ((3, 256, 128), (None, "mlp"), (None, "embed")),
        ((3, 128, 128), (None, "embed"), (None, "mlp")),
    ],
    ids=str,
)
def test_what_adafactor_keeps_and_its_axes(shape, row, column, b1):
    """A row and a column of a stack of kernels, all of what is small, and a momentum or none."""
    config = OptimConfig(optimizer="adafactor", b1=b1)
    state = optim.make_optimizer(config, num_steps=10).init(kernel_and_bias(*shape))
    depth, inputs, outputs = shape
    size = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    signs = 3  # that there is no whole of the kernel, and no row or column of the bias
    parameters = depth * (inputs * outputs + outputs)
    assert size == depth * (inputs + outputs + outputs) + signs + (b1 > 0) * parameters

    small, large = sorted([inputs, outputs])
    for moment, names, kept in (("v_row", row, small), ("v_col", column, large)):
        kernel = optax.tree.get(state, moment)["kernel"]
        assert (kernel.shape, kernel.get_metadata()["axes"]) == ((depth, kept), names)
        assert optax.tree.get(state, moment)["bias"].get_metadata()["axes"] == ()
    assert optax.tree.get(state, "v")["bias"].get_metadata()["axes"] == ("mlp",)
    assert optax.tree.get(state, "v")["kernel"].get_metadata()["axes"] == ()


def test_early_averages_forget():
    decay = [optim.ema_decay_at(jnp.asarray(step), 0.99) for step in (0, 9, 989, 10_000)]
    np.testing.assert_allclose(decay, [1 / 10, 10 / 19, 0.99, 0.99], rtol=1e-6)
