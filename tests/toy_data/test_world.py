"""`world` is deterministic, has disjoint splits, and short, unambiguous instructions."""

import json
from collections import defaultdict

import numpy as np
import pytest

from kontext_jax.toy_data import world
from kontext_jax.toy_data.checker import check
from kontext_jax.toy_data.scene import ALPHABET, FONT, Scene, render
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


def test_triples_are_a_pure_function_of_their_arguments(train):
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


def test_categories_match_the_trainers_and_their_weights(train):
    assert tuple(world.EDITS) == tuple(world.CATEGORY_WEIGHTS) == CATEGORIES
    share = np.mean([triple.category == "local" for triple in train])
    assert abs(share - world.CATEGORY_WEIGHTS["local"]) < 0.05


def test_prompts_are_short(train, validation):
    lengths = [len(triple.prompt.encode()) for triple in [*train, *validation]]
    assert max(lengths) <= 56
    assert np.median(lengths) <= 36


def test_instructions_have_one_answer_up_to_free_factors(train, validation):
    answers, free_answers = defaultdict(set), defaultdict(set)
    for triple in [*train, *validation]:
        facts = json.loads(triple.details)
        question = json.dumps(facts["before"]), triple.prompt
        factors = Scene.from_json(facts["after"]).factors()
        answers[question].add(json.dumps([v for f, v in factors.items() if f not in facts["free"]]))
        if facts["free"]:
            free_answers[question].add(json.dumps(facts["after"]))
    assert len(answers) < len(train) + len(validation)  # some questions repeat
    assert all(len(scenes) == 1 for scenes in answers.values())
    assert max(map(len, free_answers.values())) > 5


def test_the_shape_in_an_instruction_identifies_one_object(train):
    for triple in train:
        facts = json.loads(triple.details)
        if facts["kind"] in ("recolour", "reshape", "remove"):
            before = Scene.from_json(facts["before"])
            shapes = [thing.shape for thing in (before.left, before.right) if thing]
            assert sum(f"the {shape}" in triple.prompt for shape in shapes) == 1
            assert len(set(shapes)) == len(shapes)


def test_the_details_describe_the_images(train):
    for triple in train[:100]:
        facts = json.loads(triple.details)
        np.testing.assert_array_equal(render(Scene.from_json(facts["after"]), 32), triple.target)
        assert len(triple.contexts) == (triple.category != "text_to_image")
        for context in triple.contexts:
            np.testing.assert_array_equal(render(Scene.from_json(facts["before"]), 32), context)
            assert (context != triple.target).any()


def test_letters_have_distinct_glyphs_and_words_use_twelve_of_them():
    assert {glyph.shape for glyph in FONT.values()} == {(6, 4)}
    assert len({glyph.tobytes() for glyph in FONT.values()}) == len(ALPHABET)
    assert len(set(world.WORDS)) == 40
    assert set("".join(world.WORDS)) == set("ABCDEGNOPSTU")


def test_larger_images_show_the_same_scene(train):
    for index in range(60):
        large = world.triple(index, split="train", size=64).target.astype(float)
        averaged = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert abs(averaged - train[index].target).mean() < 2.0  # of 255


def test_the_context_can_have_another_size():
    examples = list(world.triples(20, split="train", size=32, context_size=48))
    assert {triple.target.shape for triple in examples} == {(32, 32, 3)}
    assert {c.shape for triple in examples for c in triple.contexts} == {(48, 48, 3)}


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match="split is 'test'"):
        world.triple(0, split="test")
    with pytest.raises(ValueError, match="size is 16"):
        world.triple(0, split="train", size=16)


# ---- multi-turn evaluation ----------------------------------------------------------------------


def _facts(task):
    return json.loads(task.details)


@pytest.fixture(scope="module")
def sessions():
    return list(world.sessions(20, turns=4))


def test_sessions_are_a_pure_function_of_their_arguments(sessions):
    again = list(world.sessions(3, turns=4))
    longer = [task for task in world.sessions(3, turns=6) if task.turn <= 4]
    for task, *copies in zip(sessions, again, longer, strict=False):
        for other in copies:
            assert (task.id, task.prompt, task.details) == (other.id, other.prompt, other.details)
            np.testing.assert_array_equal(task.truth, other.truth)
            np.testing.assert_array_equal(task.contexts[0], other.contexts[0])
    other_seed = list(world.sessions(3, turns=4, seed=1))
    assert [task.details for task in other_seed] != [task.details for task in again]
    assert not {task.id for task in other_seed} & {task.id for task in sessions}


