"""Meshes and sharding rules, and that sharding does not change the result of a step."""

import dataclasses
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kontext_jax import optim, sharding
from kontext_jax.models import flux
from kontext_jax.optim import OptimConfig, make_optimizer
from kontext_jax.sharding import MeshConfig, batch_part, check_batch, make_mesh, spec
from kontext_jax.training.train_state import TrainState, abstract_state, init_state, make_train_step

# With a small eps, Adam would turn the rounding error of a gradient near zero into a full step.
OPTIM = OptimConfig(learning_rate=0.1, warmup_steps=0, eps=1e-3, ema_decay=0.5)
OPTIMIZERS = {"model": make_optimizer(OPTIM, num_steps=10)}


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))


def fake_gpus(num_slices: int, per_slice: int, per_process: int = 1) -> list[jax.Device]:
    """Returns fake GPUs of several slices and processes, in random order."""
    return [
        Mock(
            jax.Device,
            id=i,
            slice_index=i // per_slice,
            process_index=i // per_process,
            platform="gpu",
            device_kind="fake",
        )
        for i in np.random.default_rng(0).permutation(num_slices * per_slice).tolist()
    ]


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((32, 64), ("embed", "mlp"), P(("fsdp",), ("tensor",))),
        ((64, 32), ("mlp", "embed"), P(("tensor",), ("fsdp",))),
        ((64,), ("mlp",), P(("tensor", "fsdp"))),  # a bias is split over both
        ((3, 32, 64), ("embed", "mlp"), P(None, ("fsdp",), ("tensor",))),  # stacked blocks
        ((6, 64), ("embed", "mlp"), P(None, ("tensor", "fsdp"))),  # 4 does not divide 6
        ((32, 6), (None, "heads"), P(None, ("tensor",))),
        ((7, 5), ("embed", "mlp"), P(None, None)),
        ((), (), P()),
        ((8, 16, 32), ("batch", "seq", "act_embed"), P(("fsdp",), ("context",), None)),
    ],
)
def test_arrays_are_split_by_the_names_of_their_axes(shape, names, expected):
    mesh = mesh_of(fsdp=4, tensor=2)

    def splits(partition):  # without mesh axes of size 1
        as_tuples = [(axes,) if isinstance(axes, str) else axes or () for axes in partition]
        return [[axis for axis in axes if mesh.shape[axis] > 1] for axes in as_tuples]

    assert splits(spec(shape, names, mesh)) == splits(expected)


def test_rows_are_split_over_data_and_fsdp():
    mesh = mesh_of(data=2, fsdp=4)
    assert spec((8, 16, 32), ("batch", "seq", "act_embed"), mesh)[0] == ("data", "fsdp")
    assert sharding.batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)
    assert sharding.num_batch_shards(mesh) == 8
    assert sharding.num_batch_shards(mesh_of(data=2, fsdp=2, context=2)) == 4


def test_an_axis_name_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="No sharding rule for axis 'width'; rules: embed, mlp"):
        spec((8, 8), ("embed", "width"), mesh_of(fsdp=8))


@pytest.mark.parametrize(
    ("sizes", "num_slices", "per_slice", "expected"),
    [
        ({}, 1, 1, (1, 1, 1, 1)),
        ({}, 1, 8, (1, 8, 1, 1)),
        ({}, 1, 256, (1, 256, 1, 1)),
        ({}, 2, 256, (2, 256, 1, 1)),
        ({"tensor": 2}, 2, 8, (2, 4, 1, 2)),
        ({"fsdp": 4}, 2, 8, (4, 4, 1, 1)),
        ({"data": 1}, 2, 8, (1, 16, 1, 1)),
        ({"data": 2, "tensor": 2}, 1, 8, (2, 2, 1, 2)),
        ({"fsdp": 2, "context": -1}, 2, 8, (2, 2, 4, 1)),
    ],
)
def test_minus_one_takes_the_remaining_devices(sizes, num_slices, per_slice, expected):
    mesh = make_mesh(MeshConfig(**sizes), fake_gpus(num_slices, per_slice))
    assert mesh.devices.shape == expected


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=1, fsdp=4),
        MeshConfig(data=16),
        MeshConfig(data=2, fsdp=-1, context=-1),
        MeshConfig(context=-1),
        MeshConfig(data=0),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config):
    sizes = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config).items())
    with pytest.raises(ValueError, match=f"A mesh of {sizes} does not fit 8 devices"):
        make_mesh(config)


