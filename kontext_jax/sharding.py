"""The device mesh, and the rules that map the named axes of arrays to mesh axes.

Parameters name their axes in their metadata; activations are named where `constrain` is called.
`RULES` maps each name to the mesh axes that may split it, in order of preference. A mesh axis
splits at most one dimension of an array, and only a dimension that it divides. Gradients, optimizer
moments and parameter averages are sharded like their parameters.

    mesh axis  splits parameters by     activations by    communication per step
    data       nothing                  rows              gradients (all-reduce)
    fsdp       one axis of each         rows              parameters (all-gather),
                                                          gradients (reduce-scatter)
    context    nothing                  tokens            keys and values (all-gather)
    tensor     heads, MLP width, vocab  heads, MLP width  activations (all-reduce)

Examples:

    mesh                         kernel (embed, mlp)   bias (mlp)      (batch, seq, act_embed)
    fsdp                         fsdp, -               fsdp            fsdp, -, -
    data, fsdp                   fsdp, -               fsdp            data fsdp, -, -
    fsdp, tensor                 fsdp, tensor          tensor fsdp     fsdp, -, -
    fsdp, context, tensor        fsdp, tensor          tensor fsdp     fsdp, context, -

In the autoencoder, context and tensor split the rows of pixels of an image (`split_rows`), and
neighbours exchange the rows at their borders.
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
"""Mesh axes that split the rows of a batch."""

RULES: dict[str, tuple[str, ...]] = {
    # Parameters. Over fsdp they are gathered before use; over tensor each device computes with its
    # own shard.
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
    "act_rows": ("context", "tensor"),
    "act_all_rows": (),
    "act_columns": (),
    "act_channels": (),
    "act_heads": ("tensor",),
    "act_kv_seq": (),
    "act_head_dim": (),
}


@dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig(Settings):
    """The size of each mesh axis; one of them may be -1 and takes all remaining devices.

    If both ``data`` and another axis are -1, ``data`` is the number of slices (of TPUs, or of GPUs
    connected by NVLink), and the other axis takes the remaining devices. By default, each slice
    therefore holds a copy of the state, sharded over all devices of the slice; on a single slice,
    only ``fsdp`` is larger than 1.
    """

    data: int = -1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that ``config`` describes, over ``devices`` (default: all devices).

    The network between slices is slow, so only the data axis crosses it, and fsdp if data is
    smaller than the number of slices: ``data=1`` shards the state over all slices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or context or tensor
        would cross slices.
    """
    devices = jax.devices() if devices is None else devices
    # CPUs have no slice_index, nor do the devices of a single-slice TPU topology (AOT compilation).
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
    """Returns the size of each mesh axis, with every -1 resolved."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if config.data == -1 and sizes.count(-1) == 2:
        sizes[MESH_AXES.index("data")] = num_slices
    if sizes.count(-1) == 1:
        others = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = num_devices // max(others, 1)
    if min(sizes) < 1 or math.prod(sizes) != num_devices:
        requested = ", ".join(f"{axis}={getattr(config, axis)}" for axis in MESH_AXES)
        raise ValueError(
            f"A mesh of {requested} does not fit {num_devices} devices: the sizes must multiply "
            "to the number of devices. One of them, or data and one other, may be -1 to take the "
            "remaining devices."
        )
    return sizes


def _across_slices(sizes: list[int], num_slices: int) -> list[int]:
    """Returns the number of parts into which the slices divide each mesh axis."""
    data, fsdp, context, tensor = sizes
    across_data = math.gcd(data, num_slices)
    across_fsdp = num_slices // across_data
    if fsdp % across_fsdp:
        raise ValueError(
            f"A mesh of data={data}, fsdp={fsdp}, context={context}, tensor={tensor} does not fit "
            f"{num_slices} slices: context and tensor must stay within a slice, so make mesh.data "
            f"times mesh.fsdp a multiple of {num_slices}."
        )
    return [across_data, across_fsdp, 1, 1]


def spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> P:
    """Returns the partition spec of an array of ``shape`` whose last axes are named ``names``.

    Leading axes without a name (the layers of stacked blocks) are not split.

    Raises:
      ValueError: a name has no rule.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"No sharding rule for axis {unknown[0]!r}; rules: {', '.join(RULES)}.")
    named = list(enumerate(names, start=len(shape) - len(names)))
    chosen: list[list[str]] = [[] for _ in shape]
    used: set[str] = set()
    # Every dimension gets its first choice before any gets its second: a kernel (mlp, embed) is
    # split over (tensor, fsdp), and the only dimension of a bias (mlp) over both.
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
    """Returns the sharding of each array of ``tree``: by its axis names, or replicated without.

    Optimizer moments and EMA copies carry the metadata of their parameters, so they are sharded
    alike.
    """

    def sharding(leaf):
        if isinstance(leaf, nnx.Variable) and not jax.tree.leaves(leaf):
            return leaf  # an empty slot: another part of the optimizer updates this parameter
        if isinstance(leaf, nnx.Variable):
            names = leaf.get_metadata().get("axes", ())
            return leaf.replace(NamedSharding(mesh, spec(leaf.shape, names, mesh)))
        return NamedSharding(mesh, P())

    return jax.tree.map(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows split over all data-parallel devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def device_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts one element on each device."""
    return NamedSharding(mesh, P(mesh.axis_names))


def constrain(x: jax.Array, names: str) -> jax.Array:
    """Constrains the sharding of an activation on the current mesh (`jax.set_mesh`).

    Without a mesh it returns ``x`` unchanged, so models also run as plain functions.

    Args:
      x: the activation.
      names: names of its axes, separated by spaces.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, tuple(names.split()), mesh))


