import jax

from kontext_jax.chips import Chip, chip_of, num_chips


def test_chips_by_device_kind():
    assert chip_of("TPU v5 lite").peak_flops == 197e12
    assert chip_of("TPU v5").peak_flops == 459e12
    assert chip_of("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert chip_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") == Chip()
    assert chip_of(jax.devices()[0].device_kind) == Chip()  # a CPU
    assert num_chips(8, "TPU v5") == 8
    assert num_chips(8, "TPU7x") == 4
