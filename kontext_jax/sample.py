"""Generates or edits one image.

python -m kontext_jax.sample --checkpoint=DIR --prompt="make it night" --context=a.png \\
    --output=out.png [--num_steps=28 --method=euler --guidance=2.5 --cfg_scale=1 --params=ema]
    [--init=b.png --strength=0.6] [--size=WxH --seed=0]

A PNG stores how it was made: the model, the prompt, every setting, and hashes of the input images,
but no file names. ``provenance.read_provenance`` reads it back.
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
    resize,
    size_of,
)
from kontext_jax.loading.locations import is_run, load_config
from kontext_jax.loading.models import load_model
from kontext_jax.objectives.transformer import NetworksConfig
from kontext_jax.sampler import METHODS, SamplerConfig
from kontext_jax.sampling.generator import Generator, with_room
from kontext_jax.sampling.provenance import format_of, write_image
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Example, RGBImage


def define_flags() -> None:
    """Defines the command's flags. Not on import, as they would clash with other commands'."""
    flags.DEFINE_string(
        "checkpoint", None, "workdir of a run with a transformer, or a folder in diffusers' layout"
    )
    flags.DEFINE_string("prompt", "", "instruction, or caption")
    flags.DEFINE_multi_string("context", [], "image to edit; may be repeated")
    flags.DEFINE_string("init", None, "image to start from instead of noise; needs --strength")
    flags.DEFINE_float("strength", 1.0, "share of the steps to run; below 1 with --init")
    flags.DEFINE_string("output", None, "image file to write")
    flags.DEFINE_integer(
        "num_steps",
        None,
        "evaluations of the transformer; default 28, or 4 for students",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "method", None, METHODS, "default euler, or consistency for students that learn it"
    )
    flags.DEFINE_float(
        "guidance",
        None,
        "for transformers with a guidance input; default 2.5, or the student's in training",
    )
    flags.DEFINE_float("cfg_scale", 1.0, "classifier-free guidance scale; 1 is off")
    flags.DEFINE_string(
        "size", None, "WxH; default from --init, the first context, or the training sizes"
    )
    flags.DEFINE_integer("seed", 0, "seed of the initial noise")
    flags.DEFINE_enum("params", "ema", ["ema", "params"], "averaged or raw parameters")
    flags.DEFINE_string("lora", None, "adapters to apply, a file or folder in diffusers' layout")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "dtype of the computation; default as trained"
    )
    flags.DEFINE_bool("provenance", True, "whether a PNG stores how it was made")
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
    """Returns one image, and the record of how it was made.

    Args:
      checkpoint: workdir of a run, or a pipeline in another layout.
      prompt: instruction, or caption.
      contexts: images to edit, of any size.
      sampler: sampler settings.
      init: image to start from, of any size; needs a ``sampler.strength`` below 1.
      size: size of the image; by default from ``init``, the first context, or the training sizes.
      seed: seed of the initial noise.
      params: "ema" or "params", the averaged or the raw parameters of a run.
      dtype: dtype of the computation, "float32" or "bfloat16"; the model's own if empty.
      lora: adapters to apply, a file or folder in diffusers' layout.

    Raises:
      FileNotFoundError: there is nothing at ``checkpoint``.
      ValueError: it holds no model, is incomplete or damaged, ``size`` does not suit its
        autoencoder, or ``init`` and the strength contradict each other.
    """
    _check_strength(init, sampler)
    mesh = make_mesh(MeshConfig())
    model = load_model(checkpoint, mesh, params, dtype, lora)
    example = _example(prompt, contexts, init, size, model.data)
    # One example per row makes the row exactly as long as the example.
    data = dataclasses.replace(model.data, packing=PackingConfig(max_examples=1))
    data = with_room(data, [example])
    generator = Generator([example], data, model.objective, sampler, mesh, seed)
    (batch,) = generator.batches(model.networks)
    if not batch.finite:
        raise ValueError(
            f"The samples of {checkpoint} are not finite: its weights are damaged, its training "
            "diverged, or the range of --dtype is too small for it."
        )
    (image,) = batch.images
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
            "left of --init: lower it, for example to 0.6."
        )


def _describe(image: RGBImage) -> dict[str, str]:
    """Returns what identifies an input image: a hash of its pixels, not its file name."""
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
    """Returns the example to sample; its target is the image to start from, or black."""
    geometry, tokenizer = data.geometry, Tokenizer(data.text)
    size = size or _default_size(contexts, init, geometry.sizes)
    GeometryConfig(sizes=(size,), pixels_per_token=geometry.pixels_per_token)  # rejects bad sizes
    target = np.zeros((size[1], size[0], 3), np.uint8) if init is None else resize(init, size)
    fitted = tuple(fit(image, geometry.sizes) for image in contexts)
    return Example("sample", target, fitted, tokenizer(prompt), tokenizer.clip(prompt))


def _default_size(
    contexts: Sequence[RGBImage], init: RGBImage | None, sizes: Sequence[Size]
) -> Size:
    """Returns the size nearest to ``init``, else to the first context, else the squarest size."""
    images = [*contexts] if init is None else [init]
    if images:
        return nearest_size(*size_of(images[0]), sizes)
    return min(sizes, key=lambda size: abs(size[0] - size[1]))


def default_sampler(checkpoint: str) -> SamplerConfig:
    """Returns the sampler that suits a checkpoint: the run's own for students."""
    objective = load_config(checkpoint).objective if is_run(checkpoint) else None
    return objective.sampler if isinstance(objective, NetworksConfig) else SamplerConfig()


def parse_size(text: str) -> Size:
    """Returns the (width, height) of "WxH".

    Raises:
      ValueError: ``text`` has another form.
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
    format_of(output)  # rejects a bad name before sampling
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
