"""Sets of every kind, complete sessions, model inputs without targets, and fingerprints."""

import dataclasses
import json

import numpy as np
import pytest

from kontext_jax.data import store
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.sources import TripleSource
from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.evaluation.tasks.magic_brush import magic_brush
from kontext_jax.evaluation.tasks.sets import (
    SetConfig,
    examples_of,
    fingerprint_of_tasks,
    load_sets,
    load_tasks,
)
from kontext_jax.geometry import GeometryConfig, fit
from kontext_jax.toy_data import world
from kontext_jax.types import Task, Triple
from tests.evaluation.tasks.miniature import (
    KONTEXT_BENCH,
    MAGIC_BRUSH,
    random_image,
    write_miniature_kontext_bench,
    write_miniature_magic_brush,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Both public benchmarks, and a data set of triples."""
    folder = tmp_path_factory.mktemp("sets")
    write_miniature_kontext_bench(folder / "bench")
    (folder / "brush").mkdir()
    write_miniature_magic_brush(folder / "brush" / "dev")
    records = [
        Triple("a", image(0), (image(1), image(2)), "both", "style"),
        Triple("b", image(3), (), "a cat", "text_to_image"),
        Triple("c", image(4), (image(5),), "red", "local"),
        Triple("d", image(6), (image(7),), "blue", "local"),
    ]
    store.write({"validation": records, "train": [records[2]._replace(id="e")]}, folder / "triples")
    return str(folder)


def image(seed: int, width: int = 24, height: int = 16) -> np.ndarray:
    return np.array(random_image(seed, width, height))


def ids(**settings) -> list[str]:
    return [task.id for task in load_tasks(SetConfig(name="x", **settings))]


def test_a_set_of_triples(folder):
    triples = dict(path=f"{folder}/triples")
    assert ids(**triples) == ["a", "b", "c", "d"]
    assert ids(**triples, num_examples=2) == ["a", "b"]
    assert ids(**triples, num_examples=9) == ["a", "b", "c", "d"]
    assert ids(**triples, split="train") == ["e"]
    with pytest.raises(ValueError, match='no split "test"'):
        ids(**triples, split="test")


def test_a_set_of_kontext_bench(folder):
    bench = dict(kind="kontext_bench", path=f"{folder}/bench")
    assert len(ids(**bench)) == sum(map(len, KONTEXT_BENCH))
    assert ids(**bench, num_examples=4) == ["0000_00", "0000_01", "0000_02", "0001_00"]
    sessions = [f"images/000{i}.jpg/turn{turn}" for i in range(3) for turn in (1, 2)]
    assert ids(**bench, turns=2) == ids(**bench, turns=6) == sessions
    assert ids(**bench, turns=2, num_examples=2) == sessions[:4]


def test_a_set_of_magic_brush(folder):
    brush = dict(kind="magic_brush", path=f"{folder}/brush", split="dev")
    assert set(MAGIC_BRUSH) == {"139", "30"} and len(MAGIC_BRUSH["139"]) == 3
    assert ids(**brush) == ["139/1", "139/2", "139/3", "30/1"]
    assert ids(**brush, num_examples=2) == ["139/1", "139/2"]
    assert ids(**brush, turns=2) == ["139/1", "139/2", "30/1"]
    assert ids(**brush, turns=3) == ids(**brush, turns=9) == ["139/1", "139/2", "139/3", "30/1"]
    assert ids(**brush, turns=3, num_examples=1) == ["139/1", "139/2", "139/3"]
    alone, chained = (load_tasks(SetConfig(name="x", **brush, turns=turns)) for turns in (1, 3))
    assert [task.follows for task in alone] == [""] * 4
    assert [task.follows for task in chained] == ["", "139/1", "139/2", ""]


def test_a_set_of_the_toy_world():
    tasks = load_tasks(SetConfig(name="x", kind="world", num_examples=2, turns=3, seed=7))
    expected = list(world.sessions(2, turns=3, seed=7))
    assert [(task.id, task.prompt, task.details) for task in tasks] == [
        (task.id, task.prompt, task.details) for task in expected
    ]
    assert len(tasks) == 6
    probes = SetConfig(name="x", kind="world", num_examples=2, turns=2, probe="done")
    assert [task.prompt for task in load_tasks(probes)] == [
        task.prompt for task in world.probes(2, turns=2)
    ]


def test_probes_have_the_first_contexts_in_every_turn(folder):
    """Whatever the length of the set's sessions, with and without a limit on probes."""
    for source, names in (
        (dict(path=f"{folder}/triples"), ["a", "c", "d"]),
        (dict(kind="kontext_bench", path=f"{folder}/bench"), [f"000{i}_00" for i in range(5)]),
        (dict(kind="magic_brush", path=f"{folder}/brush", split="dev"),
         ["139/1", "139/2", "139/3", "30/1"]),
    ):  # fmt: skip
        probe = dict(probe="change nothing", turns=2, **source)
        expected = [f"{name}/same/{turn}" for name in names for turn in (1, 2)]
        assert ids(**probe) == expected
        assert ids(**probe, num_examples=2) == expected[:4]
        for task in load_tasks(SetConfig(name="x", **probe)):
            assert task.prompt == "change nothing" and task.truth is task.contexts[0]
            assert bool(task.follows) == (task.turn == 2)


def test_sessions_stay_complete_when_sorted_by_turn(folder, monkeypatch):
    """All first turns come before all second ones; two sessions still include all turns."""
    tasks = magic_brush(f"{folder}/brush", "dev", sessions=True)
    tasks = sorted(tasks, key=lambda task: (task.turn, task.group != "30"))
    assert [task.id for task in tasks] == ["30/1", "139/1", "139/2", "139/3"]
    monkeypatch.setattr("kontext_jax.evaluation.tasks.sets.magic_brush", lambda *_, **__: tasks)
    brush = dict(kind="magic_brush", path="x", turns=3)
    assert ids(**brush, num_examples=1) == ["30/1"]
    assert ids(**brush, num_examples=2) == [task.id for task in tasks]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "emu"}, "kind 'emu' is not one of triples, kontext_bench, magic_brush, world"),
        ({"path": ""}, "path is empty"),
        ({"kind": "kontext_bench", "path": ""}, "path is empty"),
        ({"turns": 0}, "turns 0 must be 1 or more"),
        ({"turns": 2}, "triples have no sessions; set turns=1"),
        ({"kind": "world"}, "the toy world is infinite; set num_examples"),
        ({"num_examples": -1}, "num_examples -1 must be 0 or more"),
    ],
)
def test_errors_name_the_set_and_the_setting(settings, message):
    with pytest.raises(ValueError, match=f"^set 'mine': {message}"):
        SetConfig(**{"name": "mine", "path": "x"} | settings)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (json.JSONDecodeError("bad", "x", 0), ValueError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), ValueError),
        (FileNotFoundError("bad"), FileNotFoundError),
    ],
)
def test_errors_from_loading_name_the_set(monkeypatch, error, kind):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("kontext_jax.evaluation.tasks.sets.kontext_bench", broken)
    with pytest.raises(kind, match="^set 'mine': .*bad"):
        load_sets([SetConfig(name="mine", kind="kontext_bench", path="x")])