@pytest.mark.parametrize(
    ("sizes", "across"),
    [
        ({}, (4, 1)),
        ({"data": 8}, (4, 1)),
        ({"data": 2}, (2, 2)),
        ({"data": 6, "fsdp": 2, "tensor": 2}, (2, 2)),
        ({"data": 1}, (1, 4)),
        ({"data": 1, "context": 2, "tensor": 3}, (1, 4)),
    ],
)
def test_data_and_then_fsdp_cross_slices(sizes, across):
    """Each of four slices of six devices is a block of the mesh."""
    grid = make_mesh(MeshConfig(**sizes), fake_gpus(4, 6)).devices
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    data, fsdp = (size // parts for size, parts in zip(grid.shape, across, strict=False))
    order = np.arange(4).reshape(*across, 1, 1)
    blocks = np.kron(order, np.ones((data, fsdp, *grid.shape[2:]), int))
    np.testing.assert_array_equal(slices, blocks)


def test_a_mesh_axis_may_be_a_part_of_a_torus_dimension():
    """`jax.make_mesh` refuses this on most TPUs."""
    tpus = [
        Mock(
            jax.Device, coords=[x, y, 0], core_on_chip=0, platform="tpu", device_kind="TPU v6 lite"
        )
        for x in range(4)
        for y in range(4)
    ]
    pairs = make_mesh(MeshConfig(tensor=2), tpus).devices.reshape(8, 2)
    for a, b in pairs:
        assert np.abs(np.subtract(a.coords, b.coords)).sum() == 1  # neighbours


def test_context_and_tensor_stay_within_a_slice():
    with pytest.raises(ValueError, match="mesh.data times mesh.fsdp a multiple of 4"):
        make_mesh(MeshConfig(data=2, tensor=12), fake_gpus(4, 6))


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"tensor": 2}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"context": 2, "tensor": 2}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"tensor": 8}, [(0, 1)] * 4),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_part(sizes, parts):
    mesh = make_mesh(MeshConfig(**sizes), fake_gpus(1, 8, per_process=2))
    assert [batch_part(mesh, process) for process in range(4)] == parts


def test_processes_that_share_only_some_rows_are_refused():
    mesh = make_mesh(MeshConfig(tensor=3), fake_gpus(1, 6, per_process=2))
    with pytest.raises(ValueError, match="3 processes cannot share 2 parts of a batch evenly"):
        batch_part(mesh, 0)


@pytest.mark.parametrize(("batch_size", "steps"), [(12, 1), (8, 2), (0, 1), (8, 0)])
def test_a_batch_that_does_not_divide_is_refused(batch_size, steps):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    check_batch(8, 2, mesh)
    with pytest.raises(ValueError, match=f"batch_size {batch_size} must be a multiple of"):
        check_batch(batch_size, steps, mesh_of(data=2, fsdp=4))


def test_without_a_mesh_constrain_returns_its_argument():
    x = jnp.ones((2, 3, 4))
    assert sharding.constrain(x, "batch seq act_embed") is x


def test_constrain_splits_activations():
    with jax.set_mesh(mesh_of(data=2, fsdp=2, context=2)):
        x = jax.jit(lambda x: sharding.constrain(x, "batch seq act_embed"))(jnp.ones((8, 6, 4)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 4)


def test_every_parameter_moment_and_average_is_sharded(recipe):
    state = init_state(recipe.objective, OPTIMIZERS, mesh_of(fsdp=8), seed=0)
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 0:
            assert leaf.sharding.is_fully_replicated, name
        else:
            assert 8 * leaf.addressable_shards[0].data.size == leaf.size, name
    assert sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state)) == 3 + 2  # and Adam's counts


