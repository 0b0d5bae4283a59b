"""Where the names of a chart's points go: beside them, or where there is room, with a line there.

All lengths are in points, 1/72 inch, and grow to the right and up.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

GAP, NEAR, REACH = 5.0, 6.0, 10.0
"""From a point to its name; how far off no name is too far; and from where on a line leads to it.
"""

ON_LINE, ON_DOT, ON_LEAD, LEFT_OUT = 24.0, 96.0, 200.0, 2000.0
"""How much further a name rather goes than lie on a line, or on a point, than have its line cross
another name, and than not be there."""

Segments = Float[np.ndarray, "n 2 2"]
"""Starts and ends, (x, y) each."""


class Box(NamedTuple):
    """Left, lower, right and upper side."""

    left: float
    low: float
    right: float
    high: float

    def nearest(self, spot: tuple[float, float]) -> tuple[float, float]:
        """The place in the box that is nearest to a point."""
        x, y = spot
        return min(max(x, self.left), self.right), min(max(y, self.low), self.high)

    def overlaps(self, other: "Box") -> bool:
        """Whether two boxes have more in common than their sides."""
        aside = self.right <= other.left or other.right <= self.left
        return not (aside or self.high <= other.low or other.high <= self.low)

    def crossed(self, segments: Segments) -> Bool[np.ndarray, " n"]:
        """Which segments go through the box, or lie in it (Liang and Barsky 1984)."""
        start, way = segments[:, 0], segments[:, 1] - segments[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            low = (np.array([self.left, self.low]) - start) / way
            high = (np.array([self.right, self.high]) - start) / way
        enter = np.maximum(np.minimum(low, high).max(axis=1), 0.0)
        return enter < np.minimum(np.maximum(low, high).min(axis=1), 1.0)


class Name(NamedTuple):
    """The point that is named, and the size of what is written there."""

    spot: tuple[float, float]
    width: float
    height: float


def place_names(names: Sequence[Name], panel: Box, drawn: Segments) -> list[Box | None]:
    """A place for each name; None for one that finds none.

    No name leaves the panel or covers another. One after the other takes the nearest place that is
    left, but rather goes some way than lie on what is drawn, and further than have its line cross
    another name. This is tried from the left, from the right, from the middle and as given, and
    what costs least is kept.

    Args:
      names: what is to be placed.
      panel: all that there is room for.
      drawn: lines between points; a point by itself has a segment without length.
    """
    middle = (panel.left + panel.right) / 2
    numbers = range(len(names))
    orders = [
        list(numbers),
        sorted(numbers, key=lambda i: names[i].spot[0]),
        sorted(numbers, key=lambda i: -names[i].spot[0]),
        sorted(numbers, key=lambda i: abs(names[i].spot[0] - middle)),
    ]
    tries = [_place_in_order(names, order, panel, drawn) for order in orders]
    return min(tries, key=lambda found: found[0])[1]


def lead_of(box: Box, spot: tuple[float, float]) -> tuple[float, float] | None:
    """Where the line from a point to its name ends; None if they are so near that it needs none."""
    end = box.nearest(spot)
    return end if math.dist(end, spot) > REACH else None


def _place_in_order(
    names: Sequence[Name], order: Sequence[int], panel: Box, drawn: Segments
) -> tuple[float, list[Box | None]]:
    """(cost of all, places), each name in turn taking the best that those before have left."""
    boxes: list[Box | None] = [None] * len(names)
    total = 0.0
    leads = np.empty((0, 2, 2))
    dots = drawn[:, :1].repeat(2, axis=1)
    for i in order:
        spot = names[i].spot
        taken = [box for box in boxes if box is not None]
        best, least = None, LEFT_OUT
        for cost, box in _places(names[i], panel):
            if cost >= least:
                break
            if any(box.overlaps(other) for other in taken):
                continue
            lead = np.array([[box.nearest(spot), spot]])
            crossings = sum(other.crossed(lead).sum() for other in taken) + box.crossed(leads).sum()
            cost += ON_LEAD * crossings
            cost += ON_LINE * box.crossed(drawn).any() + ON_DOT * box.crossed(dots).any()
            best, least = (box, cost) if cost < least else (best, least)
        boxes[i], total = best, total + least
        if best is not None:
            leads = np.concatenate([leads, np.array([[best.nearest(spot), spot]])])
    return total, boxes


def _places(name: Name, panel: Box) -> list[tuple[float, Box]]:
    """(cost, box), nearest first: above and below a point, to its sides, pushed into the panel."""
    (x, y), width, height = name
    if width > panel.right - panel.left:
        return []
    found = []
    for row in range(math.ceil((panel.high - panel.low) / height)):
        rise = GAP / 2 + row * height
        for low, aside in itertools.product((y + rise, y - rise - height), (GAP, 35, 65)):
            for wanted in (x + aside, x - aside - width):
                left = max(min(wanted, panel.right - width), panel.left)
                box = Box(left, low, left + width, low + height)
                if panel.low <= low and box.high <= panel.high:
                    away = max(math.dist(box.nearest(name.spot), name.spot), NEAR)
                    found.append((away + 0.1 * abs(left - wanted), box))
    return sorted(found, key=lambda place: place[0])
