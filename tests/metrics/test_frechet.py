"""The Frechet distance against its formula in SciPy and against known distances."""

import re

import numpy as np
import pytest
import scipy.linalg

from kontext_jax.metrics.frechet import frechet_distance


def samples(number: int, width: int, seed: int) -> np.ndarray:
    """Correlated features of different scales with non-zero mean; float32 as from a network."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) * np.geomspace(1, 1e-3, width)
    return (rng.standard_normal((number, width)) @ mix + rng.standard_normal(width)).astype("f4")


def reference(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first.astype(np.float64), second.astype(np.float64)
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    difference = first.mean(axis=0) - second.mean(axis=0)
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(difference @ difference + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real)


@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 50), (33, 2000)])
def test_the_distance_matches_the_formula_and_is_symmetric(n, m):
    first, second = samples(n, 32, seed=1), samples(m, 32, seed=2)
    expected = reference(first, second)
    assert expected > 1
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-7)


def test_one_dimension_reduces_to_means_and_standard_deviations():
    first, second = samples(100, 1, seed=1), 3 * samples(70, 1, seed=2)
    deviations = [x.astype(np.float64).std(ddof=1) for x in (first, second)]
    means = [x.astype(np.float64).mean() for x in (first, second)]
    expected = (means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("number", [2, 10, 500], ids="{} samples".format)
def test_a_shift_gives_its_square_and_equal_sets_give_zero(number):
    """Also with fewer samples than features, where covariances are singular."""
    first = samples(number, 64, seed=1).astype(np.float64)
    shift = np.linspace(-1, 1, 64)
    assert frechet_distance(first, first[::-1]) < 1e-12
    assert frechet_distance(first, first + shift) == pytest.approx(shift @ shift, rel=1e-12)


def test_variance_in_directions_of_one_set_only_counts_in_full():
    rng = np.random.default_rng(0)
    first, second = np.zeros((50, 8)), np.zeros((50, 8))
    first[:, :3], second[:, 3:] = rng.standard_normal((50, 3)), rng.standard_normal((50, 5))
    difference = first.mean(axis=0) - second.mean(axis=0)
    expected = difference @ difference
    expected += first.var(axis=0, ddof=1).sum() + second.var(axis=0, ddof=1).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), "needs at least two samples per set, not 1."),
        (np.ones((5, 3)), np.ones((0, 3)), "needs at least two samples per set, not 0."),
        (np.ones((5, 3)), np.full((5, 3), np.inf), "needs finite features, and some are not."),
    ],
)
def test_too_few_samples_and_infinite_features_are_rejected(first, second, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        frechet_distance(first, second)
