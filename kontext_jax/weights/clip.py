"""CLIP's text encoder in transformers' files: tensor names and ``config.json``."""

from typing import Any

from kontext_jax.models.clip import ClipConfig
from kontext_jax.weights.table import Row, linear, norm

TRANSFORMERS_CLASS = "CLIPTextModel"
MODEL_TYPES = ("clip_text_model", "clip")

LEGACY_EOS_ID = 2
"""eos_token_id of old configs, whatever the tokenizer's: stands for the largest id, as in
transformers."""


def rows(config: ClipConfig) -> list[Row]:
    """Returns the name table, which has one layout."""
    layer = "text_model.encoder.layers.{i}"
    table = [
        Row("token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
        Row("position_embedding", "text_model.embeddings.position_embedding.weight"),
        *norm("blocks/norm1", f"{layer}.layer_norm1"),
        *norm("blocks/norm2", f"{layer}.layer_norm2"),
        *norm("final_norm", "text_model.final_layer_norm"),
    ]
    for name, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out_proj",) * 2):
        table += linear(f"blocks/attention/{name}", f"{layer}.self_attn.{theirs}")
    for name in ("fc1", "fc2"):
        table += linear(f"blocks/mlp/{name}", f"{layer}.mlp.{name}")
    return table


def from_json(values: dict[str, Any]) -> ClipConfig:
    """Returns the config that transformers' ``config.json`` of a text model or full CLIP describes.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting differs from OpenAI's CLIP.
    """
    values = values.get("text_config") or values
    act, epsilon = values.get("hidden_act", "quick_gelu"), values.get("layer_norm_eps", 1e-5)
    if act != "quick_gelu" or epsilon != 1e-5:
        raise ValueError(
            f"it has hidden_act {act} and layer_norm_eps {epsilon}; FLUX's text encoder, OpenAI's "
            "CLIP, has quick_gelu and 1e-5."
        )
    eos_id = values.get("eos_token_id", LEGACY_EOS_ID)
    vocab_size = values.get("vocab_size", 49408)
    return ClipConfig(
        vocab_size=vocab_size,
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        max_positions=values.get("max_position_embeddings", 77),
        eos_id=vocab_size - 1 if eos_id == LEGACY_EOS_ID else eos_id,
    )


def to_json(config: ClipConfig) -> dict[str, Any]:
    """Returns the values of transformers' ``config.json``."""
    return {
        "architectures": [TRANSFORMERS_CLASS],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config.hidden_size,
        "bos_token_id": config.eos_id - 1,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.eos_id,
    }


def canonical_name(name: str) -> str | None:
    """Returns the table's name for a stored tensor, or None to skip the tensor.

    transformers 5 drops the prefix ``text_model.``. A full CLIP also has an image encoder, and old
    files have ``position_ids``.
    """
    if name.startswith(("vision_model.", "visual_projection.", "text_projection.", "logit_scale")):
        return None
    if name.endswith("position_ids"):
        return None
    return "text_model." + name.removeprefix("text_model.")