@pytest.mark.parametrize(
    ("sizes", "accumulate_steps", "max_unrolled"),
    [
        ({"fsdp": 8}, 1, 0),
        pytest.param({"fsdp": 8}, 1, flux.MAX_UNROLLED, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, 2, 0, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "context": 2}, 1, 0, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 2, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_sharded_like_their_parameters(
    recipe, monkeypatch, sizes, accumulate_steps, max_unrolled
):
    """Inspects the shardings that the compiler chooses for the optimizer's input."""
    monkeypatch.setattr(flux, "MAX_UNROLLED", max_unrolled)
    inspected = {}

    def update(grads, *args, **kwargs):
        for path, leaf in jax.tree.leaves_with_path(grads):
            jax.debug.inspect_array_sharding(
                leaf, callback=lambda sharding, path=path: inspected.update({path: sharding})
            )
        return OPTIMIZERS["model"].update(grads, *args, **kwargs)

    adam = OPTIMIZERS["model"]
    optimizers = {"model": optax.GradientTransformationExtraArgs(adam.init, update)}
    config = dataclasses.replace(OPTIM, accumulate_steps=accumulate_steps)
    mesh = mesh_of(**sizes)
    state, shardings = abstract_state(recipe.objective, optimizers, mesh)
    step = jax.jit(
        make_train_step(recipe.objective, optimizers, config, seed=0),
        in_shardings=(
            shardings,
            sharding.shardings_of(recipe.frozen, mesh),
            sharding.batch_sharding(mesh),
        ),
        out_shardings=(shardings, None),
    )
    with jax.set_mesh(mesh):
        step.lower(state, recipe.frozen, recipe.rows([1] * 16)).compile()
    leaves = jax.tree.leaves_with_path(state.params["model"])
    assert inspected.keys() == {path for path, _ in leaves}
    for (path, leaf), expected in zip(
        leaves, jax.tree.leaves(shardings.params["model"]), strict=True
    ):
        assert inspected[path].is_equivalent_to(expected, leaf.ndim), jax.tree_util.keystr(path)


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_factored_moments_are_sharded_before_and_after_a_step(recipe, monkeypatch, moments_dtype):
    """They are split by their remaining axes; a placeholder of a single number is not split."""
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
    """Returns state and metrics after a step from fixed parameters on fixed rows."""
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
    ("sizes", "max_unrolled"),
    [
        ({"data": 2, "fsdp": 4}, 0),
        pytest.param({"data": 8}, 0, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, 0, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, 0, marks=pytest.mark.slow),
        pytest.param({"data": 2, "context": 4}, 0, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 0, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, 0, marks=pytest.mark.slow),
        pytest.param(
            {"fsdp": 2, "context": 2, "tensor": 2}, flux.MAX_UNROLLED, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_step_on_eight_devices_agrees_with_one_device(
    recipe, on_one_device, monkeypatch, sizes, max_unrolled
):
    """On eight devices, the blocks are looped over, as on accelerators, or unrolled."""
    state, metrics = on_one_device
    monkeypatch.setattr(flux, "MAX_UNROLLED", max_unrolled)
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


@pytest.mark.parametrize("num_devices", [1, 8])
def test_over_batches_returns_the_result_of_each_array_in_order(num_devices):
    """One key has several batches, one has less than a batch, and one has scalars."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    numbers = np.arange(30)
    keys = ["a" if i % 3 else "b" for i in numbers[:-1]] + ["number"]
    shapes = {"a": (2, 3), "b": (4,), "number": ()}
    arrays = [np.full(shapes[key], i, np.float32) for i, key in zip(numbers, keys, strict=True)]
    sizes = {"a": 6, "b": 99, "number": 1}
    calls = []

    def function(key, batch):
        assert jax.sharding.get_abstract_mesh().shape == mesh.shape
        assert batch.sharding.is_equivalent_to(sharding.batch_sharding(mesh), batch.ndim)
        calls.append((key, np.asarray(batch)))
        return 10 * batch + {"a": 1, "b": 2, "number": 3}[key]

    results = sharding.over_batches(function, arrays, keys, sizes, mesh)
    assert len(results) == 30
    for array, key, result in zip(arrays, keys, results, strict=True):
        assert isinstance(result, np.ndarray) and result.shape == array.shape
        np.testing.assert_array_equal(result, 10 * array + {"a": 1, "b": 2, "number": 3}[key])
    called_sizes = {key: {len(batch) for name, batch in calls if name == key} for key in shapes}
    rounded = {"a": 8, "b": 104, "number": 8} if num_devices == 8 else sizes
    assert called_sizes == {key: {size} for key, size in rounded.items()}  # each key compiles once
    assert sum(key == "a" for key, _ in calls) == -(-19 // rounded["a"])
    for key, batch in calls:  # padding is copied from arrays of the same key
        assert {int(x.flat[0]) for x in batch} <= {i for i in numbers if keys[i] == key}


def test_over_batches_accepts_other_output_shapes_and_no_arrays():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    arrays = [np.full((2, 2), i, np.int32) for i in range(3)]
    sums = sharding.over_batches(lambda _, x: x.sum((1, 2)), arrays, "kkk", {"k": 2}, mesh)
    assert [int(x) for x in sums] == [0, 4, 8]
    assert sharding.over_batches(lambda _, x: x, [], [], {}, mesh) == []
