"""Emoji sets read from `npm pack @iconify-json/<set>` tarballs: what each icon is, and its picture.

The sets are drawn by artists and share their slugs, so "the same thing in another style" or "the
same person with red hair" is a matter of names. `Icon` is what a name says; `EmojiSets` holds the
drawings, which `EmojiSets.render` turns into pixels at any size.

Nothing is extracted to disk. Licences are those of the sets: Noto is Apache-2.0, Fluent is MIT, and
Twemoji is CC-BY-4.0, which asks for attribution wherever its pictures are shown or passed on.
"""

import functools
import gzip
import io
import json
import pathlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

STYLES = {
    "fluent-emoji": "Fluent 3D",
    "fluent-emoji-flat": "Fluent flat",
    "fluent-emoji-high-contrast": "Fluent black and white",
    "noto": "Noto",
    "noto-v1": "Noto v1",
    "openmoji": "OpenMoji",
    "twemoji": "Twemoji",
}
"""What prompts call a set; a set not listed goes by the name in its own metadata."""

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
PEOPLE = "People & Body"
DEFAULT_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # where iconify gives no number
CACHED_PICTURES = 512

# Fluent writes `cook-dark`, the others `cook-dark-skin-tone`, or even
# `man-dark-skin-tone-red-hair`. Couples have one tone each.
_TONE = re.compile(r"-(light|medium-light|medium-dark|medium|dark)(?:-skin-tone)?(?=-|$)")
_GENDER = re.compile(r"^(man|woman|person)(?:-|$)")


class Icon(NamedTuple):
    """What the name of a drawing says.

    Attributes:
      set: the iconify set, e.g. "noto".
      slug: the name within the set, e.g. "woman-dark-skin-tone-red-hair".
      category: the group the set puts it in, e.g. "People & Body"; "" if in none.
      concept: the slug less gender and tone, e.g. "red-hair", "cook"; "person" for a plain person.
      gender: "man", "woman", "person", or "" where the icon has no such variants.
      tone: one of `TONES`; "" for the neutral one, "light+dark" for a couple.
    """

    set: str
    slug: str
    category: str
    concept: str
    gender: str = ""
    tone: str = ""


def parse(set_name: str, slug: str, category: str, roles: frozenset[str] = frozenset()) -> Icon:
    """Reads an icon's name.

    Args:
      set_name: the iconify set.
      slug: the icon's name within the set.
      category: the group the set puts it in; only people have tones ("police-car-light" has none).
      roles: concepts that have a "man-" variant, so that a bare "cook" is a person of any gender.
    """
    if category != PEOPLE:
        return Icon(set_name, slug, category, slug)
    tone = "+".join(_TONE.findall(slug))
    concept = _TONE.sub("", slug).replace("blonde-hair", "blond-hair")
    if match := _GENDER.match(concept):
        gender, concept = match[1], concept[match.end() :] or "person"
    else:
        gender = "person" if concept in roles else ""
    return Icon(set_name, slug, category, concept, gender, tone)


