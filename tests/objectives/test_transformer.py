"""Means over each example's target tokens, which all transformer objectives share."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.objectives.transformer import per_example, target_membership


@pytest.fixture(scope="module")
def arguments(ladd):
    """Arguments of `per_example`: a value for each token, and each example's target tokens."""
    values = np.random.default_rng(0).standard_normal(ladd.tokens.segments.shape, np.float32)
    return jnp.asarray(values), *target_membership(ladd.tokens)


def test_mean_is_over_the_target_tokens_of_each_example(arguments, ladd):
    values, member, counts = arguments
    tokens = jax.tree.map(np.asarray, ladd.tokens)
    means = np.asarray(per_example(values, member, counts))
    lengths = np.asarray(counts)
    assert np.count_nonzero(lengths) == 3
    for row, example in np.ndindex(means.shape):
        mask = tokens.is_target[row] & (tokens.segments[row] == example + 1)
        assert lengths[row, example] == mask.sum()
        expected = np.asarray(values, np.float64)[row, mask].sum() / max(mask.sum(), 1)
        np.testing.assert_allclose(means[row, example], expected, rtol=1e-6, atol=1e-7)


def test_accelerators_sum_in_full_precision(arguments):
    """Both forward and in the gradient. CPUs always do, so the test reads the lowered program."""

    def total(values, member, counts):
        means = per_example(values, member, counts)
        return jnp.sum(means), means

    program = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(*arguments).as_text()
    products = re.findall(r"stablehlo\.dot_general.*", program)
    assert len(products) == 2
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)
