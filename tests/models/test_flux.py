"""FLUX against a reference in NumPy float64, and the shapes of its full-size train step."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from kontext_jax.models import attention, flux, layers, splash
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.clip import ClipConfig, ClipText
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.t5 import T5Config, T5Encoder
from kontext_jax.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from kontext_jax.optim import OptimConfig, make_optimizer
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.training.train_state import abstract_state, make_train_step
from kontext_jax.tree_paths import by_name
from kontext_jax.types import Batch

SIZES = dict(
    in_channels=8, hidden_size=32, num_heads=2, depth=1, depth_single=1, vec_in_dim=12,
    context_in_dim=20, axes_dim=(4, 6, 6), remat="none",
)  # fmt: skip
TARGET, CONTEXT, TEXT = 6, 4, 5


def config_of(**sizes) -> FluxConfig:
    return FluxConfig.tiny(**(SIZES | sizes))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    target = [(0, row, column) for row in range(2) for column in range(3)]
    context = [(1, row, column) for row in range(2) for column in range(2)]
    return {
        "latents": normal(2, TARGET + CONTEXT, 8),
        "text": normal(2, TEXT, 20),
        "pooled": normal(2, 1, 12),
        "t": jnp.array([[0.3], [0.9]]),
        "positions": jnp.asarray(np.broadcast_to(target + context, (2, TARGET + CONTEXT, 3))),
        "segments": jnp.ones((2, TARGET + CONTEXT), jnp.int32),
        "text_segments": jnp.ones((2, TEXT), jnp.int32),
    }


@jax.jit
def forward(model, inputs):
    return model(**inputs)


@pytest.fixture(scope="module")
def make(random_network):
    return lambda **sizes: random_network(lambda: Flux(config_of(**sizes), rngs=nnx.Rngs(0)))


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def embed(p, x):
    return linear(p["out_layer"], silu(linear(p["in_layer"], x)))


def sinusoids(t):
    angles = 1000 * t * np.exp(-np.log(10000) * np.arange(128) / 128)
    return np.concatenate([np.cos(angles), np.sin(angles)])


def rotate(x, ids, axes_dim):
    """RoPE of one head's vectors, on pairs of adjacent channels."""
    out = np.empty_like(x)
    for s, position in enumerate(ids):
        angles = np.concatenate(
            [p * 10000.0 ** (-np.arange(0, d, 2) / d)
             for p, d in zip(position, axes_dim, strict=True)]
        )  # fmt: skip
        for k, angle in enumerate(angles):
            a, b = x[s, 2 * k], x[s, 2 * k + 1]
            out[s, 2 * k] = np.cos(angle) * a - np.sin(angle) * b
            out[s, 2 * k + 1] = np.sin(angle) * a + np.cos(angle) * b
    return out


def attend(q, k, v, ids, config):
    """Attention of q, k, v [tokens, heads, channels]; results of heads are concatenated."""
    heads = []
    for h in range(config.num_heads):
        logits = rotate(q[:, h], ids, config.axes_dim) @ rotate(k[:, h], ids, config.axes_dim).T
        weights = np.exp(logits / np.sqrt(config.head_dim))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, h])
    return np.concatenate(heads, -1)


