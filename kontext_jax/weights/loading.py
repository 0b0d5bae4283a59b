"""From stored weights to networks on a mesh."""

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
"""Settings that follow from an autoencoder's weights; a run measures its own."""

NORM = ("weight", "bias", "running_mean", "running_var")
"""PyTorch's names of what makes up a batch norm that is not trained any more."""


def check_same(reader: Reader, config, where: str, but: Sequence[str] = ()) -> None:
    """Refuses weights of another architecture than ``config``'s; settings ``but`` may differ.

    Raises:
      WeightsError: it names every setting that differs.
    """
    stored, wanted = architecture(reader.config), architecture(config)
    wrong = [
        f"{name} is {stored[name]}, not {value}"
        for name, value in wanted.items()
        if name not in (*MEASURED, *but) and stored[name] != value
    ]
    if wrong:
        raise WeightsError(
            f"The {reader.network.name} in {where} is another than this run's: {'; '.join(wrong)}. "
            "Give the run its settings."
        )


def load(reader: Reader, config, mesh: Mesh, dtype=np.float32, initial=None):
    """A network with the reader's weights, each array made where it will live.

    A layer of a parameter is in the host's memory at a time, beside this host's share of that
    parameter.

    Args:
      reader: the weights.
      config: of the network; as the reader's, but for how it is computed.
      mesh: where it goes.
      dtype: of the parameters; as stored if None.
      initial: arrays by name for parameters that the reader lacks.

    Raises:
      WeightsError: a parameter is missing.
    """
    abstract = reader.network.abstract(config)
    leaves, treedef = jax.tree.flatten(abstract)
    shardings = jax.tree.leaves(shardings_of(abstract, mesh))
    layers: dict[str, list[int | None]] = {}
    for param, layer in reader.network.places(reader.config):
        layers.setdefault(param, []).append(layer)
    arrays = []
    for name, leaf, sharding in zip(named_leaves(abstract), leaves, shardings, strict=True):
        if name in reader.dtypes:
            to = np.dtype(dtype or reader.dtypes[name])
            arrays.append(_load(reader, name, layers[name], leaf.shape, sharding, to))
        elif initial is not None and name in initial:
            arrays.append(jax.device_put(initial[name], sharding))
        else:
            raise WeightsError(f"The weights hold no {name}, and nothing says what it should be.")
    return jax.tree.unflatten(treedef, arrays)


def _load(
    reader: Reader,
    name: str,
    layers: list[int | None],
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: np.dtype,
) -> jax.Array:
    places = sharding.addressable_devices_indices_map(shape)
    spans = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in places.items()
    }
    shares = {
        span: np.empty([stop - start for start, stop in span], dtype)
        for span in set(spans.values())
    }
    for layer in layers:
        array = reader.read((name, layer)).astype(dtype)
        for span, share in shares.items():
            if layer is None:
                share[...] = array[_slices(span)]
            elif span[0][0] <= layer < span[0][1]:
                share[layer - span[0][0]] = array[_slices(span[1:])]
    on_devices = [jax.device_put(shares[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def _slices(span: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in span)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, or of any file of ``torch.save``, by name.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: it cannot be read.
    """
    if path.suffix == ".safetensors":
        files = TensorFiles(path)
        return {name: files.read(name) for name in files.entries}
    return read_tensors(path)


def lay_out(abstract, arrays: Mapping[str, np.ndarray], mesh: Mesh):
    """A network of arrays by the names of its parameters, in their dtypes, on a mesh."""
    leaves, treedef = jax.tree.flatten(abstract)
    shardings = jax.tree.leaves(shardings_of(abstract, mesh))
    on_devices = [
        jax.device_put(arrays[name].astype(leaf.dtype), sharding)
        for name, leaf, sharding in zip(named_leaves(abstract), leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(treedef, on_devices)


def with_norm(
    weight: np.ndarray, norm: Sequence[np.ndarray], epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a convolution that has taken in the batch norm behind it, float64.

    Args:
      weight: PyTorch's, of a convolution without bias.
      norm: PyTorch's weight, bias, and running mean and variance.
      epsilon: of the norm.
    """
    weight, gamma, beta, mean, variance = (x.astype(np.float64) for x in (weight, *norm))
    scale = gamma / np.sqrt(variance + epsilon)
    return weight.transpose(2, 3, 1, 0) * scale, beta - mean * scale
