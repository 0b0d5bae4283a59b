"""One way to read weights, wherever they are stored: a layer of a parameter at a time."""

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
from kontext_jax.weights.table import Place, Table


@runtime_checkable
class Reader(Protocol):
    """A network's weights, in our layout.

    Attributes:
      network: which of the networks this is.
      config: its config.
      record: what the file or run says of where the weights come from.
      dtypes: the stored dtype of each of our parameters; those that are missing are left out.
    """

    network: Network
    config: Any
    record: dict[str, Any]
    dtypes: dict[str, np.dtype]

    def read(self, place: Place) -> np.ndarray:
        """One layer of a parameter; all of it where it is not stacked."""
        ...


class TensorReader:
    """Weights in safetensors, in BFL's or diffusers' layout."""

    def __init__(
        self,
        files: TensorFiles,
        network: Network,
        config: Any,
        layout: str,
        except_for: Sequence[str] = (),
    ):
        """Compares the files with the network's name table.

        Args:
          files: the tensors.
          network, config: what they should be.
          layout: "bfl" or "diffusers".
          except_for: patterns of tensors that may be missing, or are not to be read.

        Raises:
          WeightsError: tensors are missing, not wanted, or of another shape or dtype; it names all.
        """
        self.network, self.config, self.record = network, config, files.record
        self._files = files
        table = network.table(config, layout)
        self._pieces = table.pieces
        self._stored_as = _stored_names(files, network)
        self.dtypes = self._check(table, except_for)

    def _check(self, table: Table, except_for: Sequence[str]) -> dict[str, np.dtype]:
        wanted = table.tensors()
        for name in [name for name in self._stored_as if matches(name, except_for)]:
            del self._stored_as[name]
        wrong = [f"{name} is not wanted" for name in self._stored_as if name not in wanted]
        dtypes: dict[str, np.dtype] = {}
        for (param, _), pieces in table.pieces.items():
            for piece in pieces:
                if piece.name not in self._stored_as:
                    if not matches(piece.name, except_for):
                        wrong.append(f"{piece.name} is missing")
                    continue
                entry = self._files.entries[self._stored_as[piece.name]]
                if entry.shape != piece.shape:
                    wrong.append(f"{piece.name} is {entry.shape}, not {piece.shape}")
                elif entry.dtype not in TENSOR_DTYPES:
                    wrong.append(f"{piece.name} is {entry.dtype}, not {', '.join(TENSOR_DTYPES)}")
                elif (
                    dtypes.setdefault(param, TENSOR_DTYPES[entry.dtype])
                    != TENSOR_DTYPES[entry.dtype]
                ):
                    wrong.append(f"{piece.name} is {entry.dtype}, other layers or parts are not")
        missing = {
            param
            for (param, _), pieces in table.pieces.items()
            for piece in pieces
            if piece.name not in self._stored_as
        }
        wrong += [f"{param} is there in part" for param in sorted(missing & set(dtypes))]
        if wrong:
            raise WeightsError(
                f"The weights in {self._files.path} do not fit this {self.network.name}: "
                f"{'; '.join(wrong)}."
            )
        return dtypes

    def read(self, place: Place) -> np.ndarray:
        """One layer of a parameter; all of it where it is not stacked."""
        parts = [
            piece.to_ours(self._files.read(self._stored_as[piece.name]))
            for piece in self._pieces[place]
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the glob patterns is ``name``'s."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class OrbaxReader:
    """Weights in an Orbax checkpoint, read layer by layer through TensorStore."""

    def __init__(
        self, item: Path, prefix: Sequence[str], network: Network, config: Any, record: dict
    ):
        """Opens the arrays.

        Args:
          item: the folder of the tree of arrays, ``checkpoints/STEP/ema`` for one.
          prefix: names on the way to the network in that tree.
          network, config: what they should be.
          record: where they come from.

        Raises:
          WeightsError: arrays are missing or of another shape.
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

    def read(self, place: Place) -> np.ndarray:
        """One layer of a parameter; all of it where it is not stacked."""
        param, layer = place
        array = self._arrays[param]
        return (array if layer is None else array[layer]).read().result()


def _open_array(item: Path, name: str) -> ts.TensorStore:
    kvstore = {"driver": "ocdbt", "base": item.absolute().as_uri() + "/", "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()


class ArrayReader:
    """Weights that are in memory: a network as it trains or samples."""

    def __init__(self, network: Network, module: Any, record: dict[str, Any] | None = None):
        self.network, self.config, self.record = network, module.config, record or {}
        self._arrays = named_leaves(module)
        self.dtypes = {name: np.dtype(array.dtype) for name, array in self._arrays.items()}

    def read(self, place: Place) -> np.ndarray:
        """One layer of a parameter; all of it where it is not stacked."""
        param, layer = place
        array = self._arrays[param]
        return np.asarray(jax.device_get(array if layer is None else array[layer]))


def _stored_names(files: TensorFiles, network: Network) -> dict[str, str]:
    """The files' names by the table's.

    Raises:
      WeightsError: two tensors, with and without a prefix, are one of the table's.
    """
    names: dict[str, str] = {}
    for stored in files.entries:
        name = network.format.known_as(stored)
        if name in names:
            raise WeightsError(f"{files.path} has {name} twice: as {names[name]} and as {stored}.")
        if name is not None:
            names[name] = stored
    return names


def open_folder(folder: Path, except_for: Sequence[str] = ()) -> TensorReader:
    """The network in a folder that diffusers' or transformers' save_pretrained wrote.

    Raises:
      FileNotFoundError: the folder, its config or its weights are missing.
      WeightsError: the network is not one of ours, or they do not fit one another.
    """
    values = read_config(folder)
    network = kind_of(values, folder)
    try:
        config = network.format.from_json(values)
    except KeyError as error:
        raise WeightsError(f"{folder / 'config.json'} says nothing of {error}.") from error
    except TypeError as error:
        raise WeightsError(f"{folder / 'config.json'} has a wrong type ({error}).") from error
    except ValueError as error:
        raise WeightsError(f"{folder / 'config.json'} cannot be used: {error}") from error
    return TensorReader(TensorFiles(folder), network, config, "diffusers", except_for)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
      FileNotFoundError: it is missing.
      WeightsError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is no JSON object.")
    return values


def kind_of(values: dict[str, Any], folder: Path) -> Network:
    """Which network a ``config.json`` describes.

    Raises:
      WeightsError: none of ours.
    """
    name = values.get("_class_name") or values.get("model_type") or "nothing"
    for network in ALL_NETWORKS.values():
        if name == network.class_name or name in getattr(network.format, "MODEL_TYPES", ()):
            return network
    known = ", ".join(network.class_name for network in ALL_NETWORKS.values())
    raise WeightsError(f"{folder / 'config.json'} describes {name}; known are {known}.")


def open_file(path: Path, except_for: Sequence[str] = ()) -> TensorReader:
    """A network in a single file of Black Forest Labs' layout.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: it is of another kind, or incomplete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
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
        "diffusers' layout give the folder with its config.json."
    )


def _bfl_config(files: TensorFiles, network: Network, shapes: dict[str, tuple[int, ...]]):
    if "network" in files.record:  # written by us
        return config_of(network, files.record["network"])
    try:
        return network.format.from_shapes(shapes)
    except KeyError as error:
        raise WeightsError(f"{files.path} has no tensor {error}.") from error
    except ValueError as error:
        raise WeightsError(f"{files.path} cannot be used: {error}") from error


def config_of(network: Network, values: dict[str, Any]):
    """A network's config from JSON values, see ``networks.architecture``.

    Raises:
      WeightsError: a setting that the network does not have, or a wrong one.
    """
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return network.config_class(**tuples)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"The record of this {network.name} cannot be used: {error}") from error
