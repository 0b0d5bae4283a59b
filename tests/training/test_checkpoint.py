import dataclasses
import json
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx

from kontext_jax.loading.locations import is_run, load_meta, split_step, step_at, steps_at
from kontext_jax.objectives.flow_matching import FlowMatching
from kontext_jax.optim import OptimConfig, make_optimizer
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.training import checkpoint
from kontext_jax.training.checkpoint import CheckpointConfig, Checkpointer
from kontext_jax.training.train_state import TrainState, abstract_state
from kontext_jax.tree_paths import by_name, named_leaves
from kontext_jax.weights.networks import ALL_NETWORKS
from tests.weights.small import CONFIGS

OPTIMIZERS = {"model": make_optimizer(OptimConfig(), num_steps=10)}


def mesh_of(num_devices=8, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])


@pytest.fixture(scope="module")
def state(recipe) -> TrainState:
    """A train state whose arrays all differ."""
    rng = np.random.default_rng(0)

    def noise(tree):
        return jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)).astype(x.dtype), tree
        )

    step, skipped, skipped_in_a_row = (jnp.asarray(n, jnp.int32) for n in (7, 2, 1))
    moments = jax.eval_shape(lambda: {"model": OPTIMIZERS["model"].init(recipe.params["model"])})
    params, ema = recipe.params, noise(recipe.params)
    return TrainState(step, skipped, skipped_in_a_row, params, noise(moments), ema)


def save(workdir, state, **config) -> None:
    checkpointer = Checkpointer(workdir, CheckpointConfig(**config))
    checkpointer.save(state, {"position": 3}, {"config": {"seed": 5}, "metrics": {"loss": 0.5}})
    checkpointer.close()


