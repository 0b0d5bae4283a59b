"""Loads stored weights as networks on a mesh."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from kontext_jax.sharding import shardings_of
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import TensorFiles, WeightsError
from kontext_jax.weights.networks import architecture
from kontext_jax.weights.reading import Reader
from kontext_jax.weights.torch_legacy import read_tensors

MEASURED = ("scale_factor", "shift_factor")
"""Settings that follow from an autoencoder's weights; a run measures them itself."""

BATCH_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""PyTorch's names of the tensors of a frozen batch norm."""


def check_architecture(reader: Reader, config, location: str, ignore: Sequence[str] = ()) -> None:
    """Checks that weights have the architecture of a config.

    Args:
      reader: the weights.
      config: config of the run's network.
      location: where the weights are, for the message.
      ignore: settings that may differ.

    Raises:
      WeightsError: settings differ; the message names all of them.
    """
    stored, expected = architecture(reader.config), architecture(config)
    wrong = [
        f"{name} is {stored[name]}, not {value}"
        for name, value in expected.items()
        if name not in (*MEASURED, *ignore) and stored[name] != value
    ]
    if wrong:
        raise WeightsError(
            f"The {reader.network.name} in {location} differs from this run's: {'; '.join(wrong)}. "
            "Set the run's config to match the weights."
        )


def load(reader: Reader, config, mesh: Mesh, dtype=np.float32, initial=None):
    """Returns a network with the reader's weights, sharded over a mesh.

    Host memory holds one layer of one parameter at a time, and this host's shards of that
    parameter.

    Args:
      reader: the weights.
      config: config of the network; may differ from the reader's in how it is computed.
      mesh: device mesh.
      dtype: dtype of the parameters; None keeps the stored dtypes.
      initial: arrays for parameters that the reader lacks, by name.

    Raises:
      WeightsError: a parameter is neither stored nor in ``initial``.
    """
    abstract = reader.network.abstract(config)
    leaves, treedef = jax.tree.flatten(abstract)
    shardings = jax.tree.leaves(shardings_of(abstract, mesh))
    layers: dict[str, list[int | None]] = {}
    for param, layer in reader.network.layer_keys(reader.config):
        layers.setdefault(param, []).append(layer)
    arrays = []
    for name, leaf, sharding in zip(named_leaves(abstract), leaves, shardings, strict=True):
        if name in reader.dtypes:
            target = np.dtype(dtype or reader.dtypes[name])
            arrays.append(_load(reader, name, layers[name], leaf.shape, sharding, target))
        elif initial is not None and name in initial:
            arrays.append(jax.device_put(initial[name], sharding))
        else:
            raise WeightsError(f"The weights lack {name}, and it has no initial value.")
    return jax.tree.unflatten(treedef, arrays)


def _load(
    reader: Reader,
    name: str,
    layers: list[int | None],
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: np.dtype,
) -> jax.Array:
    spans = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    shards = {
        span: np.empty([stop - start for start, stop in span], dtype)
        for span in set(spans.values())
    }
    for layer in layers:
        array = reader.read((name, layer)).astype(dtype)
        for span, shard in shards.items():
            if layer is None:
                shard[...] = array[_slices(span)]
            elif span[0][0] <= layer < span[0][1]:
                shard[layer - span[0][0]] = array[_slices(span[1:])]
    on_devices = [jax.device_put(shards[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def _slices(span: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in span)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a .safetensors file or of a file of ``torch.save``, by name.

    Raises:
      FileNotFoundError: the file does not exist.
      WeightsError: the file cannot be read.
    """
    if path.suffix == ".safetensors":
        files = TensorFiles(path)
        return {name: files.read(name) for name in files.entries}
    return read_tensors(path)


def network_from_arrays(abstract, arrays: Mapping[str, np.ndarray], mesh: Mesh):
    """Returns a network of the given arrays, sharded over a mesh.

    Args:
      abstract: the network with shapes for arrays; the arrays are cast to its dtypes.
      arrays: arrays by the names of the network's parameters.
      mesh: device mesh.
    """
    leaves, treedef = jax.tree.flatten(abstract)
    shardings = jax.tree.leaves(shardings_of(abstract, mesh))
    on_devices = [
        jax.device_put(arrays[name].astype(leaf.dtype), sharding)
        for name, leaf, sharding in zip(named_leaves(abstract), leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(treedef, on_devices)


def fold_batch_norm(
    weight: np.ndarray, norm: Sequence[np.ndarray], epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias of a convolution with its batch norm folded in, in float64.

    Args:
      weight: PyTorch's weight of the convolution, which has no bias.
      norm: PyTorch's weight, bias, running mean and running variance of the norm after it.
      epsilon: epsilon of the norm.
    """
    weight, gamma, beta, mean, variance = (x.astype(np.float64) for x in (weight, *norm))
    scale = gamma / np.sqrt(variance + epsilon)
    return weight.transpose(2, 3, 1, 0) * scale, beta - mean * scale
