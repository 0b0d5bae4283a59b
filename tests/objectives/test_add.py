"""ADD's terms against their formulas, and the pixels that it compares."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax import flow
from kontext_jax.data.packing import PackingConfig, size_key
from kontext_jax.data.pipeline import DataConfig, assemble
from kontext_jax.encoders import encode_images
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig, to_pixels
from kontext_jax.models.dino import DinoConfig
from kontext_jax.models.discriminator import HeadsConfig, grid_neighbours
from kontext_jax.models.efficientnet import EfficientNetConfig, Stage
from kontext_jax.objectives import Sums
from kontext_jax.objectives.add import FEATURES, Add, AddConfig, decode, targets_by_size
from kontext_jax.objectives.adversarial import logits_only
from kontext_jax.objectives.student import StudentTimes
from kontext_jax.objectives.transformer import inputs_at
from kontext_jax.types import Example

KEY, STEP = jax.random.key(3), jnp.array(0)
ALWAYS_NOISE = StudentTimes(values=(1.0,), warmup=(1.0,), probabilities=(1.0,), warmup_steps=0)

# An autoencoder with four pixels per token, and feature networks with one block per map, because
# these tests spend their time in the compiler.
AUTOENCODER = AutoencoderConfig.tiny(channels=8, channel_multipliers=(1, 2))
FEATURE_CONFIGS = {
    "dino": DinoConfig.tiny(input_size=28, num_layers=2, taps=(0, 1)),
    "efficientnet": EfficientNetConfig.tiny(
        stages=(Stage(3, 1, 1, 8, 1), Stage(5, 2, 2, 8, 1)), taps=(0, 1)
    ),
}


class AddRecipe(NamedTuple):
    """An objective, its networks, and a batch with 1, 2 and 0 examples in its rows."""

    objective: Add
    params: dict
    frozen: dict
    batch: Any


class Losses(NamedTuple):
    """The prepared batch, and (loss, sums) of both players."""

    inputs: dict
    student: tuple[jax.Array, Sums]
    discriminator: tuple[jax.Array, Sums]


@pytest.fixture(scope="module")
def frozen(ladd, random_network) -> dict:
    """The frozen networks, and the feature networks of both kinds."""
    networks = FEATURES | {"autoencoder": Autoencoder}
    configs = FEATURE_CONFIGS | {"autoencoder": AUTOENCODER}
    return ladd.frozen | {
        name: random_network(lambda n=name, c=config: networks[n](c, rngs=nnx.Rngs(0)))
        for name, config in configs.items()
    }


@pytest.fixture(scope="module")
def make_add(recipe, frozen, random_network):
    """A function from ADD settings to a recipe."""
    config = recipe.objective.config
    batch = jax.tree.map(jnp.asarray, recipe.rows([1, 2, 0], side=8))

    def make(features="efficientnet", **settings) -> AddRecipe:
        objective = Add(
            AddConfig(
                transformer=config.transformer,
                text_encoder=config.text_encoder,
                pooled=config.pooled,
                features=features,
                heads=HeadsConfig(width=8, dtype="float32"),
                student_times=ALWAYS_NOISE,
                **{features: FEATURE_CONFIGS[features]} | settings,
            )
        )
        params = random_network(lambda: objective.init(jax.random.key(0)), seed=1)
        return AddRecipe(objective, params, frozen, batch)

    return make


@partial(jax.jit, static_argnums=0)
def losses(objective, params, frozen, batch) -> Losses:
    """The losses of both players; the discriminator sees the features of the student's images."""
    inputs = objective.prepare(frozen, batch)
    student = objective.loss("student", params, frozen, inputs, KEY, STEP)
    inputs = inputs | student[1].forwarded
    discriminator = objective.loss("discriminator", params, frozen, inputs, KEY, STEP)
    return Losses(inputs, student, discriminator)


@pytest.fixture(scope="module")
def add(make_add) -> AddRecipe:
    """The default settings, with EfficientNet."""
    return make_add()


@pytest.fixture(scope="module")
def add_losses(add) -> Losses:
    return losses(*add)


@pytest.fixture(scope="module")
def dino_add(make_add) -> AddRecipe:
    """With DINOv2, and a weight of R1 that makes it a part of the loss worth comparing."""
    return make_add("dino", r1_weight=0.1)


@pytest.fixture(scope="module")
def dino_losses(dino_add) -> Losses:
    return losses(*dino_add)


