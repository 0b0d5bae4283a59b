"""Tasks from triples, and identity probes.

For the public benchmarks see `kontext_bench` and `magic_brush`.
"""

import os
from collections.abc import Iterable, Iterator

import numpy as np

from kontext_jax.data.sources import TripleSource
from kontext_jax.files import short_digest
from kontext_jax.types import RGBImage, Task, Triple


def triples(path: os.PathLike | str, split: str, num: int = 0) -> Iterator[Task]:
    """Yields the triples of a data set as tasks with a target.

    Triples with the same first context form a group; without contexts, those with the same target.
    The data set is opened immediately, and each triple is read when it is needed.

    Args:
      path: folder of the data set.
      split: name of the split.
      num: number of triples, from the first on; 0 for all.

    Raises:
      CorruptRecordError: a record cannot be read.
      FileNotFoundError: the data set or one of its files is missing.
      ValueError: the data set has no such split, or `num` is negative.
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


def _digest(image: RGBImage) -> str:
    """A short hash of an image's pixels and shape."""
    return short_digest(repr(image.shape).encode() + image.tobytes())


def identity_probe(tasks: Iterable[Task], prompt: str, turns: int = 1, num: int = 0) -> list[Task]:
    """Tasks that ask for no change: each distinct first context should come back unchanged.

    Over several turns, each turn starts from the image generated in the turn before, and the target
    stays the stored image: the distance between them measures how errors of repeated edits add up.

    Args:
      tasks: tasks whose first contexts are probed. Contexts with equal pixels are probed once, with
        the group and caption of the first task.
      prompt: the instruction to change nothing.
      turns: number of turns per image.
      num: number of distinct images, after which ``tasks`` is not read further; 0 for all.

    Raises:
      ValueError: no task has a context, or `turns` is below 1.
    """
    if turns < 1:
        raise ValueError(f"turns must be 1 or more, not {turns}.")
    # Tasks share arrays, so each is hashed once. The dict keeps them alive: ids are then unique.
    hashed: dict[int, np.ndarray] = {}
    distinct: dict[str, Task] = {}
    for task in tasks:
        if task.contexts and id(image := task.contexts[0]) not in hashed:
            hashed[id(image)] = image
            distinct.setdefault(_digest(image), task)
            if len(distinct) == num:
                break
    if not distinct:
        raise ValueError("An identity probe needs tasks with a context, but none has one.")
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
