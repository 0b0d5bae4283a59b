"""Packs a histogram: from the number of examples of each class to rows, without the examples.

Examples of a class cost the same. A template is a row that lists the classes of its examples; it
stands for as many equal rows as its ``repeats`` say. So the work depends on the number of classes
and not on the number of examples.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from kontext_jax.data.permutation import hashed
from kontext_jax.geometry import Size
from kontext_jax.settings import Settings

UNITS = 4096  # of a row's capacity, for scores
STEPS = 1000  # a template makes at most one in STEPS of all rows, so that a mixture remains


@dataclass(kw_only=True, unsafe_hash=True)
class PackingConfig(Settings):
    """Capacity of a row.

    Attributes:
      image_tokens: S, targets and contexts together.
      text_tokens: L, all prompts together.
      max_examples: N.
    """

    image_tokens: int = 8704
    text_tokens: int = 512
    max_examples: int = 1


class Templates(NamedTuple):
    """Rows of one epoch.

    Attributes:
      classes: class of each place, template by template.
      ends: end of each template's places.
      repeats: number of rows that each template makes.
    """

    classes: Int[np.ndarray, " places"]
    ends: Int[np.ndarray, " templates"]
    repeats: Int[np.ndarray, " templates"]


def pack(
    costs: Int[np.ndarray, "c d"], counts: Int[np.ndarray, " c"], capacity: Int[np.ndarray, " d"]
) -> Templates:
    """Packs all examples into rows that no cost overflows, and tries to need few rows.

    Rows are filled one after the other. The first example of a row is drawn at random, so that
    those that are easy to place do not run out first. Then always the class comes next that leaves
    the least of the row, by a square norm in which a cost weighs the more, the more rows it alone
    would fill (Panigrahy et al., "Heuristics for Vector Bin Packing", 2011). All arithmetic is
    exact, so that all machines get the same rows.

    Args:
      costs: what an example of each class needs of a row; the first column is filled best.
      counts: examples of each class; those of a class fit into an empty row.
      capacity: what a row has.
    """
    present = np.flatnonzero(counts)  # classes with examples left
    costs, counts = costs[present].T.astype(np.int32), counts[present].astype(np.int64)
    capacity = capacity.astype(np.int32)[:, None]
    # Integers as floats: sums of products stay below 2**53 and are exact in any order.
    shares = (costs.astype(np.int64) * UNITS // capacity).astype(float)
    squares = np.square(shares)
    remaining = (costs @ counts)[:, None]  # int64
    most = math.ceil((remaining / capacity).max() / STEPS)
    rows, repeats = [], []
    while counts.any():
        if 4 * np.count_nonzero(counts) < 3 * len(counts):
            more = counts > 0
            present, counts, costs, shares, squares = (
                x[..., more] for x in (present, counts, costs, shares, squares)
            )
        demand = remaining / capacity
        weights = np.round(255 * np.square(np.square(demand / demand.max())))
        norms = weights[:, 0] @ squares
        left, free, row, fits = counts.copy(), capacity, [], counts > 0
        while (fits := fits & (costs <= free).all(axis=0) & (left > 0)).any():
            if not row:
                ends = np.cumsum(counts)
                drawn = hashed(f"row {len(rows)}") % int(ends[-1])
                best = int(np.searchsorted(ends, drawn, side="right"))
            else:
                free_shares = free.astype(np.int64) * UNITS // capacity
                scores = 2 * (weights * free_shares)[:, 0] @ shares - norms
                best = int(np.argmax(np.where(fits, scores, -np.inf)))
            row.append(best)
            left[best] -= 1
            free = free - costs[:, best, None]
        members, uses = np.unique(row, return_counts=True)
        repeat = min(most, int((counts[members] // uses).min()))
        rows.append(present[row])
        repeats.append(repeat)
        counts[members] -= repeat * uses
        remaining = remaining - repeat * (costs[:, members] @ uses)[:, None]
    return Templates(np.concatenate(rows), np.cumsum([len(row) for row in rows]), np.array(repeats))


def size_key(size: Size) -> str:
    """Key of a size in `Batch.images`: "HxW"."""
    return f"{size[1]}x{size[0]}"