def expected_forward(model, latents, text, pooled, t, ids, guidance=None):
    """The forward pass for one example, from the published formulas."""
    config = model.config
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), by_name(model))
    double = jax.tree.map(lambda x: x[0], p["double_blocks"])
    single = jax.tree.map(lambda x: x[0], p["single_blocks"])
    ids = np.concatenate([np.zeros((len(text), 3)), ids])
    img, txt = linear(p["img_in"], latents), linear(p["txt_in"], text)
    vec = embed(p["time_in"], sinusoids(t))
    if guidance is not None:
        vec = vec + embed(p["guidance_in"], sinusoids(guidance))
    vec = vec + embed(p["vector_in"], pooled)

    def heads(x):
        return x.reshape(len(x), config.num_heads, config.head_dim)

    def qkv(p, x, shift, scale):
        q, k, v = map(heads, np.split(linear(p["qkv"], (1 + scale) * layer_norm(x) + shift), 3, -1))
        norm = p["norm"]
        q, k = rms_norm(q, norm["query_norm"]["scale"]), rms_norm(k, norm["key_norm"]["scale"])
        return q, k, v

    mods = {s: np.split(linear(double[f"{s}_mod"]["lin"], silu(vec)), 6) for s in ("img", "txt")}
    streams = {"txt": txt, "img": img}
    parts = [qkv(double[f"{s}_attn"], streams[s], *mods[s][:2]) for s in ("txt", "img")]
    out = attend(*(np.concatenate(pair) for pair in zip(*parts, strict=True)), ids, config)
    outs = {"txt": out[: len(text)], "img": out[len(text) :]}
    for s, x in streams.items():
        shift2, scale2, gate2 = mods[s][3:]
        mlp = double[f"{s}_mlp"]
        x = x + mods[s][2] * linear(double[f"{s}_attn"]["proj"], outs[s])
        hidden = gelu_tanh(linear(mlp["in_layer"], (1 + scale2) * layer_norm(x) + shift2))
        streams[s] = x + gate2 * linear(mlp["out_layer"], hidden)

    x = np.concatenate([streams["txt"], streams["img"]])
    shift, scale, gate = np.split(linear(single["modulation"]["lin"], silu(vec)), 3)
    joint = linear(single["linear1"], (1 + scale) * layer_norm(x) + shift)
    q, k, v = (heads(joint[:, i * x.shape[1] : (i + 1) * x.shape[1]]) for i in range(3))
    norm = single["norm"]
    q, k = rms_norm(q, norm["query_norm"]["scale"]), rms_norm(k, norm["key_norm"]["scale"])
    mlp = gelu_tanh(joint[:, 3 * x.shape[1] :])
    joint = np.concatenate([attend(q, k, v, ids, config), mlp], -1)
    x = x + gate * linear(single["linear2"], joint)

    last = p["final_layer"]
    shift, scale = np.split(linear(last["adaLN_modulation"], silu(vec)), 2)
    return linear(last["linear"], (1 + scale) * layer_norm(x[len(text) :]) + shift)


@pytest.mark.parametrize("guidance", [None, (2.5, 4.0)], ids=["schnell", "dev"])
def test_forward_matches_the_numpy_reference(make, inputs, guidance):
    model = make(guidance_embed=guidance is not None)
    if guidance:
        inputs = inputs | {"guidance": jnp.array(guidance)[:, None]}
    out = forward(model, inputs)
    for i in range(2):
        args = [np.asarray(inputs[n][i], np.float64) for n in ("latents", "text", "pooled", "t")]
        latents, text, [pooled], [t] = args
        ids = np.asarray(inputs["positions"][i])
        expected = expected_forward(model, latents, text, pooled, t, ids, guidance and guidance[i])
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(out[i], expected, atol=2e-5 * np.abs(expected).max())


def test_timestep_dtype_rounds_the_time(make, inputs):
    """In bfloat16, 1000 t is 824 for t = 0.825821."""
    model = make()
    rounded = make(timestep_dtype="bfloat16")
    odd = forward(rounded, inputs | {"t": jnp.full((2, 1), 0.825821)})
    even = forward(model, inputs | {"t": jnp.full((2, 1), 0.824)})
    np.testing.assert_allclose(odd, even, atol=1e-4)


def test_target_depends_on_contents_and_positions_of_context(make, inputs):
    model = make()
    out = forward(model, inputs)[:, :TARGET]
    brighter = inputs["latents"].at[:, TARGET:].add(1.0)
    moved = inputs["positions"].at[:, TARGET:, 2].add(5)
    for changed in ({"latents": brighter}, {"positions": moved}):
        assert np.abs(forward(model, inputs | changed)[:, :TARGET] - out).max() > 1e-3


def test_order_of_image_tokens_does_not_matter(make, inputs):
    model = make()
    order = np.random.default_rng(0).permutation(TARGET + CONTEXT)
    shuffled = {name: inputs[name][:, order] for name in ("latents", "positions", "segments")}
    out = forward(model, inputs)
    np.testing.assert_allclose(forward(model, inputs | shuffled), out[:, order], atol=2e-5)


def loss(model, inputs):
    return jnp.sum(jnp.square(model(**inputs)))


