"""`emoji`: edits between real icons, drawn by artists and not by a model.

Icons of `emoji_icons` are paired by name. A *family* pairs icons that differ in one respect: the
hair, the time on a clock, the set they belong to. The families cover KontextBench's five kinds of
edit and text-to-image. All prompts and pairs were checked by eye; a set is left out of a family if
its images would make an instruction untrue.

Hold-out. Each icon has one *base*. A stable hash of the base decides whether the icon is held out
from training, in every set, family and role. Validation targets are held-out icons only; their
contexts may be any icons.
  - For most icons the base is the concept: the slug without gender, skin tone and direction. All
    cooks are held out together, and a dog held out in Twemoji is held out in Noto. 6 % are held
    out.
  - In families about a value (`SWAPS`) the concept would be "heart" or "clock", and holding it out
    would leave only one split with the family. Their base is the value: "purple-heart",
    "nine-thirty". For plain people it is gender, hair and tone, as in "woman/red-hair/dark".
  - 12 % of values, roles and activities are held out, because a family has few of them (eleven
    keycaps, twelve word buttons, twenty roles).
  - `SALT` was chosen so that every family has validation examples with the four sets Noto, Noto v1,
    Twemoji and Fluent flat.

A draw picks the category, the family, the base and then one icon of that base, so that neither the
seventy drawings of a cook nor the many skin tones outweigh a single hamburger.
"""

import collections
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kontext_jax.toy_data.emoji_icons import PEOPLE, TONES, EmojiSets, Icon
from kontext_jax.toy_data.emoji_words import (
    ACTIVITIES,
    HAIR,
    KNOWN,
    PRONOUNS,
    REDRAW,
    ROLES,
    SCENES,
    SWAPS,
    UNTRUE,
    VALUES,
    name,
)
from kontext_jax.types import Triple

SPLITS = ("train", "validation")
SALT = "emoji-3600"
CONCEPTS_HELD_OUT, VALUES_HELD_OUT = 0.06, 0.12

CATEGORY_WEIGHTS = {
    "local": 0.30,
    "global": 0.15,
    "text": 0.15,
    "character": 0.15,
    "style": 0.15,
    "text_to_image": 0.10,
}
# Weights within a category. By count, four fifths of all local edits would be skin tones. The other
# edits teach more, so tone and gender together get less than 8 %.
FAMILY_WEIGHTS = {
    "local/hair": 0.26,
    "local/colour": 0.24,
    "local/clock": 0.22,
    "local/expression": 0.18,
    "local/state": 0.04,
    "local/gender": 0.03,
    "local/tone": 0.03,
    "global/set": 1.0,
    "text/letter": 0.4,
    "text/keycap": 0.3,
    "text/button": 0.3,
    "character/role": 0.5,
    "character/activity": 0.5,
    "style/reference": 1.0,
    "text_to_image/caption": 1.0,
}
NUM_CONTEXTS = {"style/reference": (1, 1, 2), "text_to_image/caption": (0,)}  # 1 for other families

# ---- hold-out ----------------------------------------------------------------------------------

# Mirrored and gendered variants share a base.
_IGNORED_WORDS = frozenset(
    "man woman person men women people and left right leftwards rightwards facing".split()
)


def base(icon: Icon) -> str:
    """Returns the base that decides whether the icon is held out; see the module."""
    if icon.slug in VALUES:
        return VALUES[icon.slug]
    if icon.gender and icon.concept in ("person", "beard", *HAIR):
        return f"{icon.gender}/{icon.concept}/{icon.tone or 'neutral'}"
    words = [word for word in icon.concept.split("-") if word not in _IGNORED_WORDS]
    return "family" if words[:1] == ["family"] else "-".join(words) or icon.concept


