import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.data.packing import PackingConfig, size_key
from kontext_jax.data.pipeline import DataConfig, assemble
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.discriminator import (
    BlockHeads,
    HeadsConfig,
    gather_neighbours,
    target_neighbours,
)
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.types import Example, Tokens

# (width, height): all grids have different neighbours, and swapping the axes would show.
SIZES = ((24, 16), (16, 32), (32, 32))
GEOMETRY = GeometryConfig(sizes=SIZES, pixels_per_token=8)
CONFIG = FluxConfig.tiny(
    hidden_size=16, num_heads=1, depth=2, depth_single=3, axes_dim=(4, 6, 6), vec_in_dim=8,
    context_in_dim=8, in_channels=4, mlp_ratio=2.0,
)  # fmt: skip
HEADS = HeadsConfig(width=8, dtype="float32")


def image(size):
    return np.zeros((size[1], size[0], 3), np.uint8)


def tokens_of(numbers, seed: int = 0) -> Tokens:
    """One row with the examples ``numbers``, out of three; their contexts differ in size."""
    contexts = {0: (), 1: (image(SIZES[0]),), 2: (image(SIZES[2]), image(SIZES[1]))}
    examples = [
        Example(str(i), image(SIZES[i]), contexts[i], np.full(3, i + 1, np.int32)) for i in numbers
    ]
    images = [image for e in examples for image in (e.target, *e.contexts)]
    keys = [size_key((image.shape[1], image.shape[0])) for image in images]
    slots = {key: keys.count(key) for key in sorted(set(keys))}
    data = DataConfig(
        geometry=GEOMETRY, packing=PackingConfig(image_tokens=70, text_tokens=12, max_examples=3)
    )
    batch = jax.tree.map(lambda x: x[None], assemble(examples, numbers, slots, data))

    latents = np.zeros((1, 70, 4), np.float32)
    text = np.zeros((1, 12, 8), np.float32)
    pooled = np.zeros((1, 3, 8), np.float32)
    for index, i in enumerate(numbers):
        rng = np.random.default_rng((seed, i))
        image_mask = batch.segments[0] == index + 1
        text_mask = batch.text_segments[0] == index + 1
        latents[0, image_mask] = rng.standard_normal((image_mask.sum(), 4))
        text[0, text_mask] = rng.standard_normal((text_mask.sum(), 8))
        pooled[0, index] = rng.standard_normal(8)
    return Tokens(
        latents=jnp.asarray(latents),
        positions=jnp.asarray(batch.positions),
        segments=jnp.asarray(batch.segments),
        is_target=jnp.asarray(batch.is_target),
        offsets=jnp.asarray(batch.offsets),
        text=jnp.asarray(text),
        text_segments=jnp.asarray(batch.text_segments),
        pooled=jnp.asarray(pooled),
        example_ids=jnp.asarray(batch.example_ids),
    )


@pytest.fixture(scope="module")
def networks(random_network):
    return random_network(
        lambda: (Flux(CONFIG, rngs=nnx.Rngs(0)), BlockHeads(HEADS, CONFIG, rngs=nnx.Rngs(1)))
    )


@jax.jit
def logits_of(networks, tokens: Tokens, t):
    teacher, heads = networks
    return teacher.tapped(
        tokens.latents,
        tokens.text,
        tokens.pooled,
        t,
        positions=tokens.positions,
        segments=tokens.segments,
        text_segments=tokens.text_segments,
        taps=heads.taps(tokens, t),
    )[1]


def times(*values):
    return jnp.array([values + (0.0,) * (3 - len(values))])


def of_example(array, tokens: Tokens, index: int):
    """The values of ``array`` for the target tokens of the example at ``index`` in the row."""
    return np.asarray(array)[..., (tokens.segments[0] == index + 1) & tokens.is_target[0]]


