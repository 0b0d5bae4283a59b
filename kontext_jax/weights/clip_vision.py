"""A whole CLIP outside this package, and its vectors of pictures and texts.

What is read is a folder of transformers' layout, such as openai/clip-vit-base-patch32: config.json,
safetensors, and the tokenizer's files. A folder with a pickle in place of safetensors is brought to
this layout by transformers' ``CLIPModel.from_pretrained(...).save_pretrained(...)``.
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
"""transformers', which its files leave out: ViT-B/32's."""


def rows(config: ClipPairConfig) -> list[Row]:
    """One row a parameter; there is one layout."""
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
    """The config that transformers' ``config.json`` tells of.

    Raises:
      ValueError: this is not OpenAI's CLIP.
    """
    # Old files say the same twice, and what the second one says holds.
    text, vision = (
        defaults | (values.get(f"{name}_config") or {}) | (values.get(f"{name}_config_dict") or {})
        for name, defaults in (("text", TEXT_DEFAULTS), ("vision", VISION_DEFAULTS))
    )
    wanted = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3}
    wrong = [name for name, value in wanted.items() if vision.get(name, value) != value]
    if wrong:
        found = ", ".join(f"{name} = {vision[name]}" for name in wrong)
        raise ValueError(f"the image encoder of OpenAI's CLIP has no {found}.")
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


def known_as(name: str) -> str | None:
    """The name that the table has for a file's tensor; None for one that is not read.

    The scale of the logits serves training alone; old files hold the numbers of the positions.
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
    """A whole CLIP on a mesh, and its tokenizer."""

    network: ClipPair
    tokenizer: Tokenizer

    def image(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], mesh: Mesh, batch_size: int = 64
    ) -> Float32[np.ndarray, "N D"]:
        """The projected vector of each image, not normalised; see `features.pooled_features`.

        Raises:
          ValueError: there are no images.
        """
        return pooled_features(self.network.vision, images, mesh, batch_size)

    def text(
        self, prompts: Sequence[str], mesh: Mesh, batch_size: int = 64
    ) -> Float32[np.ndarray, "N D"]:
        """The projected vector of each prompt, not normalised; products of matrices are exact.

        Args:
          prompts: longer ones are truncated to CLIP's 77 tokens, both ends included.
          mesh: over which batches are split.
          batch_size: prompts computed at once; more, if the mesh has more parts.

        Raises:
          ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("There are no prompts to compute vectors of.")
        ids = [self.tokenizer.clip(prompt) for prompt in prompts]
        shapes, sizes = [x.shape for x in ids], {ids[0].shape: min(batch_size, len(ids))}
        found = over_batches(lambda _, batch: _read(self.network, batch), ids, shapes, sizes, mesh)
        return np.stack(found)


@jax.jit
def _read(network: ClipPair, ids: Int[Array, "B Q"]) -> Float32[Array, "B D"]:
    with jax.default_matmul_precision("highest"):
        return network.read(ids).astype(jnp.float32)


def load_clip(folder: Path | str, mesh: Mesh, dtype: str = "float32", crop: bool = True) -> Clip:
    """A whole CLIP from a folder; see the module's docstring.

    Args:
      folder: a local one; nothing is fetched.
      mesh: where it goes.
      dtype: compute dtype; parameters are float32.
      crop: see `ClipVisionConfig`.

    Raises:
      FileNotFoundError: the folder, its config, its weights or its tokenizer are missing.
      WeightsError: it holds another network, or weights or a tokenizer that do not fit its config;
        all tensors that are missing, not wanted or of another shape are named.
    """
    folder = Path(folder)
    values, where = read_config(folder), folder / "config.json"
    if values.get("model_type") != MODEL_TYPE:
        raise WeightsError(f"{where} describes {values.get('model_type')} and no whole CLIP.")
    try:
        config = from_json(values)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{where} cannot be used: {error}") from error
    reader = TensorReader(TensorFiles(folder), NETWORK, config, "diffusers")
    config = ClipPairConfig(
        text=dataclasses.replace(config.text, dtype=dtype),
        vision=dataclasses.replace(config.vision, dtype=dtype, crop=crop),
    )
    length, end = config.text.max_positions, config.text.eos_id
    tokenizer = Tokenizer(TextConfig(clip_tokenizer=str(folder), clip_max_tokens=length))
    if end not in tokenizer.clip(""):
        raise WeightsError(f"The tokenizer in {folder} is another's: it writes no end, {end}.")
    return Clip(loading.load(reader, config, mesh), tokenizer)
