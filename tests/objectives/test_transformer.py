"""What all objectives on the transformer share: means over each example's target."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.objectives.transformer import per_example, target_membership


@pytest.fixture(scope="module")
def given(ladd):
    """A value a token, and which tokens are the target of which example."""
    values = np.random.default_rng(0).standard_normal(ladd.tokens.segments.shape, np.float32)
    return jnp.asarray(values), *target_membership(ladd.tokens)


def test_an_example_has_the_mean_of_its_target(given, ladd):
    values, member, counts = given
    tokens = jax.tree.map(np.asarray, ladd.tokens)
    means = np.asarray(per_example(values, member, counts))
    numbers = np.asarray(counts)
    assert np.count_nonzero(numbers) == 3
    for row, place in np.ndindex(means.shape):
        mine = tokens.is_target[row] & (tokens.segments[row] == place + 1)
        assert numbers[row, place] == mine.sum()
        expected = np.asarray(values, np.float64)[row, mine].sum() / max(mine.sum(), 1)
        np.testing.assert_allclose(means[row, place], expected, rtol=1e-6, atol=1e-7)


def test_accelerators_sum_in_full_precision(given):
    """CPUs do anyhow, so it is the program that tells: forwards, and in the gradient."""

    def total(values, member, counts):
        means = per_example(values, member, counts)
        return jnp.sum(means), means

    program = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(*given).as_text()
    products = re.findall(r"stablehlo\.dot_general.*", program)
    assert len(products) == 2
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)
