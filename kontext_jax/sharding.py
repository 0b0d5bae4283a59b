"""Where arrays live: the device mesh, the names of axes, and the rules that join the two.

Parameters name their axes in their metadata, activations at `constrain`. A rule table maps a name
to the mesh axes it may be split over, in order of preference; a mesh axis is used at most once an
array, and only where it divides the dimension. Gradients, moments and averages are split as their
parameters are.

    axis      of parameters it splits    of activations    and so each step communicates
    data      nothing                    rows              gradients (all-reduce)
    fsdp      one axis of each           rows              parameters (all-gather),
                                                           gradients (reduce-scatter)
    context   nothing                    tokens            keys and values (all-gather)
    tensor    heads, MLP width, vocab    heads, MLP width  activations (all-reduce)

    mesh                         kernel (embed, mlp)   bias (mlp)      (batch, seq, act_embed)
    fsdp                         fsdp, -               fsdp            fsdp, -, -
    data, fsdp                   fsdp, -               fsdp            data fsdp, -, -
    fsdp, tensor                 fsdp, tensor          tensor fsdp     fsdp, -, -
    fsdp, context, tensor        fsdp, tensor          tensor fsdp     fsdp, context, -
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kontext_jax.settings import Settings

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
    "act_heads": ("tensor",),
    "act_kv_seq": (),
    "act_head_dim": (),
}


@dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig(Settings):
    """Size of each axis of the whole mesh; one of them may be -1: all devices that are left.

    ``data`` may be -1 beside another: it then has one part for each slice (of TPUs, or of GPUs that
    NVLink joins), and the other has the rest. So the default keeps a copy of the state in each
    slice, split over all of its devices; on one slice, that is ``fsdp`` alone.
    """

    data: int = -1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of ``config`` over ``devices`` (all of them where left out).

    Between slices the network is slow. What lies across it is the data axis, and fsdp where data
    has fewer parts than there are slices: ``data=1`` splits the state over all slices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or context or tensor
        would lie across slices.
    """
    devices = jax.devices() if devices is None else devices
    # CPUs have no such index, nor have the TPUs of one slice that are compiled for elsewhere.
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = _sizes(config, len(devices), num_slices)
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        across = _across_slices(sizes, num_slices)
        within = [size // parts for size, parts in zip(sizes, across, strict=True)]
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _sizes(config: MeshConfig, num_devices: int, num_slices: int) -> list[int]:
    """The size of each mesh axis, none of them -1."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if config.data == -1 and sizes.count(-1) == 2:
        sizes[MESH_AXES.index("data")] = num_slices
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = num_devices // max(rest, 1)
    if min(sizes) < 1 or math.prod(sizes) != num_devices:
        asked = ", ".join(f"{axis}={getattr(config, axis)}" for axis in MESH_AXES)
        raise ValueError(
            f"A mesh of {asked} does not fit {num_devices} devices; the sizes must multiply to "
            "the number of devices, and one of them, or data and another, may be -1 for the rest."
        )
    return sizes


def _across_slices(sizes: list[int], num_slices: int) -> list[int]:
    """Into how many parts the slices divide each mesh axis."""
    data, fsdp, context, tensor = sizes
    across_data = math.gcd(data, num_slices)
    across_fsdp = num_slices // across_data
    if fsdp % across_fsdp:
        raise ValueError(
            f"A mesh of data={data}, fsdp={fsdp}, context={context}, tensor={tensor} does not fit "
            f"{num_slices} slices: context and tensor must stay within one, so make mesh.data "
            f"times mesh.fsdp a multiple of {num_slices}."
        )
    return [across_data, across_fsdp, 1, 1]


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


def device_sharding(mesh: Mesh) -> NamedSharding:
    """One element a device."""
    return NamedSharding(mesh, P(mesh.axis_names))


def constrain(x: jax.Array, names: str) -> jax.Array:
    """Pins an activation to the mesh in use (`jax.set_mesh`), its axes named in one string.

    Without a mesh this does nothing, so that models also run as plain functions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, tuple(names.split()), mesh))


