"""Emoji triples, on tiny synthetic sets and, if available, on the real ones."""

import collections
import io
import json
import os
import pathlib
import sys
import tarfile

import numpy as np
import pytest

from kontext_jax.toy_data import emoji, emoji_icons, emoji_words
from kontext_jax.types import CATEGORIES

pytest.importorskip("resvg_py", reason="rendering emoji needs the `emoji` extra")

ANIMALS = [f"{size}-{animal}" for size in ("small", "big") for animal in "cat dog owl ant".split()]
ANIMALS += [f"animal-{number}" for number in range(60)]
CLOCKS = [f"{hour}-oclock" for hour in emoji_words.HOURS]


def _icon(number: int) -> dict:
    """A disc with a distinct colour."""
    return {"body": f'<circle cx="8" cy="8" r="6" fill="#{number:02x}{255 - number:02x}80"/>'}


def _pack(prefix: str, first: int) -> dict[str, dict]:
    icons = {slug: _icon(first + i) for i, slug in enumerate(ANIMALS + CLOCKS)}
    icons["copy-of-big-cat"] = icons["big-cat"]
    icons["withdrawn"] = _icon(250) | {"hidden": True}
    icons["wide"] = {"body": '<rect width="16" height="8"/>', "width": 16, "height": 8}
    icons["wide-too"] = {"body": '<path d="M-8 0h16v8h-16z"/>', "left": -8, "height": 8}
    icons["broken"] = {"body": "<unclosed>"}
    aliases = {
        "kitty": {"parent": "small-cat"},
        "pussy": {"parent": "kitty"},
        "mirrored": {"parent": "small-dog", "hFlip": True},
        "dangling": {"parent": "nobody"},
    }
    return {
        "icons": {"prefix": prefix, "icons": icons, "aliases": aliases},
        "info": {"name": prefix.title()},
        "metadata": {"categories": {"Animals & Nature": ANIMALS, "Travel & Places": CLOCKS}},
    }


def _write(path: pathlib.Path, files: dict[str, object]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("emoji")
    _write(path / "one.tgz", _pack("noto", 0))
    _write(path / "two.tgz", _pack("homemade", 100))
    return path


@pytest.fixture(scope="module")
def tiny(folder: pathlib.Path) -> emoji.Emoji:
    return emoji.Emoji(folder)


@pytest.fixture(scope="module")
def real() -> emoji.Emoji:
    here = pathlib.Path(__file__).resolve().parents[2].parent / "shared/data/emoji"
    path = pathlib.Path(os.environ.get("KONTEXT_EMOJI_DIR", here))
    if not list(path.glob("*.tgz")):
        pytest.skip("no emoji tarballs: point KONTEXT_EMOJI_DIR at a folder of @iconify-json/*")
    return emoji.Emoji(path)


def _kinds(triples) -> collections.Counter:
    return collections.Counter(json.loads(triple.details)["kind"] for triple in triples)


# ---- sets and images -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "expected"),
    [
        ("woman-dark-skin-tone-red-hair", ("red-hair", "woman", "dark")),
        ("woman-red-hair-medium-dark", ("red-hair", "woman", "medium-dark")),
        ("man-blonde-hair-light", ("blond-hair", "man", "light")),
        ("cook-medium-light-skin-tone", ("cook", "person", "medium-light")),
        ("man", ("person", "man", "")),
        ("waving-hand", ("waving-hand", "", "")),
        ("handshake-light-skin-tone-dark-skin-tone", ("handshake", "", "light+dark")),
    ],
)
def test_names_of_people_are_parsed(slug, expected):
    icon = emoji_icons.parse("noto", slug, emoji_icons.PEOPLE, frozenset({"cook"}))
    assert (icon.concept, icon.gender, icon.tone) == expected


def test_only_people_have_tones():
    assert emoji_icons.parse("noto", "police-car-light", "Travel & Places").tone == ""


def test_duplicate_and_hidden_drawings_are_dropped(tiny):
    slugs = [icon.slug for icon in tiny.sets.icons if icon.set == "noto"]
    assert len(slugs) == len(set(slugs))
    assert "big-cat" in slugs
    assert not {"copy-of-big-cat", "withdrawn", "kitty"} & set(slugs)
    # Three more drawings of the second set repeat the first set's.
    assert tiny.sets.duplicates == {"noto": 1, "homemade": 1 + len({"wide", "wide-too", "broken"})}


def test_styles_have_readable_names(tiny):
    assert tiny.sets.styles == {"noto": "Noto", "homemade": "Homemade"}


