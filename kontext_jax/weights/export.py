"""Writing weights: diffusers' and Black Forest Labs' layouts, and Orbax checkpoints.

Everything is written a layer of a parameter at a time, read again, and compared bit for bit.
"""

import json
from collections.abc import Callable, Mapping
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
from kontext_jax.weights.table import Piece, Place

MAX_SHARD_BYTES = 10 * 10**9  # diffusers' own
CHUNK_BYTES = 128 * 2**20  # of an Orbax array; reading one layer reads no more than it needs


def write_diffusers(
    reader: Reader,
    folder: Path,
    record: Mapping[str, Any],
    dtype: np.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """One network as diffusers or transformers would save it: ``config.json`` and its tensors.

    Args:
      reader: the weights.
      folder: where to; made if need be.
      record: where they come from, kept in the files' metadata.
      dtype: to cast to; as stored if left out.
      max_shard_bytes: of a file; larger networks get several and an index.

    Raises:
      OSError: the disk is full.
      ValueError: diffusers has no such network.
      WeightsError: what was written is not what was to be written.
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
    """One network as a single file in Black Forest Labs' layout.

    Raises:
      OSError: the disk is full.
      WeightsError: what was written is not what was to be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _tensors(reader, "bfl", dtype), _metadata(reader, record))
    check_copy(reader, open_file(path), dtype)


def _metadata(reader: Reader, record: Mapping[str, Any]) -> dict[str, str]:
    """``format`` is what PyTorch's loaders ask for."""
    ours = dict(record) | {"network": architecture(reader.config)}
    return {"format": "pt", METADATA_KEY: json.dumps(ours, sort_keys=True)}


def _tensors(reader: Reader, layout: str, dtype: np.dtype | None) -> list[NewTensor]:
    pieces = reader.network.table(reader.config, layout).pieces
    last: tuple[Place, np.ndarray] | None = None

    def make(place: Place, piece: Piece, to: np.dtype) -> np.ndarray:
        nonlocal last
        if last is None or last[0] != place:  # the pieces of a layer come one after the other
            last = place, reader.read(place)
        return piece.to_tensor(last[1]).astype(to)

    tensors = []
    for place in reader.network.places(reader.config):
        to = dtype or reader.dtypes[place[0]]
        for piece in pieces[place]:

            def make_this(place=place, piece=piece, to=to):
                return make(place, piece, to)

            tensors.append(NewTensor(piece.name, piece.shape, to, make_this))
    return tensors


def check_copy(source: Reader, copy: Reader, dtype: np.dtype | None = None) -> None:
    """Compares every bit of ``copy`` with ``source``, cast to ``dtype``.

    Raises:
      WeightsError: it names all places that differ.
    """
    wrong = []
    for place in source.network.places(source.config):
        wanted, there = source.read(place), copy.read(place)
        wanted = wanted.astype(dtype or wanted.dtype)
        if wanted.dtype != there.dtype or wanted.tobytes() != there.tobytes():
            wrong.append(f"{place[0]}" + (f" of layer {place[1]}" if place[1] is not None else ""))
    if wrong:
        raise WeightsError(
            f"Read again, the written {source.network.name} differs in {', '.join(wrong)}; is the "
            "disk sound?"
        )


class _Layers:
    """An array that Orbax is to write, made layer by layer."""

    def __init__(self, shape, dtype, read: Callable[[int | None], np.ndarray], stacked: bool):
        self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), len(shape)
        self.size = int(np.prod(shape))
        self.read, self.stacked = read, stacked


class _LayersHandler(ocp.type_handlers.NumpyHandler):
    """Writes `_Layers` as Orbax writes NumPy arrays, one layer of one array at a time."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: _Layers, tspec, ts_context) -> None:
        # It waits for each write, so that Orbax's other coroutines, and their layers, wait too.
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
    """Networks as one Orbax checkpoint: ``folder/checkpoints/STEP/{params, meta}``.

    Args:
      readers: by the name that each network gets in the tree of arrays.
      folder: where to.
      step: the number of the checkpoint.
      meta: JSON kept beside the arrays.
      dtype: to cast to; as stored if left out.

    Raises:
      OSError: the disk is full.
      WeightsError: what was written is not what was to be written.
    """
    tree = {name: _orbax_tree(reader, dtype) for name, reader in readers.items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns if it is missing
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
        except ValueError as error:  # what TensorStore makes of a failing disk
            raise OSError(f"The checkpoint could not be written: {error}") from error
    for name, reader in readers.items():
        item = checkpoints / str(step) / "params"
        copy = OrbaxReader(item, [name], reader.network, reader.config, {})
        check_copy(reader, copy, dtype)


def _orbax_tree(reader: Reader, dtype: np.dtype | None) -> dict[str, Any]:
    shapes = reader.network.shapes(reader.config)
    stacked = {param for param, layer in reader.network.places(reader.config) if layer is not None}

    def layers(param: str) -> _Layers:
        to = dtype or reader.dtypes[param]
        return _Layers(
            shapes[param], to, lambda i: reader.read((param, i)).astype(to), param in stacked
        )

    tree: dict[str, Any] = {}
    for param in shapes:
        *parents, last = param.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = layers(param)
    return tree
