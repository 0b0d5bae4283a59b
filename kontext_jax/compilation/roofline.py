"""A lower bound of a compiled program's time on a chip, and the corresponding MFU.

The roofline has three terms: FLOPs at the chip's peak, memory traffic at its bandwidth, and
collectives over all links at once. With full overlap ("at best"), the program takes as long as the
slowest term; without overlap, it takes their sum.
"""

from kontext_jax.chips import Chip
from kontext_jax.compilation.hlo import Cost


def roofline(
    cost: Cost, model_flops: float, chip: Chip
) -> tuple[dict[str, float], tuple[float, float] | None]:
    """Returns the terms of the roofline, and the MFU with and without overlap.

    Args:
      cost: cost of the program, per device.
      model_flops: model FLOPs per device and step.
      chip: the chip that the device is, or is a part of.

    Returns:
      Seconds by term ("compute", "memory", "links"), and (MFU at best, MFU without overlap); ({},
      None) if the chip's peak FLOPs or a bandwidth is not known.
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
