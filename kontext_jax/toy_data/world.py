"""`world`: an endless data set of tiny scenes and edits with exact ground truth.

`checker` reads success from the image itself, where real editing benchmarks need a judge: the
factors that an instruction names have one correct answer. Some instructions leave factors *free*,
as real ones do: "a star on the left" may have any colour and background, but must have one. A model
that answers with the mean of all valid images shows nothing that can be read. The data cover
KontextBench's five kinds of edit and text-to-image, in prompts that are short enough for a model of
about a million parameters to learn in minutes on two CPU cores.

An instruction's *combination* is what it combines: which colour or word becomes which, or which
object has which style. A stable hash holds out a tenth of all combinations. Validation consists of
these only, so it measures composition and not memorisation.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

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
    Figure,
    Scene,
    Sign,
    Thing,
    render,
)
from kontext_jax.types import Task, Triple

SPLITS = ("train", "validation")
HELD_OUT_ONE_IN = 10  # one combination in ten is held out
CATEGORY_WEIGHTS = {
    "local": 0.30,
    "global": 0.12,
    "text": 0.12,
    "character": 0.14,
    "style": 0.14,
    "text_to_image": 0.18,
}
NIGHT_SHARE = 0.2  # of scenes that can have either tone

RESTYLE = {
    "solid": "make everything solid",
    "outlined": "turn it into line art",
    "striped": "make everything striped",
}
# Spelled with twelve letters only (ABCDEGNOPSTU), so that each letter is frequent.
WORDS = tuple(
    "ACE ANT APE BAG BAT BED BEE BUG BUS BUN CAB CAN CAP CAT COD COG CUB CUP DEN DOG "
    "DOT EGG GAS NET NUT ONE PAN PEA PEN PET POD POT SEA SUN TAG TAP TEA TEN TOE TUB".split()
)


class Edit(NamedTuple):
    """An instruction with one valid result.

    Attributes:
      combination: what the split depends on, see the module.
      prompt: the instruction.
      before: the scene to edit; None for text-to-image.
      after: a valid result.
      free: factors of ``after`` that may have any value; all others have one correct value.
    """

    combination: str
    prompt: str
    before: Scene | None
    after: Scene
    free: tuple[str, ...] = ()

    def named_factors(self) -> tuple[str, ...]:
        """Returns the factors whose new value the instruction determines: changed and not free."""
        before = self.before.factors() if self.before else {}
        after = {f: v for f, v in self.after.factors().items() if f not in self.free}
        return tuple(f for f, value in after.items() if before.get(f, "") != value)


# ---- random draws -------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Iterable[str], *excluded: str) -> str:
    allowed = [option for option in options if option not in excluded]
    return allowed[rng.integers(len(allowed))]


def _shuffled(rng: np.random.Generator, options: Iterable[str]) -> list[str]:
    options = list(options)
    return [options[i] for i in rng.permutation(len(options))]


def _setting(rng: np.random.Generator) -> dict[str, str]:
    tone = "night" if rng.random() < NIGHT_SHARE else "day"
    return {"background": _pick(rng, BACKGROUNDS), "tone": tone}


def _still_life(rng: np.random.Generator, num_objects: int) -> tuple[Scene, str, Thing]:
    """Draws a scene and returns it with the place and description of one of its objects.

    The objects differ in shape, so that "the star" is unambiguous, and in colour.
    """
    places = _shuffled(rng, PLACES)[:num_objects]
    things = [Thing(*t) for t in zip(_shuffled(rng, SHAPES), _shuffled(rng, COLOURS), strict=False)]
    objects = dict(zip(places, things, strict=False))
    scene = Scene(**_setting(rng), style=_pick(rng, STYLES), **objects)
    return scene, places[0], things[0]


Start = tuple[Scene, str, Thing]
"""A scene and one of its objects to edit, as returned by `_still_life`."""


def _one_or_two(rng: np.random.Generator) -> Start:
    return _still_life(rng, 1 + int(rng.integers(2)))


def _a(*words: str) -> str:
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


# ---- one function per kind of edit --------------------------------------------------------------


def _recolour(rng: np.random.Generator, start: Start | None = None) -> Edit:
    before, place, (shape, colour) = start or _one_or_two(rng)
    new = _pick(rng, COLOURS, colour)
    after = replace(before, **{place: Thing(shape, new)})
    return Edit(f"{shape}/{colour}>{new}", f"make the {shape} {new}", before, after)


def _reshape(rng: np.random.Generator, start: Start | None = None) -> Edit:
    before, place, (shape, colour) = start or _one_or_two(rng)
    new = _pick(rng, SHAPES, shape)
    after = replace(before, **{place: Thing(new, colour)})
    return Edit(f"{colour}/{shape}>{new}", f"turn the {shape} into {_a(new)}", before, after)


def _remove(rng: np.random.Generator) -> Edit:
    before, place, (shape, colour) = _one_or_two(rng)
    after = replace(before, **{place: None})
    return Edit(f"{before.style}/{colour}/{shape}", f"remove the {shape}", before, after)


def _add(rng: np.random.Generator) -> Edit:
    before, taken, _ = _still_life(rng, 1)
    place, shape, colour = _pick(rng, PLACES, taken), _pick(rng, SHAPES), _pick(rng, COLOURS)
    after = replace(before, **{place: Thing(shape, colour)})
    prompt = f"add {_a(colour, shape)} on the {place}"
    return Edit(f"{colour}/{shape}/{place}", prompt, before, after)


def _background(rng: np.random.Generator, start: Start | None = None) -> Edit:
    before, _, (shape, _) = start or _one_or_two(rng)
    new = _pick(rng, BACKGROUNDS, before.background)
    after = replace(before, background=new)
    prompt = f"change the background to {new}"
    return Edit(f"{shape}/{before.background}>{new}", prompt, before, after)


def _tone(rng: np.random.Generator) -> Edit:
    scene, _, (shape, colour) = _one_or_two(rng)
    old, new = _shuffled(rng, TONES)
    before, after = replace(scene, tone=old), replace(scene, tone=new)
    return Edit(f"{scene.background}/{colour}/{shape}>{new}", f"make it {new}", before, after)


def _restyle(rng: np.random.Generator, start: Start | None = None) -> Edit:
    before, _, (shape, colour) = start or _one_or_two(rng)
    new = _pick(rng, STYLES, before.style)
    after = replace(before, style=new)
    return Edit(f"{colour}/{shape}/{before.style}>{new}", RESTYLE[new], before, after)


def _reword(rng: np.random.Generator) -> Edit:
    old, new = _shuffled(rng, WORDS)[:2]
    board = _pick(rng, BOARDS)
    before = Scene(**_setting(rng), sign=Sign(old, board))
    after = replace(before, sign=Sign(new, board))
    return Edit(f"{old}>{new}", f"change {old} to {new}", before, after)


def _portrait(rng: np.random.Generator) -> tuple[Scene, Figure]:
    """Returns a scene with a large character in the centre, and that character at another place."""
    large = Figure(_pick(rng, COLOURS), _pick(rng, TOPPERS), _pick(rng, EYES), "centre")
    return Scene(_pick(rng, BACKGROUNDS), figure=large), large._replace(place=_pick(rng, PLACES))


def _elsewhere(rng: np.random.Generator) -> Edit:
    before, figure = _portrait(rng)
    new = _pick(rng, BACKGROUNDS, before.background)
    prompt = f"this character on the {figure.place}, on {new}"
    after = replace(before, background=new, figure=figure)
    return Edit("/".join(figure[:3]), prompt, before, after)


def _at_night(rng: np.random.Generator) -> Edit:
    before, figure = _portrait(rng)
    after = replace(before, tone="night", figure=figure)
    prompt = f"this character on the {figure.place} at night"
    return Edit("/".join(figure[:3]), prompt, before, after)


def _same_style(rng: np.random.Generator) -> Edit:
    before, _, old = _still_life(rng, 1)
    shape, colour = _pick(rng, SHAPES, old.shape), _pick(rng, COLOURS, old.colour)
    place = _pick(rng, PLACES)
    after = replace(before, **{"left": None, "right": None, place: Thing(shape, colour)})
    prompt = f"in this style, {_a(colour, shape)} on the {place}"
    return Edit(f"{before.style}/{colour}/{shape}", prompt, before, after)


def _same_style_in_any_colour(rng: np.random.Generator) -> Edit:
    edit = _same_style(rng)
    (place,) = (place for place in PLACES if getattr(edit.after, place))
    prompt = f"in this style, {_a(getattr(edit.after, place).shape)} on the {place}"
    return edit._replace(prompt=prompt, free=(f"{place}.colour",))


def _caption_shape(rng: np.random.Generator) -> Edit:
    scene, place, (shape, colour) = _still_life(rng, 1)
    combination = f"{scene.style}/{colour}/{shape}/{scene.background}"
    free = (f"{place}.colour", "background", "style")
    after = replace(scene, tone="day")
    return Edit(combination, f"{_a(shape)} on the {place}", None, after, free)


def _caption_one(rng: np.random.Generator) -> Edit:
    scene, place, (shape, colour) = _still_life(rng, 1)
    style = () if scene.style == "solid" else (scene.style,)  # solid is the default
    prompt = f"{_a(*style, colour, shape)} on the {place}, on {scene.background}"
    return Edit(f"{scene.style}/{colour}/{shape}", prompt, None, replace(scene, tone="day"))


def _caption_two(rng: np.random.Generator) -> Edit:
    scene, _, _ = _still_life(rng, 2)
    scene = replace(scene, tone="day", style="solid")
    left, right = (f"{thing.colour} {thing.shape}" for thing in (scene.left, scene.right))
    prompt = f"{left} left, {right} right, on {scene.background}"
    return Edit("+".join(sorted((left, right))), prompt, None, scene)


EDITS: dict[str, dict[str, Callable[[np.random.Generator], Edit]]] = {
    "local": {"recolour": _recolour, "reshape": _reshape, "remove": _remove, "add": _add},
    "global": {"background": _background, "tone": _tone, "restyle": _restyle},
    "text": {"reword": _reword},
    "character": {"elsewhere": _elsewhere, "at_night": _at_night},
    "style": {"same_style": _same_style, "any_colour": _same_style_in_any_colour},
    "text_to_image": {"one": _caption_one, "two": _caption_two, "shape": _caption_shape},
}

# ---- triples ------------------------------------------------------------------------------------


def held_out(key: str) -> bool:
    """Returns whether a combination, "category/kind/combination", is held out for validation."""
    digest = hashlib.sha256(key.encode()).digest()  # hash() changes from run to run
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _draw_edit(rng: np.random.Generator, split: str) -> tuple[str, str, Edit]:
    """Draws a category, a kind, and an edit of that kind that belongs to the split."""
    weights = np.array(list(CATEGORY_WEIGHTS.values()))
    category = list(CATEGORY_WEIGHTS)[rng.choice(len(weights), p=weights / weights.sum())]
    kind = _pick(rng, EDITS[category])
    while True:  # about ten draws for validation; every kind has held-out combinations
        edit = EDITS[category][kind](rng)
        if held_out(f"{category}/{kind}/{edit.combination}") == (split == "validation"):
            return category, kind, edit


def triple(
    index: int, *, split: str, seed: int = 0, size: int = 32, context_size: int | None = None
) -> Triple:
    """Returns one example, a pure function of the arguments.

    Args:
      index: non-negative index; the data set is endless.
      split: "train" or "validation"; they share no combination.
      seed: seed of the data set.
      size: side of the target in pixels, at least 32.
      context_size: side of the context in pixels; None for ``size``.

    Returns:
      The example. Its ``details`` are JSON with ``category``, ``kind``, ``combination``, ``size``,
      ``names`` and ``free`` (the factors that the instruction determines and leaves free),
      ``before`` (a scene; None for text-to-image) and ``after`` (a scene), for `checker.check`.

    Raises:
      ValueError: the split is unknown, or a size is below 32 pixels.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; world has {' and '.join(SPLITS)}")
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    category, kind, edit = _draw_edit(rng, split)
    return Triple(
        id=f"world/{split}/{seed}/{index:06d}",
        target=render(edit.after, size),
        contexts=(render(edit.before, context_size or size),) if edit.before else (),
        prompt=edit.prompt,
        category=category,
        details=_details(category, kind, edit, size),
    )