def assert_close(tree, other, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * np.abs(a).max())


def test_gradients_do_not_depend_on_the_remat_policy_or_on_unrolling(make, inputs, monkeypatch):

    def gradients(policy):
        return jax.jit(jax.grad(loss))(make(remat=policy, depth=2, depth_single=2), inputs)

    unrolled = gradients("none")
    monkeypatch.setattr(flux, "MAX_UNROLLED", 0)
    for policy in ("full", "save_attention", "save_named", "offload"):
        assert_close(unrolled, gradients(policy))


def test_fused_kernel_on_a_mesh_matches_plain_attention_on_one_device(random_network, monkeypatch):
    """Packed rows with padding; rows, queries and heads are sharded, and blocks are scanned."""
    text_segments, segments = (
        jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], lengths, axis=1), jnp.int32)
        for lengths in ([40, 20, 4], [130, 110, 16])
    )
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.standard_normal((2, 256, 8), np.float32),
        "text": rng.standard_normal((2, 64, 20), np.float32),
        "pooled": rng.standard_normal((2, 2, 12), np.float32),
        "t": jnp.array([[0.3, 0.9], [0.5, 0.7]]),
        "positions": jnp.asarray(rng.integers(0, 16, (2, 256, 3)), jnp.int32),
        "segments": segments,
        "text_segments": text_segments,
    }
    inputs = jax.tree.map(jnp.asarray, inputs)

    def loss(model, inputs):
        out = jnp.where(segments[:, :, None] > 0, model(**inputs), 0.0)
        return jnp.sum(jnp.sin(out)), out

    def outputs_and_gradients(kernel, mesh):
        config = config_of(
            hidden_size=256, axes_dim=(16, 56, 56), mlp_ratio=1.0, depth=2, depth_single=2,
            remat="save_attention", attention=kernel,
        )  # fmt: skip
        model = random_network(lambda: Flux(config, rngs=nnx.Rngs(0)))
        with jax.set_mesh(mesh):
            model = jax.device_put(model, shardings_of(model, mesh))
            return jax.jit(jax.grad(loss, has_aux=True))(model, inputs)

    plain = outputs_and_gradients("xla", make_mesh(MeshConfig(), jax.devices()[:1]))
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    monkeypatch.setattr(flux, "MAX_UNROLLED", 0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))
    assert_close(plain, outputs_and_gradients("splash", mesh))


def operations(jaxpr) -> Counter:
    """Counts matmuls and transfers between memories in a program; loop bodies count once."""
    count = Counter()
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = params["dimension_numbers"]
            # Skip the products with a column of ones (norms on CPUs) and with a square matrix of
            # a head's size (RoPE): their cost is negligible.
            sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
            if np.prod(sizes) > 1 and (16, 16) not in [x.aval.shape for x in equation.invars]:
                count["attention" if batch else "linear"] += 1
        elif equation.primitive.name == "device_put":
            count["moves"] += 1
        for inner in jaxprs_in_params(params):
            count += operations(inner)
    return count


@pytest.mark.parametrize(
    ("policy", "linear", "attention", "saved", "moves"),
    [
        ("none", 0, 0, None, 0),
        ("full", 13, 4, 0, 0),  # 10 + 3 linear maps; two products per attention
        ("save_attention", 13, 2, 2, 0),
        ("save_named", 0, 2, 10 + 9, 0),
        ("offload", 0, 2, 10 + 9, 2 * (11 + 4)),
    ],
)
def test_remat_policies_recompute_and_save_as_documented(
    inputs, policy, linear, attention, saved, moves
):
    """Operations in addition to "none"; saved widths per token in addition to "full"."""

    def abstract(policy):
        return jax.eval_shape(lambda: Flux(config_of(remat=policy), rngs=nnx.Rngs(0)))

    def computed(policy):
        return operations(jax.make_jaxpr(jax.grad(loss))(abstract(policy), inputs).jaxpr)

    def widths(policy):
        pullback = jax.eval_shape(lambda model: jax.vjp(loss, model, inputs)[1], abstract(policy))
        stacked = [x for x in jax.tree.leaves(pullback) if x.ndim > 3 and x.shape[2] > 1]
        return sum(x.size for x in stacked) / (2 * (TARGET + CONTEXT + TEXT) * 32)

    extra = computed(policy)
    extra.subtract(computed("none"))
    expected = {"linear": linear, "attention": attention, "moves": moves}
    assert {name: extra[name] for name in expected} == expected
    if saved is not None:
        assert widths(policy) - widths("full") == saved


