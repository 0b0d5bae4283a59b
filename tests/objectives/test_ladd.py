"""What metrics do not see: LADD's images, levels, losses and gradients, one by one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import flow
from kontext_jax.flops import forward_flops
from kontext_jax.models.discriminator import BlockHeads
from kontext_jax.models.flux import Flux, FluxConfig
from kontext_jax.objectives.ladd import LaddConfig, plain, with_slope
from kontext_jax.objectives.student import StudentTimes
from kontext_jax.objectives.transformer import lengths_of, target_membership
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig, sample
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.training.train_state import (
    abstract_state,
    init_state,
    jit_train_step,
    make_optimizers,
    make_train_step,
)

KEY = jax.random.key(3)
AFTER = jnp.array(500)


def keys_of(ladd):
    return flow.example_keys(KEY, ladd.tokens.example_ids)


def at(value: float) -> StudentTimes:
    """Always this time."""
    return StudentTimes(values=(value,), warmup=(1.0,), probabilities=(1.0,))


class Formula(Flux):
    """A transformer that is a formula of the noisy latents and the time of each token."""

    def __init__(self, velocity, config: FluxConfig):
        self.velocity, self.config, self.seen = velocity, config, []

    def __call__(self, latents, text, pooled, t, *, segments, **_):
        token_t = flow.at_tokens(t, segments)
        self.seen.append((latents, token_t))
        return self.velocity(latents, token_t)

    def tapped(self, *, taps, **inputs):
        velocity = self(**inputs)
        reading = taps.read(jax.tree.map(lambda p: p[0], taps.single), self.features(inputs))
        return velocity, jax.tree.map(lambda x: x[None], reading)

    def features(self, inputs):
        return jnp.tile(inputs["latents"], (1, 1, 2))[..., : self.config.hidden_size]


@pytest.mark.parametrize("t", [1.0, 0.75, 0.5, 0.25])
def test_a_student_that_knows_the_velocity_gives_the_image(make_ladd, target, t):
    ladd = make_ladd(student_times=at(t))
    oracle = Formula(lambda x, t: (x - ladd.tokens.latents) / t, ladd.objective.config.transformer)
    made, times = ladd.objective.make(oracle, ladd.tokens, keys_of(ladd), AFTER)
    np.testing.assert_allclose(made[target], ladd.tokens.latents[target], atol=1e-5)
    np.testing.assert_allclose(times, t)
    noisy, _ = oracle.seen[0]
    np.testing.assert_array_equal(noisy[~target], ladd.tokens.latents[~target])  # clean contexts


def test_the_students_image_is_the_clean_end_of_its_velocity(ladd, target):
    student = Formula(lambda x, t: jnp.sin(x) + t, ladd.objective.config.transformer)
    made, _ = ladd.objective.make(student, ladd.tokens, keys_of(ladd), AFTER)
    x_t, t = student.seen[0]
    np.testing.assert_array_equal(made[target], (x_t - t * (jnp.sin(x_t) + t))[target])


def test_the_student_sees_noise_alone_at_1_and_a_quarter_of_it_at_a_quarter(make_ladd, target):
    def seen(t, latents):
        ladd = make_ladd(student_times=at(t))
        student = Formula(lambda x, t: x, ladd.objective.config.transformer)
        tokens = ladd.tokens.replace(latents=latents)
        ladd.objective.make(student, tokens, keys_of(ladd), AFTER)
        return student.seen[0][0][target]

    latents = make_ladd().tokens.latents
    noise = seen(1.0, latents)
    np.testing.assert_array_equal(noise, seen(1.0, latents + 5))
    np.testing.assert_allclose(
        seen(0.25, latents), 0.75 * latents[target] + 0.25 * noise, atol=1e-6
    )
    assert abs(np.std(noise) - 1) < 0.1


def test_one_step_of_the_untrained_student_is_the_teachers_own_image(make_ladd, target):
    """In training and by both samplers, each from its own first noise."""
    ladd = make_ladd(student_times=at(1.0))
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

    made, _ = jax.jit(ladd.objective.make)(teacher, tokens, keys_of(ladd), AFTER)
    expected = image(flow.split_keys(keys_of(ladd), 2)[1])
    np.testing.assert_allclose(made[target], expected[target], atol=1e-5)
    expected = image(keys_of(ladd))
    for method in ("consistency", "euler"):
        sampler = SamplerConfig(num_steps=1, method=method)
        out = sample(teacher, tokens, KEY, sampler, ladd.objective.config.time)
        np.testing.assert_allclose(out[target], expected[target], atol=1e-5)


def test_times_are_drawn_by_the_two_phases():
    times = StudentTimes()
    keys = jax.random.split(jax.random.key(0), (1, 20_000))
    for step, chances in ((0, times.warmup), (499, times.warmup), (500, times.probabilities)):
        drawn = np.asarray(times.sample(keys, jnp.array(step)))
        shares = [np.mean(drawn == value) for value in times.values]
        np.testing.assert_allclose(shares, chances, atol=0.012)


def test_levels_are_logit_normal_around_one():
    keys = jax.random.split(jax.random.key(0), (1, 100_000))
    renoise = LaddConfig().renoise
    levels = np.asarray(flow.sample_times(keys, jnp.full((1, 100_000), 4096), renoise), np.float64)
    logits = np.log(levels / (1 - levels))
    np.testing.assert_allclose([logits.mean(), logits.std()], [1, 1], atol=0.01)
    np.testing.assert_allclose([levels.mean(), np.median(levels)], [0.697, 0.731], atol=0.003)
    np.testing.assert_allclose(np.quantile(levels, [0.1, 0.9]), [0.43, 0.91], atol=0.005)


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_images_are_noised_to_the_level_that_teacher_and_heads_are_told(
    ladd, target, player, monkeypatch
):
    """Catches a level that is turned round, an image that is not noised, and noise as real."""
    heads_told, taps = [], BlockHeads.taps

    def recording(self, tokens, t, *args, **kwargs):
        heads_told.append(flow.at_tokens(t, tokens.segments))
        return taps(self, tokens, t, *args, **kwargs)

    monkeypatch.setattr(BlockHeads, "taps", recording)
    teacher = Formula(lambda x, t: jnp.zeros_like(x), ladd.objective.config.transformer)
    made = jnp.full_like(ladd.tokens.latents, 3.0)
    judge = getattr(ladd.objective, "student_loss" if player == "student" else "heads_loss")
    judge(ladd.params["discriminator"], teacher, ladd.tokens, made, keys_of(ladd))
    images = [made] if player == "student" else [ladd.tokens.latents, made]
    assert len(teacher.seen) == len(images)
    noises = []
    for (seen, s), image in zip(teacher.seen, images, strict=True):
        assert np.all((s > 0) & (s < 1))
        noise = ((seen - (1 - s) * image) / s)[target]
        assert abs(np.mean(noise)) < 0.15 and abs(np.std(noise) - 1) < 0.15
        noises.append(noise)
        np.testing.assert_array_equal(seen[~target], ladd.tokens.latents[~target])
    assert len(noises) == 1 or np.all(noises[0] != noises[1])
    for (_, told), level in zip(teacher.seen, heads_told, strict=True):
        np.testing.assert_array_equal(level, told)
    assert len(np.unique(teacher.seen[0][1][target])) == 3  # a level an example


def zeroed(heads):
    heads = jax.tree.map(lambda x: x, heads)
    for part in (heads.double, heads.single):
        part.out_layer.kernel[...] = jnp.zeros_like(part.out_layer.kernel[...])
        part.out_layer.bias[...] = jnp.zeros_like(part.out_layer.bias[...])
    return heads


def test_heads_that_say_nothing_have_a_loss_of_two_and_teach_nothing(ladd):
    heads, teacher = zeroed(ladd.params["discriminator"]), ladd.frozen["teacher"]
    made = ladd.tokens.latents + 1
    loss, sums = jax.jit(ladd.objective.heads_loss)(
        heads, teacher, ladd.tokens, made, keys_of(ladd)
    )
    np.testing.assert_allclose([loss, sums.weight], [2 * 3, 3], rtol=1e-6)
    loss, sums = jax.jit(ladd.objective.student_loss)(
        heads, teacher, ladd.tokens, made, keys_of(ladd)
    )
    np.testing.assert_allclose([loss, sums.weight], [0, 3], atol=1e-6)


class Ramp(Formula):
    """Whose features make logits of known size; heads are asked for what they read, no more."""

    def tapped(self, *, taps, **inputs):
        self(**inputs)
        values = 3 * jnp.stack([inputs["latents"][..., 0], inputs["latents"][..., 1]])
        return jnp.zeros_like(inputs["latents"]), self.shape(values)


@pytest.mark.parametrize("adversarial", ["hinge", "non_saturating"])
def test_losses_are_means_over_logits_and_not_of_means(make_ladd, target, adversarial):
    ladd = make_ladd(adversarial=adversarial)
    config = ladd.objective.config.transformer
    made, heads = jnp.cos(9 * ladd.tokens.latents), ladd.params["discriminator"]

    def run(loss, shape):
        teacher = Ramp(lambda x, t: x, config)
        teacher.shape = shape
        value, _ = loss(heads, teacher, ladd.tokens, made, keys_of(ladd))
        return value, [3 * np.asarray(x, np.float64)[..., :2] for x, _ in teacher.seen]

    def means(values):  # over logits, then the sum over examples
        member, counts = (np.asarray(x, np.float64) for x in target_membership(ladd.tokens))
        over_targets = np.einsum("bsk,bsn->bn", values, member) / np.maximum(counts, 1) / 2
        return over_targets.sum()

    def softplus(x):
        return np.logaddexp(0, x)

    value, (real, fake) = run(
        ladd.objective.heads_loss, lambda values: (values, jnp.zeros((2, *values.shape[1:])))
    )
    if adversarial == "hinge":
        expected = means(np.maximum(1 - real, 0) + np.maximum(1 + fake, 0))
    else:
        expected = means(softplus(-real) + softplus(fake))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    value, (fake,) = run(ladd.objective.student_loss, lambda values: values)
    expected = means(-fake) if adversarial == "hinge" else means(softplus(-fake))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def assert_gradient(loss, params, rtol: float):
    """Returns the gradient, which is the loss's slope along it, by central differences."""
    value, grads = jax.jit(loss), jax.jit(jax.grad(loss))(params)
    norm = float(jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))))
    assert norm > 1e-2
    step = 1e-2 / norm

    def moved(sign):
        return jax.tree.map(lambda p, g: p + sign * step * g, params, grads)

    slope = float(value(moved(1)) - value(moved(-1))) / (2 * step)
    np.testing.assert_allclose(slope, norm**2, rtol=rtol)
    return grads