@functools.cache
def held_out(base_name: str) -> bool:
    """Returns whether icons of this base are held out; stable across processes and versions."""
    is_value = any(base_name in names for names in (VALUES, ROLES, ACTIVITIES)) or "/" in base_name
    share = VALUES_HELD_OUT if is_value else CONCEPTS_HELD_OUT
    digest = hashlib.sha256(f"{SALT}/{base_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# ---- families ----------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A target icon, prompts that ask for it, and icons that can be its context."""

    target: Icon
    prompts: tuple[str, ...]
    pool: tuple[Icon, ...]


def _pair(
    targets: Iterable[Icon],
    contexts: Iterable[Icon],
    group: Callable[[Icon], Hashable],
    prompts: Callable[[Icon], Sequence[str]],
) -> Iterator[Choice]:
    """Yields each target with the contexts of its group, if it has any besides itself."""
    pools = collections.defaultdict(list)
    for icon in contexts:
        pools[group(icon)].append(icon)
    frozen = {key: tuple(pool) for key, pool in pools.items()}
    for target in targets:
        pool = frozen.get(group(target), ())
        if any(icon != target for icon in pool):
            yield Choice(target, tuple(prompts(target)), pool)


def _swaps(
    words: dict[str, str], targets: Sequence[Icon], contexts: Sequence[Icon]
) -> Iterator[Choice]:
    def member(icon: Icon) -> bool:
        return icon.slug in words and (icon.set, icon.slug) not in UNTRUE

    return _pair(
        filter(member, targets),
        filter(member, contexts),
        lambda icon: icon.set,
        lambda icon: (words[icon.slug],),
    )


def _hair(targets: Sequence[Icon], contexts: Sequence[Icon]) -> Iterator[Choice]:
    """Changes of hair; never from or to the plain person, which some sets frame differently."""

    def member(icon: Icon) -> bool:
        return icon.concept in HAIR and bool(icon.gender)

    return _pair(
        filter(member, targets),
        filter(member, contexts),
        lambda icon: (icon.set, icon.gender, icon.tone),
        lambda icon: (HAIR[icon.concept].format(PRONOUNS[icon.gender]),),
    )


def _gender(targets: Sequence[Icon], contexts: Sequence[Icon]) -> Iterator[Choice]:
    return _pair(
        (icon for icon in targets if icon.gender in ("man", "woman")),
        (icon for icon in contexts if icon.gender),
        lambda icon: (icon.set, icon.concept, icon.tone),
        lambda icon: (f"make this person a {icon.gender}",),
    )


def _tone(targets: Sequence[Icon], contexts: Sequence[Icon]) -> Iterator[Choice]:
    return _pair(
        (icon for icon in targets if icon.tone in TONES),
        (icon for icon in contexts if icon.category == PEOPLE and "+" not in icon.tone),
        lambda icon: (icon.set, icon.concept, icon.gender),
        lambda icon: (f"change the skin tone to {icon.tone.replace('-', ' ')}",),
    )


def _redrawn(
    styles: dict[str, str], targets: Sequence[Icon], contexts: Sequence[Icon]
) -> Iterator[Choice]:
    def member(icon: Icon) -> bool:
        return icon.category in SCENES or icon.category == PEOPLE

    return _pair(
        filter(member, targets),
        filter(member, contexts),
        lambda icon: (icon.concept, icon.gender, icon.tone),
        lambda icon: [words.format(styles[icon.set]) for words in REDRAW],
    )


def _character(kind: str, targets: Sequence[Icon], contexts: Sequence[Icon]) -> Iterator[Choice]:
    """Roles or activities of men and women; in some sets the gender of a "person" varies."""
    deeds = ROLES if kind == "character/role" else ACTIVITIES
    link = " as " if kind == "character/role" else " "

    def gendered(icon: Icon) -> bool:
        return icon.gender in ("man", "woman")

    return _pair(
        (icon for icon in targets if gendered(icon) and icon.concept in deeds),
        (icon for icon in contexts if gendered(icon) and icon.concept in KNOWN),
        lambda icon: (icon.set, icon.gender, icon.tone),
        lambda icon: [
            f"{who} {icon.gender}{link}{deeds[icon.concept]}" for who in ("this", "the same")
        ],
    )


def _reference(targets: Sequence[Icon], contexts: Sequence[Icon]) -> Iterator[Choice]:
    return _pair(
        filter(name, targets),
        filter(name, contexts),
        lambda icon: icon.set,
        lambda icon: (f"in this style, draw {name(icon)}", f"draw {name(icon)} in the same style"),
    )


def _captions(styles: dict[str, str], targets: Sequence[Icon]) -> Iterator[Choice]:
    for icon in filter(name, targets):
        style = styles[icon.set]
        yield Choice(icon, (f"{name(icon)}, {style} style", f"{name(icon)} in {style} style"), ())


def _families(
    styles: dict[str, str], targets: Sequence[Icon], contexts: Sequence[Icon]
) -> dict[str, list[Choice]]:
    swaps = {
        kind: itertools.chain.from_iterable(_swaps(words, targets, contexts) for words in groups)
        for kind, groups in SWAPS.items()
    }
    families = swaps | {
        "local/hair": _hair(targets, contexts),
        "local/gender": _gender(targets, contexts),
        "local/tone": _tone(targets, contexts),
        "global/set": _redrawn(styles, targets, contexts),
        "character/role": _character("character/role", targets, contexts),
        "character/activity": _character("character/activity", targets, contexts),
        "style/reference": _reference(targets, contexts),
        "text_to_image/caption": _captions(styles, targets),
    }
    return {kind: choices for kind in FAMILY_WEIGHTS if (choices := list(families[kind]))}


# ---- triples -----------------------------------------------------------------------------------


class Emoji:
    """Triples from a folder of icon sets, each a pure function of (seed, split, index)."""

    def __init__(self, folder: str | pathlib.Path):
        """Reads the folder; see `EmojiSets` for its contents and the errors."""
        self.sets = EmojiSets(folder)
        icons = self.sets.icons
        by_hold_out = {
            held: [icon for icon in icons if held_out(base(icon)) == held] for held in (False, True)
        }
        self._choices = {
            "train": _families(self.sets.styles, by_hold_out[False], by_hold_out[False]),
            "validation": _families(self.sets.styles, by_hold_out[True], icons),
        }
        self._by_base = {
            (split, kind): _grouped(choices)
            for split, families in self._choices.items()
            for kind, choices in families.items()
        }

    def triple(
        self, index: int, *, split: str, sizes: Sequence[int] = (64,), seed: int = 0
    ) -> Triple:
        """Draws and renders one triple.

        Args:
          index: non-negative index; the sequence is endless and repeats pairs at random sizes.
          split: one of `SPLITS`.
          sizes: sides in pixels; the target and each context draw one independently.
          seed: selects one of many sequences over the same icons.

        Returns:
          The triple. Its ``details`` are JSON with the kind, the target and contexts as "set/slug",
          and the target's base.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {SPLITS}")
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        kind, choice = self._draw(rng, split)
        others = [icon for icon in choice.pool if icon != choice.target]
        count = min(rng.choice(NUM_CONTEXTS.get(kind, (1,))), len(others))
        contexts = [others[i] for i in rng.choice(len(others) or 1, count, replace=False)]
        images = [
            self.sets.render(icon.set, icon.slug, int(rng.choice(sizes)))
            for icon in (choice.target, *contexts)
        ]
        details = {
            "kind": kind,
            "target": f"{choice.target.set}/{choice.target.slug}",
            "contexts": [f"{icon.set}/{icon.slug}" for icon in contexts],
            "base": base(choice.target),
        }
        return Triple(
            id=f"emoji/{split}/{index:07d}",
            target=images[0],
            contexts=tuple(images[1:]),
            prompt=str(rng.choice(choice.prompts)),
            category=kind.split("/")[0],
            details=json.dumps(details),
        )

    def triples(
        self, num: int, *, split: str, sizes: Sequence[int] = (64,), seed: int = 0
    ) -> Iterator[Triple]:
        """Yields the first ``num`` triples of a split."""
        for index in range(num):
            yield self.triple(index, split=split, sizes=sizes, seed=seed)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Counts the distinct (context, target) pairs by split and family."""
        return {
            split: {
                kind: sum(len(set(pool) - {target}) or 1 for target, _, pool in choices)
                for kind, choices in families.items()
            }
            for split, families in self._choices.items()
        }

    def _draw(self, rng: np.random.Generator, split: str) -> tuple[str, Choice]:
        kinds = list(self._choices[split])
        if not kinds:
            raise ValueError(f"the emoji sets {sorted(self.sets.styles)} have no pairs for {split}")
        categories = dict.fromkeys(kind.split("/")[0] for kind in kinds)
        category = _weighted(rng, tuple(categories), CATEGORY_WEIGHTS)
        members = [kind for kind in kinds if kind.startswith(f"{category}/")]
        kind = _weighted(rng, members, FAMILY_WEIGHTS)
        bases = self._by_base[split, kind]
        choices = bases[rng.integers(len(bases))]
        return kind, choices[rng.integers(len(choices))]


def _grouped(choices: Iterable[Choice]) -> list[list[Choice]]:
    groups = collections.defaultdict(list)
    for choice in choices:
        groups[base(choice.target)].append(choice)
    return list(groups.values())


def _weighted(rng: np.random.Generator, names: Sequence[str], weights: dict[str, float]) -> str:
    """Draws a name; weights are renormalised over ``names``."""
    shares = np.array([weights[name] for name in names])
    return names[rng.choice(len(names), p=shares / shares.sum())]
