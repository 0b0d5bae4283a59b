"""The words of the `emoji` data set: instructions and the names of icons.

Every table was checked against the images of Noto, Noto v1, Twemoji and Fluent flat. An icon is in
a table only if the instruction is true of its image in all four sets, or `UNTRUE` lists the set in
which it is not.
"""

import re

from kontext_jax.toy_data.emoji_icons import Icon

_AN = re.compile(r"(?!uni|eu|ewe|one)[aeiou]|x-ray", re.IGNORECASE)


def _with_article(noun: str) -> str:
    return ("an " if _AN.match(noun) else "a ") + noun


# ---- instructions --------------------------------------------------------------------------------

HOURS = "one two three four five six seven eight nine ten eleven twelve".split()
COLOURS = "red orange yellow green blue purple brown black white".split()
PHASES = (
    "new full first-quarter last-quarter waxing-crescent waning-crescent waxing-gibbous "
    "waning-gibbous"
).split()


def _coloured(noun: str, slugs: dict[str, str]) -> dict[str, str]:
    return {slug: f"make the {noun} {colour}" for colour, slug in slugs.items()}


def _reading(slugs: dict[str, str]) -> dict[str, str]:
    return {slug: f"change the text to {text}" for text, slug in slugs.items()}


SWAPS: dict[str, tuple[dict[str, str], ...]] = {
    "local/clock": (
        {f"{hour}-oclock": f"set the clock to {hour} o'clock" for hour in HOURS}
        | {f"{hour}-thirty": f"set the clock to half past {hour}" for hour in HOURS},
    ),
    "local/colour": (
        _coloured("heart", {c: f"{c}-heart" for c in (*COLOURS, "grey", "pink")})
        | {"light-blue-heart": "make the heart light blue"},
        _coloured("circle", {c: f"{c}-circle" for c in COLOURS}),
        _coloured(
            "square",
            {c: f"{c}-square" for c in COLOURS[:-2]}
            | {c: f"{c}-large-square" for c in COLOURS[-2:]},
        ),
        _coloured(
            "book", {c: f"{c}-book" for c in ("orange", "green", "blue")} | {"red": "closed-book"}
        ),
        _coloured("diamond", {c: f"large-{c}-diamond" for c in ("orange", "blue")}),
        _coloured("diamond", {c: f"small-{c}-diamond" for c in ("orange", "blue")}),
    ),
    "local/expression": (
        {
            "angry-face": "make the face angry",
            "astonished-face": "make the face look astonished",
            "cowboy-hat-face": "give the face a cowboy hat",
            "crying-face": "make the face shed a tear",
            "drooling-face": "make the face drool",
            "face-with-head-bandage": "put a bandage around its head",
            "face-with-medical-mask": "put a medical mask on the face",
            "face-with-monocle": "give the face a monocle",
            "face-with-raised-eyebrow": "raise one of its eyebrows",
            "face-with-rolling-eyes": "make the face roll its eyes",
            "face-with-tears-of-joy": "make the face laugh until it cries",
            "face-with-thermometer": "put a thermometer in its mouth",
            "face-with-tongue": "make the face stick out its tongue",
            "face-without-mouth": "give the face no mouth",
            "frowning-face": "make the face frown",
            "grinning-face": "make the face grin",
            "kissing-face": "make the face give a kiss",
            "loudly-crying-face": "make the face cry out loud",
            "lying-face": "give the face a very long nose",
            "money-mouth-face": "give the face dollar signs for eyes",
            "nerd-face": "give the face nerdy glasses",
            "neutral-face": "make the face look neutral",
            "sleeping-face": "make the face sleep",
            "slightly-smiling-face": "make the face smile a little",
            "smiling-face-with-halo": "give the face a halo",
            "smiling-face-with-heart-eyes": "give the face hearts for eyes",
            "smiling-face-with-sunglasses": "put sunglasses on the face",
            "sneezing-face": "make the face sneeze",
            "star-struck": "give the face stars for eyes",
            "thinking-face": "make the face think, hand on chin",
            "winking-face": "make the face wink",
            "yawning-face": "make the face yawn",
            "zipper-mouth-face": "zip its mouth shut",
        },
    ),
    "local/state": (
        {f"{phase}-moon": f"make it a {phase.replace('-', ' ')} moon" for phase in PHASES},
        {
            "see-no-evil-monkey": "make the monkey cover its eyes",
            "hear-no-evil-monkey": "make the monkey cover its ears",
            "speak-no-evil-monkey": "make the monkey cover its mouth",
        },
    ),
    "text/letter": (
        {f"letter-{c}": f"change the letter to {c.upper()}" for c in "abcdefghijklmnopqrstuvwxyz"},
    ),
    "text/keycap": ({f"keycap-{n}": f"change the number to {n}" for n in range(11)},),
    # Grouped by the colour of the plate, which must not change with the text.
    "text/button": (
        _reading({w.upper(): f"{w}-button" for w in ("cool", "free", "new", "ng", "ok")})
        | _reading({"UP!": "up-button"})
        | _reading({"UP!": "up-exclamation-button"}),
        _reading({w.upper(): f"{w}-button" for w in ("cl", "sos")})
        | _reading({w.upper(): f"{w}-button-blood-type" for w in ("a", "b", "ab", "o")}),
    ),
}
"""Groups of interchangeable slugs by family, each slug with the instruction that asks for it."""
# In Noto v1 red hearts are pink, and books lie or stand. Fluent's yellow square is orange.
UNTRUE = {("noto-v1", slug) for group in SWAPS["local/colour"] for slug in group} | {
    ("fluent-emoji-flat", "yellow-square")
}
_WORDS = {
    slug: words for groups in SWAPS.values() for group in groups for slug, words in group.items()
}
_FIRST: dict[str, str] = {}
VALUES = {slug: _FIRST.setdefault(words, slug) for slug, words in _WORDS.items()}
"""The first slug with the same instruction, by slug: two slugs read "UP!"."""

