"""Fingerprints of networks: hashes of all values that do not depend on file layout, dtype or mesh.

The float32 bits of each value are hashed with the parameter's name and the value's index in it
(MurmurHash3's finaliser twice, with two seeds), and the hashes are summed modulo 2^32. Sums
commute, so a network may be hashed layer by layer from a file, or sharded over a mesh.
"""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt32

from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.reading import Reader

SEEDS = (0x9E3779B9, 0x7F4A7C15)


def fingerprint(network) -> str:
    """Returns the fingerprint of a network on devices, or of any tree of arrays."""
    leaves = named_leaves(network)
    sharding = getattr(next(iter(leaves.values())), "sharding", None)
    # Every process needs the sums, however the network is sharded.
    replicated = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
    return _text(np.asarray(jax.jit(_tree_sums, out_shardings=replicated)(leaves)))


def fingerprint_of(reader: Reader, dtype: np.dtype | None = None) -> str:
    """Returns the fingerprint of stored weights, cast to ``dtype`` if given.

    Memory holds one layer of one parameter at a time.
    """
    total = np.zeros(2, np.uint32)
    for param, layer in reader.network.layer_keys(reader.config):
        if param in reader.dtypes:
            values = reader.read((param, layer))
            values = values.astype(dtype or values.dtype)
            start = (layer or 0) * math.prod(values.shape) % 2**32
            total = total + np.asarray(_sums(values, np.uint32(_seed(param)), np.uint32(start)))
    return _text(total)


def _tree_sums(leaves: dict[str, Array]) -> UInt32[Array, "2"]:
    total = jnp.zeros(2, jnp.uint32)
    for name, values in leaves.items():
        total = total + _sums(values, jnp.uint32(_seed(name)), jnp.uint32(0))
    return total


@jax.jit
def _sums(
    values: Float[Array, "*shape"], seed: UInt32[Array, ""], start: UInt32[Array, ""]
) -> UInt32[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    position = jnp.broadcast_to(start, bits.shape)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        steps = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position + steps * jnp.uint32(stride)
    mixed = _mix(bits ^ _mix(position + seed))
    return jnp.stack([jnp.sum(_mix(mixed ^ jnp.uint32(s)), dtype=jnp.uint32) for s in SEEDS])


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _text(sums: UInt32[np.ndarray, "2"]) -> str:
    return "".join(f"{int(value):08x}" for value in sums)
