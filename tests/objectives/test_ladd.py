"""LADD's images, levels, losses and gradients, whose mistakes no training metric shows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import flow
from kontext_jax.flops import forward_flops
from kontext_jax.models.discriminator import BlockHeads
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.objectives.adversarial import logits_and_r1, logits_only
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.student import StudentTimes
from kontext_jax.objectives.transformer import lengths_of, target_membership
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.training.train_state import (
    init_state,
    make_optimizers,
    make_train_step,
)

KEY = jax.random.key(3)
AFTER_WARMUP = jnp.array(500)


def keys_of(ladd):
    return flow.example_keys(KEY, ladd.tokens.example_ids)


def always(value: float) -> StudentTimes:
    """A single time."""
    return StudentTimes(values=(value,), warmup=(1.0,), probabilities=(1.0,))


class Formula(Flux):
    """A transformer whose velocity is a formula of noisy latents and token times; records both."""

    def __init__(self, velocity, config: FluxConfig):
        self.velocity, self.config, self.calls = velocity, config, []

    def __call__(self, latents, text, pooled, t, *, segments, **_):
        token_t = flow.at_tokens(t, segments)
        self.calls.append((latents, token_t))
        return self.velocity(latents, token_t)

    def tapped(self, *, taps, **inputs):
        velocity = self(**inputs)
        first_head = jax.tree.map(lambda p: p[0], taps.single)
        reading = taps.read(first_head, self.features(inputs))
        return velocity, jax.tree.map(lambda x: x[None], reading)

    def features(self, inputs):
        return jnp.tile(inputs["latents"], (1, 1, 2))[..., : self.config.hidden_size]


@pytest.mark.parametrize("t", [1.0, 0.75, 0.5, 0.25])
def test_true_velocity_gives_the_real_image(make_ladd, target, t):
    ladd = make_ladd(student_times=always(t))
    oracle = Formula(lambda x, t: (x - ladd.tokens.latents) / t, ladd.objective.config.transformer)
    generated, times = ladd.objective.generate(oracle, ladd.tokens, keys_of(ladd), AFTER_WARMUP)
    np.testing.assert_allclose(generated[target], ladd.tokens.latents[target], atol=1e-5)
    np.testing.assert_allclose(times, t)
    noisy, _ = oracle.calls[0]
    np.testing.assert_array_equal(noisy[~target], ladd.tokens.latents[~target])  # clean contexts


def test_generated_image_is_x_t_minus_t_times_the_velocity(ladd, target):
    student = Formula(lambda x, t: jnp.sin(x) + t, ladd.objective.config.transformer)
    generated, _ = ladd.objective.generate(student, ladd.tokens, keys_of(ladd), AFTER_WARMUP)
    x_t, t = student.calls[0]
    np.testing.assert_array_equal(generated[target], (x_t - t * (jnp.sin(x_t) + t))[target])


def test_student_input_is_noise_at_time_1_and_a_mixture_at_time_a_quarter(make_ladd, target):
    def student_input(t, latents):
        ladd = make_ladd(student_times=always(t))
        student = Formula(lambda x, t: x, ladd.objective.config.transformer)
        tokens = ladd.tokens.replace(latents=latents)
        ladd.objective.generate(student, tokens, keys_of(ladd), AFTER_WARMUP)
        return student.calls[0][0][target]

    latents = make_ladd().tokens.latents
    noise = student_input(1.0, latents)
    np.testing.assert_array_equal(noise, student_input(1.0, latents + 5))
    mixture = 0.75 * latents[target] + 0.25 * noise
    np.testing.assert_allclose(student_input(0.25, latents), mixture, atol=1e-6)
    assert abs(np.std(noise) - 1) < 0.1


def test_one_step_of_the_initial_student_equals_one_step_of_the_teacher(make_ladd, target):
    """In training and with both samplers, each from its own initial noise."""
    ladd = make_ladd(student_times=always(1.0))
    teacher, tokens = ladd.frozen["teacher"], ladd.tokens

    @jax.jit
    def image(noise_keys):
        channels = tokens.latents.shape[-1]
        noise = flow.token_noise(noise_keys, tokens.segments, tokens.offsets, channels)
        start = jnp.where(tokens.is_target[..., None], noise, tokens.latents)
        return start - teacher(
            start, tokens.text, tokens.pooled, jnp.ones(tokens.example_ids.shape),
            positions=tokens.positions, segments=tokens.segments,
            text_segments=tokens.text_segments,
        )  # fmt: skip

    generated, _ = jax.jit(ladd.objective.generate)(teacher, tokens, keys_of(ladd), AFTER_WARMUP)
    expected = image(flow.split_keys(keys_of(ladd), 2)[1])
    np.testing.assert_allclose(generated[target], expected[target], atol=1e-5)
    expected = image(keys_of(ladd))
    for method in ("consistency", "euler"):
        sampler = SamplerConfig(num_steps=1, method=method)
        out = sample(teacher, tokens, KEY, sampler, ladd.objective.config.time)
        np.testing.assert_allclose(out[target], expected[target], atol=1e-5)


def test_times_have_other_probabilities_during_the_warmup():
    times = StudentTimes()
    keys = jax.random.split(jax.random.key(0), (1, 20_000))
    for step, probabilities in ((0, times.warmup), (499, times.warmup), (500, times.probabilities)):
        drawn = np.asarray(times.sample(keys, jnp.array(step)))
        shares = [np.mean(drawn == value) for value in times.values]
        np.testing.assert_allclose(shares, probabilities, atol=0.012)


def test_levels_are_logit_normal_with_mean_1_and_std_1():
    keys = jax.random.split(jax.random.key(0), (1, 100_000))
    renoise = LaddConfig().renoise
    levels = np.asarray(flow.sample_times(keys, jnp.full((1, 100_000), 4096), renoise), np.float64)
    logits = np.log(levels / (1 - levels))
    np.testing.assert_allclose([logits.mean(), logits.std()], [1, 1], atol=0.01)
    np.testing.assert_allclose([levels.mean(), np.median(levels)], [0.697, 0.731], atol=0.003)
    np.testing.assert_allclose(np.quantile(levels, [0.1, 0.9]), [0.43, 0.91], atol=0.005)


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_images_are_noised_to_the_level_given_to_teacher_and_heads(
    ladd, target, player, monkeypatch
):
    """Detects a reversed level, an image that is not noised, and noise in place of real images."""
    head_levels, taps = [], BlockHeads.taps

    def recording(self, tokens, t, *args, **kwargs):
        head_levels.append(flow.at_tokens(t, tokens.segments))
        return taps(self, tokens, t, *args, **kwargs)

    monkeypatch.setattr(BlockHeads, "taps", recording)
    teacher = Formula(lambda x, t: jnp.zeros_like(x), ladd.objective.config.transformer)
    generated = jnp.full_like(ladd.tokens.latents, 3.0)
    loss = getattr(ladd.objective, f"{player}_loss")
    loss(ladd.params["discriminator"], teacher, ladd.tokens, generated, keys_of(ladd))
    images = [generated] if player == "student" else [ladd.tokens.latents, generated]
    assert len(teacher.calls) == len(images)
    noises = []
    for (x_s, s), image in zip(teacher.calls, images, strict=True):
        assert np.all((s > 0) & (s < 1))
        noise = ((x_s - (1 - s) * image) / s)[target]
        assert abs(np.mean(noise)) < 0.15 and abs(np.std(noise) - 1) < 0.15
        noises.append(noise)
        np.testing.assert_array_equal(x_s[~target], ladd.tokens.latents[~target])
    assert len(noises) == 1 or np.all(noises[0] != noises[1])
    for (_, s), level in zip(teacher.calls, head_levels, strict=True):
        np.testing.assert_array_equal(level, s)
    assert len(np.unique(teacher.calls[0][1][target])) == 3  # one level per example


def with_zero_logits(heads):
    heads = jax.tree.map(lambda x: x, heads)
    for part in (heads.double, heads.single):
        part.out_layer.kernel[...] = jnp.zeros_like(part.out_layer.kernel[...])
        part.out_layer.bias[...] = jnp.zeros_like(part.out_layer.bias[...])
    return heads


def test_zero_logits_give_losses_of_two_and_zero(ladd):
    heads, teacher = with_zero_logits(ladd.params["discriminator"]), ladd.frozen["teacher"]
    generated = ladd.tokens.latents + 1
    loss, sums = jax.jit(ladd.objective.discriminator_loss)(
        heads, teacher, ladd.tokens, generated, keys_of(ladd)
    )
    np.testing.assert_allclose([loss, sums.weight], [2 * 3, 3], rtol=1e-6)
    loss, sums = jax.jit(ladd.objective.student_loss)(
        heads, teacher, ladd.tokens, generated, keys_of(ladd)
    )
    np.testing.assert_allclose([loss, sums.weight], [0, 3], atol=1e-6)


class KnownLogits(Formula):
    """Replaces the logits of two heads by three times the first two channels of the latents."""

    def tapped(self, *, taps, **inputs):
        self(**inputs)
        logits = 3 * jnp.stack([inputs["latents"][..., 0], inputs["latents"][..., 1]])
        return jnp.zeros_like(inputs["latents"]), self.reading_of(logits)


@pytest.mark.parametrize("adversarial", ["hinge", "non_saturating"])
def test_losses_are_means_over_logits_not_losses_of_mean_logits(make_ladd, target, adversarial):
    ladd = make_ladd(adversarial=adversarial)
    config = ladd.objective.config.transformer
    generated, heads = jnp.cos(9 * ladd.tokens.latents), ladd.params["discriminator"]

    def run(loss, reading_of):
        teacher = KnownLogits(lambda x, t: x, config)
        teacher.reading_of = reading_of
        value, _ = loss(heads, teacher, ladd.tokens, generated, keys_of(ladd))
        return value, [3 * np.asarray(x, np.float64)[..., :2] for x, _ in teacher.calls]

    def total(values):  # mean over an example's logits, sum over examples
        member, counts = (np.asarray(x, np.float64) for x in target_membership(ladd.tokens))
        over_targets = np.einsum("bsk,bsn->bn", values, member) / np.maximum(counts, 1) / 2
        return over_targets.sum()

    def softplus(x):
        return np.logaddexp(0, x)

    value, (real, fake) = run(
        ladd.objective.discriminator_loss,
        lambda logits: (logits, jnp.zeros((2, *logits.shape[1:]))),
    )
    if adversarial == "hinge":
        expected = total(np.maximum(1 - real, 0) + np.maximum(1 + fake, 0))
    else:
        expected = total(softplus(-real) + softplus(fake))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    value, (fake,) = run(ladd.objective.student_loss, lambda logits: logits)
    expected = total(-fake) if adversarial == "hinge" else total(softplus(-fake))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def assert_gradient(loss, params, rtol: float):
    """Compares the gradient's norm with central differences along it; returns the gradient."""
    value, grads = jax.jit(loss), jax.jit(jax.grad(loss))(params)
    norm = float(jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))))
    assert norm > 1e-2
    step = 1e-2 / norm

    def shifted(sign):
        return jax.tree.map(lambda p, g: p + sign * step * g, params, grads)

    slope = float(value(shifted(1)) - value(shifted(-1))) / (2 * step)
    np.testing.assert_allclose(slope, norm**2, rtol=rtol)
    return grads


