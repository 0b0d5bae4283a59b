"""Devices of TPU slices that are not attached, for ahead-of-time compilation."""

import os

import jax

from kontext_jax import cli


def topology_devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Returns the devices of ``num_slices`` TPU slices with a topology like "v5p:4x4x4".

    Raises:
      cli.UserError: libtpu is not installed, or does not know the topology.
    """
    # Keep libtpu from looking for TPUs on this machine, and for other processes that use them.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise cli.UserError(
            "--topology needs the TPU compiler: pip install 'kontext-jax[aot]'."
        ) from error
    from jax.experimental import topologies

    # One device per chip, as on a real TPU v4.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=num_slices, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise cli.UserError(
            f"--topology={name} is not a TPU topology: {str(error).splitlines()[0]}"
        ) from error
    return list(topology.devices)
