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


def test_cosine_schedule_reaches_zero_at_the_last_step():
    config = OptimConfig(learning_rate=0.4, warmup_steps=4, schedule="cosine")
    rate = optim.learning_rate(config, num_steps=24)
    expected = [0.2] + [0.2 * (1 + np.cos(np.pi * done)) for done in (0, 0.25, 0.5, 0.95, 1)]
    np.testing.assert_allclose(
        [rate(step) for step in (2, 4, 9, 14, 23, 24)], expected, rtol=1e-5, atol=1e-8
    )


def test_without_warmup_the_first_step_has_the_full_learning_rate():
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
        ("clip_norm", 0.0, "above 0; use inf to disable clipping"),
        ("learning_rate", 0.0, "above 0"),
        ("warmup_steps", -1, "0 or more"),
        ("ema_decay", 1.5, "from 0 to below 1"),
        ("b2", -0.1, "from 0 to below 1"),
        ("accumulate_steps", 0, "1 or more"),
    ],
)
def test_invalid_settings_are_refused(name, value, rule):
    with pytest.raises(ValueError, match=f"^optim.{name} {value} must be {rule}"):
        OptimConfig(**{name: value})


def test_infinite_clip_norm_disables_clipping():
    optimizer = optim.make_optimizer(OptimConfig(clip_norm=float("inf")), num_steps=10)
    grads = {"bias": jnp.array([3e5, 4e5])}
    state = optimizer.init(grads)
    _, state = optimizer.update(grads, state, grads)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["bias"], [3e4, 4e4], rtol=1e-6)


def test_is_kernel_excludes_embeddings_biases_and_scales(recipe):
    mask = jax.tree.leaves_with_path(optim.is_kernel(recipe.params))
    for (path, is_kernel), x in zip(mask, jax.tree.leaves(recipe.params), strict=True):
        name = jax.tree_util.keystr(path)
        other = x.ndim < 2 or any(word in name for word in ("embedding", "bias", "scale"))
        assert is_kernel != other, name
    assert sum(is_kernel for _, is_kernel in mask) > 20


def test_weight_decay_is_only_for_kernels():
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.2)
    optimizer = optim.make_optimizer(config, num_steps=10)
    linear = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
    params = {"a": linear, "b": {"scale": jnp.ones(2)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.5 * 0.2 * 3.0, rtol=1e-6)
    assert not np.any(updates["a"]["bias"]) and not np.any(updates["b"]["scale"])


def adapter():
    """An adapter under names without "kernel"."""
    lora = LowRank(4, 6, 2, ("embed", "mlp"), rngs=nnx.Rngs(0), scale=1.0)
    lora.b[...] = jnp.ones((2, 6))
    return {"blocks/qkv": lora}


def test_frozen_parameters_have_no_updates():
    """Not even by weight decay."""
    config = OptimConfig(warmup_steps=0, weight_decay=0.2, frozen=("encoder/*",))
    params = {name: {"kernel": jnp.ones((2, 2))} for name in ("encoder", "decoder")}
    optimizer = optim.make_optimizer(config, num_steps=10)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert not np.any(updates["encoder"]["kernel"]) and np.all(updates["decoder"]["kernel"] < 0)
    config.frozen = ("encodr/*",)
    message = r"optim.frozen 'encodr/\*' matches no parameter, such as decoder/kernel"
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(config, num_steps=10).init(params)


def test_weight_decay_includes_adapters():
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.2)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = {"adapters": adapter(), "norm": {"scale": jnp.ones(2)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    old, new = params["adapters"]["blocks/qkv"], updates["adapters"]["blocks/qkv"]
    np.testing.assert_allclose(new.a[...], -0.1 * old.a[...], rtol=1e-6)
    np.testing.assert_allclose(new.b[...], -0.1, rtol=1e-6)
    assert not np.any(updates["norm"]["scale"])


def test_muon_uses_adam_for_adapters():
    config = OptimConfig(optimizer="muon", learning_rate=0.1, warmup_steps=0, clip_norm=1e9)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = jax.tree.map(lambda x: x[None], adapter())  # a stack of one layer
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
    for update, x in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        # Adam's first step has the same size everywhere, unlike an orthogonal matrix of this shape.
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


def test_first_step_of_adamw_has_the_size_of_the_learning_rate():
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
def test_last_learning_rate_is_that_of_the_last_update(name, b1):
    """With a constant gradient, the size of each optimizer's step is the learning rate."""
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
    rates, step_sizes = [], []
    for _ in range(8):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimizer.update(grads, state, params)
        rates.append(optim.last_learning_rate(config, 8, state))
        step_sizes.append(-updates["bias"][0])
    np.testing.assert_allclose(rates, step_sizes, rtol=1e-4)
    np.testing.assert_allclose(rates[:5], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_adamw_with_b1_of_0_stores_no_first_moment_and_matches_optax():
    config = OptimConfig(learning_rate=0.1, b1=0.0, b2=0.9, weight_decay=0.3, warmup_steps=0)
    optimizer = optim.make_optimizer(dataclasses.replace(config, clip_norm=1e9), num_steps=10)
    reference = optax.adamw(
        0.1, b1=0.0, b2=0.9, eps=config.eps, weight_decay=0.3, mask=optim.is_kernel
    )
    start = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    actual, expected = (start, optimizer.init(start)), (start, reference.init(start))
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.cos((step + 1) * x), start)
        actual, expected = _step(optimizer, actual, grads), _step(reference, expected, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual[0], expected[0])
    assert optax.tree.get(actual[1], "mu", None) is None
    assert optax.tree.get(expected[1], "mu", None) is not None


def _step(optimizer, params_and_state, grads):
    params, state = params_and_state
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("adamw", "mu", "nu"), ("muon", "mu", "nu"), ("adafactor", "ema", "v")],
)
def test_moments_dtype_is_only_for_the_first_moment(name, first, second, dtype):
    config = OptimConfig(optimizer=name, moments_dtype=dtype)
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones(4)}
    old = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, new = optimizer.update(params, old, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    for state in (old, new):
        for moment, expected in ((first, dtype), (second, "float32")):
            trees = optax.tree.get_all_with_path(state, moment)
            leaves = [x for _, tree in trees for x in jax.tree.leaves(tree)]
            assert leaves and {x.dtype for x in leaves} == {jnp.dtype(expected)}, moment


def kernel_and_bias(depth: int, inputs: int, outputs: int) -> dict:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (depth, inputs, outputs), "bias": (depth, outputs)}
    axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    return {
        name: nnx.Param(jnp.asarray(rng.standard_normal(shape), jnp.float32), axes=axes[name])
        for name, shape in shapes.items()
    }