@pytest.mark.parametrize("remat", ["full", "none"])
def test_student_gradient_passes_through_the_teacher(ladd, remat):
    """It matches central differences, and reaches every parameter of the single blocks."""
    student, heads = ladd.params["student"], ladd.params["discriminator"]
    frozen = dict(ladd.frozen)
    frozen["teacher"] = jax.tree.map(lambda x: x, frozen["teacher"])
    frozen["teacher"].config = dataclasses.replace(frozen["teacher"].config, remat=remat)

    def loss(student):
        models = {"student": student, "discriminator": heads}
        inputs = {"tokens": ladd.tokens}
        return ladd.objective.loss("student", models, frozen, inputs, KEY, AFTER_WARMUP)[0]

    grads = assert_gradient(loss, student, rtol=5e-3)
    for leaf in jax.tree.leaves(grads["transformer"].single_blocks):
        assert np.any(leaf != 0)


def test_discriminator_gradient_matches_central_differences(make_ladd):
    """Including R1, whose gradient is a gradient of a gradient."""
    ladd = make_ladd(r1_weight=0.5)
    generated = jnp.cos(9 * ladd.tokens.latents)

    def loss(heads):
        inputs = ladd.frozen["teacher"], ladd.tokens, generated, keys_of(ladd)
        return ladd.objective.discriminator_loss(heads, *inputs)[0]

    assert_gradient(loss, ladd.params["discriminator"], rtol=5e-3)


