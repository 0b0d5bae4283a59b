"""FLUX.1's transformer outside this package: names, and the settings that files carry."""

from typing import Any

from kontext_jax.models.flux import FluxConfig
from kontext_jax.weights.table import Row, linear

DIFFUSERS_CLASS = "FluxTransformer2DModel"
PREFIXES = ("model.diffusion_model.",)


def rows(config: FluxConfig) -> list[Row]:
    """One row a parameter. BFL's names, then diffusers'."""
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
        # BFL: shift, scale. diffusers: scale, shift.
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
    """The config that diffusers' ``config.json`` tells of.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting that FLUX.1 does not have.
    """
    channels = values["in_channels"]
    if values.get("patch_size", 1) != 1 or values.get("out_channels") not in (None, channels):
        raise ValueError(
            f"it has patch_size {values.get('patch_size')} and out_channels "
            f"{values.get('out_channels')} for in_channels {channels}; FLUX.1 and Kontext have "
            "patch_size 1 and as many channels out as in (Fill, Canny and Depth do not)."
        )
    return FluxConfig(
        in_channels=channels,
        hidden_size=values["num_attention_heads"] * values["attention_head_dim"],
        num_heads=values["num_attention_heads"],
        depth=values["num_layers"],
        depth_single=values["num_single_layers"],
        vec_in_dim=values["pooled_projection_dim"],
        context_in_dim=values["joint_attention_dim"],
        # FLUX.1 [dev] and [schnell] were published before diffusers wrote this one down.
        axes_dim=tuple(values.get("axes_dims_rope", FluxConfig.axes_dim)),
        guidance_embed=values["guidance_embeds"],
    )


def to_json(config: FluxConfig) -> dict[str, Any]:
    """diffusers' ``config.json``.

    Raises:
      ValueError: diffusers has no such setting.
    """
    if config.mlp_ratio != 4.0 or config.theta != 10000.0:
        raise ValueError(
            f"diffusers' transformer has mlp_ratio 4 and theta 10000, not {config.mlp_ratio} and "
            f"{config.theta}."
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
    """The config of a BFL file, which carries none; FLUX's own axes_dim and theta.

    Raises:
      KeyError: a tensor is missing.
      ValueError: its heads are not FLUX's.
    """
    size, channels = shapes["img_in.weight"]
    head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    standard = FluxConfig()
    if head_dim != standard.head_dim:
        raise ValueError(
            f"its heads have {head_dim} channels and not {standard.head_dim}, and nothing in it "
            "says how they are shared by the position axes (axes_dim); use a diffusers folder."
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


def known_as(name: str) -> str | None:
    """The name that the table has for a file's tensor; None for one that is not read."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def is_bfl(names: set[str]) -> bool:
    """Whether these are the names of a BFL file of this network."""
    return "double_blocks.0.img_attn.qkv.weight" in names
