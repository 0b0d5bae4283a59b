"""`world` is deterministic, keeps its splits apart, and asks for one thing in few words."""

import json
from collections import defaultdict

import numpy as np
import pytest

from kontext_jax.data import world
from kontext_jax.data.scene import ALPHABET, FONT, Scene, render
from kontext_jax.types import CATEGORIES


@pytest.fixture(scope="module")
def train():
    return list(world.triples(2000, split="train"))


@pytest.fixture(scope="module")
def validation():
    return list(world.triples(1000, split="validation"))


def _key(triple):
    facts = json.loads(triple.details)
    return f"{facts['category']}/{facts['kind']}/{facts['combination']}"


def test_a_triple_depends_on_its_arguments_alone(train):
    again = world.triple(7, split="train")
    assert again.id == train[7].id and again.details == train[7].details
    np.testing.assert_array_equal(again.target, train[7].target)
    assert world.triple(7, split="train", seed=1).details != again.details


def test_ids_are_unique(train, validation):
    other_seed = list(world.triples(50, split="train", seed=1))
    ids = [triple.id for triple in [*train, *validation, *other_seed]]
    assert len(set(ids)) == len(ids)


def test_splits_share_no_combination(train, validation):
    assert not {_key(t) for t in train} & {_key(t) for t in validation}
    assert not any(world.held_out(_key(t)) for t in train)


def test_every_kind_of_edit_has_held_out_combinations(validation):
    combinations = defaultdict(set)
    for triple in validation:
        category, kind, combination = _key(triple).split("/", 2)
        combinations[category, kind].add(combination)
    kinds = {(category, kind) for category, kinds in world.EDITS.items() for kind in kinds}
    assert set(combinations) == kinds
    assert min(map(len, combinations.values())) >= 5


def test_categories_are_those_of_the_trainer(train):
    assert tuple(world.EDITS) == tuple(world.CATEGORY_WEIGHTS) == CATEGORIES
    share = np.mean([triple.category == "local" for triple in train])
    assert abs(share - world.CATEGORY_WEIGHTS["local"]) < 0.05


def test_prompts_are_short(train, validation):
    lengths = [len(triple.prompt.encode()) for triple in [*train, *validation]]
    assert max(lengths) <= 56
    assert np.median(lengths) <= 36


def test_an_instruction_has_one_answer_but_for_what_it_leaves_open(train, validation):
    answers, open_ones = defaultdict(set), defaultdict(set)
    for triple in [*train, *validation]:
        facts = json.loads(triple.details)
        question = json.dumps(facts["before"]), triple.prompt
        factors = Scene.from_json(facts["after"]).factors()
        answers[question].add(json.dumps([v for f, v in factors.items() if f not in facts["free"]]))
        if facts["free"]:
            open_ones[question].add(json.dumps(facts["after"]))
    assert len(answers) < len(train) + len(validation)  # some questions were asked twice
    assert all(len(scenes) == 1 for scenes in answers.values())
    assert max(map(len, open_ones.values())) > 5


def test_the_shape_of_an_instruction_names_one_object(train):
    for triple in train:
        facts = json.loads(triple.details)
        if facts["kind"] in ("recolour", "reshape", "remove"):
            before = Scene.from_json(facts["before"])
            shapes = [thing.shape for thing in (before.left, before.right) if thing]
            assert sum(f"the {shape}" in triple.prompt for shape in shapes) == 1
            assert len(set(shapes)) == len(shapes)


def test_the_details_describe_the_pictures(train):
    for triple in train[:100]:
        facts = json.loads(triple.details)
        np.testing.assert_array_equal(render(Scene.from_json(facts["after"]), 32), triple.target)
        assert len(triple.contexts) == (triple.category != "text_to_image")
        for context in triple.contexts:
            np.testing.assert_array_equal(render(Scene.from_json(facts["before"]), 32), context)
            assert (context != triple.target).any()


def test_every_letter_has_its_own_glyph():
    assert {glyph.shape for glyph in FONT.values()} == {(6, 4)}
    assert len({glyph.tobytes() for glyph in FONT.values()}) == len(ALPHABET)
    assert len(set(world.WORDS)) == 40
    assert set("".join(world.WORDS)) == set("ABCDEGNOPSTU")


def test_a_larger_picture_is_the_same_picture(train):
    for index in range(60):
        large = world.triple(index, split="train", size=64).target.astype(float)
        averaged = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert abs(averaged - train[index].target).mean() < 2.0  # of 255


def test_the_context_may_have_its_own_size():
    examples = list(world.triples(20, split="train", size=32, context_size=48))
    assert {triple.target.shape for triple in examples} == {(32, 32, 3)}
    assert {c.shape for triple in examples for c in triple.contexts} == {(48, 48, 3)}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="split is 'test'"):
        world.triple(0, split="test")
    with pytest.raises(ValueError, match="size is 16"):
        world.triple(0, split="train", size=16)
