import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import flow
from kontext_jax.flow import TimeConfig
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.types import Tokens

KEY = jax.random.key(5)


@pytest.fixture
def tokens() -> Tokens:
    """One row: an edit (4 target and 2 context tokens), text-to-image (3 tokens), padding."""
    segments = jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]])
    return Tokens(
        latents=jax.random.normal(jax.random.key(0), (1, 10, 4)),
        positions=jnp.zeros((1, 10, 3), jnp.int32),
        segments=segments,
        is_target=jnp.array([[True] * 4 + [False] * 2 + [True] * 3 + [False]]),
        offsets=jnp.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0]]),
        text=jnp.zeros((1, 2, 4)),
        text_segments=jnp.array([[1, 2]]),
        pooled=jnp.zeros((1, 2, 4)),
        example_ids=jnp.array([[3, 8]]),
    )


def packed(examples: dict[int, tuple[int, int]]) -> Tokens:
    """One row of ``examples``: id -> (number of target tokens, number of context tokens)."""
    counts = [sum(sizes) for sizes in examples.values()]
    latents = [
        np.random.default_rng(number).standard_normal((count, 4), np.float32)
        for number, count in zip(examples, counts, strict=True)
    ]
    offsets = np.concatenate([np.arange(count) for count in counts])
    num_target = np.repeat([target for target, _ in examples.values()], counts)
    return Tokens(
        latents=jnp.asarray(np.concatenate(latents))[None],
        positions=jnp.zeros((1, len(offsets), 3), jnp.int32),
        segments=jnp.asarray(np.repeat(1 + np.arange(len(counts)), counts))[None],
        is_target=jnp.asarray(offsets < num_target)[None],
        offsets=jnp.asarray(offsets)[None],
        text=jnp.zeros((1, 2, 4)),
        text_segments=jnp.zeros((1, 2), jnp.int32),
        pooled=jnp.zeros((1, len(counts), 4)),
        example_ids=jnp.array([list(examples)]),
    )


def fake(velocity):
    """A transformer that evaluates ``velocity(x, t, text)``, with ``t`` per token."""

    class Transformer(Flux):
        def __init__(self):
            self.config = FluxConfig.tiny()

        def __call__(self, x, text, pooled, t, *, segments, **_):
            index = jnp.maximum(segments - 1, 0)
            return velocity(x, jnp.take_along_axis(t, index, axis=1)[..., None], text)

    return Transformer()


def noise_of(tokens: Tokens):
    keys = flow.example_keys(KEY, tokens.example_ids)
    return flow.token_noise(keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])


@pytest.mark.parametrize("num_steps", [1, 7])
def test_a_straight_velocity_field_is_exact_in_any_number_of_steps(tokens, num_steps):
    data = jax.random.normal(jax.random.key(1), tokens.latents.shape)
    straight = fake(lambda x, t, text: noise_of(tokens) - data)
    out = sample(straight, tokens, KEY, SamplerConfig(num_steps=num_steps), TimeConfig())
    target = np.asarray(tokens.is_target)[0]
    np.testing.assert_allclose(out[0, target], data[0, target], atol=1e-5)
    np.testing.assert_array_equal(out[0, ~target], tokens.latents[0, ~target])


def test_euler_matches_a_loop_over_the_schedule_of_each_example(tokens):
    curved = fake(lambda x, t, text: jnp.sin(x) * t)
    config, time = SamplerConfig(num_steps=5), TimeConfig(base_tokens=2, max_tokens=9)
    out = sample(curved, tokens, KEY, config, time)
    for segment, count in ((1, 4), (2, 3)):
        mask = np.asarray((tokens.segments[0] == segment) & tokens.is_target[0])
        x = np.asarray(noise_of(tokens), np.float64)[0, mask]
        times = np.asarray(flow.schedule(5, count, time), np.float64)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = x + (t_next - t) * np.sin(x) * t
        np.testing.assert_allclose(out[0, mask], x, atol=1e-5)


def test_consistency_adds_fresh_noise_to_the_predicted_image():
    """Records the inputs of a network that predicts a known image, in each of four steps."""
    tokens = packed({3: (300, 20), 8: (200, 0)})
    image = jax.random.normal(jax.random.key(1), tokens.latents.shape)
    target, calls = np.asarray(tokens.is_target), []

    def velocity_from_image(x, t, text):
        calls.append((x, t))
        return (x - image) / t

    config = SamplerConfig(num_steps=4, method="consistency")
    with jax.disable_jit():  # so that all steps are recorded
        out = sample(fake(velocity_from_image), tokens, KEY, config, TimeConfig(shift="none"))
    np.testing.assert_allclose(out[target], image[target], atol=1e-5)
    np.testing.assert_array_equal(out[~target], tokens.latents[~target])
    noises = []
    for (x, t), expected in zip(calls, np.linspace(1, 0, 5)[:-1], strict=True):
        np.testing.assert_allclose(t, np.full_like(t, expected), rtol=1e-6)
        np.testing.assert_array_equal(x[~target], tokens.latents[~target])
        noises.append(np.ravel(((x - (1 - t) * image) / t)[target]))
    np.testing.assert_array_equal(noises[0], np.ravel(noise_of(tokens)[target]))
    np.testing.assert_allclose(np.mean(noises, axis=1), 0, atol=0.1)
    np.testing.assert_allclose(np.std(noises, axis=1), 1, atol=0.1)
    np.testing.assert_allclose(np.corrcoef(noises), np.eye(4), atol=0.1)


