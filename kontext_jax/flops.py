"""Model FLOPs of the transformer, the numerator of MFU (``chips.py`` has the denominator).

Counted are products of matrices, two operations a multiply-add, that the model's function needs.
The forward pass of one example of l text tokens, s target tokens and c context tokens, with
L = l + s + c, width h, MLP of m and D double and S single blocks, takes

    linear     = 2 L h (4 h + 2 m) (D + S)     both kinds of block: a token passes one stream
    attention  = 4 L^2 h (D + S)               QK^T and AV, each token with every other
    modulation = 2 h^2 (12 D + 3 S + 2)        once an example
    ends       = 2 h (in_channels (s + c) + context_in_dim l + in_channels s)
               + 2 h (256 + h [time] + 256 + h [guidance, if any] + vec_in_dim + h)

and training three times as much: each product has two gradients, which are products of its size.
(FLUX has m = 4 h: 12 h^2 weights a token and block, 6.455e9 in all.)

Not counted: what is computed again in the backward pass; padding, and attention across segments of
a packed row; the velocity of context tokens, which nothing reads; the encoders, frozen or not; the
optimizer; RoPE; everything that is no product of matrices. So MFU falls with all of these.
"""

import fnmatch
from typing import NamedTuple

from jaxtyping import Array, Float

from kontext_jax.models.flux import TIME_EMBED_DIM, FluxConfig
from kontext_jax.models.lora import LoraConfig

Count = int | float | Float[Array, "..."]
"""A number of tokens, or of each of many examples; float32 on the device, for squares overflow."""


class LinearMap(NamedTuple):
    """The same linear map in each of some layers, and which of an example's tokens go through it.

    ``tokens`` is "target", "image" (target and contexts), "text", "joint" (image and text), or
    "example": one vector for the whole example.
    """

    layers: int
    in_features: int
    out_features: int
    tokens: str


def linear_maps(config: FluxConfig) -> dict[str, LinearMap]:
    """Every linear map of the transformer by its path, as `models.lora` names it."""
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
      target, contexts: image tokens to make, and of all contexts together.
      text: text tokens.
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

    Of a frozen transformer with adapters, linear maps count twice and not three times, for their
    kernels have no gradient; attention and the adapters' own products count three times. This
    takes the input of every map to have a gradient. Those in front of the first adapter have
    none: with the default targets the modulation and the first maps, 0.1 % of all.

    Args:
      config: sizes of the transformer.
      target, contexts: image tokens to make, and of all contexts together.
      text: text tokens.
      lora: adapters that are trained in the transformer's place, if they have a rank.
      frozen: nothing of it is trained, but its input has a gradient.
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
    """How many vectors of an example go through a `LinearMap`, by its ``tokens``."""
    image = target + contexts
    return {"target": target, "image": image, "text": text, "joint": image + text, "example": 1}


# Factors are floats, for as int32 they would overflow.


def _linear_flops(config: FluxConfig, lengths: dict[str, Count]) -> Count:
    return sum(
        2.0 * m.layers * m.in_features * m.out_features * lengths[m.tokens]
        for m in linear_maps(config).values()
    )


def _attention_flops(config: FluxConfig, length: Count) -> Count:
    return 4.0 * config.hidden_size * (config.depth + config.depth_single) * length * length


def _adapter_flops(config: FluxConfig, lora: LoraConfig, lengths: dict[str, Count]) -> Count:
    """Of the forward pass: from a map's input to the rank, and on to its output."""
    return sum(
        2.0 * m.layers * lora.rank * (m.in_features + m.out_features) * lengths[m.tokens]
        for path, m in linear_maps(config).items()
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in lora.targets)
    )
