"""Cosines against known angles and against the formula row by row."""

import re

import numpy as np
import pytest

from kontext_jax.metrics.similarity import clip_directional, cosine


def vectors(seed: int, number: int = 5) -> np.ndarray:
    """Float32 vectors, as from a network."""
    return np.random.default_rng(seed).normal(0.3, 1, (number, 16)).astype(np.float32)


def test_cosines_match_known_angles_and_ignore_lengths():
    angles = np.array([0.0, 0.3, np.pi / 2, 2.0, np.pi])
    a = np.tile([[3.0, 0.0]], (5, 1))
    b = np.array([1, 1e-6, 1e6, 2, 5])[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    result = cosine(a, b)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, np.cos(angles), atol=1e-15)


def test_each_row_is_compared_with_the_same_row():
    a, b = vectors(0), vectors(1)
    for x, y, result in zip(a.astype(np.float64), b.astype(np.float64), cosine(a, b), strict=True):
        assert result == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-15)
    np.testing.assert_allclose(cosine(a, 7 * a), np.ones(5), atol=1e-15)
    assert cosine(a, a).max() <= 1.0


def test_directional_similarity_matches_the_formula_for_unit_vectors():
    """Doubling an image's vector changes nothing."""
    after, before, text_after, text_before = map(vectors, range(4))
    result = clip_directional(after, 2 * before, text_after, 4 * text_before)
    for row in range(5):
        a, b, c, d = (
            x[row].astype(np.float64) / np.linalg.norm(x[row].astype(np.float64))
            for x in (after, before, text_after, text_before)
        )
        expected = (a - b) @ (c - d) / np.linalg.norm(a - b) / np.linalg.norm(c - d)
        assert result[row] == pytest.approx(expected, abs=1e-14)
    np.testing.assert_allclose(
        clip_directional(before, after, text_after, text_before),
        -clip_directional(after, before, text_after, text_before),
        atol=1e-14,
    )
    np.testing.assert_allclose(clip_directional(after, before, after, before), 1, atol=1e-14)


def test_images_that_are_equal_up_to_rounding_score_zero():
    after, before, text_after, text_before = map(vectors, range(4))
    after[2] = before[2] * np.float32(1.0000002)
    after[3] = before[3]
    result = clip_directional(after, before, text_after, text_before)
    assert (result == 0).tolist() == [False, False, True, True, False]


def test_rows_with_unchanged_captions_are_rejected_and_listed():
    after, before, text_after, text_before = map(vectors, range(4))
    text_after[[1, 4]] = text_before[[1, 4]]
    with pytest.raises(ValueError, match=re.escape("captions of rows [1, 4] are the same before")):
        clip_directional(after, before, text_after, text_before)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_zero_and_non_finite_rows_are_rejected_and_listed(value):
    good, bad = vectors(0), vectors(1)
    bad[3] = value
    for call in (
        lambda: cosine(good, bad),
        lambda: cosine(bad, good),
        lambda: clip_directional(good, vectors(2), bad, vectors(3)),
        lambda: clip_directional(bad, vectors(2), good, vectors(3)),
    ):
        with pytest.raises(ValueError, match=re.escape("Rows [3] are zero or not finite")):
            call()


def test_different_shapes_are_rejected_and_not_broadcast():
    with pytest.raises(ValueError, match=re.escape("the same shape, not (5, 16) and (1, 16)")):
        cosine(vectors(0), vectors(1, 1))
    with pytest.raises(ValueError, match=re.escape("the same shape, not (5, 16) and (4, 16)")):
        clip_directional(vectors(0), vectors(1), vectors(2), vectors(3, 4))
