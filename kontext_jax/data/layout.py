"""Rows of an epoch before examples are dealt to their places: templates, and examples by class.

Examples of equal cost (image tokens, text tokens, images of each size whose number is limited) form
a class; those of a class are exchangeable. If there are too many classes, costs are rounded up, see
`ROUNDINGS`. The templates follow from the number of examples of each class. Two passes over the
columns of the index count the examples and sort them by class, which takes seconds for 100 million;
the result is kept in a file that all processes map.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from kontext_jax.data.packing import PackingConfig, Templates, pack, size_key
from kontext_jax.data.shapes import Shape, Shapes
from kontext_jax.files import atomic_path
from kontext_jax.geometry import GeometryConfig, num_tokens

VERSION = 2  # of the rows that given data and settings lead to; 1 packed example by example
SLOT_SLACK = 1.25  # limit on the images of one size in a row, as a multiple of the mean
RUN = 2**20  # examples sorted at a time
IN_MEMORY = 2**16  # the order of more examples is kept in a file
MAX_CLASSES = 4096  # packing more takes many seconds

ROUNDINGS = (
    (None, None, True),
    (None, 128, True),
    (None, 32, True),
    (1024, 32, True),
    (1024, 32, False),
)
"""(x, y, whether the images of a size are limited): image tokens are rounded up to multiples of 1/x
of a row and text tokens to multiples of 1/y.

The first that gives at most `MAX_CLASSES` classes is used, or else the last. Nothing is rounded up
beyond the largest value that rounds to the same, so that equal examples are not rounded at all.
"""


class Cache(NamedTuple):
    """Where layouts are kept.

    Attributes:
      folders: the first that has the layout, or else that can be written to, is used.
      key: identifies the examples and all settings that shape their rows.
    """

    folders: tuple[Path, ...]
    key: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The rows of every epoch, and the examples that may take their places.

    Attributes:
      templates: rows that list the classes of their places.
      order: all examples, sorted by class within each run of `RUN` examples.
      starts: start of each class in each run of ``order``, and the end of the last.
      slots: an upper bound of the images of each size in any row, in the order of the sizes.
      used: image tokens and text tokens of all examples, not rounded.
      folder: where it is kept, or None.
    """

    templates: Templates
    order: Integer[np.ndarray, " n"]
    starts: Int[np.ndarray, "runs classes_and_end"]
    slots: Int[np.ndarray, " sizes"]
    used: Int[np.ndarray, " 2"]
    folder: Path | None = None

    @classmethod
    def of(
        cls,
        shapes: Shapes,
        names: Sequence[str],
        packing: PackingConfig,
        geometry: GeometryConfig,
        cache: Cache | None = None,
    ) -> "Layout":
        """Plans the rows of examples, or loads them from the cache.

        Small data sets are planned in memory, large ones in files if there is a cache. Files are
        complete or absent, whatever process is killed and however many plan at once.

        Raises:
          OSError: no folder of the cache can be written to.
          ValueError: an example does not fit into an empty row, or files of the cache are damaged.
        """
        plan = functools.partial(_layout, shapes, names, packing, geometry)
        if cache is None or len(shapes) <= IN_MEMORY:
            return plan()
        folders = [folder / cache.key for folder in cache.folders]
        for folder in folders:
            if folder.exists():
                return cls.load(folder)
        reasons = []
        for folder in folders:
            try:
                with atomic_path(folder) as temporary:
                    temporary.mkdir()
                    plan(temporary)
            except OSError as error:  # it is read-only or full, or another process was faster
                reasons.append(str(error))
            if folder.exists():
                return cls.load(folder)
        raise OSError(
            "The plan of a large data set is kept in files, but none can be written "
            f"({'; '.join(reasons)}): give one of the folders room and write permission."
        )

    @classmethod
    def load(cls, folder: Path) -> "Layout":
        """Maps the files of a layout.

        Raises:
          ValueError: they are damaged.
        """
        try:
            order = np.load(folder / "order.npy", mmap_mode="r")
            with (folder / "layout.npz").open("rb") as file, np.load(file) as arrays:
                values = dict(arrays)
            templates = Templates(*(values.pop(name) for name in Templates._fields))
            return cls(templates=templates, order=order, folder=folder, **values)
        except Exception as error:  # NumPy and zipfile raise errors of many classes
            raise ValueError(
                f"The plan in {folder} is damaged ({error}): delete the folder, and it is made "
                "again."
            ) from error

    def save(self, folder: Path) -> None:
        """Writes all but the order to a folder."""
        arrays = {name: getattr(self, name) for name in ("starts", "slots", "used")}
        with (folder / "layout.npz").open("wb") as file:
            np.savez(file, **self.templates._asdict(), **arrays)
            os.fsync(file.fileno())

    @functools.cached_property
    def class_ends(self) -> Int[np.ndarray, "c runs"]:
        """Number of examples of each class up to the end of each run."""
        return np.cumsum(np.diff(self.starts), axis=0).T

    def example(self, class_: int, rank: int) -> int:
        """The ``rank``-th example of a class."""
        ends = self.class_ends[class_]
        run = int(np.searchsorted(ends, rank, side="right"))
        in_run = rank - (int(ends[run - 1]) if run else 0)
        return int(self.order[self.starts[run, class_] + in_run])

    def __reduce_ex__(self, protocol):
        """Other processes map the files."""
        if self.folder is None:
            return super().__reduce_ex__(protocol)
        return Layout.load, (self.folder,)