@pytest.mark.parametrize("remat", ["full", "none"])
def test_the_students_gradient_goes_through_the_teacher(ladd, remat):
    """Against central differences along the gradient."""
    student, heads = ladd.params["student"], ladd.params["discriminator"]
    frozen = dict(ladd.frozen)
    frozen["teacher"] = jax.tree.map(lambda x: x, frozen["teacher"])
    frozen["teacher"].config = dataclasses.replace(frozen["teacher"].config, remat=remat)

    def loss(student):
        models = {"student": student, "discriminator": heads}
        inputs = {"tokens": ladd.tokens}
        return ladd.objective.loss("student", models, frozen, inputs, KEY, AFTER)[0]

    grads = assert_gradient(loss, student, rtol=5e-3)
    for leaf in jax.tree.leaves(grads["transformer"].single_blocks):
        assert np.any(leaf != 0)


def test_the_heads_gradient_is_that_of_their_loss(make_ladd):
    """R1's too, which is a gradient of a gradient; against central differences."""
    ladd = make_ladd(r1_weight=0.5)
    made = jnp.cos(9 * ladd.tokens.latents)

    def loss(heads):
        teacher = ladd.frozen["teacher"]
        return ladd.objective.heads_loss(heads, teacher, ladd.tokens, made, keys_of(ladd))[0]

    assert_gradient(loss, ladd.params["discriminator"], rtol=5e-3)


