"""Packing is exact: an example in a packed row gives the same results as in its own row."""

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
from kontext_jax.encoders import encode_images
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.objectives.flow_matching import FlowMatching, FlowMatchingConfig, per_example_loss
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.types import Batch, Example, Tokens

GEOMETRY = geometry.GeometryConfig(sizes=((32, 32), (32, 16), (16, 24)), pixels_per_token=8)
SAMPLER = SamplerConfig(num_steps=3)
# A steep shift, so that a wrong number of target tokens would change the noise levels.
TIME = flow.TimeConfig(base_tokens=4, max_tokens=20, max_shift=2.0)
CONFIG = FlowMatchingConfig(
    train_text_encoder=True,
    pooled="mean",
    transformer=FluxConfig.tiny(
        hidden_size=32, num_heads=2, depth=1, depth_single=1, axes_dim=(4, 6, 6)
    ),
    text_encoder=T5Config.tiny_bytes(num_layers=1),
    time=TIME,
)
# (target, contexts, bytes of the prompt): text-to-image, one context, several contexts.
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
    """Returns a batch of one row, with one unused slot for each image size."""
    packing = PackingConfig(
        image_tokens=image_tokens, text_tokens=text_tokens, max_examples=max_examples
    )
    images = [image for e in examples for image in (e.target, *e.contexts)]
    keys = [size_key((image.shape[1], image.shape[0])) for image in images]
    slots = {key: keys.count(key) + 1 for key in sorted(set(keys))}
    config = DataConfig(geometry=GEOMETRY, packing=packing)
    return jax.tree.map(lambda x: x[None], assemble(examples, ids, slots, config))


def packed_row(examples) -> Batch:
    """Returns a row with three examples, and unused tokens, text tokens and example slots."""
    return as_batch(examples, IDS, image_tokens=80, text_tokens=40, max_examples=5)