def on_shards(function: Callable[..., jax.Array], inputs: Sequence[str]) -> Callable:
    """``function``, run on each device's parts of its arguments: for kernels that XLA cannot split.

    Args:
      function: of arrays, to one array, which is split as the first of them.
      inputs: names of the arguments' axes, as in `constrain`; of axes that are not split, each
        device gets all.
    """

    def run(*arrays: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(*arrays)
        parts = [
            spec(x.shape, tuple(names.split()), mesh)
            for x, names in zip(arrays, inputs, strict=True)
        ]
        sharded = jax.shard_map(
            function, in_specs=tuple(parts), out_specs=parts[0], check_vma=False
        )
        return sharded(*arrays)

    return run


def platform() -> str:
    """What is compiled for: the devices of the mesh in use, or JAX's default ones without a mesh.

    The two differ where a program is compiled ahead of time, for devices that are elsewhere.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def num_batch_shards(mesh: Mesh) -> int:
    """Over how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def over_batches(
    function: Callable[[Hashable, jax.Array], jax.Array],
    arrays: Sequence[np.ndarray],
    keys: Sequence[Hashable],
    batch_sizes: Mapping[Hashable, int],
    mesh: Mesh,
) -> list[np.ndarray]:
    """``function(key, batch)`` of arrays of any shapes, those of a key together; in their order.

    Every batch of a key has the same size, so that each key compiles once: the last one is filled
    up with copies, whose results are dropped. Batches are split over the mesh.

    Args:
      function: compiled; the first axis of its result is that of the batch.
      arrays: on the host, the same on every process.
      keys: of each array; those of one key have one shape.
      batch_sizes: by key; rounded up to what divides over the mesh.
      mesh: in use while the function runs.

    Returns:
      A result for each array, on every process.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    shards = num_batch_shards(mesh)
    results: dict[int, np.ndarray] = {}
    with jax.set_mesh(mesh):
        for key, members in groups.items():
            size = -(-batch_sizes[key] // shards) * shards
            for start in range(0, len(members), size):
                part = members[start : start + size]
                filled = part + part[-1:] * (size - len(part))
                batch = np.stack([arrays[i] for i in filled])
                out = function(key, jax.device_put(batch, batch_sharding(mesh)))
                out = multihost_utils.process_allgather(out, tiled=True)
                rows = map(np.asarray, np.asarray(out))  # NumPy's rows of numbers are no arrays
                results.update(zip(part, rows, strict=False))
    return [results[i] for i in range(len(arrays))]


def check_batch(batch_size: int, accumulate_steps: int, mesh: Mesh) -> None:
    """Refuses batches that do not divide over the mesh and the microbatches.

    Raises:
      ValueError: the rows are no multiple of the parts.
    """
    shards = num_batch_shards(mesh)
    parts = shards * accumulate_steps
    if batch_size < 1 or parts < 1 or batch_size % parts:
        raise ValueError(
            f"data.batch_size {batch_size} must be a multiple of {parts}: mesh.data times "
            f"mesh.fsdp is {shards}, optim.accumulate_steps is {accumulate_steps}."
        )


def batch_part(mesh: Mesh, process: int) -> tuple[int, int]:
    """(index, count): which part of each batch ``process`` reads, and how many parts there are.

    Processes whose devices hold the same rows read the same part: where context or tensor
    parallelism goes across hosts, the parts are fewer than the processes.

    Raises:
      ValueError: processes hold some of the same rows, but not all.
    """
    num_shards = num_batch_shards(mesh)
    held = defaultdict(set)
    for shard, devices in enumerate(mesh.devices.reshape(num_shards, -1)):
        for device in devices:
            held[device.process_index].add(shard)
    parts = sorted({tuple(sorted(shards)) for shards in held.values()})
    if any(len(part) * len(parts) != num_shards for part in parts):
        raise ValueError(
            f"{len(held)} processes cannot share {num_shards} parts of a batch evenly: make "
            "mesh.context times mesh.tensor a divisor or a multiple of a process's devices."
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)
