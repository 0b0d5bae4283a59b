"""A full CLIP from transformers' files, and its embeddings of images and prompts.

The input is a folder in transformers' layout, such as openai/clip-vit-base-patch32: config.json,
safetensors, and the tokenizer's files. If a folder has a pickle instead of safetensors, convert it
with transformers: ``CLIPModel.from_pretrained(...).save_pretrained(...)``.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, UInt8

from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.models.clip_vision import ClipPair, ClipPairConfig, ClipVisionConfig
from kontext_jax.models.features import pooled_features
from kontext_jax.sharding import over_batches
from kontext_jax.weights import clip, loading
from kontext_jax.weights.files import TensorFiles, WeightsError
from kontext_jax.weights.networks import Network
from kontext_jax.weights.reading import TensorReader, read_config
from kontext_jax.weights.table import Row, kernel, linear, norm

TRANSFORMERS_CLASS = "CLIPModel"
MODEL_TYPE = "clip"

PROJECTION_DIM = 512
TEXT_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
"""transformers' defaults (ViT-B/32), which its files leave out."""


def rows(config: ClipPairConfig) -> list[Row]:
    """Returns the name table, which has one layout."""
    layer = "vision_model.encoder.layers.{i}"
    embeddings = "vision_model.embeddings"
    table = [
        Row("vision/class_embedding", f"{embeddings}.class_embedding"),
        Row("vision/position_embedding", f"{embeddings}.position_embedding.weight"),
        *kernel("vision/patch_embedding", f"{embeddings}.patch_embedding"),
        *norm("vision/first_norm", "vision_model.pre_layrnorm"),
        *norm("vision/blocks/norm1", f"{layer}.layer_norm1"),
        *norm("vision/blocks/norm2", f"{layer}.layer_norm2"),
        *norm("vision/final_norm", "vision_model.post_layernorm"),
        *kernel("vision/projection", "visual_projection"),
        *kernel("text_projection", "text_projection"),
    ]
    for name, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out_proj",) * 2):
        table += linear(f"vision/blocks/attention/{name}", f"{layer}.self_attn.{theirs}")
    for name in ("fc1", "fc2"):
        table += linear(f"vision/blocks/mlp/{name}", f"{layer}.mlp.{name}")
    text = clip.rows(config.text)
    return table + [dataclasses.replace(row, param=f"text/{row.param}") for row in text]


def from_json(values: dict[str, Any]) -> ClipPairConfig:
    """Returns the config that transformers' ``config.json`` describes.

    Raises:
      ValueError: a setting differs from OpenAI's CLIP.
    """
    # Old files have every setting twice; the second one takes precedence.
    text, vision = (
        defaults | (values.get(f"{name}_config") or {}) | (values.get(f"{name}_config_dict") or {})
        for name, defaults in (("text", TEXT_DEFAULTS), ("vision", VISION_DEFAULTS))
    )
    required = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3}
    wrong = [name for name, value in required.items() if vision.get(name, value) != value]
    if wrong:
        settings = ", ".join(f"{name} = {vision[name]}" for name in wrong)
        raise ValueError(f"the image encoder of OpenAI's CLIP does not support {settings}.")
    return ClipPairConfig(
        text=clip.from_json(text),
        vision=ClipVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            projection_dim=values.get("projection_dim", PROJECTION_DIM),
        ),
    )


def canonical_name(name: str) -> str | None:
    """Returns the table's name for a stored tensor, or None to skip the tensor.

    ``logit_scale`` is for training only, and old files have ``position_ids``.
    """
    return None if name == "logit_scale" or name.endswith("position_ids") else name


NETWORK = Network(
    "CLIP",
    ClipPair,
    ClipPairConfig,
    sys.modules[__name__],
    "",
    "transformers",
    TRANSFORMERS_CLASS,
    "model",
)


class Clip(NamedTuple):
    """A full CLIP on a mesh, and its tokenizer."""

    network: ClipPair
    tokenizer: Tokenizer

    def image(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], mesh: Mesh, batch_size: int = 64
    ) -> Float32[np.ndarray, "N D"]:
        """Returns the projected embedding of each image, not normalised.

        See `features.pooled_features`.

        Raises:
          ValueError: there are no images.
        """
        return pooled_features(self.network.vision, images, mesh, batch_size)

    def text(
        self, prompts: Sequence[str], mesh: Mesh, batch_size: int = 64
    ) -> Float32[np.ndarray, "N D"]:
        """Returns the projected embedding of each prompt, not normalised.

        Matrix products have the highest precision.

        Args:
          prompts: texts, truncated to CLIP's 77 tokens including start and end.
          mesh: device mesh that batches are split over.
          batch_size: prompts per batch, rounded up to a multiple of the batch shards.

        Raises:
          ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("There are no prompts to embed.")
        ids = [self.tokenizer.clip(prompt) for prompt in prompts]
        shapes, sizes = [x.shape for x in ids], {ids[0].shape: min(batch_size, len(ids))}
        return np.stack(
            over_batches(lambda _, batch: _read(self.network, batch), ids, shapes, sizes, mesh)
        )


@jax.jit
def _read(network: ClipPair, ids: Int[Array, "B Q"]) -> Float32[Array, "B D"]:
    with jax.default_matmul_precision("highest"):
        return network.encode_text(ids).astype(jnp.float32)


def load_clip(folder: Path | str, mesh: Mesh, dtype: str = "float32", crop: bool = True) -> Clip:
    """Loads a full CLIP from a local folder, see the module's docstring.

    Args:
      folder: local folder; nothing is downloaded.
      mesh: device mesh.
      dtype: compute dtype; parameters are float32.
      crop: see `ClipVisionConfig`.

    Raises:
      FileNotFoundError: the folder, its config, its weights or its tokenizer are missing.
      WeightsError: the folder holds another network, or its weights or tokenizer do not fit its
        config; the message names all tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    values, file = read_config(folder), folder / "config.json"
    if values.get("model_type") != MODEL_TYPE:
        raise WeightsError(f"{file} describes {values.get('model_type')}, not a full CLIP.")
    try:
        config = from_json(values)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{file} cannot be used: {error}") from error
    reader = TensorReader(TensorFiles(folder), NETWORK, config, "diffusers")
    config = ClipPairConfig(
        text=dataclasses.replace(config.text, dtype=dtype),
        vision=dataclasses.replace(config.vision, dtype=dtype, crop=crop),
    )
    length, end = config.text.max_positions, config.text.eos_id
    tokenizer = Tokenizer(TextConfig(clip_tokenizer=str(folder), clip_max_tokens=length))
    if end not in tokenizer.clip(""):
        raise WeightsError(
            f"The tokenizer in {folder} belongs to another network: it does not end prompts with "
            f"the end id {end}."
        )
    return Clip(loading.load(reader, config, mesh), tokenizer)
