"""The kernel distance against its formula as explicit sums and against known distances."""

import itertools
import re

import numpy as np
import pytest

from kontext_jax.metrics.kernel import kernel_distance


def samples(number: int, width: int, seed: int) -> np.ndarray:
    """Correlated features of different scales with non-zero mean; float32 as from a network."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) * np.geomspace(1, 1e-3, width)
    return (rng.standard_normal((number, width)) @ mix + rng.standard_normal(width)).astype("f4")


def reference(first: np.ndarray, second: np.ndarray) -> float:
    def kernel(x, y):
        return (float(x.astype(np.float64) @ y.astype(np.float64)) / len(x) + 1) ** 3

    m = len(first)
    within = sum(
        kernel(vectors[i], vectors[j])
        for vectors in (first, second)
        for i, j in itertools.permutations(range(m), 2)
    )
    between = sum(kernel(x, y) for x, y in itertools.product(first, second))
    return within / (m * (m - 1)) - 2 * between / m**2


@pytest.mark.parametrize("number", [2, 7, 40], ids="{} samples".format)
def test_the_distance_matches_the_formula(number):
    first, second = samples(number, 5, seed=1), samples(number, 5, seed=2)
    expected = reference(first, second)
    assert abs(expected) > 0.1
    assert kernel_distance(first, second) == (pytest.approx(expected, rel=1e-10), 0.0)


def test_two_repeated_points_give_their_kernel_distance_for_any_subset():
    """It is k(a, a) + k(b, b) - 2 k(a, b), whatever the sizes of sets and subsets."""
    a, b = np.array([1.0, 2.0, -1.0, 0.0]), np.array([0.0, 1.0, 1.0, 2.0])
    expected = (6 / 4 + 1) ** 3 + (6 / 4 + 1) ** 3 - 2 * (1 / 4 + 1) ** 3
    for n, m, size in ((9, 5, 1000), (5, 9, 3), (6, 6, 2)):
        mean, std = kernel_distance(np.tile(a, (n, 1)), np.tile(b, (m, 1)), 10, size)
        assert mean == pytest.approx(expected, rel=1e-12) and std < 1e-12


def test_samples_of_one_distribution_have_zero_mean_distance():
    """Within 4 standard errors; a biased estimate, with the diagonals, would be 20 away."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 4000, 4))
    mean, std = kernel_distance(first, second, num_subsets=400, subset_size=10)
    assert std > 0.1 and abs(mean) < 4 * std / 20


def test_subsets_are_random_and_have_the_requested_size():
    """The first set has two kinds of samples; the moments reveal how often a pair has both 2s."""
    first = np.repeat([[0.0], [2.0]], 50, axis=0)
    second = np.zeros((3, 1))
    mean, std = kernel_distance(first, second, num_subsets=2000, subset_size=2)
    # Between two samples k is 125 if both are 2 and 1 otherwise; between a sample and 0 it is 1.
    assert mean == pytest.approx(124 * 49 / 198, rel=0.1)
    assert std == pytest.approx(124 * np.sqrt(49 / 198 * 149 / 198), rel=0.05)


def test_subset_size_is_capped_at_the_smaller_set():
    first, second = samples(7, 5, seed=1), samples(30, 5, seed=2)
    assert kernel_distance(first, second) == kernel_distance(first, second, subset_size=7)
    assert kernel_distance(first, second) != kernel_distance(first, second, subset_size=6)
    assert kernel_distance(second, first)[1] > 0


def test_the_seed_determines_the_subsets():
    first, second = samples(30, 5, seed=1), samples(20, 5, seed=2)
    results = [kernel_distance(first, second, 5, 10, seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("first", "second", "settings", "message"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), {}, "needs at least two samples per set, not 1."),
        (np.ones((5, 3)), np.ones((0, 3)), {}, "needs at least two samples per set, not 0."),
        (np.ones((5, 3)), np.full((5, 3), np.nan), {}, "needs finite features, and some are not."),
        (
            np.ones((5, 3)), np.ones((5, 3)), {"subset_size": 1},
            "at least two samples, not num_subsets 100 and subset_size 1.",
        ),
        (
            np.ones((5, 3)), np.ones((5, 3)), {"num_subsets": 0},
            "at least two samples, not num_subsets 0 and subset_size 1000.",
        ),
    ],
)  # fmt: skip
def test_invalid_sets_and_subsets_are_rejected(first, second, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel_distance(first, second, **settings)