def alone(number: int) -> Batch:
    """Returns a row that one example fills completely."""
    single = EXAMPLES[number]
    tokens = sum(image.size // 3 // 64 for image in (single.target, *single.contexts))
    return as_batch([single], [IDS[number]], tokens, len(single.text_ids), max_examples=1)


def only(numbers) -> Batch:
    """Returns the packed row as if the records of all other examples were unreadable."""
    full = packed_row(EXAMPLES)
    slots = {key: images.shape[1] for key, images in full.images.items()}
    packing = PackingConfig(image_tokens=80, text_tokens=40, max_examples=5)
    config = DataConfig(geometry=GEOMETRY, packing=packing)
    row = assemble(
        [e if i in numbers else None for i, e in enumerate(EXAMPLES)], IDS, slots, config
    )
    return jax.tree.map(lambda x: x[None], row)


@pytest.fixture(scope="module")
def setup(random_network) -> Setup:
    objective = FlowMatching(CONFIG)
    models = random_network(lambda: objective.init(jax.random.key(0)))
    autoencoder = random_network(lambda: Autoencoder(AutoencoderConfig.tiny(), rngs=nnx.Rngs(0)))
    return Setup(objective, models, autoencoder)


@jax.jit
def encoded(models, autoencoder, batch: Batch) -> Tokens:
    return CONFIG.tokens(models["model"], batch, encode_images(autoencoder, batch))


@jax.jit
def run(models, tokens: Tokens):
    """Returns each example's loss, noise level and presence, and sampled latents."""
    transformer = models["model"]["transformer"]
    losses = per_example_loss(transformer, tokens, TIME, 1.0, jax.random.key(5))
    return *losses, sample(transformer, tokens, jax.random.key(6), SAMPLER, TIME)


@pytest.fixture(scope="module")
def packed(setup) -> Tokens:
    return encoded(setup.models, setup.autoencoder, packed_row(EXAMPLES))


@pytest.fixture(scope="module")
def gradient(setup):
    """A function of a batch; returns the sums that a step accumulates: loss, weight, gradients."""
    frozen = {"autoencoder": setup.autoencoder}

    def loss(models, batch):
        inputs = setup.objective.prepare(frozen, batch)
        key, step = jax.random.key(5), jnp.zeros((), jnp.int32)
        return setup.objective.loss("model", models, frozen, inputs, key, step)

    return partial(jax.jit(jax.value_and_grad(loss, has_aux=True)), setup.models)


def segment_of(tokens: Tokens, number: int) -> np.ndarray:
    return np.asarray(tokens.segments[0]) == number + 1


@pytest.mark.parametrize("number", range(3))
def test_an_example_is_the_same_packed_and_alone(setup, packed, number):
    single = encoded(setup.models, setup.autoencoder, alone(number))
    segment = segment_of(packed, number)
    text_segment = np.asarray(packed.text_segments[0]) == number + 1
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    close(packed.latents[0, segment], single.latents[0])
    close(packed.text[0, text_segment], single.text[0])
    close(packed.pooled[0, number], single.pooled[0, 0])

    losses, times, present, images = run(setup.models, packed)
    loss, time, _, image = run(setup.models, single)
    assert present.tolist() == [[1, 1, 1, 0, 0]] and not losses[0, 3:].any()
    close(times[0, number], time[0, 0])
    close(losses[0, number], loss[0, 0])
    close(images[0, segment], image[0])


def test_gradients_of_a_packed_row_are_the_sum_of_its_examples(gradient):
    (loss, (weight, _, _)), grads = gradient(packed_row(EXAMPLES))
    parts = [gradient(only([number])) for number in range(3)]
    (alone_loss, (alone_weight, _, _)), alone_grads = jax.tree.map(lambda *x: sum(x), *parts)
    assert weight == alone_weight == 3
    np.testing.assert_allclose(loss, alone_loss, rtol=1e-4)
    for (path, grad), expected in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(alone_grads), strict=True
    ):
        name, size = jax.tree_util.keystr(path), np.abs(expected).max()
        assert size > 0, name
        np.testing.assert_allclose(grad, expected, atol=1e-4 * size, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("changed", range(3))
def test_an_example_does_not_depend_on_others_in_its_row(setup, packed, changed):
    """Changing the pixels and prompt of an example leaves the others bit-identical."""
    examples = [e if i != changed else example(i, seed=1) for i, e in enumerate(EXAMPLES)]
    other = encoded(setup.models, setup.autoencoder, packed_row(examples))
    losses, _, _, images = run(setup.models, packed)
    other_losses, _, _, other_images = run(setup.models, other)
    for number in range(3):
        segment = segment_of(packed, number)
        if number == changed:
            assert abs(losses[0, number] - other_losses[0, number]) > 1e-4
            assert not np.allclose(images[0, segment], other_images[0, segment], atol=1e-3)
        else:
            np.testing.assert_array_equal(losses[0, number], other_losses[0, number])
            np.testing.assert_array_equal(images[0, segment], other_images[0, segment])


@pytest.mark.parametrize("condition", ["context", "prompt"])
def test_the_target_depends_on_context_and_prompt(setup, packed, condition):
    original = EXAMPLES[1]
    if condition == "context":
        changed = original._replace(contexts=(255 - original.contexts[0],))
    else:
        changed = original._replace(text_ids=original.text_ids[::-1].copy())
    row = packed_row([EXAMPLES[0], changed, EXAMPLES[2]])
    images = run(setup.models, encoded(setup.models, setup.autoencoder, row))[-1]
    target = segment_of(packed, 1) & np.asarray(packed.is_target[0])
    assert np.abs(images - run(setup.models, packed)[-1])[0, target].max() > 1e-3


def test_padding_content_does_not_change_losses_and_images(setup, packed):
    padding = np.asarray(packed.segments) == 0
    assert padding.any()
    altered = packed.replace(
        latents=jnp.where(padding[..., None], 1e3, packed.latents),
        positions=jnp.where(padding[..., None], 17, packed.positions),
        text=jnp.where(packed.text_segments[..., None] == 0, 1e3, packed.text),
    )
    *expected_losses, expected_images = run(setup.models, packed)
    *losses, images = run(setup.models, altered)
    assert np.isfinite(images).all()
    np.testing.assert_array_equal(images[~padding], expected_images[~padding])
    jax.tree.map(np.testing.assert_array_equal, losses, expected_losses)


def test_a_row_without_examples_has_no_loss_and_no_gradient(gradient):
    row = only([])
    (loss, (weight, _, _)), grads = gradient(row)
    assert loss == 0 and weight == 0 and row.skipped == 3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
