"""Low-rank adapters against merged kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax import sharding
from kontext_jax.models import lora
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.t5 import T5Config, T5Encoder

SIZES = dict(
    in_channels=8, hidden_size=32, num_heads=2, depth=2, depth_single=2, vec_in_dim=8,
    context_in_dim=16, axes_dim=(4, 6, 6), mlp_ratio=2.0,
)  # fmt: skip
CONFIG = LoraConfig(rank=3, alpha=1.5)
QKV = "double_blocks/img_attn/qkv"


@pytest.fixture(scope="module")
def make(random_network):
    return lambda **sizes: random_network(
        lambda: Flux(FluxConfig.tiny(**(SIZES | sizes)), rngs=nnx.Rngs(0))
    )


@pytest.fixture(scope="module")
def network(make):
    return make()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "latents": normal(2, 6, 8),
        "text": normal(2, 4, 16),
        "pooled": normal(2, 1, 8),
        "t": jnp.array([[0.3], [0.9]]),
        "positions": jnp.asarray(rng.integers(0, 9, (2, 6, 3)), jnp.int32),
        "segments": jnp.ones((2, 6), jnp.int32),
        "text_segments": jnp.ones((2, 4), jnp.int32),
    }


@jax.jit
def forward(network, inputs):
    return network(**inputs)


def random_adapters(network, config=CONFIG, seed=0):
    """Random adapters whose ``b`` is not zero, as after training."""
    rng = np.random.default_rng(seed)
    adapters = jax.eval_shape(lambda: lora.init(network, config, jax.random.key(0)))
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), adapters
    )


def shapes_of(tree):
    return {jax.tree_util.keystr(k): x.shape for k, x in jax.tree.leaves_with_path(tree)}


def test_the_default_targets_are_those_of_diffusers(network):
    adapters = lora.init(network, LoraConfig(rank=2), jax.random.key(0))
    streams = [f"double_blocks/{stream}_" for stream in ("img", "txt")]
    parts = ["attn/proj", "attn/qkv", "mlp/in_layer", "mlp/out_layer"]
    doubles = [stream + part for stream in streams for part in parts]
    assert list(adapters) == [*doubles, "single_blocks/linear1"]
    assert adapters[QKV].a.shape == (2, 32, 2) and adapters[QKV].b.shape == (2, 2, 96)
    assert all(adapter.scale == 1.0 for adapter in adapters.values())


def test_new_adapters_differ_in_all_layers_and_add_nothing(network):
    config = LoraConfig(rank=4, alpha=8.0, targets=("single_blocks/*", "img_in"))
    adapters = lora.init(network, config, jax.random.key(0))
    single = "single_blocks/"
    assert list(adapters) == ["img_in"] + [
        single + name for name in ("linear1", "linear2", "modulation/lin")
    ]
    assert adapters["img_in"].a.shape == (8, 4)
    drawn = np.concatenate([np.ravel(adapter.a[...]) for adapter in adapters.values()])
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    np.testing.assert_allclose(np.std(drawn), 1 / 4, rtol=0.05)
    assert not any(np.any(adapter.b[...]) for adapter in adapters.values())
    assert {adapter.scale for adapter in adapters.values()} == {2.0}
    assert adapters[single + "linear2"].a.get_metadata()["axes"] == ("mlp", None)
    assert adapters[single + "linear2"].b.get_metadata()["axes"] == (None, "embed")


def test_init_and_merge_accept_abstract_arrays(network):
    """Includes FLUX.1 [dev] with the default targets at rank 16."""
    abstract = jax.eval_shape(lambda: network)
    jax.tree.map(
        np.testing.assert_array_equal,
        lora.init(abstract, CONFIG, jax.random.key(0)),
        lora.init(network, CONFIG, jax.random.key(0)),
    )
    dev = jax.eval_shape(lambda: Flux(FluxConfig.dev(), rngs=nnx.Rngs(0)))
    adapters = jax.eval_shape(lambda: lora.init(dev, LoraConfig(rank=16), jax.random.key(0)))
    d = 3072
    double, single = 2 * (4 * d + 2 * d + 5 * d + 5 * d), 8 * d
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 16 * (19 * double + 38 * single)
    merged = jax.eval_shape(lora.merge, dev, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(dev)
    assert shapes_of(merged) == shapes_of(dev)


def test_rank_0_has_no_adapters(network):
    adapters = lora.init(network, LoraConfig(), jax.random.key(0))
    assert adapters == {}
    for same in (lora.attach(network, adapters), lora.merge(network, adapters)):
        assert jax.tree.structure(same) == jax.tree.structure(network)
        jax.tree.map(np.testing.assert_array_equal, same, network)


def test_networks_may_be_in_a_dict():
    networks = jax.eval_shape(
        lambda: {
            "autoencoder": Autoencoder(AutoencoderConfig.tiny(channels=8), rngs=nnx.Rngs(0)),
            "text_encoder": T5Encoder(T5Config.tiny_bytes(), rngs=nnx.Rngs(0)),
        }
    )
    config = LoraConfig(rank=2, targets=("text_encoder/blocks/attention/[qv]", "*/mid/*/q"))
    adapters = jax.eval_shape(lambda: lora.init(networks, config, jax.random.key(0)))
    assert list(adapters) == [
        "autoencoder/decoder/mid/attn_1/q",
        "autoencoder/encoder/mid/attn_1/q",
        "text_encoder/blocks/attention/q",
        "text_encoder/blocks/attention/v",
    ]
    attached = jax.eval_shape(lora.attach, networks, adapters)
    assert len(jax.tree.leaves(attached)) == len(jax.tree.leaves((networks, adapters)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_leave_outputs_bitwise_unchanged(make, inputs, dtype):
    network = make(dtype=dtype)
    adapters = lora.init(network, LoraConfig(rank=3, targets=("*",)), jax.random.key(0))
    attached = lora.attach(network, adapters)
    np.testing.assert_array_equal(forward(attached, inputs), forward(network, inputs))


@pytest.mark.parametrize(
    "targets",
    [
        LoraConfig().targets,
        ("double_blocks/*",),
        ("single_blocks/*",),
        ("img_in", "final_layer/*", "time_in/out_layer"),
    ],
    ids=["default", "double", "single", "unstacked"],
)
def test_attached_and_merged_adapters_agree(network, inputs, targets):
    config = LoraConfig(rank=3, alpha=1.5, targets=targets)
    adapters = random_adapters(network, config)
    attached = forward(lora.attach(network, adapters), inputs)
    merged = forward(lora.merge(network, adapters), inputs)
    np.testing.assert_allclose(attached, merged, atol=2e-4)
    assert np.abs(attached - forward(network, inputs)).max() > 0.1


def test_attached_and_merged_adapters_agree_in_bfloat16(make, inputs):
    network = make(dtype="bfloat16")
    adapters = random_adapters(network)
    attached = forward(lora.attach(network, adapters), inputs)
    merged = forward(lora.merge(network, adapters), inputs)
    difference = np.sqrt(np.mean(np.square(attached - merged)) / np.mean(np.square(merged)))
    assert 0 < difference < 0.03
    assert lora.merge(network, adapters).double_blocks.img_attn.qkv.kernel.dtype == jnp.float32


def test_adapters_of_a_text_encoder(random_network):
    config = T5Config.tiny_bytes(d_model=16, d_kv=4, d_ff=16)
    network = random_network(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))
    adapters = random_adapters(network, LoraConfig(rank=2, targets=("blocks/attention/[qv]",)))
    assert list(adapters) == ["blocks/attention/q", "blocks/attention/v"]
    inputs = {"text_ids": jnp.arange(12).reshape(2, 6), "segments": jnp.ones((2, 6), jnp.int32)}
    attached = forward(lora.attach(network, adapters), inputs)
    np.testing.assert_allclose(attached, forward(lora.merge(network, adapters), inputs), atol=1e-4)
    assert np.abs(attached - forward(network, inputs)).max() > 0.01


def test_merge_changes_only_adapted_kernels(network):
    """An adapted kernel becomes kernel + scale * a @ b."""
    adapters = random_adapters(network)
    before = jax.tree.map(jnp.copy, network)
    merged = lora.merge(network, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(network)
    jax.tree.map(np.testing.assert_array_equal, network, before)
    changed = []
    for (path, new), old in zip(
        jax.tree.leaves_with_path(merged), jax.tree.leaves(network), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        module = name.removesuffix("/kernel/value")
        if module in adapters:
            a, b = (np.asarray(x, np.float64) for x in jax.tree.leaves(adapters[module]))
            np.testing.assert_allclose(new, np.asarray(old) + 0.5 * a @ b, atol=1e-6)
            changed.append(module)
        else:
            np.testing.assert_array_equal(new, old, err_msg=name)
    assert sorted(changed) == list(adapters)


def test_gradients_are_the_chain_rule_on_merged_kernels(network, inputs):
    """With W = kernel + s a b: da = s dW b^T and db = s a^T dW, in each layer."""
    adapters = random_adapters(network)
    target = jnp.asarray(np.random.default_rng(2).standard_normal((2, 6, 8)), jnp.float32)

    def loss(network):
        return jnp.mean(jnp.square(network(**inputs) - target))

    grads = jax.jit(jax.grad(lambda adapters: loss(lora.attach(network, adapters))))(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    by_kernel = jax.jit(jax.grad(loss))(lora.merge(network, adapters))
    for path, adapter in adapters.items():
        module = by_kernel
        for name in path.split("/"):
            module = getattr(module, name)
        kernel = np.asarray(module.kernel[...], np.float64)
        a, b = (np.asarray(x, np.float64) for x in (adapter.a[...], adapter.b[...]))
        for grad, expected in [
            (grads[path].a[...], 0.5 * kernel @ b.swapaxes(1, 2)),
            (grads[path].b[...], 0.5 * a.swapaxes(1, 2) @ kernel),
        ]:
            size = np.abs(expected).max(axis=(1, 2), keepdims=True)
            assert np.all(size > 0), path
            np.testing.assert_allclose(grad / size, expected / size, atol=1e-3, err_msg=path)


def test_the_first_gradient_is_zero_for_a(network, inputs):
    adapters = lora.init(network, LoraConfig(rank=2, targets=(QKV,)), jax.random.key(0))
    grads = jax.jit(jax.grad(lambda x: jnp.sum(lora.attach(network, x)(**inputs))))(adapters)[QKV]
    assert not np.any(grads.a[...])
    assert np.all(np.any(grads.b[...], axis=(1, 2)))


@pytest.mark.parametrize("path", [QKV, "single_blocks/linear1"])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_has_its_own_adapter(network, inputs, path, layer):
    adapters = random_adapters(network, LoraConfig(rank=3, targets=(path,)))
    only = jnp.arange(2)[:, None, None] == layer
    adapters[path].b[...] = jnp.where(only, adapters[path].b[...], 0.0)

    expected = jax.tree.map(lambda x: x, network)
    block, *names = path.split("/")
    linear = getattr(expected, block)
    for name in names:
        linear = getattr(linear, name)
    product = adapters[path].a[layer] @ adapters[path].b[layer]
    linear.kernel[...] = linear.kernel[...].at[layer].add(product)

    attached = forward(lora.attach(network, adapters), inputs)
    np.testing.assert_allclose(attached, forward(expected, inputs), atol=2e-4)
    assert np.abs(attached - forward(network, inputs)).max() > 0.01


def test_attach_does_not_modify_its_arguments(network):
    adapters = random_adapters(network)
    structure = jax.tree.structure((network, adapters))
    attached = lora.attach(network, adapters)
    attached.img_in.kernel[...] = jnp.zeros_like(attached.img_in.kernel[...])
    attached.double_blocks.img_attn.qkv.lora.b[...] = jnp.zeros((2, 3, 96))
    assert network.double_blocks.img_attn.qkv.lora is None
    assert jax.tree.structure((network, adapters)) == structure
    assert np.any(network.img_in.kernel[...]) and np.any(adapters[QKV].b[...])


def test_adapters_with_other_values_are_not_traced_again(network):
    traces = []

    @jax.jit
    def total(network, adapters):
        traces.append(None)
        return sum(jnp.sum(x) for x in jax.tree.leaves(lora.attach(network, adapters)))

    for seed in range(3):
        config = LoraConfig(rank=3, alpha=1.5)
        total(network, lora.init(network, config, jax.random.key(seed)))
    assert len(traces) == 1


def test_adapters_are_sharded_like_their_kernels(network, inputs):
    """Over eight devices: along the axes of the kernel, but not along the rank."""
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    adapters = random_adapters(network)
    shardings = sharding.shardings_of(adapters, mesh)
    for path, adapter in adapters.items():
        layers, in_features, out_features = 2, adapter.a.shape[1], adapter.b.shape[2]
        shards = [
            sharding_of_x.shard_shape(x.shape)
            for sharding_of_x, x in zip(
                jax.tree.leaves(shardings[path]), jax.tree.leaves(adapter), strict=True
            )
        ]
        assert shards == [(layers, in_features // 8, 3), (layers, 3, out_features // 8)], path

    expected = forward(lora.attach(network, adapters), inputs)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(adapters, shardings)
        base = jax.device_put(network, sharding.shardings_of(network, mesh))
        result = jax.jit(lambda n, a: lora.attach(n, a)(**inputs))(base, sharded)
    np.testing.assert_allclose(result, expected, atol=2e-4)


def test_axes_that_do_not_divide_by_the_mesh_are_not_sharded():
    network = jax.eval_shape(
        lambda: Flux(FluxConfig.tiny(**(SIZES | {"in_channels": 12})), rngs=nnx.Rngs(0))
    )
    adapters = lora.init(network, LoraConfig(rank=8, targets=("img_in",)), jax.random.key(0))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    shardings = sharding.shardings_of(adapters, mesh)["img_in"]
    assert shardings.a.get_raw_value().shard_shape((12, 8)) == (12, 8)
    assert shardings.b.get_raw_value().shard_shape((8, 32)) == (8, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, r"rank -1 must be 0 \(no adapters\) or more"),
        ({"rank": 4, "alpha": -2.0}, "alpha -2.0 must be 0"),
        ({"rank": 4, "alpha": float("nan")}, "alpha nan must be 0"),
        ({"rank": 4, "targets": ()}, "targets is empty; adapters of rank 4 need linear maps"),
    ],
)
def test_invalid_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_targets_without_a_match_are_refused(network):
    config = LoraConfig(rank=2, targets=("img_in", "double_blocks/*/to_q"))
    message = (
        r"'double_blocks/\*/to_q' matches no linear map; choose from double_blocks/img_attn/proj"
    )
    with pytest.raises(ValueError, match=message + r".* and \d+ more\."):
        lora.init(network, config, jax.random.key(0))


@pytest.mark.parametrize("join", [lora.attach, lora.merge])
def test_adapters_of_another_network_are_refused(network, join):
    adapters = random_adapters(network, LoraConfig(rank=2, targets=(QKV, "img_in")))
    with pytest.raises(ValueError, match="no linear map 'img_out'; choose from double_"):
        join(network, {"img_out": adapters["img_in"]})
    message = r"'img_in', a \(2, 32, 2\) and b \(2, 2, 96\), does not fit its kernel \(8, 32\)"
    with pytest.raises(ValueError, match=message):
        join(network, {"img_in": adapters[QKV]})
    attached = lora.attach(network, adapters)
    with pytest.raises(ValueError, match=f"already has adapters: {QKV}, img_in"):
        join(attached, adapters)
    with pytest.raises(ValueError, match="already has adapters"):
        lora.init(attached, CONFIG, jax.random.key(0))
