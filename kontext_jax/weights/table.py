"""The language of the name tables, which map PyTorch's tensors to our parameters.

A `Row` describes one parameter in both layouts, Black Forest Labs' (BFL's) and diffusers'. Our
names follow BFL's. diffusers splits some parameters into several tensors along our last axis. A
name with ``{i}`` stands for one tensor per layer; our parameter stacks them along its first axis.

PyTorch stores a linear kernel as (out, in) and a convolution kernel as (out, in, height, width);
ours are (in, out) and (height, width, in, out).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LAYOUTS = ("bfl", "diffusers")


@dataclass(frozen=True)
class Row:
    """One parameter and the tensors that store it.

    Attributes:
      param: name of our parameter, e.g. ``double_blocks/img_attn/qkv/kernel``.
      bfl: name of the tensor in BFL's layout, or in the only layout if the network has one.
      diffusers: name in diffusers' layout; a tuple if it is split into several tensors; empty if
        it equals BFL's.
      sizes: widths of these tensors along our last axis; empty if they are equal.
      swapped: whether diffusers stores the two halves of the last axis in reverse order.
      pixelwise: whether BFL stores this linear kernel as a 1 x 1 convolution.
    """

    param: str
    bfl: str
    diffusers: str | tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    swapped: bool = False
    pixelwise: bool = False


class Piece(NamedTuple):
    """One PyTorch tensor, which stores a slice of one layer of a parameter.

    Attributes:
      name, shape: name and shape of the tensor.
      start, stop: range of our last axis that it stores.
      axes: permutation of our axes that gives the tensor's axes.
      swapped: whether the tensor's two halves are swapped, see `Row`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    axes: tuple[int, ...]
    swapped: bool

    def to_tensor(self, ours: np.ndarray) -> np.ndarray:
        """Returns the tensor, given the full layer of our parameter."""
        part = ours[..., self.start : self.stop]
        if self.swapped:
            part = _swap_halves(part)
        return np.ascontiguousarray(part.transpose(self.axes)).reshape(self.shape)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the slice of our parameter's layer that the tensor stores."""
        squeezed = tensor.reshape(tensor.shape[: len(self.axes)])  # drops the axes of a 1 x 1
        part = squeezed.transpose(np.argsort(self.axes))
        return _swap_halves(part) if self.swapped else part


def _swap_halves(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([second, first], axis=-1)


LayerKey = tuple[str, int | None]
"""(parameter, layer): one layer of a stacked parameter; layer None is an unstacked parameter."""


class Table:
    """All tensors of a network in one layout, by `LayerKey`."""

    def __init__(self, rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]], layout: str):
        """Matches the rows with the network's parameters.

        Args:
          rows: one row per parameter.
          shapes: shapes of our parameters, by name.
          layout: "bfl" or "diffusers".

        Raises:
          ValueError: the table is wrong: a parameter has no row or two rows, or a row has no
            parameter.
        """
        described, expected = Counter(row.param for row in rows), Counter(shapes.keys())
        if described != expected:
            wrong = sorted((described - expected) | (expected - described))
            raise ValueError(f"The table does not describe the network: {', '.join(wrong)}.")
        self.pieces: dict[LayerKey, list[Piece]] = {}
        for row in rows:
            stacked = "{i}" in row.bfl
            for layer in range(shapes[row.param][0]) if stacked else [None]:
                shape = shapes[row.param][1:] if stacked else shapes[row.param]
                self.pieces[row.param, layer] = _pieces(row, shape, layer, layout)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor, by name."""
        return {piece.name: piece.shape for pieces in self.pieces.values() for piece in pieces}


def _pieces(row: Row, shape: tuple[int, ...], layer: int | None, layout: str) -> list[Piece]:
    names, sizes = (row.bfl,), ()
    if layout == "diffusers" and row.diffusers:
        names = (row.diffusers,) if isinstance(row.diffusers, str) else row.diffusers
        sizes = row.sizes
    stops = np.cumsum(sizes or [shape[-1] // len(names)] * len(names)).tolist()
    axes = tuple(range(len(shape)))
    if row.param.endswith("kernel"):
        axes = (1, 0) if len(shape) == 2 else (3, 2, 0, 1)
    pieces = []
    for name, start, stop in zip(names, [0, *stops], stops, strict=False):
        ours = (*shape[:-1], stop - start)
        tensor = tuple(ours[axis] for axis in axes)
        if row.pixelwise and layout == "bfl":
            tensor = (*tensor, 1, 1)
        swapped = row.swapped and layout == "diffusers"
        pieces.append(Piece(name.replace("{i}", str(layer)), tensor, start, stop, axes, swapped))
    return pieces


def linear(ours: str, bfl: str, diffusers: str | tuple[str, ...] = (), **kwargs) -> list[Row]:
    """Returns the rows of a linear map or convolution: kernel and bias."""
    settings = {name: value for name, value in kwargs.items() if name != "pixelwise"}
    return kernel(ours, bfl, diffusers, **kwargs) + [
        Row(f"{ours}/bias", f"{bfl}.bias", _add_suffix(diffusers, "bias"), **settings)
    ]


def kernel(ours: str, bfl: str, diffusers: str | tuple[str, ...] = (), **kwargs) -> list[Row]:
    """Returns the row of a linear map or convolution without bias."""
    return [Row(f"{ours}/kernel", f"{bfl}.weight", _add_suffix(diffusers, "weight"), **kwargs)]


def norm(ours: str, bfl: str, diffusers: str | tuple[str, ...] = ()) -> list[Row]:
    """Returns the rows of a norm: scale and bias."""
    return [
        Row(f"{ours}/scale", f"{bfl}.weight", _add_suffix(diffusers, "weight")),
        Row(f"{ours}/bias", f"{bfl}.bias", _add_suffix(diffusers, "bias")),
    ]


def _add_suffix(names: str | tuple[str, ...], suffix: str) -> str | tuple[str, ...]:
    if isinstance(names, str):
        return f"{names}.{suffix}"
    return tuple(f"{name}.{suffix}" for name in names)


def in_layer_order(keys: Iterable[LayerKey]) -> list[LayerKey]:
    """Sorts keys layer by layer, as PyTorch's files are; unstacked parameters come first."""
    return sorted(keys, key=_order)


def _order(key: LayerKey) -> tuple:
    param, layer = key
    return (layer is not None, param.split("/")[0], layer or 0, param)
