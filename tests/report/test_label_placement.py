"""Labels of points lie inside the panel, do not overlap, and are near their points."""

import itertools

import numpy as np
import pytest

from kontext_jax.report.label_placement import GAP, REACH, Box, Label, leader_end, place_labels

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


def dots(anchors) -> np.ndarray:
    return np.array([[anchor, anchor] for anchor in anchors], float)


def overlapping(boxes) -> bool:
    return any(
        a.left < b.right and b.left < a.right and a.low < b.high and b.low < a.high
        for a, b in itertools.combinations(boxes, 2)
    )


@pytest.mark.parametrize("width", [30.0, 80.0, 150.0])
@pytest.mark.parametrize("kind", ["one place", "some pixels", "row", "column", "edge", "corners"])
def test_eight_labels_do_not_overlap(kind, width):
    anchors = crowd(kind)
    boxes = place_labels([Label(anchor, width, HEIGHT) for anchor in anchors], PANEL, dots(anchors))
    assert None not in boxes and not overlapping(boxes)
    for box in boxes:
        assert (box.right - box.left, box.high - box.low) == pytest.approx((width, HEIGHT))
        assert box.left >= PANEL.left and box.right <= PANEL.right
        assert box.low >= PANEL.low and box.high <= PANEL.high
    if width == 30:
        assert not any(box.crossed(dots(anchors)).any() for box in boxes)
        for i, j in itertools.permutations(range(8), 2):
            leader = np.array([[boxes[i].nearest(anchors[i]), anchors[i]]])
            assert not boxes[j].crossed(leader).any()


def test_a_single_label_is_beside_its_point():
    anchor = (200.0, 100.0)
    [box] = place_labels([Label(anchor, 50.0, HEIGHT)], PANEL, dots([anchor]))
    assert (box.left, box.low) == (205.0, 102.5) and leader_end(box, anchor) is None
    assert box.left - anchor[0] == GAP


def test_a_label_at_the_edge_moves_to_the_other_side_of_its_point():
    anchor = (PANEL.right, PANEL.high)
    [box] = place_labels([Label(anchor, 50.0, HEIGHT)], PANEL, dots([anchor]))
    assert box.right == anchor[0] - GAP and box.high == anchor[1] - GAP / 2


def test_labels_move_away_to_keep_off_lines():
    anchor = (200.0, 100.0)
    ends = itertools.product((110.0, 290.0), (80.0, 100.0, 120.0))
    fan = np.array([[anchor, end] for end in ends])
    [box] = place_labels([Label(anchor, 40.0, HEIGHT)], PANEL, fan)
    assert not box.crossed(fan).any() and leader_end(box, anchor) is not None
    # But not as far as the other side of the panel.
    x, y = np.meshgrid(np.arange(40.0, 361.0, 5), [30.0, 200.0], indexing="ij")
    grid = np.stack([x, y], axis=-1)
    drawn = np.concatenate([grid, dots([anchor])])
    [box] = place_labels([Label(anchor, 40.0, HEIGHT)], PANEL, drawn)
    assert box.crossed(grid).any() and leader_end(box, anchor) is None


def test_labels_move_further_away_to_keep_off_points():
    anchor = (200.0, 100.0)
    around = [(x, y) for x in range(130, 271, 10) for y in range(62, 139, 4)]
    [box] = place_labels([Label(anchor, 40.0, HEIGHT)], PANEL, dots([anchor, *around]))
    assert not box.crossed(dots(around)).any() and leader_end(box, anchor) is not None


def test_leader_lines_do_not_cross_labels_if_an_order_avoids_it():
    """Each label is half as wide as the panel; labels of outer points go around the inner ones."""
    anchors = crowd("row")
    boxes = place_labels([Label(anchor, 150.0, HEIGHT) for anchor in anchors], PANEL, dots(anchors))
    for i, j in itertools.permutations(range(8), 2):
        leader = np.array([[boxes[i].nearest(anchors[i]), anchors[i]]])
        assert not boxes[j].crossed(leader).any()


def test_labels_without_a_free_position_are_omitted():
    labels = [Label((200.0, 100.0), width, HEIGHT) for width in (50.0, 321.0, 50.0)]
    first, second, third = place_labels(labels, PANEL, dots([(200.0, 100.0)]))
    assert second is None and first is not None and third is not None
    assert not overlapping([first, third])
    small = Box(0.0, 0.0, 60.0, 25.0)
    boxes = place_labels([Label((30.0, 12.0), 50.0, HEIGHT)] * 8, small, dots([(30.0, 12.0)]))
    placed = [box for box in boxes if box is not None]
    assert 1 <= len(placed) <= 2 and not overlapping(placed)
    undefined = (float("nan"), 100.0)
    assert place_labels([Label(undefined, 50.0, HEIGHT)], PANEL, np.empty((0, 2, 2))) == [None]
    assert place_labels([], PANEL, np.empty((0, 2, 2))) == []


def test_a_leader_line_ends_at_the_nearest_point_of_its_label():
    box = Box(100.0, 100.0, 150.0, 110.0)
    assert leader_end(box, (90.0, 90.0)) == (100.0, 100.0)
    assert leader_end(box, (120.0, 130.0)) == (120.0, 110.0)
    assert leader_end(box, (120.0, 110.0 + REACH)) is None
    assert leader_end(box, (120.0, 105.0)) is None


def test_crossings_agree_with_sampling_points_of_each_segment():
    rng = np.random.default_rng(0)
    box = Box(0.3, 0.4, 0.6, 0.7)
    segments = rng.random((500, 2, 2))
    segments[:50, 1, 0] = segments[:50, 0, 0]  # vertical
    segments[50:100, 1, 1] = segments[50:100, 0, 1]  # horizontal
    segments[100:150, 1] = segments[100:150, 0]  # points
    fraction = np.linspace(0, 1, 4001)[:, None, None]
    samples = segments[:, 0] * (1 - fraction) + segments[:, 1] * fraction
    inside = (samples > (box.left, box.low)) & (samples < (box.right, box.high))
    expected = inside.all(axis=-1).any(axis=0)
    assert 50 < expected.sum() < 450 and expected[100:150].any()
    np.testing.assert_array_equal(box.crossed(segments), expected)
