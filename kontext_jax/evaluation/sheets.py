"""Sheets of pictures: context | instruction | result | truth, one row an example."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from kontext_jax.config import Config
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.data.sources import TripleSource
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampling.generator import Generator, reconstruct
from kontext_jax.types import Example

GAP = 8
INK, PAPER, FAINT = (32, 32, 32), (255, 255, 255), (140, 140, 140)


class SheetRow(NamedTuple):
    """One example; ``truth`` is None where none is known, ``note`` is a word on how it went."""

    contexts: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    prompt: str
    results: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    truth: UInt8[np.ndarray, "_ _ 3"] | None
    note: str = ""


def draw_sheet(
    rows: Sequence[SheetRow],
    *,
    result_names: Sequence[str] = ("result",),
    cell: int = 128,
    text_width: int = 240,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws rows under their headings; without the column of truths where no row has one.

    Args:
      rows: the examples, each with one result for each of ``result_names``.
      result_names: headings of the results; those wider than ``cell`` take several lines.
      cell: side of a picture in pixels; smaller ones are enlarged without smoothing.
      text_width: of the column of instructions.
    """
    num_contexts = max([len(row.contexts) for row in rows] + [1])
    truth = ["truth"] if any(row.truth is not None for row in rows) else []
    columns = [cell] * num_contexts + [text_width] + [cell] * (len(result_names) + len(truth))
    lefts = np.cumsum([GAP] + [width + GAP for width in columns])
    font = ImageFont.load_default(size=15)
    small = ImageFont.load_default(size=12)
    headings = ["context"] + [""] * (num_contexts - 1) + ["instruction", *result_names, *truth]
    headings = [wrap(text, font, width) for text, width in zip(headings, columns, strict=True)]
    head = 8 + 18 * max(map(len, headings))
    sheet = Image.new("RGB", (int(lefts[-1]), head + len(rows) * (cell + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, lines in zip(lefts[:-1], headings, strict=True):
        draw.multiline_text((left, 5), "\n".join(lines), fill=FAINT, font=font)
    for i, row in enumerate(rows):
        top = head + i * (cell + GAP)
        for left, image in zip(lefts, row.contexts, strict=False):
            sheet.paste(_fit(image, cell), (int(left), top))
        text_left = int(lefts[num_contexts])
        lines = wrap(row.prompt, font, text_width)
        draw.multiline_text((text_left, top + 4), "\n".join(lines), fill=INK, font=font)
        draw.text((text_left, top + cell - 18), row.note, fill=FAINT, font=small)
        for left, image in zip(lefts[num_contexts + 1 :], [*row.results, row.truth], strict=False):
            if image is not None:
                sheet.paste(_fit(image, cell), (int(left), top))
    return np.asarray(sheet)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _fit(image: np.ndarray, cell: int) -> Image.Image:
    """Enlarges by whole pixels where that fills the cell, else resamples."""
    picture = Image.fromarray(np.asarray(image))
    scale = cell / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    smooth = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.BICUBIC
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(picture.resize(size, smooth), ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def make_sheet_maker(config: Config, mesh: Mesh) -> Callable[[dict, dict], np.ndarray]:
    """A function (networks by player, frozen networks) -> sheet, for ``config``'s objective.

    Its examples are spread evenly over ``config.sheets.split`` and stay the same in a run.
    """
    source = TripleSource(config.data.path, config.sheets.split)
    number = min(config.sheets.num_examples, len(source))
    triples = [source[i] for i in np.linspace(0, len(source) - 1, number).astype(int)]
    examples = prepare_all(triples, config.data)
    if config.objective.kind == "autoencoder":
        return lambda networks, frozen: _reconstructions(networks["autoencoder"], examples, mesh)
    player = config.make_objective().generator
    generate = Generator(examples, config.data, config.objective, config.sheets.sampler, mesh)

    def edits(networks, frozen):
        images = generate(networks_of(networks[player], frozen))
        rows = [
            SheetRow(t.contexts, t.prompt, [image], t.target, t.category)
            for t, image in zip(triples, images, strict=True)
        ]
        return draw_sheet(rows)

    return edits


def _reconstructions(autoencoder, examples: Sequence[Example], mesh: Mesh) -> np.ndarray:
    images = [example.target for example in examples]
    rows = [
        SheetRow([], example.id, [image], example.target)
        for example, image in zip(examples, reconstruct(autoencoder, images, mesh), strict=True)
    ]
    return draw_sheet(rows, result_names=["reconstruction"])
