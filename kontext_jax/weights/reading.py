"""Readers of stored weights: one interface for all formats, one layer of a parameter at a time."""

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import tensorstore as ts

from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights.files import TENSOR_DTYPES, TensorFiles, WeightsError
from kontext_jax.weights.networks import ALL_NETWORKS, NETWORKS, Network
from kontext_jax.weights.table import LayerKey, Table


@runtime_checkable
class Reader(Protocol):
    """The weights of one network, in our layout.

    Attributes:
      network: the network.
      config: config of the network.
      record: provenance of the weights, as stored in the file or run.
      dtypes: stored dtypes of our parameters, by name; missing parameters are left out.
    """

    network: Network
    config: Any
    record: dict[str, Any]
    dtypes: dict[str, np.dtype]

    def read(self, key: LayerKey) -> np.ndarray:
        """Returns one layer of a parameter, or the full parameter if it is not stacked."""
        ...


class TensorReader:
    """Reads safetensors files in BFL's or diffusers' layout."""

    def __init__(
        self,
        files: TensorFiles,
        network: Network,
        config: Any,
        layout: str,
        except_for: Sequence[str] = (),
    ):
        """Checks the files against the network's name table.

        Args:
          files: the tensors.
          network, config: the expected network and its config.
          layout: "bfl" or "diffusers".
          except_for: patterns of tensor names that may be missing and are not read.

        Raises:
          WeightsError: tensors are missing or unexpected, or have another shape or dtype; the
            message names all of them.
        """
        self.network, self.config, self.record = network, config, files.record
        self._files = files
        table = network.table(config, layout)
        self._pieces = table.pieces
        self._stored_as = _stored_names(files, network)
        self.dtypes = self._check(table, except_for)

    def _check(self, table: Table, except_for: Sequence[str]) -> dict[str, np.dtype]:
        expected = table.tensors()
        for name in [name for name in self._stored_as if matches(name, except_for)]:
            del self._stored_as[name]
        wrong = [f"{name} is unexpected" for name in self._stored_as if name not in expected]
        dtypes: dict[str, np.dtype] = {}
        incomplete: set[str] = set()
        for (param, _), pieces in table.pieces.items():
            for piece in pieces:
                if piece.name not in self._stored_as:
                    incomplete.add(param)
                    if not matches(piece.name, except_for):
                        wrong.append(f"{piece.name} is missing")
                    continue
                entry = self._files.entries[self._stored_as[piece.name]]
                dtype = TENSOR_DTYPES.get(entry.dtype)
                if entry.shape != piece.shape:
                    wrong.append(f"{piece.name} is {entry.shape}, not {piece.shape}")
                elif dtype is None:
                    wrong.append(f"{piece.name} is {entry.dtype}, not {', '.join(TENSOR_DTYPES)}")
                elif dtypes.setdefault(param, dtype) != dtype:
                    wrong.append(f"{piece.name} is {entry.dtype}, unlike other tensors of {param}")
        wrong += [f"{param} is only partly stored" for param in sorted(incomplete & set(dtypes))]
        if wrong:
            raise WeightsError(
                f"The weights in {self._files.path} do not fit this {self.network.name}: "
                f"{'; '.join(wrong)}."
            )
        return dtypes

    def read(self, key: LayerKey) -> np.ndarray:
        """Returns one layer of a parameter, or the full parameter if it is not stacked."""
        parts = [
            piece.to_ours(self._files.read(self._stored_as[piece.name]))
            for piece in self._pieces[key]
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether ``name`` matches one of the glob patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class OrbaxReader:
    """Reads an Orbax checkpoint layer by layer through TensorStore."""

    def __init__(
        self, item: Path, prefix: Sequence[str], network: Network, config: Any, record: dict
    ):
        """Opens the arrays.

        Args:
          item: folder of the checkpoint item, e.g. ``checkpoints/STEP/ema``.
          prefix: path of the network in the item's tree of arrays.
          network, config: the expected network and its config.
          record: provenance of the weights.

        Raises:
          WeightsError: arrays are missing or have another shape; the message names all of them.
        """
        self.network, self.config, self.record = network, config, record
        self._arrays: dict[str, ts.TensorStore] = {}
        wrong = []
        for name, shape in network.shapes(config).items():
            try:
                array = _open_array(item, ".".join([*prefix, *name.split("/")]))
            except ValueError:
                wrong.append(f"{name} is missing")
                continue
            if array.shape != shape:
                wrong.append(f"{name} is {array.shape}, not {shape}")
            self._arrays[name] = array
        if wrong:
            raise WeightsError(
                f"The weights in {item} do not fit this {network.name}: {'; '.join(wrong)}."
            )
        self.dtypes = {
            name: np.dtype(array.dtype.numpy_dtype) for name, array in self._arrays.items()
        }

    def read(self, key: LayerKey) -> np.ndarray:
        """Returns one layer of a parameter, or the full parameter if it is not stacked."""
        param, layer = key
        array = self._arrays[param]
        return (array if layer is None else array[layer]).read().result()


def _open_array(item: Path, name: str) -> ts.TensorStore:
    kvstore = {"driver": "ocdbt", "base": item.absolute().as_uri() + "/", "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()


class ArrayReader:
    """Reads a network in memory."""

    def __init__(self, network: Network, module: Any, record: dict[str, Any] | None = None):
        self.network, self.config, self.record = network, module.config, record or {}
        self._arrays = named_leaves(module)
        self.dtypes = {name: np.dtype(array.dtype) for name, array in self._arrays.items()}

    def read(self, key: LayerKey) -> np.ndarray:
        """Returns one layer of a parameter, or the full parameter if it is not stacked."""
        param, layer = key
        array = self._arrays[param]
        return np.asarray(jax.device_get(array if layer is None else array[layer]))


def _stored_names(files: TensorFiles, network: Network) -> dict[str, str]:
    """Returns the tensor names in the files, by the names in the name table.

    Raises:
      WeightsError: two stored tensors, with and without a prefix, have the same name in the table.
    """
    names: dict[str, str] = {}
    for stored in files.entries:
        name = network.format.canonical_name(stored)
        if name in names:
            raise WeightsError(f"{files.path} has {name} twice, as {names[name]} and as {stored}.")
        if name is not None:
            names[name] = stored
    return names


def open_folder(folder: Path, except_for: Sequence[str] = ()) -> TensorReader:
    """Opens a network's folder in the layout of diffusers' or transformers' ``save_pretrained``.

    Args:
      folder: folder of ``config.json`` and the safetensors files.
      except_for: patterns of tensor names that may be missing and are not read.

    Raises:
      FileNotFoundError: the folder, its config or its weights are missing.
      WeightsError: the network is not supported, or its weights do not fit its config.
    """
    values = read_config(folder)
    network = identify_network(values, folder)
    try:
        config = network.format.from_json(values)
    except KeyError as error:
        raise WeightsError(f"{folder / 'config.json'} lacks {error}.") from error
    except TypeError as error:
        raise WeightsError(
            f"{folder / 'config.json'} has a setting of the wrong type ({error})."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{folder / 'config.json'} cannot be used: {error}") from error
    return TensorReader(TensorFiles(folder), network, config, "diffusers", except_for)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the values of the folder's ``config.json``.

    Raises:
      FileNotFoundError: the file is missing.
      WeightsError: the file is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is not a JSON object.")
    return values


def identify_network(values: dict[str, Any], folder: Path) -> Network:
    """Returns the network that the values of a folder's ``config.json`` describe.

    Raises:
      WeightsError: the network is not supported.
    """
    name = values.get("_class_name") or values.get("model_type") or "no network"
    for network in ALL_NETWORKS.values():
        if name == network.class_name or name in getattr(network.format, "MODEL_TYPES", ()):
            return network
    known = ", ".join(network.class_name for network in ALL_NETWORKS.values())
    raise WeightsError(f"{folder / 'config.json'} describes {name}; supported are {known}.")


def open_file(path: Path, except_for: Sequence[str] = ()) -> TensorReader:
    """Opens a network's single file in Black Forest Labs' layout.

    Args:
      path: safetensors file.
      except_for: patterns of tensor names that may be missing and are not read.

    Raises:
      FileNotFoundError: the file does not exist.
      WeightsError: the file is of another kind, or incomplete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    files = TensorFiles(path)
    for network in NETWORKS.values():
        if not network.has_bfl_layout:
            continue
        shapes = {
            stored: files.entries[name].shape
            for stored, name in _stored_names(files, network).items()
        }
        if network.format.is_bfl(set(shapes)):
            return TensorReader(
                files, network, _bfl_config(files, network, shapes), "bfl", except_for
            )
    raise WeightsError(
        f"{path} holds neither a transformer nor an autoencoder in Black Forest Labs' layout; for "
        "diffusers' layout, pass the folder that has the config.json."
    )


def _bfl_config(files: TensorFiles, network: Network, shapes: dict[str, tuple[int, ...]]):
    if "network" in files.record:  # our own export
        return config_from_record(network, files.record["network"])
    try:
        return network.format.from_shapes(shapes)
    except KeyError as error:
        raise WeightsError(f"{files.path} lacks the tensor {error}.") from error
    except ValueError as error:
        raise WeightsError(f"{files.path} cannot be used: {error}") from error


def config_from_record(network: Network, values: dict[str, Any]):
    """Returns a network's config from the JSON values of `networks.architecture`.

    Raises:
      WeightsError: a setting is unknown or invalid.
    """
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return network.config_class(**tuples)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"The recorded {network.name} config is invalid: {error}") from error
