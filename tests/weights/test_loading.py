"""Tests of loading weights onto a mesh: values do not depend on the mesh; dtypes are as set."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.loading import check_architecture, load
from kontext_jax.weights.networks import ALL_NETWORKS
from kontext_jax.weights.reading import ArrayReader, open_folder
from tests.weights.small import CONFIGS, reader_of, save_folder, tensors_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes))


def assert_same(actual, expected):
    """Asserts that two networks agree in every bit, however they are sharded."""
    actual, expected = named_leaves(actual), named_leaves(expected)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert np.asarray(actual[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.fixture(scope="module")
def rounded(networks):
    """The small networks in bfloat16."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(BFLOAT16)), networks)


@pytest.mark.parametrize(
    "make",
    [one_device, lambda: mesh_of(fsdp=8), lambda: mesh_of(fsdp=4, tensor=2)],
    ids=["one", "fsdp", "fsdp-tensor"],
)
@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_a_network_is_equal_on_every_mesh_and_sharded_by_its_axes(networks, name, make):
    mesh = make()
    network = load(reader_of(networks[name]), CONFIGS[name], mesh)
    assert network.config == CONFIGS[name]
    assert_same(network, networks[name])
    shardings = jax.tree.leaves(shardings_of(ALL_NETWORKS[name].abstract(CONFIGS[name]), mesh))
    for leaf, sharding in zip(jax.tree.leaves(network), shardings, strict=True):
        assert leaf.sharding == sharding
    split = [not sharding.is_fully_replicated for sharding in shardings]
    assert any(split) == (mesh.size > 1)


def test_each_device_holds_only_its_shard(networks):
    mesh = mesh_of(fsdp=4, tensor=2)
    network = load(reader_of(networks["transformer"]), CONFIGS["transformer"], mesh)
    kernel = network.double_blocks.img_attn.qkv.kernel[...]
    expected = np.asarray(networks["transformer"].double_blocks.img_attn.qkv.kernel[...])
    assert expected.shape == (2, 16, 48)
    for shard in kernel.addressable_shards:
        assert shard.data.shape == (2, 4, 24)
        np.testing.assert_array_equal(shard.data, expected[shard.index])


def test_dtypes_are_kept_or_cast(networks, tmp_path):
    tensors = tensors_of(networks["clip"], "diffusers")
    stored = {n: t if "norm" in n else t.astype(BFLOAT16) for n, t in tensors.items()}
    reader = open_folder(save_folder(tmp_path, networks["clip"], stored))
    config, mesh = CONFIGS["clip"], one_device()
    kept = named_leaves(load(reader, config, mesh, dtype=None))
    assert {name: np.dtype(x.dtype) for name, x in kept.items()} == reader.dtypes
    assert {str(dtype) for dtype in reader.dtypes.values()} == {"float32", "bfloat16"}
    for dtype in (np.float32, BFLOAT16, np.float16):
        cast = named_leaves(load(reader, config, mesh, dtype=dtype))
        for name, x in cast.items():
            assert x.dtype == dtype, name
            np.testing.assert_array_equal(x, np.asarray(kept[name]).astype(dtype), err_msg=name)


def test_compute_settings_come_from_the_given_config(networks):
    config = dataclasses.replace(CONFIGS["transformer"], dtype="bfloat16", remat="full")
    network = load(reader_of(networks["transformer"]), config, one_device())
    assert network.config == config and network.img_in.dtype == jnp.bfloat16
    assert_same(network, networks["transformer"])


def without(module, *params: str) -> ArrayReader:
    reader = reader_of(module)
    reader.dtypes = {name: d for name, d in reader.dtypes.items() if name not in params}
    return reader


