"""FLUX.1's autoencoder in PyTorch's files: tensor names and settings."""

from typing import Any

from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.weights.table import Row, linear, norm

DIFFUSERS_CLASS = "AutoencoderKL"
PREFIXES = ("first_stage_model.", "vae.")


def rows(config: AutoencoderConfig) -> list[Row]:
    """Returns the name table; diffusers numbers the decoder's levels in reverse."""
    last = len(config.widths) - 1
    names = ("quant_conv", "post_quant_conv") if config.quant_conv else ()
    table = [row for name in names for row in linear(name, name, name)]
    for half, ours, diffusers in (
        ("encoder", "down", "down_blocks"),
        ("decoder", "up", "up_blocks"),
    ):
        table += [
            *linear(f"{half}/conv_in", f"{half}.conv_in"),
            *norm(f"{half}/norm_out", f"{half}.norm_out", f"{half}.conv_norm_out"),
            *linear(f"{half}/conv_out", f"{half}.conv_out"),
            *_resnet(f"{half}/mid/block_1", f"{half}.mid_block.resnets.0", shortcut=False),
            *_attention(f"{half}/mid/attn_1", f"{half}.mid_block.attentions.0"),
            *_resnet(f"{half}/mid/block_2", f"{half}.mid_block.resnets.1", shortcut=False),
        ]
        for level, width in enumerate(config.widths):
            up = half == "decoder"
            before = config.widths[min(level + 1, last) if up else max(level - 1, 0)]
            level_ours = f"{half}/{ours}/{level}"
            level_theirs = f"{half}.{diffusers}.{last - level if up else level}"
            for i in range(config.num_res_blocks + up):
                table += _resnet(
                    f"{level_ours}/block/{i}",
                    f"{level_theirs}.resnets.{i}",
                    shortcut=i == 0 and before != width,
                )
            if level != (0 if up else last):
                name = "upsample" if up else "downsample"
                step = f"{level_ours}/{name}/conv"
                table += linear(step, step.replace("/", "."), f"{level_theirs}.{name}rs.0.conv")
    return table


def _resnet(ours: str, diffusers: str, shortcut: bool) -> list[Row]:
    bfl = ours.replace("/", ".")
    table = []
    for i in ("1", "2"):
        table += norm(f"{ours}/norm{i}", f"{bfl}.norm{i}", f"{diffusers}.norm{i}")
        table += linear(f"{ours}/conv{i}", f"{bfl}.conv{i}", f"{diffusers}.conv{i}")
    if shortcut:
        table += linear(f"{ours}/nin_shortcut", f"{bfl}.nin_shortcut", f"{diffusers}.conv_shortcut")
    return table


def _attention(ours: str, diffusers: str) -> list[Row]:
    bfl = ours.replace("/", ".")
    table = norm(f"{ours}/norm", f"{bfl}.norm", f"{diffusers}.group_norm")
    for name, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        table += linear(f"{ours}/{name}", f"{bfl}.{name}", f"{diffusers}.{theirs}", pixelwise=True)
    return table


def from_json(values: dict[str, Any]) -> AutoencoderConfig:
    """Returns the config that diffusers' ``config.json`` describes.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting differs from FLUX.1's autoencoder.
    """
    widths = values["block_out_channels"]
    required = {
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "use_post_quant_conv": values.get("use_quant_conv", True),
        "mid_block_add_attention": True,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    # Files older than a setting do not have it; diffusers' default for both convolutions is True.
    values = {"use_quant_conv": True, "use_post_quant_conv": True} | values
    wrong = [name for name, value in required.items() if values.get(name, value) != value]
    wrong += ["block_out_channels"] * any(width % widths[0] for width in widths)
    if wrong:
        settings = ", ".join(f"{name} = {values[name]}" for name in wrong)
        raise ValueError(f"FLUX.1's autoencoder does not support {settings}.")
    return AutoencoderConfig(
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=values["layers_per_block"],
        latent_channels=values["latent_channels"],
        num_groups=values["norm_num_groups"],
        quant_conv=values["use_quant_conv"],
        scale_factor=values["scaling_factor"],
        shift_factor=values["shift_factor"] or 0.0,
    )


def to_json(config: AutoencoderConfig) -> dict[str, Any]:
    """Returns the values of diffusers' ``config.json``.

    Raises:
      ValueError: the latents are discrete, which no other library's class supports.
    """
    if config.is_discrete:
        raise ValueError(
            "Discrete latents (fsq_levels, codebook_size) have no layout of diffusers or BFL."
        )
    levels = len(config.widths)
    return {
        "_class_name": DIFFUSERS_CLASS,
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.num_groups,
        "mid_block_add_attention": True,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
    }


def from_shapes(shapes: dict[str, tuple[int, ...]]) -> AutoencoderConfig:
    """Returns the config for the tensor shapes of a BFL file, with FLUX's groups, scale and shift.

    BFL's files store no config.

    Raises:
      KeyError: a tensor is missing.
      ValueError: the widths are not multiples of the first.
    """

    def indices(prefix: str) -> list[int]:
        names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
        return sorted({int(name.split(".")[0]) for name in names})

    channels = shapes["encoder.conv_in.weight"][0]
    blocks = indices("encoder.down.0.block.")
    widths = [
        shapes[f"encoder.down.{level}.block.0.conv1.weight"][0]
        for level in indices("encoder.down.")
    ]
    if any(width % channels for width in widths):
        raise ValueError(f"the widths {widths} of its levels are not multiples of the first.")
    return AutoencoderConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=len(blocks),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        quant_conv="quant_conv.weight" in shapes,
    )


def canonical_name(name: str) -> str | None:
    """Returns the table's name for a stored tensor, or None to skip the tensor."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def is_bfl(names: set[str]) -> bool:
    """Returns whether these are the tensor names of this network's BFL file."""
    return "encoder.down.0.block.0.conv1.weight" in names
