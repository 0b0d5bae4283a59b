"""What accelerator chips can do, by JAX's name for them: the denominators of MFU and rooflines."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The data sheet of a chip; None where it is not recorded here.

    Attributes:
      peak_flops: dense bfloat16 FLOP/s.
      memory: bytes.
      memory_bandwidth: bytes/s to and from memory.
      link_bandwidth: bytes/s sent over all links to other chips together.
      devices: JAX devices per chip, one per core.
    """

    peak_flops: float | None = None
    memory: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    devices: int = 1


GIB = 2**30

# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: "peak compute per chip (bf16)", "HBM capacity"
# and "HBM bandwidth per chip", and half of "bidirectional inter-chip interconnect bandwidth per
# chip".
_V5E = Chip(197e12, 16 * GIB, 819e9, 200e9)
_V5P = Chip(459e12, 95 * GIB, 2765e9, 600e9)
_V6E = Chip(918e12, 32 * GIB, 1638e9, 400e9)

CHIPS: dict[str, Chip] = {
    "TPU v2": Chip(devices=2),
    "TPU v3": Chip(devices=2),
    "TPU v4": Chip(275e12, 32 * GIB, 1228e9, 300e9),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9, devices=2),
    # NVIDIA's data sheets, bfloat16 on tensor cores without sparsity.
    "NVIDIA A100-SXM4-40GB": Chip(312e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12),
    "NVIDIA A100-PCIE-40GB": Chip(312e12),
    "NVIDIA A100 80GB PCIe": Chip(312e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12),
    "NVIDIA H100 PCIe": Chip(756e12),
    "NVIDIA H100 NVL": Chip(835e12),
    "NVIDIA H200": Chip(989e12),
    "NVIDIA H200 NVL": Chip(835e12),
    "NVIDIA GH200 480GB": Chip(989e12),
    "NVIDIA B200": Chip(2250e12),
    "NVIDIA GB200": Chip(2500e12),
}
"""By `jax.Device.device_kind`, exactly: a slice of a GPU, or a variant that is not listed, has
another name and another peak."""


def chip_of(device_kind: str) -> Chip:
    """The chip that a device is, or is part of; nothing is known about one that is not listed."""
    return CHIPS.get(device_kind, Chip())


def num_chips(num_devices: int, device_kind: str) -> float:
    """The number of chips behind ``num_devices`` JAX devices."""
    return num_devices / chip_of(device_kind).devices
