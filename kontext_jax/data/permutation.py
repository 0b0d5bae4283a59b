"""Keyed permutations of any length in O(1) memory, the same on every machine and in every release.

(`grain.experimental.index_shuffle` takes milliseconds for lengths below a hundred.)
"""

import hashlib
import math

ROUNDS = 4


def permuted(index: int, length: int, key: str) -> int:
    """Where a pseudo-random permutation of ``range(length)`` takes ``index``.

    A Feistel network whose halves are the rows and columns of a grid of at least ``length`` cells.
    It permutes the cells; those outside the range are walked past (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002).

    Args:
      index: from 0 to ``length - 1``.
      length: number of elements, at least 1.
      key: selects the permutation.
    """
    height = math.isqrt(length - 1) + 1
    width = -(-length // height)
    while True:
        row, column = divmod(index, width)
        for i in range(ROUNDS):
            row = (row + hashed(f"{key} {i} row {column}")) % height
            column = (column + hashed(f"{key} {i} column {row}")) % width
        index = row * width + column
        if index < length:
            return index


def hashed(text: str) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