def test_turns_of_a_session_follow_one_another(sessions):
    assert len({task.id for task in sessions}) == len(sessions) == 80
    for first in range(0, 80, 4):
        turns = sessions[first : first + 4]
        assert [task.turn for task in turns] == [1, 2, 3, 4]
        assert [task.follows for task in turns] == ["", *(task.id for task in turns[:-1])]
        assert len({task.group for task in turns}) == 1
        scenes = [_facts(task) for task in turns]
        start = render(Scene.from_json(scenes[0]["before"]), 32)
        for task, before, after in zip(turns, scenes, scenes[1:], strict=False):
            assert after["before"] == before["after"] != before["before"]
            np.testing.assert_array_equal(task.contexts[0], start)
        np.testing.assert_array_equal(turns[-1].contexts[0], start)
        assert len(turns[-1].contexts) == 1
    assert len({task.group for task in sessions}) == 20
    kinds = {(_facts(task)["kind"], task.category) for task in sessions}
    assert kinds == set(world.SESSION_KINDS.items())


def test_reference_images_of_all_turns_pass_the_checker(sessions):
    for task in sessions:
        facts = _facts(task)
        assert facts["category"] == task.category and facts["names"] and facts["free"] == []
        assert task.size == (32, 32) == task.truth.shape[:2]
        np.testing.assert_array_equal(task.truth, render(Scene.from_json(facts["after"]), 32))
        assert check(task.truth, task.details) == (True, True)
        before = render(Scene.from_json(facts["before"]), 32)
        assert check(before, task.details) == (False, True)


def test_every_turn_names_an_unambiguous_object(sessions):
    """Objects have different shapes in every scene, and the instruction names one of them."""
    for task in sessions:
        facts = _facts(task)
        after, shapes = (
            [thing.shape for thing in (scene.left, scene.right) if thing]
            for scene in (Scene.from_json(facts["after"]), Scene.from_json(facts["before"]))
        )
        assert len(after) == len(set(after)) == len(set(shapes)) == len(shapes) > 0
        named = sum(f"the {shape} " in f"{task.prompt} " for shape in shapes)
        assert named == (facts["kind"] != "background")
    two = [f for f in map(_facts, sessions) if f["before"]["left"] and f["before"]["right"]]
    assert 0.2 < len(two) / len(sessions) < 0.8
    assert {name.split(".")[0] for f in two for name in f["names"]} == {
        "left",
        "right",
        "background",
    }


def test_probes_ask_for_edits_that_are_already_done():
    probes = list(world.probes(40, turns=2))
    assert len({task.id for task in probes}) == 80
    kinds = set()
    for task in probes:
        facts = _facts(task)
        assert facts["before"] == facts["after"] and facts["names"] == []
        np.testing.assert_array_equal(task.truth, task.contexts[0])
        scene = Scene.from_json(facts["before"])
        np.testing.assert_array_equal(task.truth, render(scene, 32))
        things = [thing for thing in (scene.left, scene.right) if thing]
        prompts = {f"make the {thing.shape} {thing.colour}" for thing in things}
        prompts.add(f"change the background to {scene.background}")
        assert task.prompt in prompts
        kinds.add(task.prompt.split()[0])
        assert check(task.truth, task.details) == (None, True)  # nothing to edit
        assert check(255 - task.truth, task.details) == (None, False)
    assert kinds == {"make", "change"}
    for first, second in zip(probes[::2], probes[1::2], strict=True):
        assert (first.turn, first.follows, second.turn, second.follows) == (1, "", 2, first.id)
        assert (first.prompt, first.group) == (second.prompt, second.group)
    again = list(world.probes(40, turns=1))
    assert [task.prompt for task in again] == [task.prompt for task in probes[::2]]
    assert [task.details for task in world.probes(5, seed=1)] != [
        task.details for task in again[:5]
    ]


def test_sessions_and_probes_have_the_requested_size():
    for task in (next(world.sessions(1, turns=1, size=64)), next(world.probes(1, size=64))):
        assert task.size == (64, 64) == task.truth.shape[:2] == task.contexts[0].shape[:2]
        assert check(task.truth, task.details).preserved is True
