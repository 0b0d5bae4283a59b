"""Makes or edits one image.

python -m kontext_jax.sample --checkpoint=DIR --prompt="make it night" --context=a.png \\
    --output=out.png [--num_steps=28 --method=euler --guidance=2.5 --cfg_scale=1 --params=ema]
    [--init=b.png --strength=0.6] [--size=WxH --seed=0]

A PNG carries along how it was made: the model, the prompt, every setting, and hashes of the images
given, but no file names. ``provenance.read_provenance`` reads it back.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import kontext_jax
from kontext_jax import cli
from kontext_jax.data.folder import load_image
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import Tokenizer
from kontext_jax.geometry import (
    GeometryConfig,
    Size,
    fit,
    nearest_size,
    num_tokens,
    resize,
    size_of,
)
from kontext_jax.loading.locations import is_run, load_config
from kontext_jax.loading.models import load_model
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.sampler import METHODS, SamplerConfig
from kontext_jax.sampling.generator import Generator
from kontext_jax.sampling.provenance import format_of, write_image
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Example, RGBImage


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would clash with other commands'."""
    flags.DEFINE_string(
        "checkpoint", None, "workdir of a flow-matching run, or a folder of diffusers' layout"
    )
    flags.DEFINE_string("prompt", "", "what to do, or what to show")
    flags.DEFINE_multi_string("context", [], "image to work from; may be repeated")
    flags.DEFINE_string("init", None, "image to start from, in place of noise; with --strength")
    flags.DEFINE_float("strength", 1.0, "share of the steps to run; with --init, below 1")
    flags.DEFINE_string("output", None, "image file to write")
    flags.DEFINE_integer(
        "num_steps", None, "evaluations of the transformer; 28, or a student's 4", lower_bound=1
    )
    flags.DEFINE_enum(
        "method", None, METHODS, "euler steps, or consistency, the default for students"
    )
    flags.DEFINE_float(
        "guidance", None, "for transformers with a guidance input; 2.5, or a student's own"
    )
    flags.DEFINE_float("cfg_scale", 1.0, "classifier-free scale; 1 is off")
    flags.DEFINE_string(
        "size", None, "WxH; by default that of --init, of the first context, or of training"
    )
    flags.DEFINE_integer("seed", 0, "of the initial noise")
    flags.DEFINE_enum("params", "ema", ["ema", "params"], "averaged or raw parameters")
    flags.DEFINE_string("lora", None, "adapters to use, a file or folder of diffusers' layout")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "to compute in; if unset as trained")
    flags.DEFINE_bool("provenance", True, "a PNG tells how it was made; other formats do not")
    flags.mark_flags_as_required(["checkpoint", "output"])


def generate(
    checkpoint: str,
    prompt: str,
    contexts: Sequence[RGBImage],
    sampler: SamplerConfig,
    *,
    init: RGBImage | None = None,
    size: Size | None = None,
    seed: int = 0,
    params: str = "ema",
    dtype: str = "",
    lora: str = "",
) -> tuple[RGBImage, dict[str, Any]]:
    """One image, and the record of how it was made.

    Args:
      checkpoint: workdir of a run, or a pipeline in another layout.
      prompt: what to do, or what to show.
      contexts: images to work from, of any size.
      sampler: how to sample.
      init: image to start from, of any size; with a ``sampler.strength`` below 1.
      size: of the image; by default that of ``init``, of the first context, or of training.
      seed: of the initial noise.
      params: "ema" or "params", the averaged or the raw parameters of a run.
      dtype: to compute in, "float32" or "bfloat16"; the model's own if left out.
      lora: adapters to use, a file or folder of diffusers' layout.

    Raises:
      FileNotFoundError: there is nothing at ``checkpoint``.
      ValueError: it is something else, incomplete or damaged, ``size`` does not suit its
        autoencoder, or ``init`` and the strength do not go together.
    """
    _check_strength(init, sampler)
    mesh = make_mesh(MeshConfig())
    model = load_model(checkpoint, mesh, params, dtype, lora)
    example = _example(prompt, contexts, init, size, model.data)
    generator = Generator(
        [example], _room_for(example, model.data), model.objective, sampler, mesh, seed
    )
    (made,) = generator.batches(model.networks)
    if not made.finite:
        raise ValueError(
            f"what {checkpoint} samples is not finite: its weights are damaged, its training "
            "diverged, or --dtype has too small a range for it."
        )
    (image,) = made.images
    record = {
        "software": f"kontext_jax {kontext_jax.__version__}",
        "model": model.identity,
        "prompt": prompt,
        "contexts": [_describe(context) for context in contexts],
        "init": None if init is None else _describe(init),
        "size": _format_size(size_of(image)),
        "seed": seed,
        "params": params,
        "dtype": model.objective.transformer.dtype,
    }
    return image, record | dataclasses.asdict(sampler)