PRONOUNS = {"man": "him", "woman": "her", "person": "them"}
HAIR = {
    "red-hair": "give {} red hair",
    "white-hair": "give {} white hair",
    "blond-hair": "give {} blond hair",
    "curly-hair": "give {} curly hair",
    "bald": "make {} bald",
}
# Jobs whose icons show the entire face and the plain person's hair; a context needs both.
JOBS = (
    "artist construction-worker cook farmer firefighter health-worker mechanic office-worker pilot "
    "police-officer scientist student teacher"
).split()
MASKED = "astronaut detective factory-worker guard superhero technologist vampire".split()
KNOWN = frozenset(JOBS) | {"person", "frowning", "pouting", "raising-hand", "shrugging"}
ROLES = {role: _with_article(role.replace("-", " ")) for role in (*JOBS, *MASKED)}
ACTIVITIES = {
    "biking": "riding a bike",
    "bouncing-ball": "bouncing a ball",
    "bowing": "bowing",
    "cartwheeling": "doing a cartwheel",
    "climbing": "climbing a rock",
    "dancing": "dancing",
    "facepalming": "covering the face with one hand",
    "feeding-baby": "feeding a baby",
    "frowning": "frowning",
    "gesturing-no": "with crossed arms",
    "gesturing-ok": "with both arms over the head",
    "getting-haircut": "getting a haircut",
    "getting-massage": "getting a head massage",
    "golfing": "playing golf",
    "in-lotus-position": "in the lotus position",
    "in-manual-wheelchair": "in a wheelchair",
    "in-motorized-wheelchair": "in a motorized wheelchair",
    "in-steamy-room": "in a steamy room",
    "in-tuxedo": "in a tuxedo",
    "juggling": "juggling",
    "kneeling": "kneeling",
    "lifting-weights": "lifting weights",
    "mountain-biking": "riding a bike in the mountains",
    "playing-handball": "playing handball",
    "playing-water-polo": "playing water polo",
    "raising-hand": "raising a hand",
    "rowing-boat": "rowing a boat",
    "running": "running",
    "shrugging": "shrugging",
    "standing": "standing",
    "surfing": "surfing",
    "swimming": "swimming",
    "walking": "walking",
    "wearing-turban": "wearing a turban",
    "with-veil": "wearing a bridal veil",
    "with-white-cane": "walking with a white cane",
}
REDRAW = (
    "redraw this in the {} style",
    "turn this into {} style",
    "draw the same thing in {} style",
)