def test_r1_of_a_linear_head_is_the_squared_norm_of_its_weights():
    w = jnp.array([1.0, -2.0, 2.0])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32)
    values, r1 = logits_and_r1(lambda x: x @ w, x)
    np.testing.assert_allclose(values, x @ w)
    np.testing.assert_allclose(r1, jnp.full((2, 5), 9.0))
    assert logits_only(lambda x: x @ w, x)[1].shape == ()


def test_r1_is_weighted_and_depends_only_on_the_real_image(make_ladd):
    ladd, without = make_ladd(r1_weight=0.5), make_ladd()
    generated = ladd.tokens.latents + 1
    arguments = ladd.params["discriminator"], ladd.frozen["teacher"], ladd.tokens
    loss, sums = jax.jit(ladd.objective.discriminator_loss)(*arguments, generated, keys_of(ladd))
    plain_loss, _ = jax.jit(without.objective.discriminator_loss)(
        *arguments, generated, keys_of(ladd)
    )
    assert sums.metrics["r1"] > 0
    np.testing.assert_allclose(loss - plain_loss, 0.5 * sums.metrics["r1"], rtol=1e-4)
    other = jax.jit(ladd.objective.discriminator_loss)(*arguments, generated + 1, keys_of(ladd))[1]
    np.testing.assert_allclose(other.metrics["r1"], sums.metrics["r1"], rtol=1e-6)


