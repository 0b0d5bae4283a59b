"""T5 v1.1's encoder in transformers' files: tensor names and ``config.json``."""

from typing import Any

from kontext_jax.models.t5 import T5Config
from kontext_jax.weights.table import Row, kernel

TRANSFORMERS_CLASS = "T5EncoderModel"
MODEL_TYPES = ("t5",)


def rows(config: T5Config) -> list[Row]:
    """Returns the name table, which has one layout."""
    block = "encoder.block.{i}.layer"
    table = [
        Row("shared/embedding", "shared.weight"),
        Row(
            "relative_attention_bias",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        Row("blocks/attention_norm/scale", f"{block}.0.layer_norm.weight"),
        Row("blocks/mlp_norm/scale", f"{block}.1.layer_norm.weight"),
        Row("final_layer_norm/scale", "encoder.final_layer_norm.weight"),
    ]
    for name in ("q", "k", "v", "o"):
        table += kernel(f"blocks/attention/{name}", f"{block}.0.SelfAttention.{name}")
    for name in ("wi_0", "wi_1", "wo"):
        table += kernel(f"blocks/mlp/{name}", f"{block}.1.DenseReluDense.{name}")
    return table


def from_json(values: dict[str, Any]) -> T5Config:
    """Returns the config that transformers' ``config.json`` describes.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting differs from T5 v1.1.
    """
    mlp = values.get("feed_forward_proj", "relu")
    epsilon = values.get("layer_norm_epsilon", 1e-6)
    if mlp != "gated-gelu" or epsilon != 1e-6:
        raise ValueError(
            f"it has feed_forward_proj {mlp} and layer_norm_epsilon {epsilon}; FLUX's text "
            "encoder, T5 v1.1, has gated-gelu and 1e-6."
        )
    return T5Config(
        relative_attention_max_distance=values.get("relative_attention_max_distance", 128),
        **{
            name: values[name]
            for name in (
                "vocab_size",
                "d_model",
                "d_kv",
                "d_ff",
                "num_layers",
                "num_heads",
                "relative_attention_num_buckets",
            )
        },
    )


def to_json(config: T5Config) -> dict[str, Any]:
    """Returns the values of transformers' ``config.json``."""
    return {
        "architectures": [TRANSFORMERS_CLASS],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }


def canonical_name(name: str) -> str | None:
    """Returns the table's name for a stored tensor, or None to skip the tensor.

    A full T5 also has a decoder, and some files store the embedding twice.
    """
    if name.startswith(("decoder.", "lm_head.")) or name == "encoder.embed_tokens.weight":
        return None
    return name