def test_two_adafactor_steps_match_the_formulas():
    """arXiv 1804.04235, algorithm 4, with AdamW's step size and weight decay."""
    config = OptimConfig(
        optimizer="adafactor", learning_rate=0.1, warmup_steps=0, weight_decay=0.2, clip_norm=1e9
    )
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = kernel_and_bias(2, 128, 130)
    x = {name: np.asarray(p[...], np.float64) for name, p in params.items()}
    state, row, column, unfactored = optimizer.init(params), 0, 0, 0
    momentum = {"kernel": 0, "bias": 0}
    for step in (1, 2):
        decay_rate = 1 - step**-0.8
        grads = jax.tree.map(lambda p, step=step: jnp.cos(step * p), params)
        updates, state = optimizer.update(grads, state, params)
        g = {name: np.asarray(p[...], np.float64) for name, p in grads.items()}
        new = (1 - decay_rate) * g["kernel"] ** 2
        row = decay_rate * row + new.mean(-1, keepdims=True)
        column = decay_rate * column + new.mean(-2, keepdims=True)
        unfactored = decay_rate * unfactored + (1 - decay_rate) * g["bias"] ** 2
        second = {"kernel": row * column / row.mean(-2, keepdims=True), "bias": unfactored}
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
def test_sizes_and_axes_of_adafactor_moments(shape, row, column, b1):
    """Kernels have a row and a column, small arrays a full second moment; momentum is optional."""
    config = OptimConfig(optimizer="adafactor", b1=b1)
    state = optim.make_optimizer(config, num_steps=10).init(kernel_and_bias(*shape))
    depth, inputs, outputs = shape
    size = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    placeholders = 3  # for the kernel's unfactored moment and the bias's row and column
    parameters = depth * (inputs * outputs + outputs)
    assert size == depth * (inputs + outputs + outputs) + placeholders + (b1 > 0) * parameters

    small, large = sorted([inputs, outputs])
    for moment, names, length in (("v_row", row, small), ("v_col", column, large)):
        kernel = optax.tree.get(state, moment)["kernel"]
        assert (kernel.shape, kernel.get_metadata()["axes"]) == ((depth, length), names)
        assert optax.tree.get(state, moment)["bias"].get_metadata()["axes"] == ()
    assert optax.tree.get(state, "v")["bias"].get_metadata()["axes"] == ("mlp",)
    assert optax.tree.get(state, "v")["kernel"].get_metadata()["axes"] == ()


def test_ema_decay_is_lower_in_early_steps():
    decay = [optim.ema_decay_at(jnp.asarray(step), 0.99) for step in (0, 9, 989, 10_000)]
    np.testing.assert_allclose(decay, [1 / 10, 10 / 19, 0.99, 0.99], rtol=1e-6)
