"""Loads task sets, and turns tasks into examples for the model."""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import Tokenizer
from kontext_jax.evaluation.tasks.kontext_bench import kontext_bench
from kontext_jax.evaluation.tasks.magic_brush import magic_brush
from kontext_jax.evaluation.tasks.triples import identity_probe, triples
from kontext_jax.geometry import fit, nearest_size
from kontext_jax.settings import Settings, check_choices, check_least
from kontext_jax.toy_data import world
from kontext_jax.types import Example, RGBImage, Task, Triple


@dataclass(kw_only=True, unsafe_hash=True)
class SetConfig(Settings):
    """A task set.

    Attributes:
      name: label in all results.
      kind: "triples", a data set written by `data.build`; "kontext_bench" or "magic_brush", a local
        copy of the benchmark; "world", sessions or probes of the toy world, drawn on the fly.
      path: folder of the data.
      split: split of triples or of MagicBrush.
      num_examples: number of tasks to use, from the first on, each with the later turns of its
        session; 0 for all.
      turns: turns per session; each turn edits the image generated in the turn before. With 1,
        every edit starts from its stored image.
      probe: if not empty, the instruction of an identity probe: each first context should be
        returned unchanged, in each of ``turns`` turns. The toy world only has "done", which asks
        for edits that are already done.
      seed: seed of the toy world's tasks.
    """

    name: str
    kind: str = "triples"
    path: str = ""
    split: str = "validation"
    num_examples: int = 0
    turns: int = 1
    probe: str = ""
    seed: int = 0

    def __post_init__(self):
        where = f"set {self.name!r}: "
        check_choices(self, where, kind=("triples", "kontext_bench", "magic_brush", "world"))
        if not self.path and self.kind != "world":
            raise ValueError(f"{where}path is empty; set it to the folder of the data.")
        check_least(self, where, num_examples=0, turns=1)
        if self.kind == "triples" and self.turns > 1 and not self.probe:
            raise ValueError(f"{where}triples have no sessions; set turns=1.")
        if self.kind == "world" and self.probe not in ("", "done"):
            raise ValueError(f"{where}the toy world's probe is 'done', not {self.probe!r}.")
        if self.kind == "world" and not self.num_examples:
            raise ValueError(f"{where}the toy world is infinite; set num_examples.")

    @property
    def held_out(self) -> bool:
        """Whether models have not seen the set in training; the toy world repeats training data."""
        return self.kind != "world" and self.split != "train"


def load_tasks(config: SetConfig) -> list[Task]:
    """The tasks of a set; those of one session come in the order of their turns.

    Raises:
      FileNotFoundError, ValueError: the data is missing or invalid.
    """
    if config.kind == "world":
        draw = world.probes if config.probe else world.sessions
        return list(draw(config.num_examples, turns=config.turns, seed=config.seed))
    turns = 1 if config.probe else config.turns
    if config.kind == "triples":
        tasks = triples(config.path, config.split, 0 if config.probe else config.num_examples)
    elif config.kind == "kontext_bench":
        tasks = kontext_bench(config.path, turns)
    else:
        tasks = magic_brush(config.path, config.split, sessions=turns > 1)
        tasks = [task for task in tasks if task.turn <= turns or turns == 1]
    if config.probe:
        tasks = identity_probe(tasks, config.probe, config.turns, config.num_examples)
    return _first(tasks, config.num_examples)


def _first(tasks: Iterable[Task], number: int) -> list[Task]:
    """The first ``number`` tasks that start a session, and their later turns; 0 for all."""
    kept: dict[str, Task] = {}
    started = 0
    for task in tasks:
        starts = not task.follows and (not number or started < number)
        if starts or task.follows in kept:
            kept[task.id] = task
            started += starts
    return list(kept.values())


class TaskSet(NamedTuple):
    """A loaded task set.

    Attributes:
      name: label in all results.
      tasks: tasks with unique ids, sorted by turn.
      fingerprint: hash of the tasks.
    """

    name: str
    tasks: list[Task]
    fingerprint: str


def load_sets(configs: Sequence[SetConfig]) -> list[TaskSet]:
    """Loads sets; those that differ only by name are read once.

    Raises:
      FileNotFoundError, ValueError: data is missing, invalid or empty; the message names the set.
    """
    load = functools.cache(_load)
    sets = []
    for config in configs:
        try:
            sets.append(TaskSet(config.name, *load(dataclasses.replace(config, name=""))))
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"set {config.name!r}: {error}") from error
    return sets


def _load(config: SetConfig) -> tuple[list[Task], str]:
    tasks = sorted(load_tasks(config), key=lambda task: task.turn)  # stable
    if not tasks:
        raise ValueError("it has no tasks.")
    repeated = [name for name, count in Counter(task.id for task in tasks).items() if count > 1]
    if repeated:
        raise ValueError(f"the task id {repeated[0]!r} is not unique.")
    return tasks, fingerprint_of_tasks(tasks)


def fingerprint_of_tasks(tasks: Sequence[Task]) -> str:
    """A short hash of all fields of the tasks, including their images."""
    digest = hashlib.sha256()
    for task in tasks:
        for value in task:
            images = value if isinstance(value, tuple) else (value,)
            for image in images:
                if isinstance(image, np.ndarray):
                    digest.update(repr(image.shape).encode())
                    digest.update(np.ascontiguousarray(image))
                else:
                    digest.update(f"{image!r},".encode())
    return digest.hexdigest()[:16]


def triples_of(tasks: Sequence[Task]) -> list[Triple]:
    """Training triples from the tasks that have a target and start from stored images."""
    return [
        Triple(task.id, task.truth, task.contexts, task.prompt, task.category)
        for task in tasks
        if task.truth is not None and not task.follows
    ]


def examples_of(
    tasks: Sequence[Task], generated: Mapping[str, RGBImage], data: DataConfig
) -> list[Example]:
    """Model inputs for tasks: contexts resized, prompts tokenised, targets blank.

    Args:
      tasks: tasks of one turn.
      generated: images generated in the turn before, by task id.
      data: image sizes and tokenizers.
    """
    tokenizer, sizes = Tokenizer(data.text), data.geometry.sizes
    fitted: dict[int, np.ndarray] = {}  # tasks share images

    def resized(image):
        if id(image) not in fitted:
            fitted[id(image)] = fit(image, sizes)
        return fitted[id(image)]

    blanks: dict[tuple[int, int], np.ndarray] = {}
    examples = []
    for task in tasks:
        contexts = task.contexts
        if task.follows:
            contexts = (generated[task.follows], *contexts[1:])
        width, height = nearest_size(*task.size, sizes)
        blank = blanks.setdefault((width, height), np.zeros((height, width, 3), np.uint8))
        examples.append(
            Example(
                task.id,
                blank,
                tuple(resized(image) for image in contexts),
                tokenizer(task.prompt),
                tokenizer.clip(task.prompt),
            )
        )
    return examples
