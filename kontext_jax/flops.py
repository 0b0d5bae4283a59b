"""Model FLOPs of the transformer, the numerator of MFU (``chips.py`` has the denominator).

Counts the matmuls that the model needs, with two operations per multiply-add. For one example with
l text tokens, s target tokens and c context tokens, L = l + s + c, width h, MLP width m, and D
double and S single blocks, the forward pass takes

    linear     = 2 L h (4 h + 2 m) (D + S)     both kinds of block: a token passes one stream
    attention  = 4 L^2 h (D + S)               QK^T and AV, each token with every other
    modulation = 2 h^2 (12 D + 3 S + 2)        once per example
    ends       = 2 h (in_channels (s + c) + context_in_dim l + in_channels s)
               + 2 h (256 + h [time] + 256 + h [guidance, if any] + vec_in_dim + h)

and training three times as much: each matmul has two gradients, which are matmuls of its size.
(FLUX has m = 4 h: 12 h^2 weights per token and block, 6.455e9 in total.)

Not counted, so that they lower MFU: recomputation in the backward pass; padding, and attention
across the segments of a packed row; the velocity of context tokens, which is unused; the encoders,
frozen or not; the optimizer; RoPE; and all operations other than matmuls.

The FLOPs of convolutional networks, which have no such formula, are counted in their traced program
(`traced_flops`).
"""

import fnmatch
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxtyping import Array, Float

from kontext_jax.models.flux import TIME_EMBED_DIM, FluxConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.sharding import MESH_AXES

Count = int | float | Float[Array, "..."]
"""A count, or one count per example; float32 on the device, where squares overflow int32."""


class LinearMap(NamedTuple):
    """A linear map that occurs in some number of layers.

    ``tokens`` names the inputs: "target", "image" (target and contexts), "text", "joint" (image and
    text), or "example" (one vector per example).
    """

    layers: int
    in_features: int
    out_features: int
    tokens: str


def linear_maps(config: FluxConfig) -> dict[str, LinearMap]:
    """Every linear map of the transformer by its path, as in `models.lora`."""
    h, mlp, channels = config.hidden_size, config.mlp_dim, config.in_channels
    maps = {
        "img_in": LinearMap(1, channels, h, "image"),
        "txt_in": LinearMap(1, config.context_in_dim, h, "text"),
        "final_layer/linear": LinearMap(1, h, channels, "target"),
        "final_layer/adaLN_modulation": LinearMap(1, h, 2 * h, "example"),
        "single_blocks/modulation/lin": LinearMap(config.depth_single, h, 3 * h, "example"),
        "single_blocks/linear1": LinearMap(config.depth_single, h, 3 * h + mlp, "joint"),
        "single_blocks/linear2": LinearMap(config.depth_single, h + mlp, h, "joint"),
    }
    embedders = {"time_in": TIME_EMBED_DIM, "vector_in": config.vec_in_dim}
    if config.guidance_embed:
        embedders["guidance_in"] = TIME_EMBED_DIM
    for name, width in embedders.items():
        maps[f"{name}/in_layer"] = LinearMap(1, width, h, "example")
        maps[f"{name}/out_layer"] = LinearMap(1, h, h, "example")
    for prefix, tokens in (("img", "image"), ("txt", "text")):
        block = f"double_blocks/{prefix}"
        maps[f"{block}_mod/lin"] = LinearMap(config.depth, h, 6 * h, "example")
        maps[f"{block}_attn/qkv"] = LinearMap(config.depth, h, 3 * h, tokens)
        maps[f"{block}_attn/proj"] = LinearMap(config.depth, h, h, tokens)
        maps[f"{block}_mlp/in_layer"] = LinearMap(config.depth, h, mlp, tokens)
        maps[f"{block}_mlp/out_layer"] = LinearMap(config.depth, mlp, h, tokens)
    return maps