def small_state(step: int, params) -> TrainState:
    """A state with these parameters, and one scalar in place of each other tree."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        jnp.asarray(step), zero, zero, {"model": params}, {"model": zero}, {"model": zero}
    )


def stored_chunks(item: Path) -> dict[str, tuple[int, ...]]:
    """The chunk shape of each array in a checkpoint's tree, by name."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"{item.as_uri()}/"}).result()
    arrays = [key.decode() for key in store.list().result() if key.endswith(b"/.zarray")]
    return {
        name.removesuffix("/.zarray").replace(".", "/"): tuple(
            json.loads(store.read(name).result().value)["chunks"]
        )
        for name in arrays
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_restored_state_is_bitwise_equal_on_any_mesh(recipe, state, tmp_path):
    """It moves from eight devices to two groups of four, and then to one device."""
    _, shardings = abstract_state(recipe.objective, OPTIMIZERS, mesh_of(fsdp=8))
    current = jax.device_put(state, shardings)
    for name, mesh in (("two groups", mesh_of(data=2, fsdp=4)), ("one", mesh_of(1))):
        save(tmp_path / name, current)
        abstract, shardings = abstract_state(recipe.objective, OPTIMIZERS, mesh)
        current, data = Checkpointer(tmp_path / name).restore(abstract, shardings)
        assert data == {"position": 3}
        assert_same(current, state)
        for x, sharding in zip(jax.tree.leaves(current), jax.tree.leaves(shardings), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize("kind", ["params", "ema"])
def test_one_network_is_restored_without_the_others(recipe, state, tmp_path, kind):
    save(tmp_path, state)
    abstract = jax.eval_shape(lambda: recipe.objective.init(jax.random.key(0)))["model"]
    network = Checkpointer(tmp_path).restore_network(
        "model", abstract, shardings_of(abstract, mesh_of(1)), kind
    )
    assert_same(network, getattr(state, kind)["model"])


def test_array_names_are_readable(state):
    transformer = by_name(state.params)["model"]["transformer"]
    assert "kernel" in transformer["double_blocks"]["img_attn"]["qkv"]
    moments = by_name(state.opt_state)["model"]
    assert "double_blocks" in str(moments)
    assert len(jax.tree.leaves(by_name(state.ema))) == len(jax.tree.leaves(state.ema))


def test_meta_and_the_latest_checkpoints_are_kept(state, tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    assert checkpointer.latest_step() is None
    for step in (1, 2, 3):
        meta = {"config": {"sizes": [[1, 2]]}, "metrics": {"loss": step / 2}}
        checkpointer.save(state.replace(step=jnp.asarray(step)), {}, meta)
    checkpointer.close()
    reader = Checkpointer(tmp_path)
    assert reader.latest_step() == 3
    assert reader.meta() == {"config": {"sizes": [[1, 2]]}, "metrics": {"loss": 1.5}}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["2", "3"]


def test_milestones_are_kept_forever(tmp_path):
    """Also by a process that resumes the run."""
    config = CheckpointConfig(every=1, keep=2, keep_every=3)
    for steps, kept in ((range(1, 6), [3, 4, 5]), (range(6, 9), [3, 6, 7, 8])):
        with closing(Checkpointer(tmp_path, config)) as checkpointer:
            for step in steps:
                checkpointer.save(small_state(step, {"kernel": jnp.ones(2)}), {}, {})
        assert steps_at(tmp_path) == kept


def test_invalid_settings_are_refused():
    for keep_every in (0, 1000, 3000):
        assert CheckpointConfig(every=1000, keep_every=keep_every).keep_every == keep_every
    for keep_every in (-1000, 500, 1500):
        with pytest.raises(ValueError, match=f"keep_every {keep_every} must be 0 or a multiple of"):
            CheckpointConfig(every=1000, keep_every=keep_every)
    with pytest.raises(ValueError, match="checkpoint.keep 0 must be 1 or more"):
        CheckpointConfig(keep=0)
    with pytest.raises(ValueError, match="every 0 must be 1 or more"):
        CheckpointConfig(every=0)


@pytest.mark.parametrize(("fsdp", "optimizer"), [(1, "muon"), (8, "adamw")])
def test_chunks_are_single_layers_or_complete_arrays(tmp_path, fsdp, optimizer):
    """Of parameters and optimizer moments, within each device's shard."""

    def ones(abstract):
        shardings = shardings_of(abstract, mesh_of(fsdp, fsdp=fsdp))

        def make(x, sharding):
            return jax.device_put(np.ones(x.shape, x.dtype), sharding)

        return jax.tree.map(make, abstract, shardings)

    networks = [ALL_NETWORKS[name] for name in ("transformer", "dino")]
    params = ones({network.name: network.abstract(CONFIGS[network.name]) for network in networks})
    expected = {}
    for network in networks:
        layers = dict(network.layer_keys(CONFIGS[network.name]))  # from the name tables
        for name, array in named_leaves(params[network.name]).items():
            shard = array.sharding.shard_shape(array.shape)
            stacked = layers[name] is not None
            expected[f"{network.name}/{name}"] = (1, *shard[1:]) if stacked else shard
    for name, shape in {
        "transformer/single_blocks/linear2/kernel": (1, 80, 16 // fsdp),
        "transformer/single_blocks/linear2/bias": (1, 16 // fsdp),
        "transformer/img_in/bias": (16 // fsdp,),
        "dino/patch_embedding/kernel": (14, 14, 3, 16 // fsdp),
        "dino/patch_embedding/bias": (16 // fsdp,),
    }.items():
        assert expected[name] == shape

    optimizer = make_optimizer(OptimConfig(optimizer=optimizer), num_steps=10)
    moments = ones(jax.eval_shape(optimizer.init, params))
    save(tmp_path, small_state(1, params).replace(opt_state={"model": moments}))
    folder = tmp_path / "checkpoints" / "1"
    assert stored_chunks(folder / "params") == {f"model/{k}": v for k, v in expected.items()}
    assert stored_chunks(folder / "opt_state") == {
        f"model/{name}": next(
            (shape for param, shape in expected.items() if name.endswith(f"/{param}")), array.shape
        )
        for name, array in named_leaves(moments).items()
    }


def test_chunks_are_no_larger_than_chunk_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1024)
    kernels = {
        "small": nnx.Param(jnp.ones((16, 16)), axes=("embed", "mlp")),
        "large": nnx.Param(jnp.ones((64, 8)), axes=("embed", "mlp")),
        "layers": nnx.Param(jnp.ones((2, 4, 4)), axes=("embed", "mlp")),
        "large_layers": nnx.Param(jnp.ones((2, 8, 64)), axes=("embed", "mlp")),
    }
    save(tmp_path, small_state(1, kernels))
    assert stored_chunks(tmp_path / "checkpoints" / "1" / "params") == {
        "model/small": (16, 16),
        "model/large": (32, 8),
        "model/layers": (1, 4, 4),
        "model/large_layers": (1, 8, 32),
    }


def other_objective(recipe, **sizes):
    config = recipe.objective.config
    transformer = dataclasses.replace(config.transformer, **sizes)
    return FlowMatching(dataclasses.replace(config, transformer=transformer))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"mlp_ratio": 4.0}, r"img_mlp/in_layer/kernel is \(1, 32, 64\), not \(1, 32, 128\)"),
        ({"guidance_embed": True}, r"guidance_in/in_layer/kernel is missing"),
        ({"depth": 2}, r"double_blocks/.* is \(1, .*not \(2, "),
    ],
)
def test_mismatched_arrays_are_named(recipe, state, tmp_path, sizes, message):
    save(tmp_path, state)
    objective = other_objective(recipe, **sizes)
    with pytest.raises(ValueError, match=f"does not match the configured networks.*{message}"):
        Checkpointer(tmp_path).restore(*abstract_state(objective, OPTIMIZERS, mesh_of(1)))


def test_unexpected_array_is_refused(recipe, state, tmp_path):
    params = {"model": state.params["model"] | {"extra": {"kernel": jnp.ones(2)}}}
    save(tmp_path, state.replace(params=params))
    with pytest.raises(ValueError, match="model/extra/kernel is unexpected"):
        Checkpointer(tmp_path).restore(*abstract_state(recipe.objective, OPTIMIZERS, mesh_of(1)))


def test_missing_checkpoint_is_named(recipe, tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*checkpoints"):
        checkpointer.meta()


def test_earlier_step_has_its_own_arrays_and_meta(tmp_path):
    zero = jnp.zeros((), jnp.int32)
    abstract = {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with closing(Checkpointer(tmp_path, CheckpointConfig(keep=3))) as checkpointer:
        for step in (3, 12, 100):
            params, ema = (
                {"model": {"kernel": jnp.full(2, value, jnp.float32)}} for value in (step, -step)
            )
            state = TrainState(jnp.asarray(step), zero, zero, params, {"model": zero}, ema)
            checkpointer.save(state, {"position": step}, {"config": {}, "metrics": {"at": step}})
    assert steps_at(tmp_path) == [3, 12, 100]
    one = shardings_of(abstract, mesh_of(1))
    for selected, step in ((None, 100), (3, 3), (12, 12), (100, 100)):
        location = tmp_path if selected is None else f"{tmp_path}@{selected}"
        assert step_at(location) == step and is_run(location)
        assert load_meta(location)["metrics"] == {"at": step}
        with closing(Checkpointer(tmp_path, step=selected)) as reader:
            assert (reader.step(), reader.latest_step()) == (step, 100)
            for kind, sign in (("params", 1), ("ema", -1)):
                kernel = reader.restore_network("model", abstract, one, kind)["kernel"]
                np.testing.assert_array_equal(kernel, np.full(2, sign * step))
    template = TrainState(
        *3 * [jax.ShapeDtypeStruct((), jnp.int32)], {"model": abstract},
        {"model": jax.ShapeDtypeStruct((), jnp.int32)}, {"model": abstract},
    )  # fmt: skip
    with closing(Checkpointer(tmp_path, step=12)) as reader:
        restored, data = reader.restore(template, shardings_of(template, mesh_of(1)))
    assert (int(restored.step), data) == (12, {"position": 12})
    for read in (step_at, load_meta):
        with pytest.raises(FileNotFoundError, match="has steps 3, 12, 100, but not 4"):
            read(f"{tmp_path}@4")


def test_location_may_end_with_a_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_step("runs/x@5") == (Path("runs/x"), 5)
    assert split_step(Path("runs/x@5")) == (Path("runs/x"), 5)
    assert split_step("runs/x") == (Path("runs/x"), None)
    for location in ("x@y", "x@", "x@-1", "a@b/c", "x@1.5"):
        assert split_step(location) == (Path(location), None)
    Path("a@5").mkdir()
    assert split_step("a@5") == (Path("a@5"), None)
    assert split_step("a@5@6") == (Path("a@5"), 6)


def test_folder_without_checkpoints_is_not_a_run(tmp_path):
    assert not is_run(tmp_path)
    for read in (steps_at, step_at, load_meta):
        with pytest.raises(FileNotFoundError, match="There is no run with checkpoints in"):
            read(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert steps_at(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*checkpoints"):
        step_at(tmp_path)
