"""FLUX.1's transformer in PyTorch's files: tensor names and settings."""

from typing import Any

from kontext_jax.models.flux import FluxConfig
from kontext_jax.weights.table import Row, linear

DIFFUSERS_CLASS = "FluxTransformer2DModel"
PREFIXES = ("model.diffusion_model.",)


def rows(config: FluxConfig) -> list[Row]:
    """Returns the name table, in BFL's and diffusers' layouts."""
    table = [
        *linear("img_in", "img_in", "x_embedder"),
        *linear("txt_in", "txt_in", "context_embedder"),
        *_embedder("time_in", "timestep_embedder"),
        *_embedder("vector_in", "text_embedder"),
    ]
    if config.guidance_embed:
        table += _embedder("guidance_in", "guidance_embedder")

    for ours, ff, added in (("img", "ff", ""), ("txt", "ff_context", "added_")):
        double = "transformer_blocks.{i}"
        attn = f"{double}.attn"
        qkv = (
            ("to_q", "to_k", "to_v")
            if ours == "img"
            else ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        out = "to_out.0" if ours == "img" else "to_add_out"
        modulation = "norm1" if ours == "img" else "norm1_context"
        block, theirs = f"double_blocks/{ours}", "double_blocks.{i}." + ours
        table += [
            *linear(f"{block}_mod/lin", f"{theirs}_mod.lin", f"{double}.{modulation}.linear"),
            *linear(
                f"{block}_attn/qkv", f"{theirs}_attn.qkv", tuple(f"{attn}.{part}" for part in qkv)
            ),
            *_qk_norm(f"{block}_attn/norm", f"{theirs}_attn.norm", f"{attn}.norm_{added}"),
            *linear(f"{block}_attn/proj", f"{theirs}_attn.proj", f"{attn}.{out}"),
            *linear(f"{block}_mlp/in_layer", f"{theirs}_mlp.0", f"{double}.{ff}.net.0.proj"),
            *linear(f"{block}_mlp/out_layer", f"{theirs}_mlp.2", f"{double}.{ff}.net.2"),
        ]

    size, single = config.hidden_size, "single_transformer_blocks.{i}"
    block, theirs = "single_blocks", "single_blocks.{i}"
    joint = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    table += [
        *linear(f"{block}/modulation/lin", f"{theirs}.modulation.lin", f"{single}.norm.linear"),
        *linear(
            f"{block}/linear1",
            f"{theirs}.linear1",
            tuple(f"{single}.{part}" for part in joint),
            sizes=(size, size, size, config.mlp_dim),
        ),
        *_qk_norm(f"{block}/norm", f"{theirs}.norm", f"{single}.attn.norm_"),
        *linear(f"{block}/linear2", f"{theirs}.linear2", f"{single}.proj_out"),
        *linear("final_layer/linear", "final_layer.linear", "proj_out"),
        # BFL stores (shift, scale), diffusers (scale, shift).
        *linear(
            "final_layer/adaLN_modulation",
            "final_layer.adaLN_modulation.1",
            "norm_out.linear",
            swapped=True,
        ),
    ]
    return table


def _embedder(ours: str, diffusers: str) -> list[Row]:
    theirs = f"time_text_embed.{diffusers}"
    return [
        *linear(f"{ours}/in_layer", f"{ours}.in_layer", f"{theirs}.linear_1"),
        *linear(f"{ours}/out_layer", f"{ours}.out_layer", f"{theirs}.linear_2"),
    ]


def _qk_norm(ours: str, bfl: str, diffusers: str) -> list[Row]:
    return [
        Row(f"{ours}/{name}_norm/scale", f"{bfl}.{name}_norm.scale", f"{diffusers}{name[0]}.weight")
        for name in ("query", "key")
    ]


def from_json(values: dict[str, Any]) -> FluxConfig:
    """Returns the config that diffusers' ``config.json`` describes.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting differs from FLUX.1's.
    """
    channels = values["in_channels"]
    if values.get("patch_size", 1) != 1 or values.get("out_channels") not in (None, channels):
        raise ValueError(
            f"it has patch_size {values.get('patch_size')} and out_channels "
            f"{values.get('out_channels')} for in_channels {channels}; FLUX.1 and Kontext have "
            "patch_size 1 and equal in and out channels (Fill, Canny and Depth do not)."
        )
    return FluxConfig(
        in_channels=channels,
        hidden_size=values["num_attention_heads"] * values["attention_head_dim"],
        num_heads=values["num_attention_heads"],
        depth=values["num_layers"],
        depth_single=values["num_single_layers"],
        vec_in_dim=values["pooled_projection_dim"],
        context_in_dim=values["joint_attention_dim"],
        # The configs of FLUX.1 [dev] and [schnell] predate this setting.
        axes_dim=tuple(values.get("axes_dims_rope", FluxConfig.axes_dim)),
        guidance_embed=values["guidance_embeds"],
    )


def to_json(config: FluxConfig) -> dict[str, Any]:
    """Returns the values of diffusers' ``config.json``.

    Raises:
      ValueError: diffusers does not support a setting.
    """
    if config.mlp_ratio != 4.0 or config.theta != 10000.0:
        raise ValueError(
            "diffusers' transformer supports only mlp_ratio 4 and theta 10000, not "
            f"{config.mlp_ratio} and {config.theta}."
        )
    return {
        "_class_name": DIFFUSERS_CLASS,
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def from_shapes(shapes: dict[str, tuple[int, ...]]) -> FluxConfig:
    """Returns the config for the tensor shapes of a BFL file, with FLUX's axes_dim and theta.

    BFL's files store no config.

    Raises:
      KeyError: a tensor is missing.
      ValueError: the head dimension is not FLUX's.
    """
    size, channels = shapes["img_in.weight"]
    head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    standard = FluxConfig()
    if head_dim != standard.head_dim:
        raise ValueError(
            f"its heads have {head_dim} channels, not {standard.head_dim}, and the file does not "
            "say how the position axes divide them (axes_dim); use a diffusers folder."
        )

    def depth(stack: str) -> int:
        layers = {int(name.split(".")[1]) for name in shapes if name.startswith(stack)}
        if not layers:
            raise KeyError(f"{stack}0")
        return 1 + max(layers)

    return FluxConfig(
        in_channels=channels,
        hidden_size=size,
        num_heads=size // head_dim,
        depth=depth("double_blocks."),
        depth_single=depth("single_blocks."),
        mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / size,
        vec_in_dim=shapes["vector_in.in_layer.weight"][1],
        context_in_dim=shapes["txt_in.weight"][1],
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


def canonical_name(name: str) -> str | None:
    """Returns the table's name for a stored tensor, or None to skip the tensor."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def is_bfl(names: set[str]) -> bool:
    """Returns whether these are the tensor names of this network's BFL file."""
    return "double_blocks.0.img_attn.qkv.weight" in names
