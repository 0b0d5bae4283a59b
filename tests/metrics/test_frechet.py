"""The Frechet distance against its formula, written with scipy, and against known distances."""

import re

import numpy as np
import pytest
import scipy.linalg

from kontext_jax.metrics.frechet import frechet_distance


def samples(number: int, width: int, seed: int) -> np.ndarray:
    """Correlated, of different scales, and not around zero; float32 as networks give them."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) * np.geomspace(1, 1e-3, width)
    return (rng.standard_normal((number, width)) @ mix + rng.standard_normal(width)).astype("f4")


def by_the_formula(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first.astype(np.float64), second.astype(np.float64)
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    apart = first.mean(axis=0) - second.mean(axis=0)
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(apart @ apart + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real)


@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 50), (33, 2000)])
def test_it_is_the_formula(n, m):
    first, second = samples(n, 32, seed=1), samples(m, 32, seed=2)
    expected = by_the_formula(first, second)
    assert expected > 1
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-7)


def test_in_one_dimension_it_is_that_of_means_and_deviations():
    first, second = samples(100, 1, seed=1), 3 * samples(70, 1, seed=2)
    deviations = [x.astype(np.float64).std(ddof=1) for x in (first, second)]
    means = [x.astype(np.float64).mean() for x in (first, second)]
    expected = (means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("number", [2, 10, 500], ids="{} samples".format)
def test_a_shift_is_its_square_and_a_copy_is_at_no_distance(number):
    """With fewer samples than features too, where covariances have no inverse."""
    first = samples(number, 64, seed=1).astype(np.float64)
    shift = np.linspace(-1, 1, 64)
    assert frechet_distance(first, first[::-1]) < 1e-12
    assert frechet_distance(first, first + shift) == pytest.approx(shift @ shift, rel=1e-12)


def test_directions_that_one_set_alone_has_count_in_full():
    rng = np.random.default_rng(0)
    first, second = np.zeros((50, 8)), np.zeros((50, 8))
    first[:, :3], second[:, 3:] = rng.standard_normal((50, 3)), rng.standard_normal((50, 5))
    apart = first.mean(axis=0) - second.mean(axis=0)
    expected = apart @ apart + first.var(axis=0, ddof=1).sum() + second.var(axis=0, ddof=1).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), "needs two samples or more of either set, not 1."),
        (np.ones((5, 3)), np.ones((0, 3)), "needs two samples or more of either set, not 0."),
        (np.ones((5, 3)), np.full((5, 3), np.inf), "needs finite features, and some are not."),
    ],
)
def test_what_has_no_distance_is_refused(first, second, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        frechet_distance(first, second)