def test_neighbours_are_those_on_the_grid_of_each_target():
    tokens = tokens_of([1, 0, 2])
    neighbours = np.asarray(target_neighbours(tokens)[0])
    assert (neighbours[~np.asarray(tokens.is_target[0])] == -1).all()
    for index, i in enumerate([1, 0, 2]):
        width, height = (side // 8 for side in SIZES[i])
        indices = np.flatnonzero((tokens.segments[0] == index + 1) & tokens.is_target[0])
        grid = np.pad(indices.reshape(height, width), 1, constant_values=-1)
        expected = [
            grid[y : y + 3, x : x + 3].reshape(-1) for y in range(height) for x in range(width)
        ]
        np.testing.assert_array_equal(neighbours[indices], expected)


def test_matmul_of_gathered_neighbours_is_the_convolution():
    tokens = tokens_of([1, 0])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 70, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 5, 2)), jnp.float32)
    patches = gather_neighbours(x, target_neighbours(tokens)).reshape(1, 70, 45)
    out = patches @ kernel.reshape(45, 2)
    for index, i in enumerate([1, 0]):
        width, height = (side // 8 for side in SIZES[i])
        mask = (tokens.segments[0] == index + 1) & tokens.is_target[0]
        grid = x[0, mask].reshape(1, height, width, 5)
        expected = jax.lax.conv_general_dilated(
            grid, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(out[0, mask].reshape(expected.shape), expected, atol=1e-5)


def test_gradient_of_gather_neighbours_is_its_transpose():
    tokens = tokens_of([1, 0])
    neighbours = target_neighbours(tokens)
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.standard_normal((1, 70, 2)), jnp.float32) for _ in range(2))
    out, backward = jax.vjp(lambda x: gather_neighbours(x, neighbours), x)
    y = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)
    left = jnp.vdot(gather_neighbours(other, neighbours), y)
    np.testing.assert_allclose(left, jnp.vdot(other, backward(y)[0]), rtol=1e-5)


@pytest.mark.parametrize(("every", "double", "single"), [(1, 2, 3), (2, 1, 1), (3, 0, 1)])
def test_there_is_one_head_per_tapped_block(random_network, every, double, single):
    config = dataclasses.replace(HEADS, tap_every=every)
    networks = random_network(
        lambda: (Flux(CONFIG, rngs=nnx.Rngs(0)), BlockHeads(config, CONFIG, rngs=nnx.Rngs(1)))
    )
    for heads, number in ((networks[1].double, double), (networks[1].single, single)):
        assert len(heads.in_layer.kernel) == number if number else heads is None
    tokens = tokens_of([1, 0])
    assert logits_of(networks, tokens, times(0.5, 0.2)).shape == (double + single, 1, 70)


def test_flux_has_57_heads_by_default():
    heads = nnx.eval_shape(lambda: BlockHeads(HeadsConfig(), FluxConfig.dev(), rngs=nnx.Rngs(0)))
    assert [len(part.in_layer.kernel) for part in (heads.double, heads.single)] == [19, 38]


def test_taps_leave_the_velocity_unchanged_and_read_the_outputs_of_blocks(networks):
    """A head that reads one channel, against a transformer truncated after each block."""
    teacher, heads = networks
    tokens, t = tokens_of([1, 0]), times(0.5, 0.2)
    inputs = dict(
        latents=tokens.latents, text=tokens.text, pooled=tokens.pooled, t=t,
        positions=tokens.positions, segments=tokens.segments, text_segments=tokens.text_segments,
    )  # fmt: skip
    taps = heads.taps(tokens, t, read=lambda logits, x: x[..., 3])
    velocity, readings = jax.jit(lambda: teacher.tapped(**inputs, taps=taps))()
    np.testing.assert_allclose(velocity, jax.jit(lambda: teacher(**inputs))(), atol=1e-6)
    assert readings.shape[0] == 5
    for depth, depth_single in ((1, 0), (2, 0), (2, 1), (2, 3)):
        short = jax.tree.map(lambda x: x, teacher)
        short.double_blocks = jax.tree.map(lambda x: x[:depth], teacher.double_blocks)  # noqa: B023
        short.single_blocks = jax.tree.map(
            lambda x: x[:depth_single],  # noqa: B023
            teacher.single_blocks,
        )
        x, _, _ = short._run(*(inputs[name] for name in INPUTS), None)
        np.testing.assert_allclose(readings[depth + depth_single - 1], x[..., 3], atol=1e-5)