def test_consistency_does_not_depend_on_other_examples_in_the_row():
    curved, time = fake(lambda x, t, text: jnp.sin(x) * t), TimeConfig(base_tokens=2, max_tokens=9)
    config = SamplerConfig(num_steps=3, method="consistency")
    examples = {3: (4, 2), 8: (3, 0)}
    in_one_row = sample(curved, packed(examples), KEY, config, time)[0]
    alone = [sample(curved, packed({i: n}), KEY, config, time)[0] for i, n in examples.items()]
    np.testing.assert_allclose(in_one_row, np.concatenate(alone), atol=1e-6)


def test_classifier_free_guidance_matches_its_formula(tokens):
    by_text = fake(lambda x, t, text: jnp.full_like(x, jnp.mean(text)))
    positive = tokens.replace(text=jnp.full((1, 2, 4), 2.0))
    negative = tokens.replace(text=jnp.full((1, 2, 4), 0.5))
    config = SamplerConfig(num_steps=1, cfg_scale=3.0)
    out = sample(by_text, positive, KEY, config, TimeConfig(), negative)
    expected = noise_of(tokens) - (0.5 + 3.0 * (2.0 - 0.5))
    target = np.asarray(tokens.is_target)[0]
    np.testing.assert_allclose(out[0, target], expected[0, target], atol=1e-5)


def test_negative_prompt_and_cfg_scale_need_each_other(tokens):
    transformer = fake(lambda x, t, text: x)
    with pytest.raises(ValueError, match="negative prompt needs a cfg_scale other than 1"):
        sample(transformer, tokens, KEY, SamplerConfig(), TimeConfig(), negative=tokens)
    with pytest.raises(ValueError, match="negative prompt needs a cfg_scale other than 1"):
        sample(transformer, tokens, KEY, SamplerConfig(cfg_scale=2.0), TimeConfig())


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps 0 must be 1 or more"):
        SamplerConfig(num_steps=0)
    with pytest.raises(ValueError, match="strength 0.09 leaves none of 10 steps; .* 1/10, or more"):
        SamplerConfig(num_steps=10, strength=0.09)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.5, float("nan")])
def test_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        SamplerConfig(strength=strength)


@pytest.mark.parametrize(
    ("num_steps", "strength", "first"),
    [(28, 1.0, 0), (28, 0.6, 11), (10, 0.99, 0), (10, 0.3, 7), (10, 0.1, 9), (1, 1.0, 0)],
)
def test_strength_skips_as_many_steps_as_in_diffusers(num_steps, strength, first):
    assert SamplerConfig(num_steps=num_steps, strength=strength).first_step == first


@pytest.mark.parametrize("strength", [0.99, 1.0])
def test_sampling_from_pure_noise_ignores_the_targets_latents(tokens, strength):
    """A strength of 0.99 runs all ten steps, so it also starts from pure noise."""
    curved = fake(lambda x, t, text: jnp.sin(x) * t)
    config = SamplerConfig(num_steps=10, strength=strength)
    latents = jnp.where(tokens.is_target[..., None], jnp.nan, tokens.latents)
    out = sample(curved, tokens.replace(latents=latents), KEY, config, TimeConfig())
    full = sample(curved, tokens, KEY, SamplerConfig(num_steps=10), TimeConfig())
    np.testing.assert_array_equal(out, full)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_partial_sampling_with_the_exact_field_returns_the_start_image(tokens, strength):
    """(x - data) / t is the exact velocity at any x."""
    exact = fake(lambda x, t, text: (x - tokens.latents) / t)
    config = SamplerConfig(num_steps=5, strength=strength)
    out = sample(exact, tokens, KEY, config, TimeConfig())
    np.testing.assert_allclose(out, tokens.latents, atol=1e-5)
    context_and_padding = ~np.asarray(tokens.is_target)
    np.testing.assert_array_equal(out[context_and_padding], tokens.latents[context_and_padding])


def test_partial_sampling_continues_like_full_sampling(tokens):
    """Starts both examples where full sampling is after two of six steps."""
    curved = fake(lambda x, t, text: jnp.sin(x) * t)
    time = TimeConfig(base_tokens=2, max_tokens=9)
    noise = np.asarray(noise_of(tokens), np.float64)[0]
    latents = np.array(tokens.latents)
    for segment, count in ((1, 4), (2, 3)):
        mask = np.asarray((tokens.segments[0] == segment) & tokens.is_target[0])
        times = np.asarray(flow.schedule(6, count, time), np.float64)
        x = noise[mask]
        for t, t_next in zip(times[:2], times[1:3], strict=True):
            x = x + (t_next - t) * np.sin(x) * t
        latents[0, mask] = (x - times[2] * noise[mask]) / (1 - times[2])  # inverts equation (1)
    full = sample(curved, tokens, KEY, SamplerConfig(num_steps=6), time)
    start = tokens.replace(latents=jnp.asarray(latents))
    partial = sample(curved, start, KEY, SamplerConfig(num_steps=6, strength=4 / 6), time)
    np.testing.assert_allclose(partial, full, atol=1e-5)
