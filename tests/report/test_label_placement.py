"""Names of points: in the panel, clear of each other, near what they name."""

import itertools

import numpy as np
import pytest

from kontext_jax.report.label_placement import GAP, REACH, Box, Name, lead_of, place_names

PANEL = Box(40.0, 30.0, 360.0, 200.0)
HEIGHT = 10.0


def crowd(kind: str) -> list[tuple[float, float]]:
    left, low, right, high = PANEL
    if kind == "one place":
        return [(200.0, 100.0)] * 8
    if kind == "some pixels":
        return [(200.0 + 1.7 * i, 100.0 + (i % 3)) for i in range(8)]
    if kind == "row":
        return [(60.0 + 40 * i, 100.0) for i in range(8)]
    if kind == "column":
        return [(200.0, 40.0 + 4 * i) for i in range(8)]
    if kind == "edge":
        return [(right, 40.0 + 20 * i) for i in range(8)]
    return [*itertools.product((left, right), (low, high))] * 2


def dots(spots) -> np.ndarray:
    return np.array([[spot, spot] for spot in spots], float)


def overlapping(boxes) -> bool:
    return any(
        a.left < b.right and b.left < a.right and a.low < b.high and b.low < a.high
        for a, b in itertools.combinations(boxes, 2)
    )


@pytest.mark.parametrize("width", [30.0, 80.0, 150.0])
@pytest.mark.parametrize("kind", ["one place", "some pixels", "row", "column", "edge", "corners"])
def test_eight_names_have_places_of_their_own(kind, width):
    spots = crowd(kind)
    boxes = place_names([Name(spot, width, HEIGHT) for spot in spots], PANEL, dots(spots))
    assert None not in boxes and not overlapping(boxes)
    for box in boxes:
        assert (box.right - box.left, box.high - box.low) == pytest.approx((width, HEIGHT))
        assert box.left >= PANEL.left and box.right <= PANEL.right
        assert box.low >= PANEL.low and box.high <= PANEL.high
    if width == 30:
        assert not any(box.crossed(dots(spots)).any() for box in boxes)
        for i, j in itertools.permutations(range(8), 2):
            lead = np.array([[boxes[i].nearest(spots[i]), spots[i]]])
            assert not boxes[j].crossed(lead).any()


def test_a_name_alone_stands_beside_its_point():
    spot = (200.0, 100.0)
    [box] = place_names([Name(spot, 50.0, HEIGHT)], PANEL, dots([spot]))
    assert (box.left, box.low) == (205.0, 102.5) and lead_of(box, spot) is None
    assert box.left - spot[0] == GAP


def test_it_changes_sides_where_there_is_no_room():
    spot = (PANEL.right, PANEL.high)
    [box] = place_names([Name(spot, 50.0, HEIGHT)], PANEL, dots([spot]))
    assert box.right == spot[0] - GAP and box.high == spot[1] - GAP / 2


def test_names_go_some_way_to_be_clear_of_lines():
    spot = (200.0, 100.0)
    fan = np.array([[spot, (spot[0] + x, spot[1] + y)] for x in (-90, 90) for y in (-20, 0, 20)])
    [box] = place_names([Name(spot, 40.0, HEIGHT)], PANEL, fan)
    assert not box.crossed(fan).any() and lead_of(box, spot) is not None
    # But not to the other side of the panel.
    x, y = np.meshgrid(np.arange(40.0, 361.0, 5), [30.0, 200.0], indexing="ij")
    grid = np.stack([x, y], axis=-1)
    [box] = place_names([Name(spot, 40.0, HEIGHT)], PANEL, np.concatenate([grid, dots([spot])]))
    assert box.crossed(grid).any() and lead_of(box, spot) is None


def test_names_go_further_to_be_clear_of_points():
    spot = (200.0, 100.0)
    around = [(x, y) for x in range(130, 271, 10) for y in range(62, 139, 4)]
    [box] = place_names([Name(spot, 40.0, HEIGHT)], PANEL, dots([spot, *around]))
    assert not box.crossed(dots(around)).any() and lead_of(box, spot) is not None


def test_the_order_is_one_in_which_lines_cross_no_name():
    """Each name is as wide as half of the panel; those of the outer points go around the inner."""
    spots = crowd("row")
    boxes = place_names([Name(spot, 150.0, HEIGHT) for spot in spots], PANEL, dots(spots))
    for i, j in itertools.permutations(range(8), 2):
        lead = np.array([[boxes[i].nearest(spots[i]), spots[i]]])
        assert not boxes[j].crossed(lead).any()


def test_what_has_no_place_is_left_out():
    names = [Name((200.0, 100.0), width, HEIGHT) for width in (50.0, 321.0, 50.0)]
    first, second, third = place_names(names, PANEL, dots([(200.0, 100.0)]))
    assert second is None and first is not None and third is not None
    assert not overlapping([first, third])
    low = Box(0.0, 0.0, 60.0, 25.0)
    boxes = place_names([Name((30.0, 12.0), 50.0, HEIGHT)] * 8, low, dots([(30.0, 12.0)]))
    kept = [box for box in boxes if box is not None]
    assert 1 <= len(kept) <= 2 and not overlapping(kept)
    nowhere = (float("nan"), 100.0)
    assert place_names([Name(nowhere, 50.0, HEIGHT)], PANEL, np.empty((0, 2, 2))) == [None]
    assert place_names([], PANEL, np.empty((0, 2, 2))) == []


def test_a_lead_ends_at_the_nearest_place_of_its_name():
    box = Box(100.0, 100.0, 150.0, 110.0)
    assert lead_of(box, (90.0, 90.0)) == (100.0, 100.0)
    assert lead_of(box, (120.0, 130.0)) == (120.0, 110.0)
    assert lead_of(box, (120.0, 110.0 + REACH)) is None
    assert lead_of(box, (120.0, 105.0)) is None


def test_crossings_are_those_of_many_points_on_the_way():
    rng = np.random.default_rng(0)
    box = Box(0.3, 0.4, 0.6, 0.7)
    segments = rng.random((500, 2, 2))
    segments[:50, 1, 0] = segments[:50, 0, 0]  # upright
    segments[50:100, 1, 1] = segments[50:100, 0, 1]  # level
    segments[100:150, 1] = segments[100:150, 0]  # points
    along = np.linspace(0, 1, 4001)[:, None, None]
    places = segments[:, 0] * (1 - along) + segments[:, 1] * along
    inside = (places > (box.left, box.low)) & (places < (box.right, box.high))
    expected = inside.all(axis=-1).any(axis=0)
    assert 50 < expected.sum() < 450 and expected[100:150].any()
    np.testing.assert_array_equal(box.crossed(segments), expected)
