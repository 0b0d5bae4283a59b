"""The language of the name tables: which PyTorch tensors make up each of our parameters.

A `Row` says it for one parameter in the two layouts there are, Black Forest Labs' and diffusers'.
Ours follow BFL's names; diffusers cuts some into several tensors, side by side along what is our
last axis. Names with ``{i}`` stand for one tensor a layer; ours are stacked along the first axis.

PyTorch keeps a linear map as (out, in) and a convolution as (out, in, height, width); ours are
(in, out) and (height, width, in, out).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LAYOUTS = ("bfl", "diffusers")


@dataclass(frozen=True)
class Row:
    """One of our parameters, and its tensors.

    Attributes:
      param: our name, such as ``double_blocks/img_attn/qkv/kernel``.
      bfl: the tensor's name in BFL's layout; or in the only one there is.
      diffusers: its name in diffusers'; a tuple where it is several tensors; empty if as in BFL's.
      sizes: how wide these are along our last axis; empty if they are of equal width.
      swapped: diffusers has the two halves of that axis the other way round.
      pixelwise: BFL keeps this linear map as a 1 x 1 convolution.
    """

    param: str
    bfl: str
    diffusers: str | tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    swapped: bool = False
    pixelwise: bool = False


class Piece(NamedTuple):
    """One PyTorch tensor as part of one layer of one of our parameters.

    Attributes:
      name, shape: of the tensor.
      start, stop: what it holds of our last axis.
      axes: the permutation of our axes that gives the tensor's.
      swapped: the tensor's two halves are swapped, see `Row`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    axes: tuple[int, ...]
    swapped: bool

    def to_tensor(self, ours: np.ndarray) -> np.ndarray:
        """The tensor, from a whole layer of our parameter."""
        part = ours[..., self.start : self.stop]
        if self.swapped:
            part = _swap_halves(part)
        return np.ascontiguousarray(part.transpose(self.axes)).reshape(self.shape)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Its part of our parameter's layer."""
        squeezed = tensor.reshape(tensor.shape[: len(self.axes)])  # a 1 x 1 kernel has no extent
        part = squeezed.transpose(np.argsort(self.axes))
        return _swap_halves(part) if self.swapped else part


def _swap_halves(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([second, first], axis=-1)


Place = tuple[str, int | None]
"""A parameter and its layer; None where the parameter is not stacked."""


class Table:
    """All tensors of a network in one layout, by the `Place` they belong to."""

    def __init__(self, rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]], layout: str):
        """Lays the rows out over the network's parameters.

        Args:
          rows: one for each parameter.
          shapes: of our parameters.
          layout: "bfl" or "diffusers".

        Raises:
          ValueError: a parameter without a row or with two, or a row without a parameter: the table
            is wrong.
        """
        described, wanted = Counter(row.param for row in rows), Counter(shapes.keys())
        if described != wanted:
            wrong = sorted((described - wanted) | (wanted - described))
            raise ValueError(f"The table does not describe the network: {', '.join(wrong)}.")
        self.pieces: dict[Place, list[Piece]] = {}
        for row in rows:
            stacked = "{i}" in row.bfl
            for layer in range(shapes[row.param][0]) if stacked else [None]:
                shape = shapes[row.param][1:] if stacked else shapes[row.param]
                self.pieces[row.param, layer] = _pieces(row, shape, layer, layout)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
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
    """Kernel and bias of a linear map or convolution, or scale and bias of a norm with both."""
    return kernel(ours, bfl, diffusers, **kwargs) + [
        Row(f"{ours}/bias", f"{bfl}.bias", _with("bias", diffusers), **_but_pixelwise(kwargs))
    ]


def kernel(ours: str, bfl: str, diffusers: str | tuple[str, ...] = (), **kwargs) -> list[Row]:
    """A linear map without bias."""
    return [Row(f"{ours}/kernel", f"{bfl}.weight", _with("weight", diffusers), **kwargs)]


def norm(ours: str, bfl: str, diffusers: str | tuple[str, ...] = ()) -> list[Row]:
    """Scale and bias of a norm."""
    return [
        Row(f"{ours}/scale", f"{bfl}.weight", _with("weight", diffusers)),
        Row(f"{ours}/bias", f"{bfl}.bias", _with("bias", diffusers)),
    ]


def _with(ending: str, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(names, str):
        return f"{names}.{ending}"
    return tuple(f"{name}.{ending}" for name in names)


def _but_pixelwise(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "pixelwise"}


def in_layer_order(places: Iterable[Place]) -> list[Place]:
    """Layer by layer, as PyTorch's own files are: first what is not stacked."""
    return sorted(places, key=lambda place: _order(*place))


def _order(param: str, layer: int | None) -> tuple:
    return (layer is not None, param.split("/")[0], layer or 0, param)