INPUTS = ("latents", "text", "pooled", "t", "positions", "segments", "text_segments")


def test_logits_do_not_depend_on_other_examples_in_the_row(networks):
    packed = tokens_of([2, 0, 1])
    logits = logits_of(networks, packed, times(0.3, 0.5, 0.7))
    for index, (i, t) in enumerate([(2, 0.3), (0, 0.5), (1, 0.7)]):
        alone = tokens_of([i])
        expected = of_example(logits_of(networks, alone, times(t)), alone, 0)
        np.testing.assert_allclose(of_example(logits, packed, index), expected, atol=2e-5)


def test_logits_of_targets_do_not_depend_on_context_tokens(networks):
    """Changing the input of a head at context tokens changes only their logits."""
    _, heads = networks
    tokens = tokens_of([1, 2])
    taps = heads.taps(tokens, times(0.5, 0.5))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 70, 16)), jnp.float32)
    changed = jnp.where(tokens.is_target[..., None], x, 7.0)
    head = jax.tree.map(lambda p: p[0], heads.single)
    target = np.asarray(tokens.is_target)
    np.testing.assert_array_equal(taps.read(head, x)[target], taps.read(head, changed)[target])
    assert np.any(taps.read(head, x)[~target] != taps.read(head, changed)[~target])


def test_logits_of_bfloat16_heads_are_float32_and_not_rounded(random_network):
    config = dataclasses.replace(HEADS, dtype="bfloat16")
    heads = random_network(lambda: BlockHeads(config, CONFIG, rngs=nnx.Rngs(0)))
    tokens = tokens_of([1, 2])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 70, 16)), jnp.float32)
    head = jax.tree.map(lambda p: p[0], heads.single)
    logits = heads.taps(tokens, times(0.5, 0.5)).read(head, x)
    assert logits.dtype == jnp.float32
    assert np.mean(logits.astype(jnp.bfloat16).astype(jnp.float32) != logits) > 0.9


@pytest.mark.parametrize("condition", ["t", "pooled"])
def test_logits_depend_on_the_noise_level_and_the_prompt(networks, condition):
    _, heads = networks
    tokens = tokens_of([1, 2])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 70, 16)), jnp.float32)
    other, t = tokens, times(0.5, 0.5)
    if condition == "pooled":
        other = tokens.replace(pooled=tokens.pooled.at[:, 0].add(1.0))
    else:
        t = times(0.6, 0.5)
    for kind in (heads.double, heads.single):
        head = jax.tree.map(lambda p: p[-1], kind)
        before = heads.taps(tokens, times(0.5, 0.5)).read(head, x)
        after = heads.taps(other, t).read(head, x)
        assert np.all(of_example(before, tokens, 0) != of_example(after, tokens, 0))
        np.testing.assert_array_equal(of_example(before, tokens, 1), of_example(after, tokens, 1))


def test_heads_do_not_share_parameters(networks):
    teacher, heads = networks
    tokens = tokens_of([1, 0])

    def logit(heads, which):
        return jnp.sum(logits_of((teacher, heads), tokens, times(0.5, 0.2))[which])

    for which in range(5):
        grads = jax.grad(logit)(heads, which)
        kernels = jnp.concatenate([grads.double.conv.kernel[...], grads.single.conv.kernel[...]])
        used = np.asarray(jnp.any(kernels != 0, axis=(1, 2)))
        assert used.tolist() == [i == which for i in range(5)]


def test_tap_every_that_leaves_no_head_is_refused():
    with pytest.raises(ValueError, match="tap_every 4 leaves no head on 2 double and 3 single"):
        BlockHeads(dataclasses.replace(HEADS, tap_every=4), CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tap_every 0 must be 1 or more"):
        HeadsConfig(tap_every=0)
