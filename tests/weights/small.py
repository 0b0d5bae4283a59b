"""Tiny networks of all kinds, and their tensors in PyTorch's layouts."""

import json

import numpy as np
from safetensors.numpy import save_file

from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.clip import ClipConfig
from kontext_jax.models.dino import DinoConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.weights.networks import ALL_NETWORKS
from kontext_jax.weights.reading import ArrayReader, Reader

CONFIGS = {
    "transformer": FluxConfig.tiny(
        in_channels=8, hidden_size=16, num_heads=2, depth=2, depth_single=3, vec_in_dim=8,
        context_in_dim=8, axes_dim=(2, 2, 4), guidance_embed=True, remat="none",
    ),
    "autoencoder": AutoencoderConfig(
        channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4, num_groups=4,
        remat="none",
    ),
    "text_encoder": T5Config.tiny_bytes(
        vocab_size=16, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4
    ),
    "clip": ClipConfig.tiny(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
        max_positions=6, eos_id=23,
    ),
    "dino": DinoConfig.tiny(hidden_size=16, num_heads=2, num_layers=3, taps=(0, 1, 2)),
}  # fmt: skip


def reader_of(module) -> ArrayReader:
    """Returns a reader of a network in memory."""
    return ArrayReader(
        next(n for n in ALL_NETWORKS.values() if isinstance(module, n.model)), module
    )


def tensors_of(module, layout: str) -> dict[str, np.ndarray]:
    """Returns a network's tensors in a layout, by name."""
    reader = reader_of(module)
    return {
        piece.name: piece.to_tensor(reader.read(key))
        for key, pieces in reader.network.table(module.config, layout).pieces.items()
        for piece in pieces
    }


def save_folder(folder, module, tensors: dict[str, np.ndarray] | None = None):
    """Writes a network's folder in diffusers' layout, with the given tensors or its own."""
    network = reader_of(module).network
    values = network.format.to_json(module.config)
    (folder / "config.json").write_text(json.dumps(values))
    tensors = tensors_of(module, "diffusers") if tensors is None else tensors
    save_file(tensors, folder / f"{network.stem}.safetensors")
    return folder


def assert_same(actual: Reader, expected: Reader) -> None:
    """Asserts that two readers agree in every bit and dtype."""
    assert actual.network is expected.network and actual.dtypes == expected.dtypes
    for key in expected.network.layer_keys(expected.config):
        ours, theirs = actual.read(key), expected.read(key)
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes(), key
