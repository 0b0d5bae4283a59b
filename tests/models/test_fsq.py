import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models import fsq

LEVELS = (5, 4, 3, 2)


def test_values_match_the_formula():
    """In float64 NumPy, for odd and even numbers of levels."""
    z = 3 * np.random.default_rng(0).standard_normal((200, 4))
    levels = np.array(LEVELS, np.float64)
    half = (levels - 1) * 1.001 / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    bounded = np.tanh(z + np.arctanh(offset / half)) * half - offset
    expected = np.round(bounded) / (levels // 2)
    certain = np.abs(bounded - np.round(bounded)) < 0.499
    actual = fsq.quantize(jnp.asarray(z, jnp.float32), LEVELS)
    np.testing.assert_allclose(np.where(certain, actual, 0), np.where(certain, expected, 0))


@pytest.mark.parametrize("channel", range(len(LEVELS)))
def test_every_level_is_reached(channel):
    z = jnp.zeros((2001, 4)).at[:, channel].set(jnp.linspace(-9, 9, 2001))
    values = np.unique(fsq.quantize(z, LEVELS)[:, channel])
    assert len(values) == LEVELS[channel] and values[0] == -1


def test_every_code_has_its_own_index():
    grids = [np.unique(fsq.quantize(jnp.linspace(-9, 9, 999)[:, None], (n,))) for n in LEVELS]
    vectors = jnp.asarray(list(itertools.product(*grids)), jnp.float32)
    indices = np.asarray(fsq.codes(vectors, LEVELS))
    assert sorted(indices) == list(range(fsq.num_codes(LEVELS))) == list(range(120))


def test_gradient_passes_through_the_rounding():
    z = jnp.array([[0.3, -0.2, 0.9, 0.1]])
    gradient = jax.grad(lambda z: jnp.sum(fsq.quantize(z, LEVELS)))(z)
    half, offset, width = (np.asarray(x) for x in fsq._bounds(LEVELS))
    expected = half * (1 - np.tanh(np.asarray(z) + np.arctanh(offset / half)) ** 2) / width
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)
