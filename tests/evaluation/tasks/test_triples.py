"""Tasks match their triples, and identity probes cover each distinct context once."""

import numpy as np
import pytest

from kontext_jax.data import store
from kontext_jax.data.sources import TripleSource
from kontext_jax.evaluation.tasks.kontext_bench import kontext_bench
from kontext_jax.evaluation.tasks.triples import identity_probe, triples
from kontext_jax.types import Task, Triple
from tests.evaluation.tasks.miniature import random_image, write_miniature_kontext_bench


def image(seed: int, width: int = 24, height: int = 16) -> np.ndarray:
    return np.array(random_image(seed, width, height))


def task(name: str, *contexts: np.ndarray, **fields) -> Task:
    return Task(name, contexts, "make it red", "local", (8, 8), group=f"of {name}", **fields)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "set"
    records = [
        Triple("a", image(0, 8, 16), (image(1), image(2)), "both", "style", '{"x": 1}'),
        Triple("b", image(3), (), "a cat", "text_to_image"),
        Triple("c", image(4), (image(5),), "red", "local"),
        Triple("d", image(6), (image(1),), "blue", "local"),
    ]
    store.write({"validation": records}, path)
    return path


def test_tasks_match_their_triples(path):
    first, second, third, fourth = triples(path, "validation")
    assert (first.id, first.prompt, first.category) == ("a", "both", "style")
    assert (first.size, first.details, first.turn, first.follows) == ((8, 16), '{"x": 1}', 1, "")
    np.testing.assert_array_equal(first.truth, image(0, 8, 16))
    for context, seed in zip(first.contexts, (1, 2), strict=True):
        np.testing.assert_array_equal(context, image(seed))
    assert (second.contexts, second.category) == ((), "text_to_image")
    assert third.id == "c"
    # Tasks with the same first context (or, without contexts, the same target) form a group.
    assert fourth.group == first.group
    assert len({task.group for task in (first, second, third)}) == 3


def test_num_limits_the_triples(path):
    assert [task.id for task in triples(path, "validation", 2)] == ["a", "b"]
    assert [task.id for task in triples(path, "validation", 9)] == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="num must be 0, for all, or .* not -1"):
        triples(path, "validation", -1)
    with pytest.raises(ValueError, match='no split "test"'):
        triples(path, "test")


def test_triples_are_read_lazily(path, monkeypatch):
    read = []
    get = TripleSource.__getitem__
    monkeypatch.setattr(TripleSource, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    probes = identity_probe(triples(path, "validation"), "same", turns=2, num=1)
    assert [probe.id for probe in probes] == ["a/same/1", "a/same/2"] and read == [0]
    probes = identity_probe(triples(path, "validation"), "same", num=2)
    assert [probe.id for probe in probes] == ["a/same/1", "c/same/1"] and read == [0, 0, 1, 2]


def test_probes_have_each_first_context_once(tmp_path):
    write_miniature_kontext_bench(tmp_path)
    tasks = kontext_bench(tmp_path)
    probes = identity_probe(tasks, "change nothing")
    assert [probe.id for probe in probes] == [f"000{number}_00/same/1" for number in range(5)]
    assert [probe.group for probe in probes] == [f"images/000{number}.jpg" for number in range(5)]
    for probe, first in zip(probes, [tasks[i] for i in (0, 3, 6, 9, 11)], strict=True):
        assert probe.contexts[0] is probe.truth is first.contexts[0]
        assert probe.size == first.size
        assert (probe.prompt, probe.category, probe.words) == ("change nothing", "local", "")
        assert (probe.turn, probe.follows) == (1, "")


def test_probes_compare_pixels_and_shapes():
    flat = np.zeros((4, 6, 3), np.uint8)
    tasks = [
        task("text to image"),
        task("a", image(0), image(1), source_caption="a cat", target_caption="a red cat"),
        task("a again", image(0)),
        task("b", image(1)),
        task("flat", flat),
        task("flat, turned", flat.transpose(1, 0, 2)),
    ]
    probes = identity_probe(tasks, "same")
    assert [probe.group for probe in probes] == ["of a", "of b", "of flat", "of flat, turned"]
    assert len(probes[0].contexts) == 1
    assert probes[0].source_caption == probes[0].target_caption == "a cat"
    assert [probe.size for probe in probes[-2:]] == [(6, 4), (4, 6)]


def test_probes_of_images_that_are_read_one_by_one():
    """Images are compared by pixels: an image freed from memory may pass its id to the next."""
    seeds = [seed for number in range(20) for seed in (0, 0, 0, number)]
    probes = identity_probe((task(f"{i}", image(seed)) for i, seed in enumerate(seeds)), "same")
    assert len(probes) == 20


def test_probes_are_chained_over_turns():
    probes = identity_probe([task("a", image(0)), task("b", image(1))], "same", turns=3)
    assert [(probe.id, probe.turn, probe.follows) for probe in probes[:4]] == [
        ("a/same/1", 1, ""),
        ("a/same/2", 2, "a/same/1"),
        ("a/same/3", 3, "a/same/2"),
        ("b/same/1", 1, ""),
    ]
    assert len(probes) == 6
    assert probes[2].truth is probes[2].contexts[0] is probes[0].contexts[0]


def test_probes_need_a_context_and_a_turn():
    with pytest.raises(ValueError, match="needs tasks with a context"):
        identity_probe([task("text to image")], "same")
    with pytest.raises(ValueError, match="turns must be 1 or more, not 0"):
        identity_probe([task("a", image(0))], "same", turns=0)