class EmojiSets:
    """The icon sets of a folder of tarballs, each distinct drawing once.

    Icons the set itself hides (withdrawn names) are left out. Of icons with the same SVG the first
    in alphabetical order stays, also across sets: where Noto kept a drawing of Noto v1, "redraw
    this in the Noto style" would change nothing. Left-out names and plain aliases can still be
    rendered; aliases that rotate or mirror are not supported.

    Attributes:
      icons: every distinct drawing, in order of set and slug.
      styles: what prompts call each set.
      duplicates: how many icons of each set repeat the drawing of another.
    """

    icons: tuple[Icon, ...]
    styles: dict[str, str]
    duplicates: dict[str, int]

    def __init__(self, folder: str | pathlib.Path):
        """Reads all sets of the folder.

        Args:
          folder: holds `*.tgz` files as `npm pack @iconify-json/noto` writes them.

        Raises:
          FileNotFoundError: there is no such folder, or no tarball in it.
          ValueError: a tarball cannot be read, or is not that of an icon set.
        """
        self.styles, self.duplicates = {}, {}
        self._drawings: dict[tuple[str, str], str] = {}
        icons, seen = [], set()
        for path in _tarballs(pathlib.Path(folder)):
            pack, info, metadata = _read(path)
            name = pack["prefix"]
            self.styles[name] = STYLES.get(name) or info.get("name") or name
            drawings = dict(_drawings(pack))
            self._drawings |= {(name, slug): drawing for slug, drawing in drawings.items()}
            self._drawings |= dict(_aliases(pack, drawings))
            distinct = []
            for slug, drawing in drawings.items():
                if drawing not in seen:
                    seen.add(drawing)
                    distinct.append(slug)
            self.duplicates[name] = len(drawings) - len(distinct)
            icons += _parse_all(name, distinct, metadata.get("categories", {}))
        self.icons = tuple(icons)

    def render(self, set_name: str, slug: str, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """Draws an icon on white, centred and undistorted.

        Raises:
          ValueError: there is no such icon, or its SVG cannot be drawn.
          ImportError: resvg is not installed.
        """
        try:
            return _rasterize(self._drawings[set_name, slug], size).copy()
        except KeyError:
            raise ValueError(f"there is no icon {slug!r} in the emoji set {set_name!r}") from None
        except ValueError as error:
            raise ValueError(f"icon {set_name}/{slug} cannot be drawn: {error}") from error


def _tarballs(folder: pathlib.Path) -> list[pathlib.Path]:
    mend = "fill it with `npm pack @iconify-json/noto @iconify-json/twemoji`"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no emoji folder {folder}: make it and {mend}")
    paths = sorted(path for path in folder.iterdir() if path.name.endswith((".tgz", ".tar.gz")))
    if not paths:
        raise FileNotFoundError(f"no icon tarballs (*.tgz) in {folder}: {mend}")
    return paths


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads icons.json, info.json and metadata.json; only the first has to be there."""
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for name in ("icons", "info", "metadata"):
                member = f"package/{name}.json"
                if member in archive.getnames():
                    files[name] = json.load(archive.extractfile(member))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): get it again with `npm pack @iconify-json/<set>`"
        ) from error
    if not {"prefix", "icons"} <= files.get("icons", {}).keys():
        raise ValueError(
            f"{path} holds no icons in package/icons.json: keep only tarballs made by "
            "`npm pack @iconify-json/<set>` in this folder"
        )
    return files["icons"], files.get("info", {}), files.get("metadata", {})


def _drawings(pack: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the name and the whole SVG of each icon, in alphabetical order."""
    for slug, icon in sorted(pack["icons"].items()):
        if not icon.get("hidden"):
            left, top, width, height = (
                icon.get(side, pack.get(side, default)) for side, default in DEFAULT_BOX.items()
            )
            yield (
                slug,
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>',
            )


def _aliases(
    pack: dict[str, Any], drawings: dict[str, str]
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields the drawings of names that stand for another name and change nothing."""
    aliases = pack.get("aliases", {})
    for alias in aliases:
        slug, steps = alias, 0
        while slug in aliases and aliases[slug].keys() <= {"parent", "hidden"}:
            slug, steps = aliases[slug]["parent"], steps + 1
            if steps > len(aliases):
                raise ValueError(f"the aliases of {pack['prefix']} turn in a circle at {alias!r}")
        if slug in drawings:
            yield (pack["prefix"], alias), drawings[slug]


def _parse_all(name: str, slugs: list[str], categories: dict[str, list[str]]) -> list[Icon]:
    category_of = {slug: category for category, members in categories.items() for slug in members}
    roles = frozenset(slug[len("man-") :] for slug in category_of if slug.startswith("man-"))
    return [parse(name, slug, category_of.get(slug, ""), roles) for slug in slugs]


@functools.lru_cache(maxsize=CACHED_PICTURES)
def _rasterize(svg: str, size: int) -> UInt8[np.ndarray, "size size 3"]:
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("drawing emoji needs resvg-py: install the `emoji` extra") from error
    # An explicit size keeps the aspect of the viewBox and centres it, as SVG does by default.
    sized = svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    png = resvg_py.svg_to_bytes(
        svg_string=sized, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