def _check_strength(init: RGBImage | None, sampler: SamplerConfig) -> None:
    if init is None and sampler.strength < 1:
        raise ValueError("A --strength below 1 starts from an image: name it with --init.")
    if init is not None and sampler.first_step == 0:
        raise ValueError(
            f"At --strength={sampler.strength:g} all {sampler.num_steps} steps run and nothing is "
            "left of --init: give less, such as 0.6."
        )


def _describe(image: RGBImage) -> dict[str, str]:
    """What tells a given image from others: its pixels' hash, not the name of its file."""
    return {
        "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "size": _format_size(size_of(image)),
    }


def _example(
    prompt: str,
    contexts: Sequence[RGBImage],
    init: RGBImage | None,
    size: Size | None,
    data: DataConfig,
) -> Example:
    """The example to sample; its target is the image to start from, black where there is none."""
    geometry = data.geometry
    fitted = tuple(fit(image, geometry.sizes) for image in contexts)
    size = size or _default_size(fitted, init, geometry)
    GeometryConfig(sizes=(size,), pixels_per_token=geometry.pixels_per_token)  # refuses bad sizes
    target = np.zeros((size[1], size[0], 3), np.uint8) if init is None else resize(init, size)
    tokenizer = Tokenizer(data.text)
    return Example("sample", target, fitted, tokenizer(prompt), tokenizer.clip(prompt))


def _default_size(
    fitted: Sequence[RGBImage], init: RGBImage | None, geometry: GeometryConfig
) -> Size:
    if init is not None:
        return nearest_size(*size_of(init), geometry.sizes)
    return size_of(fitted[0]) if fitted else _squarest(geometry)


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


def default_sampler(checkpoint: str) -> SamplerConfig:
    """How the model there is sampled unless one says otherwise; a run of a student knows best."""
    objective = load_config(checkpoint).objective if is_run(checkpoint) else None
    return objective.sampler if isinstance(objective, NetworksConfig) else SamplerConfig()


def parse_size(text: str) -> Size:
    """(width, height) of "WxH".

    Raises:
      ValueError: ``text`` is something else.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"--size must look like 1024x768, not {text!r}.")
    return int(match[1]), int(match[2])


def _format_size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def main() -> None:
    options = flags.FLAGS
    output = Path(options.output)
    format_of(output)  # refuses a bad name before anything is sampled
    default = default_sampler(options.checkpoint)
    image, record = generate(
        options.checkpoint,
        options.prompt,
        [load_image(path) for path in options.context],
        SamplerConfig(
            num_steps=options.num_steps or default.num_steps,
            method=options.method or default.method,
            guidance=default.guidance if options.guidance is None else options.guidance,
            cfg_scale=options.cfg_scale,
            strength=options.strength,
        ),
        init=load_image(options.init) if options.init else None,
        size=parse_size(options.size) if options.size else None,
        seed=options.seed,
        params=options.params,
        dtype=options.dtype or "",
        lora=options.lora or "",
    )
    write_image(image, output, record if options.provenance else None)
    print(f"wrote {output}, {_format_size(size_of(image))}")


if __name__ == "__main__":
    define_flags()
    cli.run("sample", main)
