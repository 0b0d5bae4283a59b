"""Guidance distillation: the loss against its formula, and a student that equals its teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import flow
from kontext_jax.objectives.guidance import Guidance, GuidanceConfig
from kontext_jax.objectives.transformer import inputs_at, target_membership
from kontext_jax.types import Prompts

KEY, STEP = jax.random.key(3), jnp.array(0)


@pytest.fixture(scope="module")
def setup(recipe, ladd):
    """(objective, frozen networks, batch with empty prompts, the player's networks)."""
    config = recipe.objective.config
    transformer = dataclasses.replace(config.transformer, guidance_embed=True)
    objective = Guidance(
        GuidanceConfig(
            transformer=transformer,
            text_encoder=config.text_encoder,
            pooled=config.pooled,
            scales=(2.0, 5.0),
        )
    )
    batch = jax.tree.map(jnp.asarray, ladd.batch)
    # Only the first token of each prompt, as if the tokenizer had encoded an empty prompt.
    first = jnp.pad(batch.text_segments, ((0, 0), (1, 0)))[:, :-1] != batch.text_segments
    segments = jnp.where(first, batch.text_segments, 0)
    batch = batch.replace(negative=Prompts(jnp.ones_like(batch.text_ids), segments, batch.clip_ids))
    student = objective.init(jax.random.key(0))["student"]["transformer"]
    teacher = ladd.frozen["teacher"]
    for name in vars(teacher):
        if name not in ("config", "guidance_in") and not name.startswith("_"):
            setattr(student, name, getattr(teacher, name))
    return objective, ladd.frozen, batch, {"student": {"transformer": student}}


def run(setup, models):
    objective, frozen, batch, _ = setup

    @jax.jit
    def loss(models, frozen, batch):
        inputs = objective.prepare(frozen, batch)
        return *objective.loss("student", models, frozen, inputs, KEY, STEP), inputs

    return loss(models, frozen, batch)


def test_loss_is_the_squared_distance_to_the_guided_velocity(setup, ladd):
    """A student that equals its teacher is off by (w - 1) (v(prompt) - v(no prompt))."""
    objective, frozen, _, models = setup
    loss, sums, inputs = run(setup, models)
    tokens, teacher = inputs["tokens"], frozen["teacher"]
    keys = flow.example_keys(KEY, tokens.example_ids)
    time_keys, noise_keys, scale_keys = flow.split_keys(keys, 3)
    member, counts = target_membership(tokens)
    t = flow.sample_times(time_keys, counts.astype(jnp.int32), objective.config.time)
    noise = flow.token_noise(noise_keys, tokens.segments, tokens.offsets, tokens.latents.shape[-1])
    x_t = flow.interpolate(tokens.latents, noise, flow.at_tokens(t, tokens.segments))
    velocity = jax.jit(lambda tokens: teacher(**inputs_at(teacher, tokens, x_t, t, 0.0)))
    with_prompt, without = (
        np.asarray(velocity(inputs[name]), np.float64) for name in ("tokens", "negative")
    )
    scale = np.asarray(
        jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, minval=2.0, maxval=5.0)))(scale_keys)
    )
    assert np.all((scale >= 2) & (scale < 5))
    assert len(np.unique(scale)) == 4  # three examples, and all empty slots share one
    token_scale = np.asarray(flow.at_tokens(jnp.asarray(scale), tokens.segments), np.float64)
    square = np.mean(((token_scale - 1) * (with_prompt - without)) ** 2, axis=-1)
    weights = np.asarray(member, np.float64) / np.maximum(np.asarray(counts), 1)[:, None]
    expected = np.einsum("bs,bsn->", square, weights)
    assert expected > 1e-3
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    assert sums.weight == 3


def test_initial_student_equals_its_teacher_at_any_scale(setup, ladd):
    _, frozen, _, models = setup
    student, teacher, tokens = models["student"]["transformer"], frozen["teacher"], ladd.tokens
    t = jnp.full(tokens.example_ids.shape, 0.4)
    expected = jax.jit(lambda: teacher(**inputs_at(teacher, tokens, tokens.latents, t, 0.0)))()
    for scale in (1.0, 4.0):
        inputs = inputs_at(student, tokens, tokens.latents, t, scale)
        out = jax.jit(lambda inputs: student(**inputs))(inputs)
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_guidance_input_has_a_gradient(setup):
    """Although the last layer of its embedder starts at zero."""
    *_, models = setup

    def loss(models):
        return run(setup, models)[0]

    grads = jax.grad(loss)(models)["student"]["transformer"].guidance_in.out_layer.kernel
    assert np.any(grads[...] != 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_embed": False}, "takes the scale as an input: set guidance_embed=True"),
        ({"scales": (3.0, 3.0)}, r"scales \(3.0, 3.0\) must be increasing"),
    ],
)
def test_invalid_settings_are_refused(setup, settings, message):
    config = setup[0].config
    embed = settings.pop("guidance_embed", True)
    transformer = dataclasses.replace(config.transformer, guidance_embed=embed)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, transformer=transformer, **settings)
