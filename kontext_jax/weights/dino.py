"""DINOv2 in transformers' files: tensor names and ``config.json``."""

from typing import Any

from kontext_jax.models.dino import EPSILON, PATCH, DinoConfig
from kontext_jax.weights.table import Row, linear, norm

TRANSFORMERS_CLASS = "Dinov2Model"
MODEL_TYPES = ("dinov2",)

LAYER = "encoder.layer.{i}"

RENAMED = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}
"""Parts of tensor names in memory in transformers 5, and their names in files."""


def rows(config: DinoConfig) -> list[Row]:
    """Returns the name table, which has one layout."""
    table = [
        Row("cls_token", "embeddings.cls_token"),
        Row("position_embeddings", "embeddings.position_embeddings"),
        *linear("patch_embedding", "embeddings.patch_embeddings.projection"),
        *norm("blocks/norm1", f"{LAYER}.norm1"),
        *norm("blocks/norm2", f"{LAYER}.norm2"),
        *norm("final_norm", "layernorm"),
        *linear("blocks/attention/out_proj", f"{LAYER}.attention.output.dense"),
    ]
    for name, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        table += linear(f"blocks/attention/{name}", f"{LAYER}.attention.attention.{theirs}")
    for name in ("fc1", "fc2"):
        table += linear(f"blocks/mlp/{name}", f"{LAYER}.mlp.{name}")
    for name in ("layer_scale1", "layer_scale2"):
        table.append(Row(f"blocks/{name}", f"{LAYER}.{name}.lambda1"))
    return table


def from_json(values: dict[str, Any]) -> DinoConfig:
    """Returns the config that transformers' ``config.json`` describes, with four taps.

    Each tap is after another quarter of the blocks.

    Raises:
      KeyError: a setting is missing.
      ValueError: the variant is not supported.
    """
    required = {
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": EPSILON,
        "num_channels": 3,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }
    wrong = [name for name, value in required.items() if values.get(name, value) != value]
    if wrong:
        settings = ", ".join(f"{name} = {values[name]}" for name in wrong)
        raise ValueError(f"DINOv2's ViT-S, ViT-B and ViT-L do not support {settings}.")
    num_layers = values["num_hidden_layers"]
    return DinoConfig(
        hidden_size=values["hidden_size"],
        num_layers=num_layers,
        num_heads=values["num_attention_heads"],
        mlp_ratio=values["mlp_ratio"],
        trained_size=values["image_size"],
        taps=tuple(sorted({max(num_layers * i // 4 - 1, 0) for i in range(1, 5)})),
    )


def to_json(config: DinoConfig) -> dict[str, Any]:
    """Returns the values of transformers' ``config.json``."""
    return {
        "architectures": [TRANSFORMERS_CLASS],
        "model_type": "dinov2",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "image_size": config.trained_size,
        "patch_size": PATCH,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": EPSILON,
        "layerscale_value": 1.0,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "use_mask_token": False,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def canonical_name(name: str) -> str | None:
    """Returns the table's name for a stored tensor, or None to skip the tensor.

    The mask token is for training only. Classifiers add a prefix and a layer.
    """
    name = name.removeprefix("dinov2.")
    if name == "embeddings.mask_token" or name.startswith("classifier."):
        return None
    for new, old in RENAMED.items():
        name = name.replace(new, old)
    return name