# ---- names of icons ------------------------------------------------------------------------------

SCENES = frozenset(
    {
        "Activities",
        "Animals & Nature",
        "Food & Drink",
        "Objects",
        "Smileys & Emotion",
        "Travel & Places",
    }
)
"""Categories whose icons can be named; flags and symbols have no names that describe them."""

# The slug is not a noun, or not a natural name for the image.
NAMELESS = frozenset(SWAPS["local/clock"][0]) | frozenset(
    "airplane-arrival airplane-departure badminton bowling bubbles building-construction "
    "camping carp-streamer chart-increasing-with-yen collision construction cooking "
    "dashing-away direct-hit dizzy exploding-head field-hockey foggy head-shaking-horizontally "
    "head-shaking-vertically heart-exclamation high-voltage hole hourglass-done "
    "hourglass-not-done hundred-points ice-hockey kaaba lacrosse left-speech-bubble light-rail "
    "locked locked-with-key locked-with-pen map-of-japan mate metro milky-way "
    "moon-viewing-ceremony mount-fuji muted-speaker performing-arts piata pine-decoration "
    "ping-pong pistol right-anger-bubble rolling-on-the-floor-laughing "
    "shibuya-109-department-store speaker-high-volume speaker-low-volume speaker-medium-volume "
    "star-struck statue-of-liberty tennis tokyo-tower unlocked wedding zzz".split()
)
# Names that end in one of these take no article.
MASS = frozenset(
    "bacon bread broccoli butter coral dna fire fog food garlic ice liquid luggage money oden "
    "popcorn rice sake salt soap spaghetti sushi thread wood yarn".split()
)
SPELLINGS = {
    "american": "American",
    "americas": "the Americas",
    "asia australia": "Asia and Australia",
    "chart decreasing": "falling chart",
    "chart increasing": "rising chart",
    "christmas": "Christmas",
    "dna": "DNA",
    "dvd": "DVD",
    "e mail": "e-mail",
    "europe africa": "Europe and Africa",
    "ferris": "Ferris",
    "french": "French",
    "hear no evil": "hear-no-evil",
    "hindu": "Hindu",
    "jack o lantern": "jack-o'-lantern",
    "japanese": "Japanese",
    "mans": "man's",
    "see no evil": "see-no-evil",
    "shinto": "Shinto",
    "speak no evil": "speak-no-evil",
    "t rex": "T-rex",
    "t shirt": "T-shirt",
    "womans": "woman's",
    "workers": "worker's",
    "x ray": "x-ray",
    "yo yo": "yo-yo",
}
_SPELLING = re.compile(rf"\b({'|'.join(SPELLINGS)})\b")
_AFTER_HEAD = re.compile(
    r" (?:with|without|of|on|in|at|and|but|behind|over|showing|holding|savoring|facing|tilted)\b"
)
_PLURAL = re.compile(r"[^suo]s$")  # not cactus, compass or rhinoceros


def name(icon: Icon) -> str:
    """Returns a noun phrase, e.g. "a hamburger", "an owl", "French fries"; "" if there is none."""
    if icon.concept in ROLES and icon.gender == "person" and not icon.tone:
        return ROLES[icon.concept]
    if icon.category not in SCENES or icon.slug in NAMELESS:
        return ""
    words = _SPELLING.sub(lambda match: SPELLINGS[match[1]], icon.slug.replace("-", " "))
    head = _AFTER_HEAD.split(words)[0]
    if _PLURAL.search(head) or head.split()[-1].lower() in MASS:
        return words
    return _with_article(words)
