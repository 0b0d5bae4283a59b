"""Writes weights in diffusers' and Black Forest Labs' layouts and as Orbax checkpoints.

Weights are written one layer of a parameter at a time, read back, and compared bit for bit.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from kontext_jax.weights.files import (
    METADATA_KEY,
    NewTensor,
    WeightsError,
    write_file,
    write_sharded,
)
from kontext_jax.weights.networks import architecture
from kontext_jax.weights.reading import OrbaxReader, Reader, open_file, open_folder
from kontext_jax.weights.table import LayerKey, Piece

MAX_SHARD_BYTES = 10 * 10**9  # diffusers' default
CHUNK_BYTES = 128 * 2**20  # of an Orbax array, so that reading one layer reads little else


def write_diffusers(
    reader: Reader,
    folder: Path,
    record: Mapping[str, Any],
    dtype: np.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a network as diffusers or transformers saves it: ``config.json`` and safetensors.

    Args:
      reader: the weights.
      folder: output folder; created if needed.
      record: provenance of the weights, stored in the files' metadata.
      dtype: dtype to cast to; None keeps the stored dtypes.
      max_shard_bytes: maximum size of a file; larger networks are sharded, with an index.

    Raises:
      OSError: the disk is full.
      ValueError: diffusers does not support the network's settings.
      WeightsError: the files differ from the weights when read back.
    """
    network = reader.network
    values = network.format.to_json(reader.config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(reader, "diffusers", dtype)
    write_sharded(folder, network.stem, tensors, _metadata(reader, record), max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    check_copy(reader, open_folder(folder), dtype)


def write_bfl(
    reader: Reader, path: Path, record: Mapping[str, Any], dtype: np.dtype | None = None
) -> None:
    """Writes a network as a single file in Black Forest Labs' layout.

    Args:
      reader: the weights.
      path: output file; its folder is created if needed.
      record: provenance of the weights, stored in the file's metadata.
      dtype: dtype to cast to; None keeps the stored dtypes.

    Raises:
      OSError: the disk is full.
      ValueError: BFL's code does not support the network's settings.
      WeightsError: the file differs from the weights when read back.
    """
    reader.network.format.to_json(reader.config)  # refuses what no other library supports
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _tensors(reader, "bfl", dtype), _metadata(reader, record))
    check_copy(reader, open_file(path), dtype)


def _metadata(reader: Reader, record: Mapping[str, Any]) -> dict[str, str]:
    record = dict(record) | {"network": architecture(reader.config)}
    # PyTorch's loaders require "format".
    return {"format": "pt", METADATA_KEY: json.dumps(record, sort_keys=True)}


def _tensors(reader: Reader, layout: str, dtype: np.dtype | None) -> list[NewTensor]:
    pieces = reader.network.table(reader.config, layout).pieces
    last: tuple[LayerKey, np.ndarray] | None = None

    def make(key: LayerKey, piece: Piece, target: np.dtype) -> np.ndarray:
        nonlocal last
        if last is None or last[0] != key:  # the pieces of a layer are adjacent
            last = key, reader.read(key)
        return piece.to_tensor(last[1]).astype(target)

    tensors = []
    for key in reader.network.layer_keys(reader.config):
        target = dtype or reader.dtypes[key[0]]
        tensors += [
            NewTensor(piece.name, piece.shape, target, partial(make, key, piece, target))
            for piece in pieces[key]
        ]
    return tensors


def check_copy(source: Reader, copy: Reader, dtype: np.dtype | None = None) -> None:
    """Checks that ``copy`` equals ``source``, cast to ``dtype``, bit for bit.

    Raises:
      WeightsError: layers differ; the message names all of them.
    """
    wrong = []
    for param, layer in source.network.layer_keys(source.config):
        expected, actual = source.read((param, layer)), copy.read((param, layer))
        expected = expected.astype(dtype or expected.dtype)
        if expected.dtype != actual.dtype or expected.tobytes() != actual.tobytes():
            wrong.append(param if layer is None else f"layer {layer} of {param}")
    if wrong:
        raise WeightsError(
            f"The written {source.network.name} differs from its source in {', '.join(wrong)}; "
            "check the disk for errors."
        )


class _Layers:
    """An array for Orbax to write, whose layers are read when they are written."""

    def __init__(self, shape, dtype, read: Callable[[int | None], np.ndarray], stacked: bool):
        self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), len(shape)
        self.size = int(np.prod(shape))
        self.read, self.stacked = read, stacked


class _LayersHandler(ocp.type_handlers.NumpyHandler):
    """Writes `_Layers` in Orbax's format of NumPy arrays, one layer of one array at a time."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: _Layers, tspec, ts_context) -> None:
        # Blocks on every write, so that no other coroutine of Orbax holds a layer meanwhile.
        array = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
        if not value.stacked:
            array.write(value.read(None)).result()
            return
        for layer in range(value.shape[0]):
            array[layer].write(value.read(layer)).result()


def write_orbax(
    readers: Mapping[str, Reader],
    folder: Path,
    step: int,
    meta: Mapping[str, Any],
    dtype: np.dtype | None = None,
) -> None:
    """Writes networks as one Orbax checkpoint: ``folder/checkpoints/STEP/{params, meta}``.

    Args:
      readers: the weights, by the networks' names in the tree of arrays.
      folder: output folder.
      step: step of the checkpoint.
      meta: JSON values stored beside the arrays.
      dtype: dtype to cast to; None keeps the stored dtypes.

    Raises:
      OSError: the disk is full.
      WeightsError: the checkpoint differs from the weights when read back.
    """
    tree = {name: _orbax_tree(reader, dtype) for name, reader in readers.items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused, but Orbax warns without it
        (_Layers, _LayersHandler()),
    )
    save_args = jax.tree.map(
        lambda array: ocp.SaveArgs(
            chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if array.stacked else ()
        ),
        tree,
    )
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    checkpoints = folder.absolute() / "checkpoints"
    params = ocp.args.PyTreeSave(tree, save_args=save_args)
    args = ocp.args.Composite(params=params, meta=ocp.args.JsonSave(dict(meta)))
    with ocp.CheckpointManager(checkpoints, item_handlers=handlers, options=options) as manager:
        try:
            manager.save(step, args=args)
        except ValueError as error:  # TensorStore raises it for a full disk
            raise OSError(f"The checkpoint could not be written: {error}") from error
    for name, reader in readers.items():
        item = checkpoints / str(step) / "params"
        copy = OrbaxReader(item, [name], reader.network, reader.config, {})
        check_copy(reader, copy, dtype)


def _orbax_tree(reader: Reader, dtype: np.dtype | None) -> dict[str, Any]:
    shapes = reader.network.shapes(reader.config)
    stacked = {
        param for param, layer in reader.network.layer_keys(reader.config) if layer is not None
    }

    def layers(param: str) -> _Layers:
        target = dtype or reader.dtypes[param]
        return _Layers(
            shapes[param],
            target,
            lambda i: reader.read((param, i)).astype(target),
            param in stacked,
        )

    tree: dict[str, Any] = {}
    for param in shapes:
        *parents, last = param.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = layers(param)
    return tree