def test_missing_parameters_take_initial_values_or_are_refused(networks):
    config, mesh = CONFIGS["transformer"], mesh_of(fsdp=8)
    reader = without(networks["transformer"], "guidance_in/in_layer/kernel", "img_in/bias")
    initial = {"guidance_in/in_layer/kernel": jnp.full((256, 16), 3.0)}
    with pytest.raises(WeightsError, match="lack guidance_in/in_layer/kernel, and it has no init"):
        load(reader, config, mesh)
    with pytest.raises(WeightsError, match="lack img_in/bias, and it has no initial value"):
        load(reader, config, mesh, initial=initial)
    network = load(reader, config, mesh, initial=initial | {"img_in/bias": jnp.full(16, 4.0)})
    kernel = network.guidance_in.in_layer.kernel[...]
    assert (kernel == 3).all() and kernel.addressable_shards[0].data.size == kernel.size // 8
    assert (network.img_in.bias[...] == 4).all()
    np.testing.assert_array_equal(
        network.img_in.kernel[...], networks["transformer"].img_in.kernel[...]
    )


def test_stored_parameters_ignore_initial_values(networks):
    initial = {"img_in/bias": jnp.full(16, 4.0)}
    reader, config = reader_of(networks["transformer"]), CONFIGS["transformer"]
    assert_same(load(reader, config, one_device(), initial=initial), networks["transformer"])


def test_one_message_names_every_setting_that_differs(networks):
    reader = reader_of(networks["transformer"])
    other = {"depth": 4, "axes_dim": (4, 2, 2), "guidance_embed": False, "theta": 500.0}
    with pytest.raises(WeightsError) as error:
        check_architecture(reader, dataclasses.replace(reader.config, **other), "some/folder")
    assert str(error.value) == (
        "The transformer in some/folder differs from this run's: depth is 2, not 4; axes_dim is "
        "(2, 2, 4), not (4, 2, 2); theta is 10000.0, not 500.0; guidance_embed is True, not False. "
        "Set the run's config to match the weights."
    )


def test_compute_settings_may_differ(networks):
    reader = reader_of(networks["transformer"])
    settings = {"dtype": "bfloat16", "timestep_dtype": "bfloat16", "remat": "full"}
    check_architecture(reader, dataclasses.replace(reader.config, **settings), "")


def forward(network) -> jax.Array:
    """Returns the output of the full network on fixed inputs."""

    def normal(*shape):
        return jnp.asarray(np.random.default_rng(7).standard_normal(shape, np.float32))

    def ids(*shape):
        return jnp.asarray(np.random.default_rng(0).integers(2, 16, shape), jnp.int32)

    calls = {
        "transformer": lambda model: model(
            normal(1, 4, 8),
            normal(1, 3, 8),
            normal(1, 2, 8),
            jnp.float32([[0.3, 0.8]]),
            positions=ids(1, 4, 3),
            segments=jnp.int32([[1, 1, 2, 0]]),
            text_segments=jnp.int32([[1, 2, 2]]),
            guidance=jnp.float32([[2.5, 4.0]]),
        ),
        "autoencoder": lambda model: model.decode(model.encode(normal(1, 4, 4, 3))),
        "text_encoder": lambda model: model(ids(1, 5), jnp.int32([[1, 1, 2, 2, 2]])),
        "clip": lambda model: model(ids(2, 5)),
        "dino": lambda model: model(jnp.tanh(normal(1, 30, 20, 3))).pooled,
    }
    return jax.jit(calls[reader_of(network).network.name])(network)


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_bfloat16_parameters_give_the_outputs_of_equal_float32_parameters(rounded, name):
    reader, config, mesh = reader_of(rounded[name]), CONFIGS[name], one_device()
    assert config.dtype == "float32"
    half, full = (load(reader, config, mesh, dtype) for dtype in (None, np.float32))
    assert {x.dtype for x in jax.tree.leaves(half)} == {BFLOAT16}
    assert {x.dtype for x in jax.tree.leaves(full)} == {np.dtype(np.float32)}
    out = forward(half)
    assert out.dtype == jnp.float32 and jnp.std(out) > 0.1
    np.testing.assert_array_equal(out, forward(full))


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_bfloat16_parameters_compute_in_bfloat16(rounded, name):
    """As for inference with released weights; norms and biases of attention are in float32."""
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    out = forward(load(reader_of(rounded[name]), config, one_device(), dtype=None))
    assert out.dtype == (jnp.float32 if name in ("transformer", "autoencoder") else jnp.bfloat16)
    assert jnp.isfinite(out).all()
