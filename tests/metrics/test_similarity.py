"""Cosines against angles that are known, and against the formula row by row."""

import re

import numpy as np
import pytest

from kontext_jax.metrics.similarity import clip_directional, cosine


def vectors(seed: int, number: int = 5) -> np.ndarray:
    """Float32, as networks give them."""
    return np.random.default_rng(seed).normal(0.3, 1, (number, 16)).astype(np.float32)


def test_cosines_are_of_the_angles_whatever_the_lengths():
    angles = np.array([0.0, 0.3, np.pi / 2, 2.0, np.pi])
    a = np.tile([[3.0, 0.0]], (5, 1))
    b = np.array([1, 1e-6, 1e6, 2, 5])[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = cosine(a, b)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.cos(angles), atol=1e-15)


def test_rows_go_with_rows():
    a, b = vectors(0), vectors(1)
    for x, y, found in zip(a.astype(np.float64), b.astype(np.float64), cosine(a, b), strict=True):
        assert found == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-15)
    np.testing.assert_allclose(cosine(a, 7 * a), np.ones(5), atol=1e-15)
    assert cosine(a, a).max() <= 1.0


def test_the_direction_is_the_formula_of_unit_vectors():
    """Lengths do not count: doubling a picture's vector changes nothing."""
    after, before, text_after, text_before = map(vectors, range(4))
    found = clip_directional(after, 2 * before, text_after, 4 * text_before)
    for row in range(5):
        a, b, c, d = (
            x[row].astype(np.float64) / np.linalg.norm(x[row].astype(np.float64))
            for x in (after, before, text_after, text_before)
        )
        expected = (a - b) @ (c - d) / np.linalg.norm(a - b) / np.linalg.norm(c - d)
        assert found[row] == pytest.approx(expected, abs=1e-14)
    np.testing.assert_allclose(
        clip_directional(before, after, text_after, text_before),
        -clip_directional(after, before, text_after, text_before),
        atol=1e-14,
    )
    np.testing.assert_allclose(clip_directional(after, before, after, before), 1, atol=1e-14)


def test_a_picture_that_stays_goes_nowhere_and_rounding_is_no_change():
    after, before, text_after, text_before = map(vectors, range(4))
    after[2] = before[2] * np.float32(1.0000002)
    after[3] = before[3]
    found = clip_directional(after, before, text_after, text_before)
    assert (found == 0).tolist() == [False, False, True, True, False]


def test_captions_that_stay_are_refused_and_named():
    after, before, text_after, text_before = map(vectors, range(4))
    text_after[[1, 4]] = text_before[[1, 4]]
    with pytest.raises(ValueError, match=re.escape("captions of rows [1, 4] are the same before")):
        clip_directional(after, before, text_after, text_before)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_vectors_without_a_direction_are_refused_and_named(value):
    good, bad = vectors(0), vectors(1)
    bad[3] = value
    for call in (
        lambda: cosine(good, bad),
        lambda: cosine(bad, good),
        lambda: clip_directional(good, vectors(2), bad, vectors(3)),
        lambda: clip_directional(bad, vectors(2), good, vectors(3)),
    ):
        with pytest.raises(ValueError, match=re.escape("no cosine: rows [3] are")):
            call()


def test_other_shapes_are_refused_and_not_stretched():
    with pytest.raises(ValueError, match=re.escape("(5, 16) and (1, 16) do not go row by row")):
        cosine(vectors(0), vectors(1, 1))
    with pytest.raises(ValueError, match=re.escape("(5, 16) and (4, 16) do not go row by row")):
        clip_directional(vectors(0), vectors(1), vectors(2), vectors(3, 4))
