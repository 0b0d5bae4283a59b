"""CLIP's text encoder against a reference in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.clip import ClipConfig, ClipText
from kontext_jax.models.layers import REMAT_POLICIES
from kontext_jax.sharding import RULES

TINY = ClipConfig.tiny()
BOS, EOS = 518, 519
LENGTHS = (0, 1, 7, 14)  # words of the prompts; the last prompt fills its row


@pytest.fixture(scope="module")
def fresh():
    return ClipText(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model(random_network):
    return random_network(lambda: ClipText(TINY, rngs=nnx.Rngs(0)))


def with_config(model, **kwargs) -> ClipText:
    """The same weights under another config."""
    other = jax.eval_shape(lambda: ClipText(ClipConfig.tiny(**kwargs), rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@jax.jit
def encode(model, ids):
    return model(ids)


def prompts(length: int = 16) -> np.ndarray:
    """One prompt per row: start, words, end, and end tokens as padding."""
    rng = np.random.default_rng(0)
    ids = np.full((len(LENGTHS), length), EOS, np.int32)
    ids[:, 0] = BOS
    for row, words in enumerate(LENGTHS):
        ids[row, 1 : 1 + words] = rng.integers(0, BOS, words)
    return ids


def float64(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def layer_norm(x, scale, bias):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale + bias


def reference(model, ids: np.ndarray) -> np.ndarray:
    """The vectors of all tokens of one prompt, head by head and query by query."""

    def of_layer(module, layer):
        names = ("kernel", "bias") if hasattr(module, "kernel") else ("scale", "bias")
        return [float64(getattr(module, name))[layer] for name in names]

    x = float64(model.token_embedding.embedding)[ids]
    x = x + float64(model.position_embedding)[: len(ids)]
    blocks, head_dim = model.blocks, TINY.hidden_size // TINY.num_heads
    for layer in range(TINY.num_layers):
        h = layer_norm(x, *of_layer(blocks.norm1, layer))
        attention = blocks.attention
        q, k, v = (
            h @ kernel + bias
            for kernel, bias in (of_layer(getattr(attention, name), layer) for name in "qkv")
        )
        mixed = np.zeros_like(x)
        for head in range(TINY.num_heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            for query in range(len(ids)):
                logits = k[: query + 1, at] @ q[query, at] / math.sqrt(head_dim)
                weights = np.exp(logits - logits.max())
                mixed[query, at] = weights / weights.sum() @ v[: query + 1, at]
        kernel, bias = of_layer(attention.out_proj, layer)
        x = x + mixed @ kernel + bias
        h = layer_norm(x, *of_layer(blocks.norm2, layer))
        kernel, bias = of_layer(blocks.mlp.fc1, layer)
        h = h @ kernel + bias
        h = h / (1 + np.exp(-1.702 * h))
        kernel, bias = of_layer(blocks.mlp.fc2, layer)
        x = x + h @ kernel + bias
    return layer_norm(x, float64(model.final_norm.scale), float64(model.final_norm.bias))


def test_the_text_model_of_large_has_123_060_480_parameters():
    abstract = jax.eval_shape(lambda: ClipText(ClipConfig.large(), rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    attention, mlp = 4 * (768 * 768 + 768), 2 * 768 * 3072 + 3072 + 768
    layer = attention + mlp + 2 * 2 * 768
    assert count == (49408 + 77) * 768 + 12 * layer + 2 * 768 == 123_060_480


def test_every_parameter_names_its_axes(fresh):
    for param in jax.tree.leaves(nnx.state(fresh), is_leaf=lambda x: isinstance(x, nnx.Param)):
        axes = param.get_metadata()["axes"]
        assert {axis for axis in axes if axis is not None} <= set(RULES)


def test_initial_scales_match_openai(fresh):
    width, layers = TINY.hidden_size, TINY.num_layers
    attention, mlp = fresh.blocks.attention, fresh.blocks.mlp
    output_std = (2 * layers * width) ** -0.5
    for param, std in (
        (fresh.token_embedding.embedding, 0.02),
        (fresh.position_embedding, 0.01),
        (attention.q.kernel, width**-0.5),
        (attention.k.kernel, width**-0.5),
        (attention.v.kernel, width**-0.5),
        (attention.out_proj.kernel, output_std),
        (mlp.fc1.kernel, (2 * width) ** -0.5),
        (mlp.fc2.kernel, output_std),
    ):
        assert float(jnp.std(param[...])) == pytest.approx(std, rel=0.1)


def test_encoder_matches_the_numpy_reference_at_the_first_end_token(model):
    ids = prompts()
    out = encode(model, ids)
    assert out.shape == (len(LENGTHS), 32) and out.dtype == jnp.float32
    for row, words in enumerate(LENGTHS):
        vectors = reference(model, ids[row])
        np.testing.assert_allclose(out[row], vectors[1 + words], atol=2e-5)
        if words < 14:  # the padding consists of end tokens too
            assert np.abs(out[row] - vectors[-1]).max() > 0.1


def test_more_padding_does_not_change_the_vectors(model):
    np.testing.assert_allclose(encode(model, prompts(16)), encode(model, prompts(40)), atol=1e-5)


def test_vectors_depend_only_on_tokens_up_to_the_end_token(model):
    ids = prompts()
    out = encode(model, ids)
    after, before = ids.copy(), ids.copy()
    for row, words in enumerate(LENGTHS):
        after[row, words + 2 :] = 3
        before[row, words] += 1 if words else -1  # a word, or else the start token
    np.testing.assert_array_equal(encode(model, after), out)
    assert np.abs(encode(model, before) - out).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("length", [0, 78])
def test_prompts_without_tokens_or_too_long_are_refused(fresh, length):
    message = f"needs 1 to 77 tokens per prompt, not {length}: set text.clip_tokenizer"
    with pytest.raises(ValueError, match=message):
        fresh(jnp.zeros((2, length), jnp.int32))


def test_gradients_do_not_depend_on_remat(model):
    ids = jnp.asarray(prompts())
    grad = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(ids)))))
    grads = [grad(with_config(model, remat=remat)) for remat in REMAT_POLICIES]
    for (path, a), *others in zip(
        jax.tree.leaves_with_path(grads[0]), *map(jax.tree.leaves, grads[1:]), strict=True
    ):
        assert np.abs(a).max() > 0, jax.tree_util.keystr(path)
        for b in others:
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_keeps_float32_parameters(fresh):
    half = with_config(fresh, dtype="bfloat16")
    abstract = jax.eval_shape(lambda: ClipText(half.config, rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    out, exact = (encode(m, prompts()) for m in (half, fresh))
    assert out.dtype == jnp.bfloat16
    error = jnp.sqrt(jnp.mean(jnp.square(out.astype(jnp.float32) - exact)))
    assert 0 < float(error) < 0.03


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_heads": 5}, "hidden_size 32 must be a multiple of num_heads 5"),
        ({"eos_id": 520}, "eos_id 520 must be below vocab_size 520"),
        ({"remat": "some"}, "remat 'some' is not one of full, none"),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ClipConfig.tiny(**wrong)
