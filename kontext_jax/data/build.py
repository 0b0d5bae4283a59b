"""Builds a data set of triples.

python -m kontext_jax.data.build --source={world,emoji,photographs,folder} --output=DIR

  world        synthetic scenes               [--num_train --num_validation --seed --size]
  emoji        edits between artists' icons   [--num_train --num_validation --seed --sizes] --input
  photographs  crops, for autoencoders        [--num_train --num_validation --seed --size]
  folder       your images and prompts        --input (kontext_jax/data/folder.py has its table)
"""

import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from absl import flags

from kontext_jax import cli
from kontext_jax.data import folder, store
from kontext_jax.data.sources import TripleSource
from kontext_jax.toy_data import emoji, photographs, world
from kontext_jax.types import Triple

REPORT_EVERY = 5.0  # seconds


class Split(NamedTuple):
    """A split's triples, generated lazily, and their number."""

    triples: Iterable[Triple]
    num: int


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command's flags; on import they would clash with those of other commands."""
    define = {"flag_values": values}
    flags.DEFINE_enum("source", None, list(SOURCES), "where the triples come from", **define)
    flags.DEFINE_string("output", None, "folder to create; it must not exist", **define)
    flags.DEFINE_string("input", None, "folder to read", **define)
    flags.DEFINE_integer("num_train", 12000, "triples to train on", lower_bound=0, **define)
    flags.DEFINE_integer("num_validation", 512, "triples held out", lower_bound=0, **define)
    flags.DEFINE_integer("seed", 0, "random seed of the triples", **define)
    flags.DEFINE_integer("size", 32, "height and width in pixels", lower_bound=1, **define)
    flags.DEFINE_list("sizes", ["32", "48", "64"], "heights and widths in pixels", **define)
    flags.mark_flags_as_required(["source", "output"], flag_values=values)


def run(options: flags.FlagValues) -> str:
    """Builds the data set described by the flags and returns a one-line summary.

    Raises:
      ValueError, OSError: in one sentence for the user; nothing is written.
    """
    start = time.monotonic()
    splits = _splits(options)
    triples = {name: _with_progress(name, split) for name, split in splits.items()}
    store.write(triples, options.output)
    counts = ", ".join(f"{len(TripleSource(options.output, name))} {name}" for name in splits)
    num_bytes = sum(file.stat().st_size for file in pathlib.Path(options.output).iterdir())
    seconds = time.monotonic() - start
    return f"{options.output}: {counts} triples, {num_bytes:,} bytes, {seconds:.1f} s"


def _splits(options: flags.FlagValues) -> dict[str, Split]:
    make, allowed_flags = SOURCES[options.source]
    for name in ("input", "num_train", "num_validation", "seed", "size", "sizes"):
        if options[name].present and name not in allowed_flags:
            raise ValueError(f"--source={options.source} does not use --{name}: leave it out.")
    if "input" in allowed_flags and options.input is None:
        raise ValueError(f"--source={options.source} needs --input, the folder to read.")
    return make(options)


def _world(options: flags.FlagValues) -> dict[str, Split]:
    return {
        split: Split(world.triples(num, split=split, seed=options.seed, size=options.size), num)
        for split, num in _requested(options)
    }


def _photographs(options: flags.FlagValues) -> dict[str, Split]:
    return {
        split: Split(photographs.triples(num, split, options.size, options.seed), num)
        for split, num in _requested(options)
    }


def _emoji(options: flags.FlagValues) -> dict[str, Split]:
    if not all(size.isdecimal() and int(size) for size in options.sizes):
        raise ValueError(
            f"--sizes is {','.join(options.sizes)}; give positive integers such as 32,48."
        )
    sizes = [int(size) for size in options.sizes]
    icons = emoji.Emoji(options.input)
    return {
        split: Split(icons.triples(num, split=split, sizes=sizes, seed=options.seed), num)
        for split, num in _requested(options)
    }


def _folder(options: flags.FlagValues) -> dict[str, Split]:
    return {
        split: Split(folder.triples(lines), len(lines))
        for split, lines in folder.read(options.input).items()
    }


def _requested(options: flags.FlagValues) -> list[tuple[str, int]]:
    splits = [("train", options.num_train), ("validation", options.num_validation)]
    return [(split, num) for split, num in splits if num]


_GENERATOR_FLAGS = ("num_train", "num_validation", "seed")
SOURCES = {
    "world": (_world, (*_GENERATOR_FLAGS, "size")),
    "emoji": (_emoji, (*_GENERATOR_FLAGS, "sizes", "input")),
    "photographs": (_photographs, (*_GENERATOR_FLAGS, "size")),
    "folder": (_folder, ("input",)),
}
"""For each --source, the function that makes its splits and the flags that it uses."""


def _with_progress(name: str, split: Split) -> Iterator[Triple]:
    """Yields the triples and prints progress every `REPORT_EVERY` seconds."""
    start = reported = time.monotonic()
    for done, triple in enumerate(split.triples, 1):
        yield triple
        now = time.monotonic()
        if now - reported >= REPORT_EVERY:
            reported = now
            rate = done / (now - start)
            left = (split.num - done) / rate
            print(
                f"{name}: {done} of {split.num}, {rate:.0f} per second, {left:.0f} s to go",
                file=sys.stderr,
            )


def main() -> None:
    """Runs the command."""
    define_flags()
    cli.run("build", lambda: print(run(flags.FLAGS)))


if __name__ == "__main__":
    main()
