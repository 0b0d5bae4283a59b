"""What an evaluation asks for: sets of tasks, and these as examples that can be packed."""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import Tokenizer
from kontext_jax.evaluation.tasks.kontext_bench import kontext_bench
from kontext_jax.evaluation.tasks.magic_brush import magic_brush
from kontext_jax.evaluation.tasks.triples import identity_probe, triples
from kontext_jax.geometry import fit, nearest_size
from kontext_jax.settings import Settings, check_choices, check_least
from kontext_jax.toy_data import world
from kontext_jax.types import Example, Task, Triple


@dataclass(kw_only=True, unsafe_hash=True)
class SetConfig(Settings):
    """One set of tasks.

    Attributes:
      name: what results call it.
      kind: "triples", a data set that `data.build` wrote; "kontext_bench" or "magic_brush", a local
        copy of these; "world", sessions or probes that are drawn on the spot.
      path: of the data.
      split: of triples, and of MagicBrush.
      num_examples: the first so many, each with the turns that follow it; 0 for all.
      turns: of a session; each turn edits the picture that was made in the turn before. 1 takes
        every edit by itself.
      probe: if there, the set's images are asked to stay as they are, in these words, in each of
        ``turns`` turns. The world has words of its own: "done" asks for edits that are done
        already, and nothing else can be asked there.
      seed: of what is drawn on the spot.
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
            raise ValueError(f"set {self.name!r}: path is empty; it names the data's folder.")
        if self.num_examples < 0:
            raise ValueError(
                f"set {self.name!r}: num_examples {self.num_examples} must be 0, for all, or more."
            )
        check_least(self, where, turns=1)
        if self.kind == "triples" and self.turns > 1 and not self.probe:
            raise ValueError(f"set {self.name!r}: triples have no sessions; set turns=1.")
        if self.kind == "world" and self.probe not in ("", "done"):
            raise ValueError(f"set {self.name!r}: the world's probe is 'done', not {self.probe!r}.")
        if self.kind == "world" and not self.num_examples:
            raise ValueError(f"set {self.name!r}: the world has no end; set num_examples.")

    @property
    def held_out(self) -> bool:
        """Whether no model was trained on it; sessions of the world repeat what training has."""
        return self.kind != "world" and self.split != "train"


def load_tasks(config: SetConfig) -> list[Task]:
    """The tasks of a set, those of a session in the order of their turns.

    Raises:
      FileNotFoundError, ValueError: the data is missing, or not what it should be.
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
    """The first so many tasks that follow none, and those that follow them; 0 for all."""
    kept: dict[str, Task] = {}
    begun = 0
    for task in tasks:
        begins = not task.follows and (not number or begun < number)
        if begins or task.follows in kept:
            kept[task.id] = task
            begun += begins
    return list(kept.values())


class Set(NamedTuple):
    """A set as it is used.

    Attributes:
      name: what results call it.
      tasks: in the order of their turns, each with an id of its own.
      fingerprint: tells them from others.
    """

    name: str
    tasks: list[Task]
    fingerprint: str


def load_sets(configs: Sequence[SetConfig]) -> list[Set]:
    """All sets; those that differ by their names only are read once.

    Raises:
      FileNotFoundError, ValueError: data is missing or not what it should be, or a set is empty; it
        names the set.
    """
    load = functools.cache(_load)
    sets = []
    for config in configs:
        try:
            sets.append(Set(config.name, *load(dataclasses.replace(config, name=""))))
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"set {config.name!r}: {error}") from error
    return sets


def _load(config: SetConfig) -> tuple[list[Task], str]:
    tasks = sorted(load_tasks(config), key=lambda task: task.turn)  # stable
    if not tasks:
        raise ValueError("it has no tasks.")
    twice = [task for task, number in Counter(task.id for task in tasks).items() if number > 1]
    if twice:
        raise ValueError(f"the task {twice[0]!r} is there twice.")
    return tasks, fingerprint_of_tasks(tasks)


def fingerprint_of_tasks(tasks: Sequence[Task]) -> str:
    """Short, of all that tasks ask for and are judged by, their images included."""
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
    """Those tasks that have a truth and start from what is stored, as they would be trained on."""
    return [
        Triple(task.id, task.truth, task.contexts, task.prompt, task.category)
        for task in tasks
        if task.truth is not None and not task.follows
    ]


def examples_of(
    tasks: Sequence[Task], made: Mapping[str, UInt8[np.ndarray, "_ _ 3"]], data: DataConfig
) -> list[Example]:
    """Tasks as a model takes them: contexts resized, prompts tokenised, targets empty.

    Args:
      tasks: of one turn.
      made: the pictures of the turn before, by the ids of their tasks.
      data: sizes and tokenizers.
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
            contexts = (made[task.follows], *contexts[1:])
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