@pytest.mark.parametrize("policy", ["none", "full"])
def test_names_of_activations_do_not_change_the_program(inputs, policy, monkeypatch):
    def program():
        model = jax.eval_shape(lambda: Flux(config_of(remat=policy), rngs=nnx.Rngs(0)))
        return jax.jit(jax.grad(lambda model, inputs: loss(model, inputs))).lower(model, inputs)

    named = program().as_text()
    for module in (layers, attention):
        monkeypatch.setattr(module, "checkpoint_name", lambda x, name: x)
    assert program().as_text() == named


def test_new_model_predicts_zero(inputs):
    model = Flux(config_of(), rngs=nnx.Rngs(0))
    assert not np.any(forward(model, inputs))


@pytest.mark.parametrize(("guidance_embed", "verb"), [(True, "needs a"), (False, "has no")])
def test_missing_or_unsupported_guidance_is_refused(make, inputs, guidance_embed, verb):
    guidance = {} if guidance_embed else {"guidance": jnp.ones((2, 1))}
    with pytest.raises(ValueError, match=f"This FLUX {verb} guidance input"):
        forward(make(guidance_embed=guidance_embed), inputs | guidance)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"axes_dim": (4, 6, 8)}, r"axes_dim \(4, 6, 8\) must be even numbers .* 16 channels"),
        ({"axes_dim": (5, 5, 6)}, r"axes_dim \(5, 5, 6\) must be even"),
        ({"hidden_size": 33}, "hidden_size 33 must be a multiple of num_heads 2"),
        ({"remat": "some"}, "remat 'some' is not one of full, none"),
    ],
)
def test_inconsistent_settings_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**sizes)


@pytest.mark.parametrize(
    ("config", "count"),
    [(FluxConfig.dev(), 11_901_408_320), (FluxConfig.schnell(), 11_891_178_560)],
    ids=["dev", "schnell"],
)
def test_parameter_counts_match_the_published_models(config, count):
    model = jax.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(model)) == count


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=16)], ids=["full", "lora"])
def test_train_step_of_kontext_dev_preserves_shapes_of_the_state(lora):
    """At 1024 pixels: 4096 target tokens, 4096 context tokens, 512 text tokens."""
    objective = FlowMatching(FlowMatchingConfig(lora=lora))
    optimizers = {"model": make_optimizer(OptimConfig(), num_steps=10)}
    state, _ = abstract_state(objective, optimizers, make_mesh(MeshConfig()))
    networks = {
        "autoencoder": lambda: Autoencoder(AutoencoderConfig.flux(), rngs=nnx.Rngs(0)),
        "text_encoder": lambda: T5Encoder(T5Config.xxl(), rngs=nnx.Rngs(0)),
        "clip": lambda: ClipText(ClipConfig.large(), rngs=nnx.Rngs(0)),
    }
    if lora.rank:
        networks["transformer"] = lambda: Flux(FluxConfig.dev(), rngs=nnx.Rngs(0))
    assert set(networks) == set(objective.frozen())
    frozen = {name: jax.eval_shape(make) for name, make in networks.items()}

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    batch = Batch(
        images={"1024x1024": jax.ShapeDtypeStruct((1, 2, 1024, 1024, 3), jnp.uint8)},
        image_segments={"1024x1024": ints(1, 2)},
        source=ints(1, 8192),
        positions=ints(1, 8192, 3),
        segments=ints(1, 8192),
        is_target=jax.ShapeDtypeStruct((1, 8192), jnp.bool),
        offsets=ints(1, 8192),
        text_ids=ints(1, 512),
        text_segments=ints(1, 512),
        clip_ids=ints(1, 1, 77),
        example_ids=ints(1, 1),
        skipped=ints(1),
    )
    step = make_train_step(objective, optimizers, OptimConfig(), seed=0)
    new_state, metrics = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert metrics["model/loss"].shape == ()
