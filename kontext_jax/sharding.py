"""Where arrays live: the device mesh, the names of axes, and the rules that join the two.

Parameters name their axes in their metadata, activations at `constrain`. A rule table maps a name
to the mesh axes it may be split over, in order of preference; a mesh axis is used at most once an
array, and only where it divides the dimension.
"""

import math
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "context", "tensor")

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

RULES: dict[str, tuple[str, ...]] = {
    # Parameters. fsdp gathers them before use; tensor computes on the split.
    "embed": ("fsdp",),
    "mlp": ("tensor", "fsdp"),
    "heads": ("tensor", "fsdp"),
    "channels": ("fsdp",),
    "head_dim": ("fsdp",),
    "vocab": ("tensor", "fsdp"),
    "buckets": ("fsdp",),
    # Activations.
    "batch": BATCH_AXES,
    "seq": ("context",),
    "act_embed": (),
}


@dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig:
    """Size of each mesh axis; one of them may be -1: all devices that are left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of ``config`` over ``devices`` (all of them where left out).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // max(rest, 1)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        asked = ", ".join(f"{axis}={getattr(config, axis)}" for axis in MESH_AXES)
        raise ValueError(
            f"A mesh of {asked} does not fit {len(devices)} devices; the sizes must multiply to "
            "the number of devices, and one of them may be -1 for the rest."
        )
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> P:
    """The partition of an array of ``shape`` whose last axes are called ``names``.

    Axes in front of the named ones (the layers of stacked blocks) are not split.

    Raises:
      ValueError: a name that no rule knows.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"No sharding rule for axis {unknown[0]!r}; rules: {', '.join(RULES)}.")
    named = list(enumerate(names, start=len(shape) - len(names)))
    chosen: list[list[str]] = [[] for _ in shape]
    used: set[str] = set()
    # Every axis gets its first choice before any gets its second: a kernel (mlp, embed) is split
    # over (tensor, fsdp), and a bias (mlp) over both.
    for rank in range(max((len(rule) for rule in RULES.values()), default=0)):
        for dim, name in named:
            rule = RULES[name] if name is not None else ()
            if rank < len(rule) and rule[rank] not in used:
                parts = math.prod(mesh.shape[axis] for axis in chosen[dim]) * mesh.shape[rule[rank]]
                if shape[dim] % parts == 0:
                    chosen[dim].append(rule[rank])
                    used.add(rule[rank])
    return P(*(tuple(axes) or None for axes in chosen))


def shardings_of(tree, mesh: Mesh):
    """A sharding for each array of ``tree``: by its axes' names, or replicated if it has none.

    Optimizer moments and EMA copies carry the parameters' metadata, and so fall where these do.
    """

    def sharding(leaf):
        if isinstance(leaf, nnx.Variable) and not jax.tree.leaves(leaf):
            return leaf  # a parameter that this part of the optimizer leaves to another
        if isinstance(leaf, nnx.Variable):
            names = leaf.get_metadata().get("axes", ())
            return leaf.replace(NamedSharding(mesh, spec(leaf.shape, names, mesh)))
        return NamedSharding(mesh, P())

    return jax.tree.map(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over all data-parallel devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def constrain(x: jax.Array, names: str) -> jax.Array:
    """Pins an activation to the mesh in use (`jax.set_mesh`), its axes named in one string.

    Without a mesh this does nothing, so that models also run as plain functions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, tuple(names.split()), mesh))


def platform() -> str:
    """What is compiled for: the devices of the mesh in use, or JAX's default ones without a mesh.

    The two differ where a program is compiled ahead of time, for devices that are elsewhere.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def num_batch_shards(mesh: Mesh) -> int:
    """Over how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