def test_r1_of_a_linear_head_is_its_weights_square():
    w = jnp.array([1.0, -2.0, 2.0])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32)
    values, slope = with_slope(lambda x: x @ w, x)
    np.testing.assert_allclose(values, x @ w)
    np.testing.assert_allclose(slope, jnp.full((2, 5), 9.0))
    assert plain(lambda x: x @ w, x)[1].shape == ()


def test_r1_is_of_the_real_image_alone_and_has_its_weight(make_ladd):
    ladd, without = make_ladd(r1_weight=0.5), make_ladd()
    made = ladd.tokens.latents + 1
    arguments = ladd.params["discriminator"], ladd.frozen["teacher"], ladd.tokens
    loss, sums = jax.jit(ladd.objective.heads_loss)(*arguments, made, keys_of(ladd))
    plain_loss, _ = jax.jit(without.objective.heads_loss)(*arguments, made, keys_of(ladd))
    assert sums.metrics["r1"] > 0
    np.testing.assert_allclose(loss - plain_loss, 0.5 * sums.metrics["r1"], rtol=1e-4)
    other = jax.jit(ladd.objective.heads_loss)(*arguments, made + 1, keys_of(ladd))[1]
    np.testing.assert_allclose(other.metrics["r1"], sums.metrics["r1"], rtol=1e-6)


