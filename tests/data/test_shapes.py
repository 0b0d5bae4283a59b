"""Shapes as columns."""

import numpy as np

from kontext_jax.data.shapes import Shape, Shapes


def test_columns_give_back_the_shapes():
    shapes = [
        Shape((32, 16), ((16, 16), (32, 16)), 5),
        Shape((16, 16), (), 7),
        Shape((32, 16), ((16, 16), (32, 16)), 6),
        Shape((32, 16), ((32, 16), (16, 16)), 5),
    ]
    columns = Shapes.of(shapes)
    assert list(columns) == shapes and len(columns) == 4
    assert columns.entries.tolist() == [0, 1, 0, 2]
    assert columns[np.int64(3)] == shapes[3]
