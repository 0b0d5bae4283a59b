import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import flow
from kontext_jax.flow import TimeConfig


def test_the_path_runs_from_data_to_noise():
    x, e = jax.random.normal(jax.random.key(0), (2, 5))
    zero, one = jnp.zeros(5), jnp.ones(5)
    np.testing.assert_array_equal(flow.interpolate(x, e, zero), x)
    np.testing.assert_array_equal(flow.interpolate(x, e, one), e)


def test_denoise_inverts_interpolate_and_velocity_is_its_derivative():
    x, e = jax.random.normal(jax.random.key(0), (2, 5))
    t = jnp.linspace(0.1, 0.9, 5)
    x_t = flow.interpolate(x, e, t)
    np.testing.assert_allclose(flow.denoise(x_t, flow.velocity(x, e), t), x, atol=1e-6)
    derivative = jax.vmap(jax.grad(flow.interpolate, argnums=2))(x, e, t)
    np.testing.assert_allclose(flow.velocity(x, e), derivative, atol=1e-6)


@pytest.mark.parametrize(("tokens", "mu"), [(4116, 1.15339), (4042, 1.14086), (256, 0.5)])
def test_mu_matches_flux(tokens, mu):
    np.testing.assert_allclose(TimeConfig().mu(tokens), mu, atol=5e-6)


def test_schedule_matches_black_forest_labs():
    """``e^mu / (e^mu + 1 / t - 1)`` for evenly spaced t, in float64."""
    t = np.linspace(1, 0, 29)[:-1]
    mu = 0.5 + (1.15 - 0.5) * (4096 - 256) / (4096 - 256)
    expected = np.append(np.exp(mu) / (np.exp(mu) + (1 / t - 1)), 0)
    np.testing.assert_allclose(flow.schedule(28, 4096, TimeConfig()), expected, atol=1e-6)


def test_shift_is_a_translation_of_logits():
    t = jnp.linspace(0.05, 0.95, 7)
    shifted = flow.shift_time(t, jnp.full(7, 0.7))
    logit = lambda p: np.log(np.asarray(p, np.float64) / (1 - np.asarray(p, np.float64)))  # noqa: E731
    np.testing.assert_allclose(logit(shifted), logit(t) + 0.7, atol=1e-5)


def test_training_times_are_logit_normal_and_shifted_by_mu():
    config = TimeConfig(mean=0.3, std=0.8)
    keys = jax.random.split(jax.random.key(0), 20_000)
    for tokens in (64, 4096):
        times = jax.vmap(lambda k, n=tokens: flow.sample_time(k, jnp.asarray(n), config))(keys)
        logits = np.log(times / (1 - times))
        np.testing.assert_allclose(logits.mean(), 0.3 + config.mu(tokens), atol=0.02)
        np.testing.assert_allclose(logits.std(), 0.8, atol=0.02)


@pytest.mark.parametrize(("shift", "mu"), [("resolution", 1.15), ("none", 0.0)])
def test_uniform_training_times_are_shifted_by_mu(shift, mu):
    config = TimeConfig(distribution="uniform", shift=shift)
    keys = jax.random.split(jax.random.key(0), 20_000)
    times = jax.vmap(lambda key: flow.sample_time(key, jnp.asarray(4096), config))(keys)
    unshifted = jax.nn.sigmoid(jnp.log(times / (1 - times)) - mu)
    levels = np.linspace(0, 1, 21)
    np.testing.assert_allclose(np.quantile(unshifted, levels), levels, atol=0.015)


def test_noise_does_not_depend_on_the_packing():
    key = jax.random.key(3)

    def noise(ids, segments, offsets):
        keys = flow.example_keys(key, jnp.array([ids]))
        return flow.token_noise(keys, jnp.array([segments]), jnp.array([offsets]), 4)[0]

    packed = noise([7, 9], [1, 1, 2, 2, 2, 0], [0, 1, 0, 1, 2, 0])
    alone = noise([9], [1, 1, 1], [0, 1, 2])
    np.testing.assert_array_equal(packed[2:5], alone)
    assert not np.allclose(packed[0], packed[2])
    assert not np.allclose(packed[0], packed[1])


def test_noise_is_standard_normal():
    keys = flow.example_keys(jax.random.key(0), jnp.arange(16)[None])
    segments = jnp.repeat(jnp.arange(1, 17), 64)[None]
    offsets = jnp.tile(jnp.arange(64), 16)[None]
    noise = np.asarray(flow.token_noise(keys, segments, offsets, 24)).ravel()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "choices"),
    [("distribution", "'logit_normal' or 'uniform'"), ("shift", "'resolution' or 'none'")],
)
def test_unknown_names_are_refused(name, choices):
    with pytest.raises(ValueError, match=f"time {name} 'linear' is not {choices}"):
        TimeConfig(**{name: "linear"})
