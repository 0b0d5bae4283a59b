"""Makes or edits one image.

python -m kontext_jax.sample --checkpoint=DIR --prompt="make it night" --context=a.png \\
    --output=out.png [--num_steps=28 --guidance=2.5 --cfg_scale=1 --size=WxH --seed=0 --params=ema]
"""

import dataclasses
import re
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from kontext_jax import cli
from kontext_jax.data.folder import load_image
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import Tokenizer
from kontext_jax.evaluator import Generator
from kontext_jax.geometry import GeometryConfig, Size, fit, num_tokens, size_of
from kontext_jax.runs import load_frozen, load_meta, load_player
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Example


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would clash with other commands'."""
    flags.DEFINE_string("checkpoint", None, "workdir of a flow-matching run")
    flags.DEFINE_string("prompt", "", "what to do, or what to show")
    flags.DEFINE_multi_string("context", [], "image to start from; may be repeated")
    flags.DEFINE_string("output", None, "image file to write")
    flags.DEFINE_integer("num_steps", 28, "evaluations of the transformer", lower_bound=1)
    flags.DEFINE_float("guidance", 2.5, "for transformers with a guidance input")
    flags.DEFINE_float("cfg_scale", 1.0, "classifier-free scale; 1 is off")
    flags.DEFINE_string("size", None, "WxH; by default that of the first context, or of training")
    flags.DEFINE_integer("seed", 0, "of the initial noise")
    flags.DEFINE_enum("params", "ema", ["ema", "params"], "averaged or raw parameters")
    flags.mark_flags_as_required(["checkpoint", "output"])


def generate(
    checkpoint: str,
    prompt: str,
    contexts: list[np.ndarray],
    sampler: SamplerConfig,
    *,
    size: Size | None = None,
    seed: int = 0,
    params: str = "ema",
) -> np.ndarray:
    """One image, uint8 [h w 3].

    Raises:
      FileNotFoundError: there is no run at ``checkpoint``.
      ValueError: the run is of another kind, or ``size`` does not suit its autoencoder.
    """
    mesh = make_mesh(MeshConfig())
    model, config = load_player(checkpoint, "model", mesh, params)
    autoencoder = load_frozen(config, mesh, load_meta(checkpoint)["frozen"])["autoencoder"]
    example = _example(prompt, contexts, size, config.data)
    generator = Generator(
        [example], _room_for(example, config.data), config.objective, sampler, mesh, seed
    )
    return generator(model, autoencoder)[0]


def _example(
    prompt: str, contexts: list[np.ndarray], size: Size | None, data: DataConfig
) -> Example:
    geometry = data.geometry
    fitted = tuple(fit(image, geometry.sizes) for image in contexts)
    if size is None:
        size = size_of(fitted[0]) if fitted else _squarest(geometry)
    GeometryConfig(sizes=(size,), pixels_per_token=geometry.pixels_per_token)  # refuses bad sizes
    target = np.zeros((size[1], size[0], 3), np.uint8)
    return Example("sample", target, fitted, Tokenizer(data.text)(prompt))


def _squarest(geometry: GeometryConfig) -> Size:
    return min(geometry.sizes, key=lambda size: abs(size[0] - size[1]))


def _room_for(example: Example, data: DataConfig) -> DataConfig:
    """One row that holds the example and nothing else."""
    tokens = sum(
        num_tokens(size_of(image), data.geometry.pixels_per_token)
        for image in (example.target, *example.contexts)
    )
    packing = PackingConfig(image_tokens=tokens, text_tokens=len(example.text_ids), max_examples=1)
    return dataclasses.replace(data, packing=packing, batch_size=1)


def parse_size(text: str) -> Size:
    """(width, height) of "WxH".

    Raises:
      ValueError: ``text`` is something else.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"--size must look like 1024x768, not {text!r}.")
    return int(match[1]), int(match[2])


def main() -> None:
    options = flags.FLAGS
    output = Path(options.output)
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise cli.UserError(f"--output {output} has no ending of an image format, such as .png.")
    image = generate(
        options.checkpoint,
        options.prompt,
        [load_image(path) for path in options.context],
        SamplerConfig(
            num_steps=options.num_steps, guidance=options.guidance, cfg_scale=options.cfg_scale
        ),
        size=parse_size(options.size) if options.size else None,
        seed=options.seed,
        params=options.params,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(output)
    print(f"wrote {output}, {image.shape[1]}x{image.shape[0]}")


if __name__ == "__main__":
    define_flags()
    cli.run("sample", main)