def test_distillation_target_is_the_teachers_denoising_without_gradient(make_ladd, target):
    """With this velocity, the teacher's denoised image is half of its input."""
    ladd = make_ladd(distillation_weight=2.0)
    teacher = Formula(lambda x, t: 0.5 * x / t, ladd.objective.config.transformer)
    heads = with_zero_logits(ladd.params["discriminator"])
    generated = jnp.cos(ladd.tokens.latents)

    def loss(generated):
        return ladd.objective.student_loss(heads, teacher, ladd.tokens, generated, keys_of(ladd))[0]

    grads = jax.grad(loss)(generated)
    teacher.calls.clear()
    value = loss(generated)
    x_s, s = (np.asarray(x, np.float64) for x in teacher.calls[0])
    member, counts = (np.asarray(x, np.float64) for x in target_membership(ladd.tokens))
    error = np.asarray(generated, np.float64) - 0.5 * x_s
    weight = 2 * (1 - s) * np.einsum("bsn,bn->bs", member, 1 / np.maximum(counts, 1))[..., None]
    weight = weight / generated.shape[-1]
    np.testing.assert_allclose(value, np.sum(weight * error**2), rtol=1e-5)
    np.testing.assert_allclose(grads, 2 * weight * error, atol=1e-6)


@pytest.mark.parametrize("student_every", [1, 3])
def test_student_is_updated_in_every_nth_step(make_ladd, student_every):
    """The heads are updated in every step. The student's metrics are NaN in the steps between."""
    config = OptimConfig(learning_rate=1e-3, warmup_steps=0, ema_decay=0.5)
    ladd = make_ladd(student_every=student_every, heads_optim=config)
    optimizers = make_optimizers(ladd.objective, config, num_steps=9)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(ladd.objective, optimizers, mesh, seed=0)
    step = jax.jit(make_train_step(ladd.objective, optimizers, config, seed=0))
    for i in range(4):
        before = state
        state, metrics = step(state, ladd.frozen, ladd.batch)
        due = i % student_every == 0
        for name in ("params", "opt_state", "ema"):
            same = jax.tree.map(np.array_equal, getattr(before, name), getattr(state, name))
            assert all(jax.tree.leaves(same["student"])) != due
            assert not all(jax.tree.leaves(same["discriminator"]))
        assert np.isnan(metrics["student/loss"]) != due
        assert np.isfinite(metrics["discriminator/loss"])
    assert (state.step, state.skipped) == (4, 0)


def test_forwarded_images_are_those_that_the_student_generates(ladd):
    """Forwarding the result of `generate` to the discriminator's loss only saves time."""
    models, inputs = ladd.params, {"tokens": ladd.tokens}
    loss = jax.jit(ladd.objective.loss, static_argnums=0)
    _, sums = loss("student", models, ladd.frozen, inputs, KEY, AFTER_WARMUP)
    keys = flow.split_keys(keys_of(ladd), 2)[0]
    student = models["student"]["transformer"]
    generated, _ = jax.jit(ladd.objective.generate)(student, ladd.tokens, keys, AFTER_WARMUP)
    np.testing.assert_allclose(sums.forwarded["generated"], generated, atol=1e-6)


