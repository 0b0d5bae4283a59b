"""Tasks from triples, and tasks that ask for no change.

The public benchmarks have modules of their own: `kontext_bench` and `magic_brush`.
"""

import os
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import UInt8

from kontext_jax.data.sources import TripleSource
from kontext_jax.files import short_digest
from kontext_jax.types import Task, Triple


def triples(path: os.PathLike | str, split: str, num: int = 0) -> Iterator[Task]:
    """The triples of a data set as tasks whose right picture is known.

    Those of the same first context are one group, and those of the same target where they have no
    context. The data set is opened at once, and each triple read when its turn comes.

    Args:
      path: the data set's folder.
      split: the name of the split.
      num: the first so many; 0 for all.

    Raises:
      CorruptRecordError: a record cannot be read.
      FileNotFoundError: there is no data set at `path`, or not all of its files.
      ValueError: the data set has no such split, or `num` is below 0.
    """
    if num < 0:
        raise ValueError(f"num must be 0, for all, or the number of triples, not {num}.")
    source = TripleSource(path, split)
    return (_task(source[index]) for index in range(min(num or len(source), len(source))))


def _task(triple: Triple) -> Task:
    height, width, _ = triple.target.shape
    return Task(
        id=triple.id,
        contexts=triple.contexts,
        prompt=triple.prompt,
        category=triple.category,
        size=(width, height),
        truth=triple.target,
        group=_digest(triple.contexts[0] if triple.contexts else triple.target),
        details=triple.details,
    )


def _digest(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Tells pictures from others."""
    return short_digest(repr(image.shape).encode() + image.tobytes())


def identity_probe(tasks: Iterable[Task], prompt: str, turns: int = 1, num: int = 0) -> list[Task]:
    """Asks for no change of each different first context: what comes back should be that picture.

    Over several turns each starts from the picture made in the turn before, and the truth stays the
    stored one: how far they drift apart is what repeated editing costs.

    Args:
      tasks: whose first contexts are taken; those of equal pixels once, with the group and the
        caption of the first task that has them.
      prompt: the instruction to change nothing.
      turns: how often it is given.
      num: the first so many pictures, and no task is asked for after them; 0 for all.

    Raises:
      ValueError: no task has a context, or `turns` is below 1.
    """
    if turns < 1:
        raise ValueError(f"turns must be 1 or more, not {turns}.")
    seen: dict[int, np.ndarray] = {}  # tasks may share arrays: no need to read them over and over
    distinct: dict[str, Task] = {}
    for task in tasks:
        if task.contexts and id(image := task.contexts[0]) not in seen:
            seen[id(image)] = image
            distinct.setdefault(_digest(image), task)
            if len(distinct) == num:
                break
    if not distinct:
        raise ValueError("A probe of identity needs tasks with a context, and there is none.")
    probes = []
    for task in distinct.values():
        image = task.contexts[0]
        height, width, _ = image.shape
        for turn in range(1, turns + 1):
            probes.append(
                Task(
                    id=f"{task.id}/same/{turn}",
                    contexts=(image,),
                    prompt=prompt,
                    category="local",
                    size=(width, height),
                    truth=image,
                    group=task.group,
                    turn=turn,
                    follows=f"{task.id}/same/{turn - 1}" if turn > 1 else "",
                    source_caption=task.source_caption,
                    target_caption=task.source_caption,
                )
            )
    return probes
