"""From stored weights to networks on a mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from kontext_jax.names import named_leaves
from kontext_jax.sharding import shardings_of
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.networks import architecture
from kontext_jax.weights.reading import Reader

MEASURED = ("scale_factor", "shift_factor")
"""Settings that follow from an autoencoder's weights; a run measures its own."""


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
