"""Places the labels of a chart's points: beside the point, or further away with a leader line.

All lengths are in points (1/72 inch); x grows to the right and y upwards.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

GAP = 5.0
"""Horizontal distance between a point and a label beside it."""

NEAR = 6.0
"""Distance below which a nearer label costs no less."""

REACH = 10.0
"""Distance above which a label gets a leader line."""

ON_LINE, ON_DOT, ON_LEADER, OMITTED = 24.0, 96.0, 200.0, 2000.0
"""Costs, as additional distance, of a label on a line or on a point, of each crossing between a
label and another label's leader line, and of a label that is omitted."""

Segments = Float[np.ndarray, "n 2 2"]
"""Start and end points (x, y) of line segments."""


class Box(NamedTuple):
    """A rectangle: its left, lower, right and upper side."""

    left: float
    low: float
    right: float
    high: float

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """Returns the point of the box that is nearest to ``point``."""
        x, y = point
        return min(max(x, self.left), self.right), min(max(y, self.low), self.high)

    def overlaps(self, other: "Box") -> bool:
        """Whether the interiors of two boxes intersect."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.high <= other.low or other.high <= self.low)

    def crossed(self, segments: Segments) -> Bool[np.ndarray, " n"]:
        """Returns which segments cross the box or lie inside it (Liang and Barsky 1984)."""
        start, delta = segments[:, 0], segments[:, 1] - segments[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            low = (np.array([self.left, self.low]) - start) / delta
            high = (np.array([self.right, self.high]) - start) / delta
        enter = np.maximum(np.minimum(low, high).max(axis=1), 0.0)
        return enter < np.minimum(np.maximum(low, high).min(axis=1), 1.0)


class Label(NamedTuple):
    """A label: the point to which it belongs, and the size of its text."""

    anchor: tuple[float, float]
    width: float
    height: float


def place_labels(labels: Sequence[Label], panel: Box, drawn: Segments) -> list[Box | None]:
    """Returns a box for each label, inside the panel; None for a label without a free position.

    Labels do not overlap. They are placed greedily, each at the cheapest free position: near its
    anchor, off lines and points, and without crossings between leader lines and other labels. Four
    orders are tried (as given, from the left, from the right, from the middle), and the cheapest
    result is returned.

    Args:
      labels: labels to place.
      panel: the box that has to contain all labels.
      drawn: drawn line segments; a single point is a segment of length 0.
    """
    middle = (panel.left + panel.right) / 2
    indices = range(len(labels))
    orders = [
        list(indices),
        sorted(indices, key=lambda i: labels[i].anchor[0]),
        sorted(indices, key=lambda i: -labels[i].anchor[0]),
        sorted(indices, key=lambda i: abs(labels[i].anchor[0] - middle)),
    ]
    layouts = [_place_in_order(labels, order, panel, drawn) for order in orders]
    return min(layouts, key=lambda layout: layout[0])[1]


def leader_end(box: Box, anchor: tuple[float, float]) -> tuple[float, float] | None:
    """Returns where a label's leader line ends; None if the label is too near to need one."""
    end = box.nearest(anchor)
    return end if math.dist(end, anchor) > REACH else None


def _place_in_order(
    labels: Sequence[Label], order: Sequence[int], panel: Box, drawn: Segments
) -> tuple[float, list[Box | None]]:
    """Places labels greedily in the given order; returns (total cost, boxes)."""
    boxes: list[Box | None] = [None] * len(labels)
    total = 0.0
    leaders = np.empty((0, 2, 2))
    dots = drawn[:, :1].repeat(2, axis=1)
    for i in order:
        anchor = labels[i].anchor
        taken = [box for box in boxes if box is not None]
        best, least = None, OMITTED
        for cost, box in _positions(labels[i], panel):
            if cost >= least:
                break
            if any(box.overlaps(other) for other in taken):
                continue
            leader = np.array([[box.nearest(anchor), anchor]])
            crossings = sum(other.crossed(leader).sum() for other in taken)
            cost += ON_LEADER * (crossings + box.crossed(leaders).sum())
            cost += ON_LINE * box.crossed(drawn).any() + ON_DOT * box.crossed(dots).any()
            best, least = (box, cost) if cost < least else (best, least)
        boxes[i], total = best, total + least
        if best is not None:
            leaders = np.concatenate([leaders, np.array([[best.nearest(anchor), anchor]])])
    return total, boxes


def _positions(label: Label, panel: Box) -> list[tuple[float, Box]]:
    """Returns (cost, box) of the positions inside the panel, cheapest first.

    Positions are above and below the anchor, to its left and right, shifted into the panel.
    """
    (x, y), width, height = label
    if width > panel.right - panel.left:
        return []
    positions = []
    for row in range(math.ceil((panel.high - panel.low) / height)):
        rise = GAP / 2 + row * height
        for low, aside in itertools.product((y + rise, y - rise - height), (GAP, 35, 65)):
            for unshifted in (x + aside, x - aside - width):
                left = max(min(unshifted, panel.right - width), panel.left)
                box = Box(left, low, left + width, low + height)
                if panel.low <= low and box.high <= panel.high:
                    distance = max(math.dist(box.nearest(label.anchor), label.anchor), NEAR)
                    positions.append((distance + 0.1 * abs(left - unshifted), box))
    return sorted(positions, key=lambda position: position[0])