def _details(category: str, kind: str, edit: Edit, size: int) -> str:
    return json.dumps(
        {
            "category": category,
            "kind": kind,
            "combination": edit.combination,
            "size": size,
            "names": edit.named_factors(),
            "free": edit.free,
            "before": asdict(edit.before) if edit.before else None,
            "after": asdict(edit.after),
        }
    )


def triples(
    num: int, *, split: str, seed: int = 0, size: int = 32, context_size: int | None = None
) -> Iterator[Triple]:
    """Yields the first ``num`` examples of a split; see `triple`."""
    for index in range(num):
        yield triple(index, split=split, seed=seed, size=size, context_size=context_size)


# ---- multi-turn evaluation ----------------------------------------------------------------------

SESSION_KINDS = {"recolour": "local", "reshape": "local", "background": "global"}
"""Kinds of edit that can follow one another in a session, with their categories."""


def sessions(num: int, *, turns: int, seed: int = 0, size: int = 32) -> Iterator[Task]:
    """Yields the ``turns`` tasks of each session; every turn edits the output of the turn before.

    A turn's reference image is the result of answering all turns so far correctly.
    """
    for index in range(num):
        rng = np.random.default_rng((seed, len(SPLITS), index))
        scene = _one_or_two(rng)[0]
        context, session = render(scene, size), f"world/session/{seed}/{index:06d}"
        for turn in range(1, turns + 1):
            kind, edit = _next_edit(rng, scene)
            yield _task(session, turn, context, SESSION_KINDS[kind], kind, edit, size)
            scene = edit.after


