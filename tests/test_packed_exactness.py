"""Packing changes nothing: a row of several examples is what each of them is alone."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax import flow, geometry
from kontext_jax.data.packing import PackingConfig, size_key
from kontext_jax.data.pipeline import DataConfig, assemble
from kontext_jax.encoders import encode_images, encode_text, to_tokens
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.objectives.flow_matching import FlowMatching, FlowMatchingConfig, per_example_loss
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.types import Batch, Example, Tokens

GEOMETRY = geometry.GeometryConfig(sizes=((32, 32), (32, 16), (16, 24)), pixels_per_token=8)
SAMPLER = SamplerConfig(num_steps=3)
# (target, contexts, bytes of the prompt): text-to-image, one context, several.
LAYOUTS = [
    ((32, 32), [], 9),
    ((16, 24), [(32, 16)], 14),
    ((32, 16), [(32, 32), (16, 24), (16, 24)], 5),
]
IDS = [7, 3, 11]


class Setup(NamedTuple):
    objective: FlowMatching
    models: dict
    autoencoder: Autoencoder


def example(number: int, seed: int = 0) -> Example:
    target, contexts, num_text = LAYOUTS[number]
    rng = np.random.default_rng((seed, number))
    image = lambda size: rng.integers(0, 256, (size[1], size[0], 3), np.uint8)  # noqa: E731
    ids = rng.integers(3, 259, num_text).astype(np.int32)
    return Example(f"{number}", image(target), tuple(map(image, contexts)), ids)


EXAMPLES = [example(number) for number in range(3)]


def as_batch(examples, ids, image_tokens: int, text_tokens: int, max_examples: int) -> Batch:
    """One row, with as many slots for images as it needs and one more."""
    packing = PackingConfig(
        image_tokens=image_tokens, text_tokens=text_tokens, max_examples=max_examples
    )
    images = [image for e in examples for image in (e.target, *e.contexts)]
    keys = [size_key((image.shape[1], image.shape[0])) for image in images]
    slots = {key: keys.count(key) + 1 for key in sorted(set(keys))}
    config = DataConfig(geometry=GEOMETRY, packing=packing)
    return jax.tree.map(lambda x: x[None], assemble(examples, ids, slots, config))


def packed_row(examples) -> Batch:
    """All three examples, and room for more tokens, text and examples."""
    return as_batch(examples, IDS, image_tokens=80, text_tokens=40, max_examples=5)


def alone(number: int) -> Batch:
    """One example in a row that it fills to the last token."""
    one = EXAMPLES[number]
    tokens = sum(image.size // 3 // 64 for image in (one.target, *one.contexts))
    return as_batch([one], [IDS[number]], tokens, len(one.text_ids), max_examples=1)


@pytest.fixture(scope="module")
def setup(randomised) -> Setup:
    config = FlowMatchingConfig(
        transformer=FluxConfig.tiny(
            hidden_size=32, num_heads=2, depth=1, depth_single=1, axes_dim=(4, 6, 6)
        ),
        text_encoder=T5Config.tiny_bytes(num_layers=1),
        # One example's times depend on its own size: a large mu shows a count gone wrong.
        time=flow.TimeConfig(base_tokens=4, max_tokens=20, max_shift=2.0),
    )
    objective = FlowMatching(config)
    models = randomised(jax.jit(objective.init)(jax.random.key(0)))
    autoencoder = jax.jit(lambda: Autoencoder(AutoencoderConfig.tiny(), rngs=nnx.Rngs(1)))()
    return Setup(objective, models, randomised(autoencoder))


@jax.jit
def encoded(models, autoencoder, batch: Batch) -> Tokens:
    text, pooled = encode_text(models["model"]["text_encoder"], batch)
    return to_tokens(batch, encode_images(autoencoder, batch), text, pooled)


def tokens_of(setup: Setup, batch: Batch) -> Tokens:
    return encoded(setup.models, setup.autoencoder, batch)


@jax.jit
def example_losses(models, tokens: Tokens):
    time = flow.TimeConfig(base_tokens=4, max_tokens=20, max_shift=2.0)
    return per_example_loss(models["model"]["transformer"], tokens, time, 1.0, jax.random.key(5))


@jax.jit
def sampled(models, tokens: Tokens):
    transformer = models["model"]["transformer"]
    return sample(transformer, tokens, jax.random.key(6), SAMPLER, flow.TimeConfig())


def loss_and_gradient(setup: Setup, batch: Batch):
    """As the train step takes them, without dividing by the weight."""
    frozen = {"autoencoder": setup.autoencoder}

    def loss(models, batch):
        inputs = setup.objective.prepare(frozen, batch)
        return setup.objective.loss("model", models, frozen, inputs, jax.random.key(5))

    (loss, (weight, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        setup.models, batch
    )
    return loss, weight, grads


@pytest.fixture(scope="module")
def packed(setup) -> Tokens:
    return tokens_of(setup, packed_row(EXAMPLES))


def places(tokens: Tokens, number: int) -> np.ndarray:
    return np.asarray(tokens.segments[0]) == number + 1


@pytest.mark.parametrize("number", range(3))
def test_an_example_is_the_same_packed_and_alone(setup, packed, number):
    single = tokens_of(setup, alone(number))
    mine, text = places(packed, number), np.asarray(packed.text_segments[0]) == number + 1
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    close(packed.latents[0, mine], single.latents[0])
    close(packed.text[0, text], single.text[0])
    close(packed.pooled[0, number], single.pooled[0, 0])

    losses, times, present = example_losses(setup.models, packed)
    loss, time, _ = example_losses(setup.models, single)
    assert present.tolist() == [[1, 1, 1, 0, 0]] and not losses[0, 3:].any()
    close(times[0, number], time[0, 0])
    close(losses[0, number], loss[0, 0])
    close(sampled(setup.models, packed)[0, mine], sampled(setup.models, single)[0])


def test_gradients_of_a_packed_row_are_the_sum_of_its_examples(setup):
    loss, weight, grads = loss_and_gradient(setup, packed_row(EXAMPLES))
    assert weight == 3
    alone_loss, _, alone_grads = jax.tree.map(
        lambda *parts: sum(parts), *[loss_and_gradient(setup, alone(n)) for n in range(3)]
    )
    np.testing.assert_allclose(loss, alone_loss, rtol=1e-4)
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(alone_grads), strict=True
    ):
        name, size = jax.tree_util.keystr(path), np.abs(theirs).max()
        assert size > 0, name
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * size, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("changed", range(3))
def test_an_example_cannot_see_another(setup, packed, changed):
    """Other pixels, other prompt: only that example moves, and the others not by a bit."""
    examples = [e if i != changed else example(i, seed=1) for i, e in enumerate(EXAMPLES)]
    other = tokens_of(setup, packed_row(examples))
    losses, _, _ = example_losses(setup.models, packed)
    other_losses, _, _ = example_losses(setup.models, other)
    result, other_result = sampled(setup.models, packed), sampled(setup.models, other)
    for number in range(3):
        mine = places(packed, number)
        if number == changed:
            assert losses[0, number] != other_losses[0, number]
            assert not np.allclose(result[0, mine], other_result[0, mine], atol=1e-3)
        else:
            np.testing.assert_array_equal(losses[0, number], other_losses[0, number])
            np.testing.assert_array_equal(result[0, mine], other_result[0, mine])


@pytest.mark.parametrize("what", ["context", "prompt"])
def test_context_and_prompt_reach_the_target(setup, packed, what):
    one = EXAMPLES[1]
    other = (
        one._replace(contexts=(255 - one.contexts[0],))
        if what == "context"
        else one._replace(text_ids=one.text_ids[::-1].copy())
    )
    tokens = tokens_of(setup, packed_row([EXAMPLES[0], other, EXAMPLES[2]]))
    target = places(packed, 1) & np.asarray(packed.is_target[0])
    change = sampled(setup.models, tokens)[0, target] - sampled(setup.models, packed)[0, target]
    assert np.abs(change).max() > 1e-3


def test_padding_is_finite_and_without_gradient(setup, packed):
    """What lies in the padding changes nothing, whatever it is."""
    empty = np.asarray(packed.segments) == 0
    assert empty.any()
    dirty = packed.replace(
        latents=jnp.where(empty[..., None], 1e3, packed.latents),
        positions=jnp.where(empty[..., None], 17, packed.positions),
    )
    assert np.isfinite(sampled(setup.models, dirty)).all()
    for a, b in zip(
        example_losses(setup.models, packed), example_losses(setup.models, dirty), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_row_without_examples_has_no_loss_and_no_gradient(setup):
    full = packed_row(EXAMPLES)
    row = assemble(
        [None, None],
        IDS[:2],
        {key: images.shape[1] for key, images in full.images.items()},
        DataConfig(
            geometry=GEOMETRY,
            packing=PackingConfig(image_tokens=80, text_tokens=40, max_examples=5),
        ),
    )
    loss, weight, grads = loss_and_gradient(setup, jax.tree.map(lambda x: x[None], row))
    assert loss == 0 and weight == 0 and row.skipped == 2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