def test_distillation_is_towards_the_teachers_own_image_without_gradient(make_ladd, target):
    """The aim is a formula here: the teacher's image is half of what it is shown."""
    ladd = make_ladd(distillation_weight=2.0)
    teacher = Formula(lambda x, t: 0.5 * x / t, ladd.objective.config.transformer)
    heads = zeroed(ladd.params["discriminator"])
    made = jnp.cos(ladd.tokens.latents)

    def loss(made):
        return ladd.objective.student_loss(heads, teacher, ladd.tokens, made, keys_of(ladd))[0]

    grads = jax.grad(loss)(made)
    teacher.seen.clear()
    value = loss(made)
    x_s, s = (np.asarray(x, np.float64) for x in teacher.seen[0])
    member, counts = (np.asarray(x, np.float64) for x in target_membership(ladd.tokens))
    error = np.asarray(made, np.float64) - 0.5 * x_s
    weight = 2 * (1 - s) * np.einsum("bsn,bn->bs", member, 1 / np.maximum(counts, 1))[..., None]
    weight = weight / made.shape[-1]
    np.testing.assert_allclose(value, np.sum(weight * error**2), rtol=1e-5)
    np.testing.assert_allclose(grads, 2 * weight * error, atol=1e-6)


@pytest.mark.parametrize("student_every", [1, 3])
def test_players_are_due_in_turn(make_ladd, student_every):
    """The heads move in each step, the student in every third; its metrics are NaN in between."""
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


def test_the_heads_judge_the_images_that_the_student_was_taught_by(ladd):
    """What is handed on is what `make` gives, so that reuse changes nothing but the time."""
    models, inputs = ladd.params, {"tokens": ladd.tokens}
    _, sums = jax.jit(ladd.objective.loss, static_argnums=0)(
        "student", models, ladd.frozen, inputs, KEY, AFTER
    )
    keys = flow.split_keys(keys_of(ladd), 2)[0]
    made, _ = jax.jit(ladd.objective.make)(
        models["student"]["transformer"], ladd.tokens, keys, AFTER
    )
    np.testing.assert_allclose(sums.forwarded["made"], made, atol=1e-6)