def test_defaults_match_the_paper():
    config = AddConfig()
    assert (config.distillation_weight, config.r1_weight) == (2.5, 1e-5)
    assert config.student_times.probabilities == (0.25,) * 4
    assert config.features == "dino" and config.dino == DinoConfig.vits14()


@pytest.mark.parametrize("computed", ["dino_losses", "add_losses"])
def test_student_loss_is_the_sum_of_its_terms(computed, request):
    loss, sums = request.getfixturevalue(computed).student
    terms = sums.metrics
    np.testing.assert_allclose(loss, terms["adversarial"] + 2.5 * terms["distillation"], rtol=1e-5)
    assert sums.weight == 3 and terms["distillation"] > 0


def test_distillation_compares_decoded_pixels_weighted_by_the_level(add, add_losses):
    objective, params, frozen, _ = add
    inputs, (_, sums) = add_losses.inputs, add_losses.student
    tokens, teacher = inputs["tokens"], frozen["teacher"]
    keys = flow.split_keys(flow.example_keys(KEY, tokens.example_ids), 3)
    student = params["student"]["transformer"]

    @jax.jit
    def images(latents):
        return decode(frozen["autoencoder"], inputs["targets"][0], latents)

    @jax.jit
    def predict(network, x, t):
        v = network(**inputs_at(network, tokens, x, t, 1.0))
        return flow.denoise(x, v, flow.at_tokens(t, tokens.segments))

    def noise_of(keys):
        return flow.token_noise(keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])

    t = jnp.ones(tokens.example_ids.shape)
    generated = predict(student, noise_of(flow.split_keys(keys[0], 2)[1]), t)
    s = flow.sample_times(keys[1], jnp.ones(t.shape, jnp.int32), objective.config.teacher_levels)
    assert np.all((s > 0) & (s < 1))
    x_s = flow.interpolate(generated, noise_of(keys[2]), flow.at_tokens(s, tokens.segments))
    error = np.asarray(images(generated) - images(predict(teacher, x_s, s)), np.float64)
    present = np.asarray(inputs["targets"][0].present)
    expected = np.sum(present * (1 - np.asarray(s)) * np.mean(error**2, axis=(2, 3, 4)))
    np.testing.assert_allclose(sums.metrics["distillation"], expected, rtol=1e-3)


def test_no_gradient_reaches_the_teacher_or_its_input(add, add_losses):
    """Then the gradient of an image is 2 c(s) (x' - x'_teacher) / numel, as in test_ladd.py."""
    objective, _, frozen, _ = add
    inputs = add_losses.inputs
    keys = flow.split_keys(flow.example_keys(KEY, inputs["tokens"].example_ids), 2)
    generated = jnp.cos(inputs["tokens"].latents)
    images = jax.jit(objective._decode)(frozen, inputs, generated)

    @jax.jit
    @jax.value_and_grad
    def distance(arguments):
        networks = frozen | {"teacher": arguments["teacher"]}
        return jnp.sum(objective._distance(networks, inputs, images, arguments["generated"], keys))

    value, grads = distance({"teacher": frozen["teacher"], "generated": generated})
    assert value > 0
    assert not any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_zero_logits_give_a_discriminator_loss_of_two_per_map(add):
    zero_heads = jax.tree.map(jnp.zeros_like, add.params["discriminator"])
    params = add.params | {"discriminator": zero_heads}
    loss, sums = losses(*add._replace(params=params)).discriminator
    np.testing.assert_allclose([loss, sums.weight], [3 * 2 * 2, 3], rtol=1e-6)  # two maps


def test_heads_can_see_reconstructions_of_the_real_images(make_add, add_losses):
    """Then a student that generates the exact latents cannot be told from the real images."""
    objective, _, frozen, batch = make_add(reconstruct_real=True)

    @jax.jit
    def features_and_real(frozen, batch):
        inputs = objective.prepare(frozen, batch)
        images = objective._decode(frozen, inputs, inputs["tokens"].latents)
        return objective._features(frozen, images), inputs["real"]

    features, real = features_and_real(frozen, batch)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, features, real)
    pixels = add_losses.inputs["real"]
    assert not np.allclose(pixels.pooled, features.pooled, atol=1e-2)