@pytest.mark.parametrize("name", ["kitty", "pussy"])
def test_aliases_render_the_icon_they_stand_for(tiny, name):
    original = tiny.sets.render("noto", "small-cat", 24)
    np.testing.assert_array_equal(tiny.sets.render("noto", name, 24), original)


@pytest.mark.parametrize("name", ["nobody", "withdrawn", "mirrored", "dangling"])
def test_unknown_icons_are_named(tiny, name):
    with pytest.raises(ValueError, match=f"noto.*{name}"):
        tiny.sets.render("noto", name, 16)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_images_have_the_requested_size_and_a_white_background(tiny, size):
    image = tiny.sets.render("noto", "small-cat", size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255])
    assert (image[size // 2, size // 2] != 255).any()


@pytest.mark.parametrize("slug", ["wide", "wide-too"])
def test_icons_that_are_not_square_are_centred_and_undistorted(tiny, slug):
    dark = tiny.sets.render("noto", slug, 16).max(-1) < 128
    expected = np.zeros((16, 16), bool)
    expected[4:12] = True  # the default box is 16 x 16; half as high, it is centred
    np.testing.assert_array_equal(dark, expected)


def test_writing_to_an_image_does_not_change_the_cache(tiny):
    tiny.sets.render("noto", "small-cat", 16)[:] = 0
    assert tiny.sets.render("noto", "small-cat", 16).any()


def test_a_broken_drawing_is_named(tiny):
    with pytest.raises(ValueError, match="noto/broken cannot be rendered"):
        tiny.sets.render("noto", "broken", 16)


def test_missing_resvg_is_reported_with_its_fix(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r"resvg-py: pip install -e '.\[emoji\]'"):
        tiny.sets.render("noto", "small-owl", 17)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*npm pack"):
        emoji_icons.EmojiSets(tmp_path / "nowhere")


def test_a_folder_without_tarballs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no icon tarballs.*{tmp_path.name}.*npm pack"):
        emoji_icons.EmojiSets(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_a_damaged_tarball_is_named(folder, tmp_path, share):
    content = (folder / "one.tgz").read_bytes()
    (tmp_path / "bad.tgz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="bad.tgz is damaged.*npm pack"):
        emoji_icons.EmojiSets(tmp_path)


def test_a_tarball_without_icons_is_named(tmp_path):
    _write(tmp_path / "other.tgz", {"package": {"name": "left-pad"}})
    with pytest.raises(ValueError, match="other.tgz has no icons.*npm pack"):
        emoji_icons.EmojiSets(tmp_path)


def test_cyclic_aliases_are_rejected(tmp_path):
    pack = _pack("noto", 0)
    pack["icons"]["aliases"] |= {"hen": {"parent": "egg"}, "egg": {"parent": "hen"}}
    _write(tmp_path / "circle.tgz", pack)
    with pytest.raises(ValueError, match="noto form a cycle at 'hen'"):
        emoji_icons.EmojiSets(tmp_path)


# ---- triples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", emoji.SPLITS)
def test_tiny_sets_give_the_families_they_have_pairs_for(tiny, split):
    triples = list(tiny.triples(80, split=split, sizes=(16,)))
    expected = {"local/clock", "global/set", "style/reference", "text_to_image/caption"}
    assert _kinds(triples).keys() == expected
    assert len({triple.id for triple in triples}) == 80


def test_triples_are_a_pure_function_of_seed_split_and_index(tiny, folder):
    again = emoji.Emoji(folder)
    for index in (11, 3):
        one = tiny.triple(index, split="train", sizes=(16, 24), seed=5)
        two = again.triple(index, split="train", sizes=(16, 24), seed=5)
        assert one._replace(target=None, contexts=()) == two._replace(target=None, contexts=())
        np.testing.assert_array_equal(one.target, two.target)
        np.testing.assert_equal(one.contexts, two.contexts)
    others = [tiny.triple(i, split="train", sizes=(16,), seed=6).details for i in range(20)]
    assert others != [tiny.triple(i, split="train", sizes=(16,)).details for i in range(20)]


def test_ids_are_stable(tiny):
    assert tiny.triple(1234, split="train").id == "emoji/train/0001234"


def test_sizes_are_drawn_independently(tiny):
    pairs = {
        (triple.target.shape[0], context.shape[0])
        for triple in tiny.triples(100, split="train", sizes=(16, 24))
        for context in triple.contexts
    }
    assert pairs == {(16, 16), (16, 24), (24, 16), (24, 24)}


def test_an_unknown_split_is_named(tiny):
    with pytest.raises(ValueError, match="'test'.*train.*validation"):
        tiny.triple(0, split="test")


def test_sets_without_pairs_are_rejected(tmp_path):
    pack = _pack("noto", 0)
    pack["icons"]["icons"] = {"left-arrow": _icon(1)}
    _write(tmp_path / "poor.tgz", pack)
    with pytest.raises(ValueError, match="noto.*no pairs for train"):
        emoji.Emoji(tmp_path).triple(0, split="train")


def test_the_held_out_icons_never_change():
    """Another hash would leak validation icons into runs resumed from older checkpoints."""
    held = [clock for clock in CLOCKS if emoji.held_out(clock)]
    assert held == ["five-oclock", "ten-oclock"]


@pytest.mark.parametrize(
    ("slug", "category", "expected"),
    [
        ("french-fries", "Food & Drink", "French fries"),
        ("octopus", "Animals & Nature", "an octopus"),
        ("unicorn", "Animals & Nature", "a unicorn"),
        ("smiling-face-with-hearts", "Smileys & Emotion", "a smiling face with hearts"),
        ("bread", "Food & Drink", "bread"),
        ("womans-hat", "Objects", "a woman's hat"),
        ("three-oclock", "Travel & Places", ""),
        ("flag-brazil", "Flags", ""),
    ],
)
def test_icons_have_natural_names(slug, category, expected):
    assert emoji_words.name(emoji_icons.parse("noto", slug, category)) == expected


def test_mirrored_and_gendered_icons_are_held_out_together():
    slugs = ("man-running", "woman-running-facing-right", "person-running-dark-skin-tone")
    icons = [emoji_icons.parse("noto", slug, emoji_icons.PEOPLE) for slug in slugs]
    assert {emoji.base(icon) for icon in icons} == {"running"}


def test_slugs_with_the_same_text_are_held_out_together():
    slugs = ("up-button", "up-exclamation-button")
    assert len({emoji.base(emoji_icons.parse("noto", slug, "Symbols")) for slug in slugs}) == 1


# ---- the real sets -------------------------------------------------------------------------------


def test_real_duplicates_are_removed(real):
    counts = collections.Counter(icon.set for icon in real.sets.icons)
    assert 3000 < counts["noto"] < 3819


def test_every_family_has_pairs_in_both_splits(real):
    counts = real.statistics()
    for split in emoji.SPLITS:
        assert counts[split].keys() == emoji.FAMILY_WEIGHTS.keys()
        assert min(counts[split].values()) > 0


@pytest.mark.parametrize("split", emoji.SPLITS)
def test_real_triples_are_well_formed(real, split):
    triples = list(real.triples(400, split=split, sizes=(32, 48)))
    assert {triple.category for triple in triples} == set(CATEGORIES)
    for triple in triples:
        assert 0 < len(triple.prompt.encode()) <= 80
        assert bool(triple.contexts) == (triple.category != "text_to_image")
        for image in (triple.target, *triple.contexts):
            assert image.shape in ((32, 32, 3), (48, 48, 3))
            assert image.std() > 1, f"{triple.details} has a blank image"
    assert {len(triple.contexts) for triple in triples} == {0, 1, 2}


def test_all_prompts_are_short(real):
    prompts = {
        prompt
        for families in real._choices.values()
        for choices in families.values()
        for choice in choices
        for prompt in choice.prompts
    }
    assert max(len(prompt.encode()) for prompt in prompts) <= 80


def test_training_has_no_held_out_icons(real):
    for split, families in real._choices.items():
        for choice in (choice for choices in families.values() for choice in choices):
            assert emoji.held_out(emoji.base(choice.target)) == (split == "validation")
    pools = {c.pool for choices in real._choices["train"].values() for c in choices}
    assert not any(emoji.held_out(emoji.base(icon)) for pool in pools for icon in pool)


def test_redrawn_icons_come_from_different_sets(real):
    for choice in real._choices["train"]["global/set"]:
        assert len({icon.set for icon in choice.pool}) == len(choice.pool)


def test_skin_tone_and_gender_are_a_small_part_of_local_edits(real):
    rng = np.random.default_rng(0)
    kinds = collections.Counter(real._draw(rng, "train")[0] for _ in range(7500))
    local = {kind: count for kind, count in kinds.items() if kind.startswith("local/")}
    assert sum(local.values()) > 2000
    assert local["local/tone"] + local["local/gender"] <= 0.08 * sum(local.values())