def _next_edit(rng: np.random.Generator, scene: Scene) -> tuple[str, Edit]:
    """Draws (kind, edit) such that shapes stay distinct, so that the next turn can name one."""
    while True:
        kind = _pick(rng, SESSION_KINDS)
        place = _pick(rng, [place for place in PLACES if getattr(scene, place)])
        start = (scene, place, getattr(scene, place))
        edit = EDITS[SESSION_KINDS[kind]][kind](rng, start)
        things = [getattr(edit.after, place) for place in PLACES if getattr(scene, place)]
        if len({thing.shape for thing in things}) == len(things):
            return kind, edit


def probes(num: int, *, turns: int = 1, seed: int = 0, size: int = 32) -> Iterator[Task]:
    """Yields tasks that are already done, like "make the star red" for a red star, in every turn.

    A perfect editor returns its context. Training contains no edits of this kind.
    """
    for index in range(num):
        rng = np.random.default_rng((seed, len(SPLITS) + 1, index))
        scene, _, (shape, colour) = _one_or_two(rng)
        prompts = [f"make the {shape} {colour}", f"change the background to {scene.background}"]
        edit = Edit("", _pick(rng, prompts), scene, scene)
        context, session = render(scene, size), f"world/probe/{seed}/{index:06d}"
        for turn in range(1, turns + 1):
            yield _task(session, turn, context, "local", "none", edit, size)


def _task(
    session: str,
    turn: int,
    context: UInt8[np.ndarray, "size size 3"],
    category: str,
    kind: str,
    edit: Edit,
    size: int,
) -> Task:
    return Task(
        id=f"{session}/{turn}",
        contexts=(context,),
        prompt=edit.prompt,
        category=category,
        size=(size, size),
        truth=render(edit.after, size),
        group=session,
        turn=turn,
        follows=f"{session}/{turn - 1}" if turn > 1 else "",
        details=_details(category, kind, edit, size),
    )
