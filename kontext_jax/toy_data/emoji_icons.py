"""Emoji sets read from `npm pack @iconify-json/<set>` tarballs: icon metadata and drawings.

The sets are drawn by artists and share their slugs, so "the same thing in another style" or "the
same person with red hair" can be found by name. `Icon` is a parsed name; `EmojiSets` holds the
drawings, which `EmojiSets.render` rasterises at any size.

Nothing is extracted to disk. The licences are those of the sets: Noto is Apache-2.0, Fluent is MIT,
and Twemoji is CC-BY-4.0, which requires attribution wherever its images are shown or redistributed.
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
"""Names of the sets in prompts; other sets are called by the name in their metadata."""

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
PEOPLE = "People & Body"
DEFAULT_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # iconify's defaults
CACHED_IMAGES = 512

# Fluent writes `cook-dark`, the others `cook-dark-skin-tone` or `man-dark-skin-tone-red-hair`. In
# couples each person has a tone.
_TONE = re.compile(r"-(light|medium-light|medium-dark|medium|dark)(?:-skin-tone)?(?=-|$)")
_GENDER = re.compile(r"^(man|woman|person)(?:-|$)")


class Icon(NamedTuple):
    """The parsed name of an icon.

    Attributes:
      set: the iconify set, e.g. "noto".
      slug: the name within the set, e.g. "woman-dark-skin-tone-red-hair".
      category: the set's category of the icon, e.g. "People & Body"; "" if it has none.
      concept: the slug without gender and tone, e.g. "red-hair", "cook"; "person" if plain.
      gender: "man", "woman", "person", or "" if the icon has no gendered variants.
      tone: one of `TONES`; "" if neutral, e.g. "light+dark" for a couple.
    """

    set: str
    slug: str
    category: str
    concept: str
    gender: str = ""
    tone: str = ""


def parse(set_name: str, slug: str, category: str, roles: frozenset[str] = frozenset()) -> Icon:
    """Parses an icon's name.

    Args:
      set_name: the iconify set.
      slug: the icon's name within the set.
      category: the icon's category; only people have tones ("police-car-light" has none).
      roles: concepts with a "man-" variant, for which a bare "cook" is a person of any gender.
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
    """The icon sets of a folder of tarballs, without duplicate drawings.

    Icons that a set hides (withdrawn names) are left out. Of icons with the same SVG the
    alphabetically first is kept, also across sets: where Noto kept a drawing of Noto v1, "redraw
    this in the Noto style" would change nothing. Duplicates and plain aliases can still be
    rendered; aliases that rotate or mirror are not supported.

    Attributes:
      icons: the distinct drawings, ordered by set and slug.
      styles: each set's name in prompts.
      duplicates: number of icons in each set that repeat another drawing.
    """

    icons: tuple[Icon, ...]
    styles: dict[str, str]
    duplicates: dict[str, int]

    def __init__(self, folder: str | pathlib.Path):
        """Reads all sets of the folder.

        Args:
          folder: folder with the `*.tgz` files that `npm pack @iconify-json/noto` writes.

        Raises:
          FileNotFoundError: the folder does not exist, or has no tarballs.
          ValueError: a tarball is damaged, or does not contain an icon set.
        """
        self.styles, self.duplicates = {}, {}
        self._drawings: dict[tuple[str, str], str] = {}
        icons, unique = [], set()
        for path in _tarballs(pathlib.Path(folder)):
            pack, info, metadata = _read(path)
            name = pack["prefix"]
            self.styles[name] = STYLES.get(name) or info.get("name") or name
            drawings = dict(_drawings(pack))
            self._drawings |= {(name, slug): drawing for slug, drawing in drawings.items()}
            self._drawings |= dict(_aliases(pack, drawings))
            distinct = []
            for slug, drawing in drawings.items():
                if drawing not in unique:
                    unique.add(drawing)
                    distinct.append(slug)
            self.duplicates[name] = len(drawings) - len(distinct)
            icons += _parse_all(name, distinct, metadata.get("categories", {}))
        self.icons = tuple(icons)

    def render(self, set_name: str, slug: str, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """Renders an icon on white, centred and undistorted.

        Raises:
          ValueError: the icon does not exist, or its SVG cannot be rendered.
          ImportError: resvg is not installed.
        """
        try:
            return _rasterize(self._drawings[set_name, slug], size).copy()
        except KeyError:
            raise ValueError(f"the emoji set {set_name!r} has no icon {slug!r}") from None
        except ValueError as error:
            raise ValueError(f"icon {set_name}/{slug} cannot be rendered: {error}") from error


def _tarballs(folder: pathlib.Path) -> list[pathlib.Path]:
    fix = "fill it with `npm pack @iconify-json/noto @iconify-json/twemoji`"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no emoji folder {folder}: create it and {fix}")
    paths = sorted(path for path in folder.iterdir() if path.name.endswith((".tgz", ".tar.gz")))
    if not paths:
        raise FileNotFoundError(f"no icon tarballs (*.tgz) in {folder}: {fix}")
    return paths


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads icons.json, info.json and metadata.json; only the first is required."""
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for name in ("icons", "info", "metadata"):
                member = f"package/{name}.json"
                if member in archive.getnames():
                    files[name] = json.load(archive.extractfile(member))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): download it again with `npm pack @iconify-json/<set>`"
        ) from error
    if not {"prefix", "icons"} <= files.get("icons", {}).keys():
        raise ValueError(
            f"{path} has no icons in package/icons.json: keep only tarballs made by "
            "`npm pack @iconify-json/<set>` in this folder"
        )
    return files["icons"], files.get("info", {}), files.get("metadata", {})


def _drawings(pack: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the slug and complete SVG of each icon, in alphabetical order."""
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
    """Yields the drawings of aliases that only rename an icon."""
    aliases = pack.get("aliases", {})
    for alias in aliases:
        slug, steps = alias, 0
        while slug in aliases and aliases[slug].keys() <= {"parent", "hidden"}:
            slug, steps = aliases[slug]["parent"], steps + 1
            if steps > len(aliases):
                raise ValueError(f"the aliases of {pack['prefix']} form a cycle at {alias!r}")
        if slug in drawings:
            yield (pack["prefix"], alias), drawings[slug]


def _parse_all(name: str, slugs: list[str], categories: dict[str, list[str]]) -> list[Icon]:
    category_of = {slug: category for category, members in categories.items() for slug in members}
    roles = frozenset(slug[len("man-") :] for slug in category_of if slug.startswith("man-"))
    return [parse(name, slug, category_of.get(slug, ""), roles) for slug in slugs]


@functools.lru_cache(maxsize=CACHED_IMAGES)
def _rasterize(svg: str, size: int) -> UInt8[np.ndarray, "size size 3"]:
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("rendering emoji needs resvg-py: pip install -e '.[emoji]'") from error
    # With an explicit size, SVG's defaults keep the viewBox's aspect ratio and centre it.
    sized = svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    png = resvg_py.svg_to_bytes(
        svg_string=sized, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