def test_discriminator_loss_generates_images_only_if_none_are_forwarded(ladd, target):
    config, tokens = ladd.objective.config.transformer, ladd.tokens
    student = Formula(lambda x, t: x, config)
    models = ladd.params | {"student": {"transformer": student}}
    images = jnp.full_like(tokens.latents, 3.0)
    for forwarded, num_calls, mean in (({"generated": images}, 0, 3.0), ({}, 1, 0.0)):
        teacher = Formula(lambda x, t: jnp.zeros_like(x), config)
        frozen, inputs = ladd.frozen | {"teacher": teacher}, {"tokens": tokens} | forwarded
        ladd.objective.loss("discriminator", models, frozen, inputs, KEY, AFTER_WARMUP)
        assert len(student.calls) == num_calls
        x_s, s = teacher.calls[1]
        np.testing.assert_allclose(np.mean((x_s / (1 - s))[target]), mean, atol=0.5)


def test_microbatches_give_the_same_step(ladd, recipe, assert_same_in_microbatches):
    """Each microbatch gets the images that the student forwarded for its rows."""
    batch = recipe.rows([1, 2, 0, 3])
    assert_same_in_microbatches(ladd.objective, ladd.params, ladd.frozen, batch)


def test_each_loss_updates_only_its_own_player(make_ladd, make_descent):
    """Although both losses depend on both players: without forwarding, heads call the student."""
    ladd = make_ladd(student_every=2)
    step = make_descent(ladd.objective)
    for fixed, updated in (("student", "discriminator"), ("discriminator", "student")):
        params, _ = step(ladd.params, ladd.frozen, ladd.batch, {fixed: 0.0, updated: 0.1})
        same = jax.tree.map(np.array_equal, params, ladd.params)
        assert all(jax.tree.leaves(same[fixed]))
        assert not all(jax.tree.leaves(same[updated]))


@pytest.fixture(scope="module")
def three_steps(make_ladd, recipe, three_steps_on):
    """A function from mesh sizes to the parameters and metrics after three steps."""
    heads_optim = OptimConfig(learning_rate=0.01, warmup_steps=0, eps=1e-2, ema_decay=0.5)
    ladd = make_ladd(heads_optim=heads_optim, r1_weight=0.1)
    batch = recipe.rows([1, 2, 0, 3, 1, 1, 2, 3])
    return functools.partial(three_steps_on, ladd.objective, ladd.params, ladd.frozen, batch)


@pytest.fixture(scope="module")
def on_one_device(three_steps):
    return three_steps({})


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4}]
)
def test_step_is_the_same_on_any_mesh(three_steps, on_one_device, assert_same_steps, sizes):
    assert_same_steps(three_steps(sizes), on_one_device)


def test_flops_of_a_step_are_those_of_seven_forward_passes(ladd, make_ladd):
    """Student: 3. Teacher: 2 with gradients by its input, and 2 for the discriminator's loss."""
    batch = jax.tree.map(jnp.asarray, ladd.batch)
    lengths = lengths_of(batch)
    forward: Any = forward_flops(ladd.objective.config.transformer, **lengths)
    forward = jnp.sum(jnp.where(lengths["target"] > 0, forward, 0.0))
    ratio = float(ladd.objective.flops(batch)) / forward
    assert 7 < ratio < 7.2  # attention has two gradients in the teacher too
    rare_student = float(make_ladd(student_every=5).objective.flops(batch)) / forward
    assert 4 < rare_student < 4.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adversarial": "wgan"}, "adversarial 'wgan' is not one of hinge, non_saturating"),
        ({"student_every": 0}, "student_every 0 must be 1 or more"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LaddConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": (1.0, 0.0, 0.5, 0.25)}, "must be above 0 and at most 1"),
        ({"warmup": (0.5, 0.5)}, "warmup .* must be 4 probabilities that add up to 1"),
        ({"probabilities": (0.7, 0.7, 0.1, 0.1)}, "probabilities .* must be 4 probabilities"),
    ],
)
def test_invalid_times_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StudentTimes(**settings)
