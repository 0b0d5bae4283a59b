"""Where arrays live, and that it changes nothing but where they live."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kontext_jax import optim, sharding
from kontext_jax.optim import OptimConfig, make_optimizer
from kontext_jax.sharding import MeshConfig, make_mesh, spec
from kontext_jax.train_state import TrainState, abstract_state, init_state, make_train_step

# A large eps: Adam would else turn the rounding of a gradient near zero into a whole step.
OPTIM = OptimConfig(learning_rate=0.1, warmup_steps=0, eps=1e-3, ema_decay=0.5)
OPTIMIZERS = {"model": make_optimizer(OPTIM, num_steps=10)}


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((32, 64), ("embed", "mlp"), P(("fsdp",), ("tensor",))),
        ((64, 32), ("mlp", "embed"), P(("tensor",), ("fsdp",))),
        ((64,), ("mlp",), P(("tensor", "fsdp"))),  # a bias takes both
        ((3, 32, 64), ("embed", "mlp"), P(None, ("fsdp",), ("tensor",))),  # stacked blocks
        ((6, 64), ("embed", "mlp"), P(None, ("tensor", "fsdp"))),  # 6 rows do not split by 4
        ((32, 6), (None, "heads"), P(None, ("tensor",))),
        ((7, 5), ("embed", "mlp"), P(None, None)),
        ((), (), P()),
        ((8, 16, 32), ("batch", "seq", "act_embed"), P(("fsdp",), ("context",), None)),
    ],
)
def test_axes_are_split_by_their_names(shape, names, expected):
    mesh = mesh_of(fsdp=4, tensor=2)

    def splits(partition):  # mesh axes of size one split nothing
        as_tuples = [(axes,) if isinstance(axes, str) else axes or () for axes in partition]
        return [[axis for axis in axes if mesh.shape[axis] > 1] for axes in as_tuples]

    assert splits(spec(shape, names, mesh)) == splits(expected)


def test_rows_are_split_over_data_and_fsdp():
    mesh = mesh_of(data=2, fsdp=4)
    assert spec((8, 16, 32), ("batch", "seq", "act_embed"), mesh)[0] == ("data", "fsdp")
    assert sharding.batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)
    assert sharding.num_batch_shards(mesh) == 8
    assert sharding.num_batch_shards(mesh_of(data=2, fsdp=2, context=2)) == 4


def test_a_name_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="No sharding rule for axis 'width'; rules: embed, mlp"):
        spec((8, 8), ("embed", "width"), mesh_of(fsdp=8))


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(data=2, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "context": 1,
        "tensor": 2,
    }


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(fsdp=4),
        MeshConfig(data=16),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=0),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config):
    asked = f"data={config.data}, fsdp={config.fsdp}, context=1, tensor=1"
    with pytest.raises(ValueError, match=f"A mesh of {asked} does not fit 8 devices"):
        make_mesh(config)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3, 4))
    assert sharding.constrain(x, "batch seq act_embed") is x


def test_constrain_splits_activations():
    with jax.set_mesh(mesh_of(data=2, fsdp=2, context=2)):
        x = jax.jit(lambda x: sharding.constrain(x, "batch seq act_embed"))(jnp.ones((8, 6, 4)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 4)


def test_every_parameter_moment_and_average_is_split(recipe):
    state = init_state(recipe.objective, OPTIMIZERS, mesh_of(fsdp=8), seed=0)
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 0:
            assert leaf.sharding.is_fully_replicated, name
        else:
            assert 8 * leaf.addressable_shards[0].data.size == leaf.size, name
    assert sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state)) == 3 + 2  # and Adam's counts


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_factored_moments_are_split_before_and_after_a_step(recipe, monkeypatch, moments_dtype):
    """By the axes that they have left; a single number stands for a moment that there is not."""
    monkeypatch.setattr(optim, "MIN_FACTORED", 8)
    config = OptimConfig(optimizer="adafactor", moments_dtype=moments_dtype)
    optimizers = {"model": make_optimizer(config, num_steps=10)}
    mesh = mesh_of(fsdp=8)
    state = init_state(recipe.objective, optimizers, mesh, seed=0)
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        parts = 1 if leaf.size == 1 else 8
        size = parts * leaf.addressable_shards[0].data.size
        assert size == leaf.size, jax.tree_util.keystr(path)
    second = [optax.tree.get(state.opt_state, name) for name in ("v_row", "v_col", "v")]
    assert sum(x.size for x in jax.tree.leaves(second)) * 5 < sum(
        x.size for x in jax.tree.leaves(state.params)
    )
    step = make_train_step(recipe.objective, optimizers, config, seed=0)
    after, _ = jax.eval_shape(step, state, recipe.frozen, recipe.rows([1] * 8))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def one_step(recipe, mesh):
    """State and metrics after a step from the same parameters on the same eight rows."""
    _, shardings = abstract_state(recipe.objective, OPTIMIZERS, mesh)
    zero = jnp.zeros((), jnp.int32)
    moments = {"model": OPTIMIZERS["model"].init(recipe.params["model"])}
    state = TrainState(zero, zero, zero, recipe.params, moments, recipe.params)
    train_step = jax.jit(
        make_train_step(recipe.objective, OPTIMIZERS, OPTIM, seed=0),
        out_shardings=(shardings, None),
    )
    with jax.set_mesh(mesh):
        frozen = jax.device_put(recipe.frozen, sharding.shardings_of(recipe.frozen, mesh))
        batch = jax.device_put(recipe.rows([3, 1, 2, 3, 2, 1, 0, 3]), sharding.batch_sharding(mesh))
        return train_step(jax.device_put(state, shardings), frozen, batch)


@pytest.fixture(scope="module")
def on_one_device(recipe):
    return one_step(recipe, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 4},
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_is_the_same_on_one_device_and_on_eight(recipe, on_one_device, sizes):
    state, metrics = on_one_device
    other_state, other_metrics = one_step(recipe, mesh_of(**sizes))
    assert metrics.keys() == other_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
    for (path, leaf), other, old in zip(
        jax.tree.leaves_with_path(state.params),
        jax.tree.leaves(other_state.params),
        jax.tree.leaves(recipe.params),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert np.abs(leaf - old).max() > 1e-3, name
        np.testing.assert_allclose(other, leaf, atol=1e-4, err_msg=name)
    for leaf, other in zip(
        jax.tree.leaves((state.opt_state, state.ema)),
        jax.tree.leaves((other_state.opt_state, other_state.ema)),
        strict=True,
    ):
        np.testing.assert_allclose(other, leaf, atol=1e-4)