def test_the_heads_ask_the_student_only_for_images_that_are_not_handed_on(ladd, target):
    config, tokens = ladd.objective.config.transformer, ladd.tokens
    student = Formula(lambda x, t: x, config)
    models = ladd.params | {"student": {"transformer": student}}
    given = jnp.full_like(tokens.latents, 3.0)
    for forwarded, number, mean in (({"made": given}, 0, 3.0), ({}, 1, 0.0)):
        teacher = Formula(lambda x, t: jnp.zeros_like(x), config)
        frozen, inputs = ladd.frozen | {"teacher": teacher}, {"tokens": tokens} | forwarded
        ladd.objective.loss("discriminator", models, frozen, inputs, KEY, AFTER)
        assert len(student.seen) == number
        seen, s = teacher.seen[1]
        np.testing.assert_allclose(np.mean((seen / (1 - s))[target]), mean, atol=0.5)


def test_microbatches_make_the_same_step(ladd, recipe, assert_same_in_microbatches):
    """Each gets what was handed on of its own rows."""
    batch = recipe.rows([1, 2, 0, 3])
    assert_same_in_microbatches(ladd.objective, ladd.params, ladd.frozen, batch)


def test_a_loss_moves_its_own_player_alone(make_ladd, make_descent):
    """Though the student's depends on the heads and theirs, here, on the student."""
    ladd = make_ladd(student_every=2)
    step = make_descent(ladd.objective)
    for still, moved in (("student", "discriminator"), ("discriminator", "student")):
        params, _ = step(ladd.params, ladd.frozen, ladd.batch, {still: 0.0, moved: 0.1})
        same = jax.tree.map(np.array_equal, params, ladd.params)
        assert all(jax.tree.leaves(same[still]))
        assert not all(jax.tree.leaves(same[moved]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4}]
)
def test_a_step_is_the_same_on_any_mesh(make_ladd, recipe, sizes):
    # A large eps: Adam would else turn the rounding of a gradient near zero into a whole step.
    config = OptimConfig(learning_rate=0.01, warmup_steps=0, eps=1e-2, ema_decay=0.5)
    ladd = make_ladd(heads_optim=config, r1_weight=0.1)
    batch = recipe.rows([1, 2, 0, 3, 1, 1, 2, 3])
    optimizers = make_optimizers(ladd.objective, config, num_steps=9)

    def run(mesh):
        _, shardings = abstract_state(ladd.objective, optimizers, mesh)
        initial = jax.device_put(jax.tree.map(jnp.copy, ladd.params), shardings.params)
        networks = {
            "student": initial["student"],
            "discriminator": {"discriminator": initial["discriminator"]},
        }
        state = init_state(ladd.objective, optimizers, mesh, 0, networks)
        frozen = jax.device_put(ladd.frozen, shardings_of(ladd.frozen, mesh))
        step = jit_train_step(ladd.objective, optimizers, config, 0, shardings)
        with jax.set_mesh(mesh):
            for _ in range(3):
                state, metrics = step(state, frozen, batch)
        return jax.device_get((state.params, metrics))

    params, metrics = run(make_mesh(MeshConfig(), jax.devices()[:1]))
    number = int(np.prod(list(sizes.values())))
    mesh = make_mesh(MeshConfig(**({"data": 1, "fsdp": 1} | sizes)), jax.devices()[:number])
    sharded, sharded_metrics = run(mesh)
    for name in metrics:
        np.testing.assert_allclose(
            sharded_metrics[name], metrics[name], rtol=2e-4, atol=1e-5, err_msg=name
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), params, sharded
    )


def test_flops_count_what_a_step_does(ladd, make_ladd):
    """Student trained (3 forwards), teacher passed through (2) and seen twice more (2): seven."""
    batch = jax.tree.map(jnp.asarray, ladd.batch)
    lengths = lengths_of(batch)
    forward: Any = forward_flops(ladd.objective.config.transformer, **lengths)
    forward = jnp.sum(jnp.where(lengths["target"] > 0, forward, 0.0))
    ratio = float(ladd.objective.flops(batch)) / forward
    assert 7 < ratio < 7.2  # attention has two gradients in the teacher, too
    slower = float(make_ladd(student_every=5).objective.flops(batch)) / forward
    assert 4 < slower < 4.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adversarial": "wgan"}, "adversarial 'wgan' is not one of hinge, non_saturating"),
        ({"student_every": 0}, "student_every 0 must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
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
def test_wrong_times_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StudentTimes(**settings)
