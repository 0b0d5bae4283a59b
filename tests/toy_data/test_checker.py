"""The checker accepts the target, also with grain or blur, and rejects everything else."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kontext_jax.toy_data import world
from kontext_jax.toy_data.checker import DETAILS, UNREADABLE, check, read
from kontext_jax.toy_data.scene import (
    BACKGROUNDS,
    BOARDS,
    COLOURS,
    EYES,
    PLACES,
    SHAPES,
    STYLES,
    TONES,
    TOPPERS,
    Scene,
    Sign,
    Thing,
    render,
)

VALUES = {
    "background": BACKGROUNDS,
    "tone": TONES,
    "style": STYLES,
    "shape": SHAPES,
    "colour": COLOURS,
    "word": world.WORDS,
    "board": BOARDS,
    "topper": TOPPERS,
    "eyes": EYES,
    "place": (*PLACES, "centre"),
}


@pytest.fixture(scope="module")
def examples():
    triples = list(world.triples(300, split="validation"))
    assert {triple.category for triple in triples} == set(world.EDITS)
    return triples


def _facts(triple):
    facts = json.loads(triple.details)
    before = Scene.from_json(facts["before"]) if facts["before"] else None
    return facts, before, Scene.from_json(facts["after"])


def _passes(image, triple):
    verdict = check(image, triple.details)
    return verdict.edited and verdict.preserved is not False


def _change(scene, factor, value):
    """The scene with one factor, such as "left.colour", set to another value."""
    part, _, field = factor.partition(".")
    if not field:
        return replace(scene, **{part: value})
    return replace(scene, **{part: getattr(scene, part)._replace(**{field: value})})


def _other_values(scene, factor):
    now = scene.factors()[factor]
    return [value for value in VALUES[factor.split(".")[-1]] if value != now]


def test_targets_pass(examples):
    for triple in examples:
        verdict = check(triple.target, triple.details)
        assert verdict.edited, triple.prompt
        assert verdict.preserved is (None if triple.category == "text_to_image" else True)


def test_reading_recovers_every_factor(examples):
    for triple in examples[:100]:
        for scene in _facts(triple)[1:]:
            if scene:
                assert read(render(scene, 32)) == scene.factors()


def test_grainy_targets_pass(examples):
    rng = np.random.default_rng(0)
    grainy = [triple.target + rng.normal(0, 0.04 * 255, triple.target.shape) for triple in examples]
    images = [np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in grainy]
    assert np.mean(list(map(_passes, images, examples))) >= 0.98


def test_blurred_targets_pass(examples):
    blur = ImageFilter.GaussianBlur(0.7)
    images = [np.asarray(Image.fromarray(triple.target).filter(blur)) for triple in examples]
    assert np.mean(list(map(_passes, images, examples))) >= 0.98


def test_a_copy_of_the_context_is_not_edited(examples):
    copies = [t for t in examples if t.contexts and check(t.contexts[0], t.details).edited]
    assert not copies


def test_a_wrong_value_of_a_named_factor_is_not_edited(examples):
    rng = np.random.default_rng(0)
    num_wrong = 0
    for triple in examples[:150]:
        facts, _, after = _facts(triple)
        for factor in facts["names"]:
            if after.factors()[factor] is None:
                continue  # an absent object: see test_a_faint_rest_of_an_object_is_not_removed
            options = _other_values(after, factor)
            wrong = _change(after, factor, options[rng.integers(len(options))])
            assert not check(render(wrong, 32), triple.details).edited, (triple.prompt, factor)
            num_wrong += 1
    assert num_wrong > 150


def test_a_wrong_value_of_another_factor_is_not_preserved(examples):
    rng = np.random.default_rng(0)
    num_damaged = 0
    for triple in examples[:150]:
        facts, before, after = _facts(triple)
        if not before:
            continue
        changeable = {*facts["names"], *facts["free"]}
        rest = [f for f, v in after.factors().items() if v and f not in changeable]
        factor = rest[rng.integers(len(rest))]
        options = _other_values(after, factor)
        image = render(_change(after, factor, options[rng.integers(len(options))]), 32)
        verdict = check(image, triple.details)
        assert verdict.edited and not verdict.preserved, (triple.prompt, factor)
        num_damaged += 1
    assert num_damaged > 100


def test_free_factors_accept_any_value_but_not_the_mean_of_all(examples):
    """The mean of all valid images is what a single teacher step gives.

    If only the colour is free, thin outlines in the mean colour can still pass for one.
    """
    rng = np.random.default_rng(0)
    num_means = 0
    for triple in examples:
        facts, _, after = _facts(triple)
        if not facts["free"]:
            continue
        others = [after]
        for _ in range(24):
            scene = after
            for factor in facts["free"]:
                options = _other_values(scene, factor)
                scene = _change(scene, factor, options[rng.integers(len(options))])
            others.append(scene)
        images = [render(scene, 32) for scene in others]
        assert all(check(image, triple.details).edited for image in images[:6]), triple.prompt
        mean = np.mean(images, axis=0).round().astype(np.uint8)
        if len(facts["free"]) > 1:
            assert not check(mean, triple.details).edited, triple.prompt
            num_means += 1
    assert num_means > 10


def test_a_lost_second_object_is_not_preserved(examples):
    num_lost = 0
    for triple in examples:
        _, before, after = _facts(triple)
        for place in PLACES:
            if triple.category == "local" and (thing := getattr(after, place)):
                if getattr(before, place) == thing:
                    image = render(replace(after, **{place: None}), 32)
                    assert check(image, triple.details) == (True, False)
                    num_lost += 1
    assert num_lost > 20


def test_a_faint_rest_of_an_object_is_not_removed():
    thing = Thing("circle", "red")
    before = Scene("sky", left=thing, right=Thing("star", "green"))
    details = json.dumps(
        {
            "category": "local",
            "size": 32,
            "names": ["left.shape", "left.colour"],
            "free": [],
            "before": asdict(before),
            "after": asdict(replace(before, left=None)),
        }
    )
    with_it, without = (render(s, 32).astype(float) for s in (before, replace(before, left=None)))
    for opacity, removed in ((0.0, True), (0.05, True), (0.25, False), (0.5, False)):
        image = np.rint(opacity * with_it + (1 - opacity) * without).astype(np.uint8)
        assert check(image, details).edited is removed, opacity


def test_a_drift_of_all_colours_is_not_preserved(examples):
    drifts = []
    for triple in examples:
        if triple.category == "text":
            image = np.clip(triple.target - 11.0, 0, 255).astype(np.uint8)
            assert read(image) == read(triple.target)  # invisible in the factors
            drifts.append(check(image, triple.details).preserved)
    assert len(drifts) > 20 and not any(drifts)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_uniform_image_fails(examples, level):
    plain = np.full((32, 32, 3), level, np.uint8)
    assert set(read(plain).values()) == {UNREADABLE}
    assert not any(check(plain, triple.details).edited for triple in examples)


def test_noise_fails(examples):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert not any(check(noise, triple.details).edited for triple in examples)


def test_letters_outside_the_lexicon_are_read():
    assert read(render(Scene("sand", sign=Sign("QXW", "blue")), 32))["sign.word"] == "QXW"


def test_a_smeared_letter_is_unreadable():
    image = render(Scene("sand", sign=Sign("CAT", "blue")), 32)
    image[9:23, 11:21] = image[9:23, 11:21].mean((0, 1))
    assert read(image)["sign.word"] == f"C{UNREADABLE}T"


def test_larger_images_are_checked_alike():
    for triple in world.triples(60, split="validation", size=64):
        assert _passes(triple.target, triple), triple.prompt
        assert not (triple.contexts and check(triple.contexts[0], triple.details).edited)


def test_an_image_of_another_size_is_rejected(examples):
    with pytest.raises(ValueError, match="image is 64x64; its target is 32x32"):
        check(np.zeros((64, 64, 3), np.uint8), examples[0].details)


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"before": "a street", "after": "a street by night"},
        {"after": "a street", "size": 32},
        {"after": 1, "before": None, "names": [], "size": 32, "category": "local"},
        ["after", "size"],
    ],
)
def test_details_of_other_data_get_no_verdict(details):
    assert check(np.zeros((8, 9, 3), np.uint8), json.dumps(details)) == (None, None)


def test_the_checker_requires_every_key_of_the_worlds_details(examples):
    assert all(json.loads(triple.details).keys() >= DETAILS for triple in examples)
    for triple in examples[:20]:
        facts = json.loads(triple.details)
        for name in ("category", "size", "names", "free", "before", "after"):
            fewer = json.dumps({key: value for key, value in facts.items() if key != name})
            assert check(triple.target, fewer) == (None, None)
