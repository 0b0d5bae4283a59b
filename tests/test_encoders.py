"""Encoding of prompts, with FLUX's settings and with the other options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax import sharding
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, assemble, prepare_all
from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.encoders import encode_clip, encode_text
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.clip import ClipConfig, ClipText
from kontext_jax.models.t5 import T5Config, T5Encoder
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Triple

PROMPTS = ["make it red", "", "a longer prompt is cut here", "make it"]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def t5(random_network):
    return random_network(lambda: T5Encoder(T5Config.tiny_bytes(num_layers=1), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def clip(random_network):
    return random_network(lambda: ClipText(ClipConfig.tiny(num_layers=1), rngs=nnx.Rngs(0)))


def text_config(folder, pad: bool) -> TextConfig:
    """With ``pad``, FLUX's settings except for shorter prompts."""
    return TextConfig(
        tokenizer=str(folder / "tokenizer_2"),
        max_tokens=MAX_TOKENS,
        pad=pad,
        clip_tokenizer=str(folder / "tokenizer"),
        clip_max_tokens=10,
    )


def rows(text: TextConfig, layout, max_examples: int = 3):
    """A batch; ``layout`` has the indices of each row's prompts, None for an unreadable record."""
    packing = PackingConfig(
        image_tokens=4 * max_examples,
        text_tokens=MAX_TOKENS * max_examples,
        max_examples=max_examples,
    )
    geometry = GeometryConfig(sizes=((16, 16),), pixels_per_token=8)
    config = DataConfig(geometry=geometry, packing=packing, text=text)
    image = np.zeros((16, 16, 3), np.uint8)
    examples = prepare_all([Triple(p, image, (), p, "text_to_image") for p in PROMPTS], config)
    assembled = [
        assemble(
            [None if i is None else examples[i] for i in row],
            range(len(row)),
            {"16x16": max_examples},
            config,
        )
        for row in layout
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *assembled)


@jax.jit
def text_of(t5, batch):
    return encode_text(t5, batch)


@jax.jit
def encode_alone(t5, ids):
    """The encoding of one prompt in a row by itself."""
    return t5(ids[None], jnp.ones_like(ids[None]))[0]


def test_with_pad_the_padding_is_part_of_the_prompt(flux_tokenizers, t5):
    text = text_config(flux_tokenizers, pad=True)
    tokenizer = Tokenizer(text)
    batch = rows(text, [[0], [1]], max_examples=1)
    assert (batch.text_segments == 1).all() and batch.text_segments.shape == (2, MAX_TOKENS)
    assert (batch.text_ids == 0).sum() == 2 * MAX_TOKENS - 4 - 1  # three words and two end tokens
    out = text_of(t5, batch)
    for row in range(2):
        expected = encode_alone(t5, jnp.asarray(tokenizer(PROMPTS[row])))
        np.testing.assert_allclose(out[row], expected, atol=2e-5)


def test_without_pad_the_padding_has_no_effect(flux_tokenizers, t5):
    text = text_config(flux_tokenizers, pad=False)
    tokenizer = Tokenizer(text)
    batch = rows(text, [[0, 3, 2], [1, None, 0]])
    out = text_of(t5, batch)
    padded = text_of(t5, rows(text_config(flux_tokenizers, pad=True), [[0]]))
    for row, segment, number in ((0, 1, 0), (0, 2, 3), (0, 3, 2), (1, 1, 1), (1, 3, 0)):
        ids = tokenizer(PROMPTS[number])
        mask = batch.text_segments[row] == segment
        np.testing.assert_array_equal(batch.text_ids[row, mask], ids)
        assert len(ids) <= MAX_TOKENS and ids[-1] == 1
        np.testing.assert_allclose(out[row, mask], encode_alone(t5, jnp.asarray(ids)), atol=2e-5)
    length = len(tokenizer(PROMPTS[0]))
    assert np.abs(out[0, :length] - padded[0, :length]).max() > 0.1


def test_each_example_has_the_clip_vector_of_its_prompt(flux_tokenizers, clip):
    text = text_config(flux_tokenizers, pad=False)
    tokenizer = Tokenizer(text)
    layout = [[0, 2], [1, None, 3]]
    batch = rows(text, layout)
    assert batch.clip_ids.shape == (2, 3, 10) and batch.clip_ids.dtype == np.int32
    pooled = jax.jit(encode_clip)(clip, batch)
    assert pooled.shape == (2, 3, 32) and pooled.dtype == jnp.float32
    for row, slot in np.ndindex(2, 3):
        number = layout[row][slot] if slot < len(layout[row]) else None
        if number is None:
            assert not batch.clip_ids[row, slot].any() and not pooled[row, slot].any()
        else:
            ids = tokenizer.clip(PROMPTS[number])
            np.testing.assert_array_equal(batch.clip_ids[row, slot], ids)
            expected = clip(jnp.asarray(ids)[None])[0]
            np.testing.assert_allclose(pooled[row, slot], expected, atol=1e-5)


def test_clip_vectors_are_the_same_on_eight_devices(flux_tokenizers, clip):
    batch = rows(text_config(flux_tokenizers, pad=False), [[i % 4, 0] for i in range(8)])
    expected = jax.jit(encode_clip)(clip, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        pooled = jax.jit(encode_clip)(
            jax.device_put(clip, sharding.shardings_of(clip, mesh)),
            jax.device_put(batch, sharding.batch_sharding(mesh)),
        )
    assert pooled.sharding.shard_shape(pooled.shape) == (1, 3, 32)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_batches_without_clip_ids_are_refused(clip):
    batch = rows(TextConfig(max_tokens=MAX_TOKENS), [[0]])
    assert batch.clip_ids.shape == (1, 3, 0)
    with pytest.raises(ValueError, match="not 0: set text.clip_tokenizer"):
        jax.jit(encode_clip)(clip, batch)