class _Classes(NamedTuple):
    """Classes of equal cost, and how to tell an example's.

    Attributes:
      costs: image tokens, text tokens, 1, and images of each size whose number is limited.
      capacity: what a row has of each.
      images: largest number of images of each size in any example of the class.
      of_cell: class of each cell of a table of images and text lengths, if there are examples.
      entry_cells: first cell of each entry of `Shapes`.
      text_cells: what each number of text tokens adds to it.
    """

    costs: Int[np.ndarray, "c d"]
    capacity: Int[np.ndarray, " d"]
    images: Int[np.ndarray, "c sizes"]
    of_cell: Integer[np.ndarray, " cells"]
    entry_cells: Int[np.ndarray, " k"]
    text_cells: Int[np.ndarray, " lengths"]

    def of(self, shapes: Shapes, block: slice) -> Integer[np.ndarray, " b"]:
        """Classes of a block of examples."""
        return self.of_cell[_cells(shapes, block, self.entry_cells, self.text_cells)]


def _layout(
    shapes: Shapes,
    names: Sequence[str],
    packing: PackingConfig,
    geometry: GeometryConfig,
    folder: Path | None = None,
) -> Layout:
    """Plans the rows; writes them to ``folder`` if given."""
    entry_counts = _count(_read(shapes.entries, block) for block in _blocks(shapes))
    text_counts = _count(_text_tokens(shapes, block) for block in _blocks(shapes))
    images, entry_kinds = _images(shapes)
    kind_counts = np.bincount(entry_kinds, entry_counts, len(images)).astype(int)
    tokens = np.array([num_tokens(size, geometry.pixels_per_token) for size in shapes.sizes])
    classes = _classes(shapes, images, entry_kinds, kind_counts, text_counts, tokens, packing)
    too_large = (classes.costs > classes.capacity).any(axis=1)
    starts = []

    def runs() -> Iterator[Integer[np.ndarray, " b"]]:
        for block in _blocks(shapes):
            of = classes.of(shapes, block)
            if too_large.any() and too_large[of].any():
                first = block.start + int(np.argmax(too_large[of]))
                raise ValueError(_too_large(names[first], shapes[first], packing, geometry))
            counts = np.bincount(of, minlength=len(classes.costs))
            starts.append(block.start + np.cumsum([0, *counts]))
            order = np.argsort(of, kind="stable")  # a radix sort, for numbers below 2**16
            yield (block.start + order).astype(np.min_scalar_type(len(shapes)))

    if folder is None:
        order = np.concatenate(list(runs()))
    else:
        order = _write_runs(folder / "order.npy", runs(), len(shapes))
    counts = np.diff(starts).sum(axis=0)
    templates = pack(classes.costs, counts, classes.capacity)
    firsts = np.append(0, templates.ends[:-1])
    in_rows = np.add.reduceat(classes.images[templates.classes], firsts)
    layout = Layout(
        templates=templates,
        order=order,
        starts=np.array(starts),
        slots=np.minimum(in_rows.max(axis=0), packing.image_tokens // tokens),
        used=np.array([kind_counts @ images @ tokens, text_counts @ np.arange(len(text_counts))]),
    )
    if folder is not None:
        layout.save(folder)
    return layout


def _classes(
    shapes: Shapes,
    images: Int[np.ndarray, "kinds sizes"],
    entry_kinds: Int[np.ndarray, " k"],
    kind_counts: Int[np.ndarray, " kinds"],
    text_counts: Int[np.ndarray, " lengths"],
    tokens: Int[np.ndarray, " sizes"],
    packing: PackingConfig,
) -> _Classes:
    """Divides examples into few enough classes.

    Encoders see one dense array per size, with as many images per row as the fullest row holds. So
    no row may hold many more images of a size than rows hold on average.
    """
    totals, most = kind_counts @ images, images.max(axis=0)
    mean = totals * packing.image_tokens / (totals @ tokens)
    limits = np.maximum(np.ceil(SLOT_SLACK * mean).astype(int), most)
    # Other limits hold anyway.
    limited = limits < np.minimum(packing.image_tokens // tokens, packing.max_examples * most)
    lengths = np.flatnonzero(text_counts)
    for image_parts, text_parts, has_limits in ROUNDINGS:
        columns = np.flatnonzero(limited & has_limits)
        image_tokens = _rounded(images @ tokens, packing.image_tokens, image_parts)
        costs, cost_of = np.unique(
            np.column_stack([image_tokens, images[:, columns]]), axis=0, return_inverse=True
        )
        levels, level_of = np.unique(
            _rounded(lengths, packing.text_tokens, text_parts), return_inverse=True
        )
        entry_cells = (cost_of.ravel() * len(levels))[entry_kinds].astype(np.int32)
        text_cells = np.zeros(len(text_counts), np.int32)
        text_cells[lengths] = level_of
        cells = np.arange(len(costs) * len(levels))
        if len(shapes) <= RUN:
            everything = slice(0, len(shapes))
            cells = np.unique(_cells(shapes, everything, entry_cells, text_cells))
        if len(cells) <= MAX_CLASSES:
            break
    cost, level = np.divmod(cells, len(levels))
    of_cell = np.zeros(len(costs) * len(levels), np.min_scalar_type(len(cells)))
    of_cell[cells] = np.arange(len(cells))
    largest = np.zeros((len(costs), len(tokens)), int)
    np.maximum.at(largest, cost_of.ravel(), images)
    rest = (levels[level], np.ones(len(cells), int), costs[cost][:, 1:])
    capacity = (packing.image_tokens, packing.text_tokens, packing.max_examples)
    return _Classes(
        costs=np.column_stack([costs[cost][:, 0], *rest]),
        capacity=np.array([*capacity, *limits[columns]]),
        images=largest[cost],
        of_cell=of_cell,
        entry_cells=entry_cells,
        text_cells=text_cells,
    )


def _rounded(
    values: Int[np.ndarray, " x"], capacity: int, parts: int | None
) -> Int[np.ndarray, " x"]:
    """The largest of the values that fall into the same ``parts`` of a row."""
    if parts is None:
        return values
    _, part_of = np.unique(-(-values * parts // capacity), return_inverse=True)
    largest = np.zeros(part_of.max() + 1, int)
    np.maximum.at(largest, part_of, values)
    return largest[part_of]


def _images(shapes: Shapes) -> tuple[Int[np.ndarray, "kinds sizes"], Int[np.ndarray, " k"]]:
    """Number of images of each size in examples of each kind, and the kind of each entry."""
    counts = np.diff(shapes.ends.astype(np.int64), prepend=0)
    images = np.zeros((len(counts), len(shapes.sizes)), np.uint16)
    np.add.at(images, (np.repeat(np.arange(len(counts)), counts), shapes.images), 1)
    kinds, kind_of = np.unique(images, axis=0, return_inverse=True)
    return kinds.astype(int), kind_of.ravel()


def _blocks(shapes: Shapes) -> Iterator[slice]:
    for start in range(0, len(shapes), RUN):
        yield slice(start, min(start + RUN, len(shapes)))


def _read(column: Integer[np.ndarray, " n"], block: slice) -> Integer[np.ndarray, " b"]:
    """A block of a column; of a file a copy, as mapped pages count as memory of this process."""
    if not isinstance(column, np.memmap):
        return column[block]
    offset = column.offset + block.start * column.itemsize
    return np.fromfile(column.filename, column.dtype, block.stop - block.start, offset=offset)


def _text_tokens(shapes: Shapes, block: slice) -> Integer[np.ndarray, " b"]:
    return shapes.text_tokens(_read(shapes.lengths, block))


def _cells(
    shapes: Shapes,
    block: slice,
    entry_cells: Int[np.ndarray, " k"],
    text_cells: Int[np.ndarray, " lengths"],
) -> Int[np.ndarray, " b"]:
    return entry_cells[_read(shapes.entries, block)] + text_cells[_text_tokens(shapes, block)]


def _count(blocks: Iterable[Integer[np.ndarray, " b"]]) -> Int[np.ndarray, " values"]:
    """How often each number occurs."""
    total = np.zeros(0, int)
    for block in blocks:
        counts = np.bincount(block, minlength=len(total))
        counts[: len(total)] += total
        total = counts
    return total


def _write_runs(
    path: Path, runs: Iterable[Integer[np.ndarray, " b"]], total: int
) -> Integer[np.ndarray, " n"]:
    """Writes an array piece by piece, in order, as object stores want it; returns it mapped."""
    with path.open("wb") as file:
        header = {"descr": np.min_scalar_type(total).str, "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, header | {"shape": (total,)})
        for run in runs:
            file.write(run)
        file.flush()
        os.fsync(file.fileno())
    return np.load(path, mmap_mode="r")


def _too_large(name: str, shape: Shape, packing: PackingConfig, geometry: GeometryConfig) -> str:
    images = " + ".join(size_key(size) for size in (shape.target, *shape.contexts))
    image_tokens = shape.image_tokens(geometry)
    if image_tokens > packing.image_tokens:
        return (
            f"Example {name} ({images}) needs {image_tokens} image tokens, but a row holds "
            f"{packing.image_tokens}: raise packing.image_tokens or use smaller geometry.sizes."
        )
    return (
        f"The prompt of example {name} needs {shape.text_tokens} text tokens, but a row holds "
        f"{packing.text_tokens}: raise packing.text_tokens or lower text.max_tokens."
    )
