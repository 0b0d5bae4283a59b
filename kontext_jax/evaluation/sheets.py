"""Contact sheets of images: context | instruction | result | target, one row per example.

For an autoencoder: original | id | reconstruction | error, with the error enlarged.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageDraw, ImageFont

from kontext_jax.config import Config
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.data.sources import TripleSource
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.sampling.generator import Generator, reconstruct
from kontext_jax.types import Example, RGBImage

GAP = 8
ERROR_GAIN = 4
INK, PAPER, FAINT = (32, 32, 32), (255, 255, 255), (140, 140, 140)


class SheetRow(NamedTuple):
    """One example; ``target`` is None if unknown, ``note`` is a word printed below the prompt."""

    contexts: Sequence[RGBImage]
    prompt: str
    results: Sequence[RGBImage]
    target: RGBImage | None
    note: str = ""


def draw_sheet(
    rows: Sequence[SheetRow],
    *,
    context_name: str = "context",
    text_name: str = "instruction",
    result_names: Sequence[str] = ("result",),
    cell: int = 128,
    text_width: int = 240,
) -> RGBImage:
    """Draws rows below headings, without a column of targets if no row has one.

    Args:
      rows: examples, with one result for each of ``result_names``.
      context_name, text_name: headings of the contexts and of the instructions.
      result_names: headings of the results; headings wider than ``cell`` wrap.
      cell: side of an image in pixels; images that fit a whole number of times are enlarged without
        smoothing.
      text_width: width of the column of instructions, in pixels.
    """
    num_contexts = max([len(row.contexts) for row in rows] + [1])
    target = ["target"] if any(row.target is not None for row in rows) else []
    columns = [cell] * num_contexts + [text_width] + [cell] * (len(result_names) + len(target))
    lefts = np.cumsum([GAP] + [width + GAP for width in columns])
    font = ImageFont.load_default(size=15)
    small = ImageFont.load_default(size=12)
    headings = [context_name] + [""] * (num_contexts - 1) + [text_name, *result_names, *target]
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
        for left, image in zip(lefts[num_contexts + 1 :], [*row.results, row.target], strict=False):
            if image is not None:
                sheet.paste(_fit(image, cell), (int(left), top))
    return np.asarray(sheet)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines of at most ``width`` pixels, or a single longer word."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _fit(image: RGBImage, cell: int) -> Image.Image:
    """Centres an image in a square cell, enlarged without smoothing if the factor is whole."""
    pil_image = Image.fromarray(np.asarray(image))
    scale = cell / max(pil_image.size)
    size = tuple(max(1, round(side * scale)) for side in pil_image.size)
    resampling = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.BICUBIC
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(pil_image.resize(size, resampling), ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def make_sheet_maker(config: Config, mesh: Mesh) -> Callable[[dict, dict], RGBImage]:
    """Returns a function (networks by player, frozen networks) -> sheet.

    The examples are spread evenly over ``config.sheets.split`` and stay the same during a run.
    """
    source = TripleSource(config.data.path, config.sheets.split)
    triples = [source[i] for i in source.spread(config.sheets.num_examples)]
    examples = prepare_all(triples, config.data)
    if config.objective.kind == "autoencoder":
        return lambda networks, _: _draw_reconstructions(networks["autoencoder"], examples, mesh)
    player = config.make_objective().generator
    generate = Generator(examples, config.data, config.objective, config.sheets.sampler, mesh)

    def draw(networks, frozen):
        images = generate(networks_of(networks[player], frozen))
        return draw_sheet(
            [
                SheetRow(triple.contexts, triple.prompt, [image], triple.target, triple.category)
                for triple, image in zip(triples, images, strict=True)
            ]
        )

    return draw


def _draw_reconstructions(autoencoder, examples: Sequence[Example], mesh: Mesh) -> RGBImage:
    targets = [example.target for example in examples]
    images = reconstruct(autoencoder, targets, mesh)
    side = max(max(target.shape[:2]) for target in targets)
    rows = [
        SheetRow([target], example.id, [image, enlarged_error(image, target)], None)
        for example, target, image in zip(examples, targets, images, strict=True)
    ]
    return draw_sheet(
        rows,
        context_name="original",
        text_name="example",
        result_names=["reconstruction", f"error x {ERROR_GAIN}"],
        cell=side * max(1, round(128 / side)),
    )


def enlarged_error(image: RGBImage, reference: RGBImage) -> RGBImage:
    """`ERROR_GAIN` times the error of each colour, around middle grey."""
    error = ERROR_GAIN * (image.astype(np.int32) - reference.astype(np.int32))
    return np.clip(128 + error, 0, 255).astype(np.uint8)