def test_a_limited_probe_reads_only_what_it_needs(folder, monkeypatch):
    read = []
    get = TripleSource.__getitem__
    monkeypatch.setattr(TripleSource, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    probe = dict(path=f"{folder}/triples", probe="same")
    assert ids(**probe, num_examples=2) == ["a/same/1", "c/same/1"] and read == [0, 1, 2]


# ---- examples -----------------------------------------------------------------------------------

DATA = DataConfig(
    geometry=GeometryConfig(sizes=((16, 16), (32, 16), (64, 32)), pixels_per_token=8),
    caption_dropout=1.0,
    context_dropout=1.0,
)


def task(name: str, *contexts: np.ndarray, **fields) -> Task:
    known = dict(prompt=f"make {name}", category="local", size=(16, 16), truth=image(99, 16, 16))
    return Task(name, contexts, **known | fields)


def test_examples_have_the_task_s_inputs_and_no_target():
    """Dropout is only for training, and targets are only for judges."""
    square, wide = image(1, 40, 40), image(2, 30, 15)
    tasks = [
        task("a", square, wide),
        task("b", wide, size=(100, 50)),
        task("c", size=(20, 10), truth=None, prompt=""),
        task("d", image(3, 16, 16)),
    ]
    examples = examples_of(tasks, {}, DATA)
    assert [example.id for example in examples] == ["a", "b", "c", "d"]
    shapes = [(16, 16, 3), (32, 64, 3), (16, 32, 3), (16, 16, 3)]
    assert [example.target.shape for example in examples] == shapes
    assert not any(example.target.any() for example in examples)
    assert [len(example.contexts) for example in examples] == [2, 1, 0, 1]
    for example, one in zip(examples, tasks, strict=True):
        for context, stored in zip(example.contexts, one.contexts, strict=True):
            np.testing.assert_array_equal(context, fit(stored, DATA.geometry.sizes))
        tokens = Tokenizer(DATA.text)(one.prompt)
        assert example.text_ids.tolist() == tokens.tolist() and len(tokens) > len(one.prompt)
    np.testing.assert_array_equal(examples[3].contexts[0], tasks[3].contexts[0])
    assert examples[0].contexts[1] is examples[1].contexts[0]  # a shared image is resized once


def test_prompts_are_tokenised_for_both_encoders(flux_tokenizers):
    text = TextConfig(clip_tokenizer=str(flux_tokenizers / "tokenizer"), clip_max_tokens=8)
    data = dataclasses.replace(DATA, text=text)
    (example,) = examples_of([task("a", prompt="make it red")], {}, data)
    assert example.clip_ids.tolist() == Tokenizer(text).clip("make it red").tolist()
    assert example.text_ids.tolist() == Tokenizer(text)("make it red").tolist()
    assert len(example.clip_ids) == 8


def test_a_later_turn_starts_from_the_generated_image():
    first, other = image(1, 16, 16), image(2, 16, 16)
    generated = {"a/1": image(3, 16, 16), "b/1": image(4, 48, 24)}
    tasks = [
        task("b/2", first, other, follows="b/1", turn=2),
        task("a/2", first, follows="a/1", turn=2),
        task("c/1", first),
    ]
    examples = examples_of(tasks, generated, DATA)
    starts = [generated["b/1"], generated["a/1"], first]
    for example, start in zip(examples, starts, strict=True):
        np.testing.assert_array_equal(example.contexts[0], fit(start, DATA.geometry.sizes))
    np.testing.assert_array_equal(examples[0].contexts[1], other)
    assert [len(example.contexts) for example in examples] == [2, 1, 1]
    with pytest.raises(KeyError):
        examples_of(tasks, {"a/1": generated["a/1"]}, DATA)


def full_task(name: str, **fields) -> Task:
    """A task with all fields set."""
    known = dict(
        contexts=(image(1, 5, 4), image(2, 5, 4)),
        prompt="make it red",
        category="local",
        size=(5, 4),
        truth=image(3, 5, 4),
        group="g",
        turn=2,
        follows="f",
        source_caption="a cat",
        target_caption="a red cat",
        words="CAT",
        details='{"x": 1}',
    )
    return Task(name, **known | fields)


OTHER = dict(
    id="b",
    contexts=(image(2, 5, 4), image(1, 5, 4)),
    prompt="make it blue",
    category="global",
    size=(4, 5),
    truth=None,
    group="h",
    turn=3,
    follows="",
    source_caption="",
    target_caption="red",
    words="cat",
    details="{}",
)


@pytest.mark.parametrize("field", Task._fields)
def test_a_fingerprint_depends_on_every_field(field):
    assert OTHER.keys() == set(Task._fields)
    one = full_task("a")
    assert fingerprint_of_tasks([one]) != fingerprint_of_tasks(
        [one._replace(**{field: OTHER[field]})]
    )


def test_a_fingerprint_depends_on_every_pixel_and_on_shapes():
    one = full_task("a")
    fingerprints = {fingerprint_of_tasks([one])}
    for index in np.ndindex(2, 4, 5, 3):
        images = np.stack(one.contexts)
        images[index] ^= 1
        fingerprints.add(fingerprint_of_tasks([one._replace(contexts=tuple(images))]))
    for index in np.ndindex(4, 5, 3):
        target = one.truth.copy()
        target[index] ^= 1
        fingerprints.add(fingerprint_of_tasks([one._replace(truth=target)]))
    fingerprints.add(fingerprint_of_tasks([one._replace(truth=one.truth.reshape(5, 4, 3))]))
    assert len(fingerprints) == 1 + 120 + 60 + 1


def test_a_fingerprint_depends_on_the_field_of_a_value():
    one, first, second = full_task("a"), *full_task("a").contexts
    different = [
        [one],
        [one, one],
        [one, full_task("b")],
        [full_task("b"), one],
        [],
        [one._replace(contexts=(first,), truth=second)],
        [one._replace(contexts=(first, second), truth=None)],
        [one._replace(contexts=(first, second, one.truth), truth=None)],
        [one._replace(contexts=())],
        [one._replace(prompt="ab", category="c")],
        [one._replace(prompt="a", category="bc")],
        [one._replace(size=(1, 23))],
        [one._replace(size=(12, 3))],
    ]
    assert len({fingerprint_of_tasks(tasks) for tasks in different}) == len(different)


def test_a_fingerprint_does_not_depend_on_memory_layout():
    one = full_task("a")
    shared = [one, full_task("b", contexts=one.contexts, truth=one.contexts[0])]
    padded = np.zeros((6, 7, 3), np.uint8)
    padded[1:5, 1:6] = one.contexts[0]
    copied = [
        one._replace(contexts=tuple(image.copy() for image in one.contexts)),
        full_task(
            "b",
            contexts=(padded[1:5, 1:6], np.asfortranarray(image(2, 5, 4))),
            truth=image(1, 5, 4),
        ),
    ]
    assert fingerprint_of_tasks(shared) == fingerprint_of_tasks(copied)
    assert len(fingerprint_of_tasks(shared)) == 16