def split_rows(x: jax.Array) -> jax.Array:
    """Constrains images [B h w c] of a convolutional network: context and tensor split the rows.

    Rows are split only if the whole mesh then splits the array; else only the batch is. If rows
    are split and devices hold copies, XLA's partitioner sums the gradient of a convolution's kernel
    over the copies too (jaxlib 0.10.2): it would be a multiple of the right one.
    """
    rows = "act_rows" if row_parts(x.shape) > 1 else "act_all_rows"
    return constrain(x, f"batch {rows} act_columns act_channels")


def row_parts(shape: tuple[int, ...]) -> int:
    """The number of parts into which `split_rows` splits the rows of images of a shape."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    names = ("batch", "act_rows", "act_columns", "act_channels")
    part = NamedSharding(mesh, spec(shape, names, mesh)).shard_shape(shape)
    return shape[1] // part[1] if math.prod(part) * mesh.size == math.prod(shape) else 1


def on_shards(function: Callable[..., jax.Array], inputs: Sequence[str]) -> Callable:
    """Wraps ``function`` to run on each device's shards, for kernels that XLA cannot partition.

    Args:
      function: takes arrays and returns one array, sharded like the first of them.
      inputs: axis names of each argument, as in `constrain`. Each device gets the full length of
        an axis that is not split.
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
    """Returns the platform of the current mesh, or JAX's default backend without a mesh.

    The two differ in ahead-of-time compilation for devices that are not attached.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def over_batches(
    function: Callable[[Hashable, jax.Array], jax.Array],
    arrays: Sequence[np.ndarray],
    keys: Sequence[Hashable],
    batch_sizes: Mapping[Hashable, int],
    mesh: Mesh,
) -> list[np.ndarray]:
    """Maps ``function(key, batch)`` over arrays, batching arrays of the same key.

    All batches of a key have the same size, so each key compiles once: the last batch is padded
    with copies, whose results are dropped. Batches are sharded over the mesh.

    Args:
      function: a compiled function; the first axis of its result is the batch axis.
      arrays: arrays on the host, the same on every process.
      keys: one key per array; arrays of the same key have the same shape.
      batch_sizes: batch size of each key, rounded up to a multiple of the batch shards.
      mesh: the mesh, set while the function runs.

    Returns:
      One result per array, in order, on every process.
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
                indices = members[start : start + size]
                padded = indices + indices[-1:] * (size - len(indices))
                batch = np.stack([arrays[i] for i in padded])
                out = function(key, jax.device_put(batch, batch_sharding(mesh)))
                out = multihost_utils.process_allgather(out, tiled=True)
                rows = map(np.asarray, np.asarray(out))  # rows of a 1-D array are NumPy scalars
                results.update(zip(indices, rows, strict=False))
    return [results[i] for i in range(len(arrays))]


def check_batch(batch_size: int, accumulate_steps: int, mesh: Mesh) -> None:
    """Checks that a batch divides evenly over the mesh and the microbatches.

    Raises:
      ValueError: it does not.
    """
    shards = num_batch_shards(mesh)
    parts = shards * accumulate_steps
    if batch_size < 1 or parts < 1 or batch_size % parts:
        raise ValueError(
            f"data.batch_size {batch_size} must be a multiple of {parts}: mesh.data times "
            f"mesh.fsdp is {shards}, optim.accumulate_steps is {accumulate_steps}."
        )


def batch_part(mesh: Mesh, process: int) -> tuple[int, int]:
    """Returns (index, count): the part of each batch that ``process`` reads, of how many parts.

    Processes whose devices hold the same rows read the same part. If context or tensor
    parallelism spans hosts, there are fewer parts than processes.

    Raises:
      ValueError: two processes share some of their rows, but not all.
    """
    num_shards = num_batch_shards(mesh)
    shards_of = defaultdict(set)
    for shard, devices in enumerate(mesh.devices.reshape(num_shards, -1)):
        for device in devices:
            shards_of[device.process_index].add(shard)
    parts = sorted({tuple(sorted(shards)) for shards in shards_of.values()})
    if any(len(part) * len(parts) != num_shards for part in parts):
        raise ValueError(
            f"{len(shards_of)} processes cannot share {num_shards} parts of a batch evenly: make "
            "mesh.context times mesh.tensor a divisor or a multiple of a process's devices."
        )
    return parts.index(tuple(sorted(shards_of[process]))), len(parts)