def test_discriminator_loss_matches_its_formula(make_add, dino_add, dino_losses):
    """R1 is the squared gradient by the heads' input features, times its weight."""
    inputs, (loss, sums) = dino_losses.inputs, dino_losses.discriminator
    _, params, frozen, _ = dino_add

    def logits(maps):
        heads = params["discriminator"](maps, inputs["condition"], logits_only)
        by_map = [values for values, _ in heads]
        return sum(map(jnp.sum, by_map)), by_map

    gradient = jax.jit(jax.grad(logits, has_aux=True))
    real_gradients, real = gradient(inputs["real"].maps)
    _, fake = gradient(inputs["fake"])

    def total(by_map):  # mean over a map's positions, sum over maps and examples
        means = [np.mean(np.asarray(x, np.float64).reshape(len(x), -1), axis=1) for x in by_map]
        return np.sum(np.asarray(inputs["present"]) * sum(means))

    pairs = zip(real, fake, strict=True)
    hinge = total([np.maximum(1 - x, 0) + np.maximum(1 + y, 0) for x, y in pairs])
    r1 = total([np.sum(np.square(x), axis=-1) for x in real_gradients])
    np.testing.assert_allclose(sums.metrics["r1"], r1, rtol=1e-4)
    np.testing.assert_allclose(loss, hinge + 0.1 * r1, rtol=1e-4)
    without = jax.jit(make_add("dino", r1_weight=0.0).objective.loss, static_argnums=0)
    loss, sums = without("discriminator", params, frozen, inputs, KEY, STEP)
    np.testing.assert_allclose(loss, hinge, rtol=1e-4)
    assert "r1" not in sums.metrics


@pytest.mark.slow
def test_microbatches_give_the_same_step(add, recipe, assert_same_in_microbatches):
    """Each microbatch gets the features that the student forwarded for its rows."""
    batch = recipe.rows([1, 2, 0, 3], side=8)
    assert_same_in_microbatches(add.objective, add.params, add.frozen, batch)


def test_grid_neighbours():
    expected = [[-1, -1, -1, -1, 0, 1, -1, 3, 4], [-1, -1, -1, 0, 1, 2, 3, 4, 5]]
    assert grid_neighbours(2, 3)[:2].tolist() == expected


def test_targets_of_all_sizes_are_found_in_packed_rows(random_network):
    """Their pixels and their tokens, without those of contexts."""
    sizes = ((24, 16), (16, 32))
    rng = np.random.default_rng(0)

    def image(size):
        return rng.integers(0, 256, (size[1], size[0], 3), np.uint8)

    examples = [
        Example("a", image(sizes[0]), (image(sizes[1]), image(sizes[0])), np.ones(2, np.int32)),
        Example("b", image(sizes[1]), (image(sizes[1]),), np.ones(2, np.int32)),
        Example("c", image(sizes[0]), (), np.ones(2, np.int32)),
    ]
    data = DataConfig(
        geometry=GeometryConfig(sizes=sizes, pixels_per_token=8),
        packing=PackingConfig(image_tokens=50, text_tokens=8, max_examples=4),
    )
    slots = {size_key(sizes[1]): 4, size_key(sizes[0]): 4}
    row = assemble(examples, [3, 4, 5], slots, data)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], row)
    autoencoder = random_network(
        lambda: Autoencoder(AutoencoderConfig.tiny(channels=8), rngs=nnx.Rngs(0))
    )
    latents = jax.jit(encode_images)(autoencoder, batch)
    all_targets = targets_by_size(batch, autoencoder.config.downsample)
    by_size = dict(zip(sorted(batch.images), all_targets, strict=True))
    for key, indices in ((size_key(sizes[0]), [0, 2]), (size_key(sizes[1]), [1])):
        targets = by_size[key]
        assert np.flatnonzero(targets.present[0]).tolist() == indices
        images = jax.jit(decode)(autoencoder, targets, latents)
        for i in indices:
            pixels = to_pixels(jnp.asarray(examples[i].target))
            np.testing.assert_array_equal(targets.pixels[0, i], pixels)
            encoded = jax.jit(lambda a, x: a.decode(a.encode(x)))(autoencoder, pixels[None])
            np.testing.assert_allclose(images[0, i], encoded[0], atol=1e-4)


def test_latents_and_unknown_features_are_refused(add):
    objective, _, frozen, batch = add
    batch = batch.replace(latents=jnp.zeros((*batch.segments.shape, 24)))
    with pytest.raises(ValueError, match="ADD needs pixels: leave data.latents.path empty"):
        objective.prepare(frozen, batch)
    with pytest.raises(ValueError, match="features 'vgg' is not one of dino, efficientnet"):
        AddConfig(features="vgg")
