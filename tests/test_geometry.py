import itertools

import numpy as np
import pytest

from kontext_jax import geometry
from kontext_jax.geometry import (
    GeometryConfig,
    nearest_size,
    num_tokens,
    position_ids,
    resize,
    size_of,
    whole_cells,
)


def test_kontext_sizes_are_the_seventeen_of_flux():
    assert len(geometry.KONTEXT_SIZES) == 17
    assert {(h, w) for w, h in geometry.KONTEXT_SIZES} == set(geometry.KONTEXT_SIZES)
    tokens = [num_tokens(size, 16) for size in geometry.KONTEXT_SIZES]
    assert num_tokens((1024, 1024), 16) == 4096
    assert (min(tokens), max(tokens)) == (4042, 4150)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 1000), (1024, 1024)), ((4000, 1000), (1568, 672)), ((600, 900), (832, 1248))],
)
def test_nearest_size_has_the_nearest_aspect_ratio(size, expected):
    assert nearest_size(*size, geometry.KONTEXT_SIZES) == expected


def test_nearest_size_breaks_ties_by_area():
    squares = [(side, side) for side in (32, 48, 64)]
    assert [nearest_size(side, side, squares) for side in (20, 33, 48, 60, 500)] == [
        (32, 32),
        (32, 32),
        (48, 48),
        (64, 64),
        (64, 64),
    ]


def test_resize_returns_an_image_of_the_right_size_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    assert resize(image, (48, 32)) is image
    assert resize(image, (64, 32)).shape == (32, 64, 3)


def test_target_positions_are_in_raster_order_at_index_zero():
    config = GeometryConfig(sizes=((48, 32),))
    assert position_ids((48, 32), [], config).tolist() == [
        [0, row, column] for row, column in itertools.product(range(2), range(3))
    ]


def test_a_single_context_starts_at_the_origin_of_index_one():
    ids = position_ids((32, 32), [(48, 32)], GeometryConfig(sizes=((32, 32),)))
    assert ids[4:].tolist() == [[1, r, c] for r in range(2) for c in range(3)]


def test_offset_scheme_lays_out_contexts_without_overlap():
    """ComfyUI's rule, in tokens: beside the previous contexts if the plane stays squarer."""
    config = GeometryConfig(sizes=((32, 32),))
    ids = position_ids((32, 32), [(32, 48), (32, 48), (64, 16)], config)[4:]
    assert (ids[:, 0] == 1).all()
    assert len({tuple(i) for i in ids}) == len(ids)
    assert ids[0].tolist() == [1, 0, 0]  # 3 rows x 2 columns at the origin
    assert ids[6].tolist() == [1, 0, 2]  # 3 + 3 rows > 2 + 2 columns: beside
    assert ids[12].tolist() == [1, 3, 0]  # 1 + 3 rows <= 4 + 4 columns: below


def test_index_scheme_numbers_the_contexts():
    config = GeometryConfig(sizes=((32, 32),), position_scheme="index")
    ids = position_ids((16, 16), [(16, 16), (32, 16)], config)
    assert ids.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, 1]]


def test_invalid_settings_and_positions_are_refused():
    with pytest.raises(ValueError, match="100x32 is not a multiple of 16"):
        GeometryConfig(sizes=((100, 32),))
    with pytest.raises(ValueError, match="'spiral' is not one of offset, index"):
        GeometryConfig(position_scheme="spiral")
    with pytest.raises(ValueError, match="geometry.sizes is empty"):
        GeometryConfig(sizes=())
    with pytest.raises(ValueError, match="beyond 2047"):
        position_ids((16, 16), [(40000, 16)], GeometryConfig(sizes=((16, 16),)))


@pytest.mark.parametrize(
    ("size", "expected"), [((32, 48), (32, 48)), ((35, 45), (32, 48)), ((3, 8), (8, 8))]
)
def test_whole_cells_have_the_nearest_multiples_as_sides(size, expected):
    image = np.zeros((size[1], size[0], 3), np.uint8)
    assert size_of(whole_cells(image, 8)) == expected
