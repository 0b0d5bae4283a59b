"""Packing of histograms: rows hold what they may, and all examples are in them."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_jax.data import packing
from kontext_jax.data.packing import Templates, pack


def rows_of(templates: Templates) -> list[list[int]]:
    return [part.tolist() for part in np.split(templates.classes, templates.ends[:-1])]


@given(
    costs=arrays.arrays(np.int64, (7, 3), elements=st.integers(0, 30)),
    counts=arrays.arrays(np.int64, 7, elements=st.integers(0, 10**8)),
)
def test_all_examples_are_in_rows_that_hold_them(costs, counts):
    costs[:, 0] += 1
    capacity = np.array([40, 30, 31])
    counts[0] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "STEPS", 20)
        templates, again = pack(costs, counts, capacity), pack(costs, counts, capacity)
    assert templates.repeats.min() >= 1
    packed = np.zeros(7, np.int64)
    for row, repeats in zip(rows_of(templates), templates.repeats, strict=True):
        assert (costs[row].sum(axis=0) <= capacity).all()
        np.add.at(packed, row, repeats)
    np.testing.assert_array_equal(packed, counts)
    for x, y in zip(templates, again, strict=True):
        np.testing.assert_array_equal(x, y)


def test_complements_find_each_other():
    """Classes of 3 + 7 and of 4 + 6 units, in any numbers."""
    costs, counts = np.array([[3], [4], [6], [7]]), np.array([10**8, 17, 17, 10**8])
    templates = pack(costs, counts, np.array([10]))
    assert templates.repeats.sum() == 10**8 + 17


def test_a_scarce_cost_does_not_pile_up():
    """Half of the examples need much of the second cost: no row should hold only those."""
    costs = np.array([[2, 5], [2, 0]])
    templates = pack(costs, np.array([10**6, 10**6]), np.array([8, 10]))
    assert templates.repeats.sum() <= 1.001 * 5 * 10**5


def test_the_work_does_not_depend_on_the_number_of_examples():
    costs = np.array([[3, 1], [4, 2], [5, 1], [6, 3]])
    few, many = (pack(costs, np.full(4, n), np.array([16, 6])) for n in (10**5, 10**12))
    assert len(many.repeats) < 2 * len(few.repeats) < 3000
    assert many.repeats.sum() <= 1.01 * 10**7 * few.repeats.sum()
