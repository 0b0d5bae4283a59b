"""The roofline of a program of known cost."""

import numpy as np

from kontext_jax.chips import CHIPS, Chip
from kontext_jax.compilation.hlo import Cost, Traffic
from kontext_jax.compilation.roofline import roofline

V5E = CHIPS["TPU v5 lite"]
COST = Cost(
    flops=197e12,
    bytes=0.5 * V5E.memory_bandwidth,
    collectives={"all-gather": Traffic(3.0, 2 * V5E.link_bandwidth)},
    opaque={"kernel": 2.0},
    unknown_loops=1,
)


def test_the_terms_of_the_roofline_and_the_mfu():
    seconds, mfu = roofline(COST, 0.5 * 197e12, V5E)
    assert seconds == {"compute": 1, "memory": 0.5, "links": 2}
    np.testing.assert_allclose(mfu, (0.25, 0.5 / 3.5))


def test_an_unknown_chip_has_no_roofline():
    assert roofline(COST, 0.5 * 197e12, Chip()) == ({}, None)