def forward_flops(config: FluxConfig, *, target: Count, contexts: Count, text: Count) -> Count:
    """FLOPs of one example's forward pass.

    Args:
      config: sizes of the transformer.
      target, contexts: number of target tokens, and of tokens of all contexts.
      text: number of text tokens.
    """
    linear = _linear_flops(config, _lengths(target, contexts, text))
    return linear + _attention_flops(config, target + contexts + text)


def training_flops(
    config: FluxConfig,
    *,
    target: Count,
    contexts: Count,
    text: Count,
    lora: LoraConfig | None = None,
    frozen: bool = False,
) -> Count:
    """FLOPs of one example's forward and backward pass.

    With adapters, linear maps count twice instead of three times, because their kernels have no
    gradient; attention and the adapters' matmuls count three times. This assumes that the input of
    every map has a gradient. Maps before the first adapter have none: with the default targets
    these are the modulation and the first maps, 0.1 % of the total.

    Args:
      config: sizes of the transformer.
      target, contexts: number of target tokens, and of tokens of all contexts.
      text: number of text tokens.
      lora: adapters that are trained instead of the transformer, if their rank is not 0.
      frozen: whether the transformer is not trained, but gradients flow to its input.
    """
    lengths = _lengths(target, contexts, text)
    linear = _linear_flops(config, lengths)
    attention = _attention_flops(config, lengths["joint"])
    if frozen:
        return 2.0 * linear + 3.0 * attention
    if lora is None or not lora.rank:
        return 3.0 * (linear + attention)
    return 2.0 * linear + 3.0 * (attention + _adapter_flops(config, lora, lengths))


def _lengths(target: Count, contexts: Count, text: Count) -> dict[str, Count]:
    """Number of inputs of a `LinearMap` per example, by its ``tokens``."""
    image = target + contexts
    return {"target": target, "image": image, "text": text, "joint": image + text, "example": 1}


# Factors are floats because int32 would overflow.


def _linear_flops(config: FluxConfig, lengths: dict[str, Count]) -> Count:
    return sum(
        2.0 * m.layers * m.in_features * m.out_features * lengths[m.tokens]
        for m in linear_maps(config).values()
    )


def _attention_flops(config: FluxConfig, length: Count) -> Count:
    return 4.0 * config.hidden_size * (config.depth + config.depth_single) * length * length


def _adapter_flops(config: FluxConfig, lora: LoraConfig, lengths: dict[str, Count]) -> Count:
    """FLOPs of the forward pass: from a map's input to the rank, then to its output."""
    return sum(
        2.0 * m.layers * lora.rank * (m.in_features + m.out_features) * lengths[m.tokens]
        for path, m in linear_maps(config).items()
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in lora.targets)
    )


def traced_flops(function: Callable, *arguments: Any) -> float:
    """FLOPs of the matmuls and convolutions of a function, two per multiply-add; runs nothing.

    Loops count as often as they run; of branches, all count.

    Args:
      function: what to count.
      arguments: its arguments, arrays or shapes.
    """
    # Fused kernels hide their matmuls, and CPUs run some convolutions in fewer operations, so trace
    # for no platform in particular.
    anything = AbstractDevice("any", 1, "any")
    sizes = jax.sharding.get_abstract_mesh().axis_sizes or (1,) * len(MESH_AXES)
    with use_abstract_mesh(AbstractMesh(sizes, MESH_AXES, abstract_device=anything)):
        # A new function: JAX caches traces by function and types, and not by mesh.
        return _flops_of(jax.make_jaxpr(lambda *args: function(*args))(*arguments).jaxpr)


def _flops_of(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        params, name = equation.params, equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            kernel, (out,) = equation.invars[1].aval.shape, equation.outvars
            if name == "dot_general":
                (_, contracted), _ = params["dimension_numbers"]
                terms = math.prod(kernel[axis] for axis in contracted)
            else:
                terms = math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(out.aval.shape) * terms
        inner = sum(map(_flops_of, jaxprs_in_params(params)))
        total += inner * (params["length"] if name == "scan" else 1)
    return total
