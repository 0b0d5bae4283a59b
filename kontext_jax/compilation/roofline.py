"""The shortest time that a compiled program can take on a chip, and its MFU.

A roofline has three terms: FLOPs at the chip's peak, memory traffic at its bandwidth, and what
collectives send over all links at once. No program is faster than the slowest of the three ("at
best", where all of them overlap); without any overlap it takes their sum.
"""

from kontext_jax.chips import Chip
from kontext_jax.compilation.hlo import Cost


def roofline(
    cost: Cost, model_flops: float, chip: Chip
) -> tuple[dict[str, float], tuple[float, float] | None]:
    """The terms of the roofline, and the MFU with and without overlap.

    Args:
      cost: of one device's program.
      model_flops: of one device and step.
      chip: that the device is, or is part of.

    Returns:
      Seconds by term ("compute", "memory", "links"), and (MFU at best, MFU without overlap); none
      if the chip's data sheet is not known in full.
    """
    if None in (chip.peak_flops, chip.memory_bandwidth, chip.link_bandwidth):
        return {}, None
    sent = sum(traffic.bytes for traffic in cost.collectives.values())
    seconds = {
        "compute": cost.flops * chip.devices / chip.peak_flops,
        "memory": cost.bytes * chip.devices / chip.memory_bandwidth,
        "links": sent * chip.devices / chip.link_bandwidth,
    }
    ideal = model_flops * chip.devices / chip.peak_flops
    return seconds, (ideal / max(seconds.values()), ideal / sum(seconds.values()))
