"""Trains a latent autoencoder of FLUX.1's kind at 256 x 256 pixels, from scratch.

    python -m kontext_jax.data.build --source=folder --input=FOLDER --output=data/images_256
    python -m kontext_jax.compile --config=configs/autoencoder.py --topology=v5p:4x4x4
    python -m kontext_jax.train --config=configs/autoencoder.py --workdir=runs/autoencoder \\
        --distributed

16 channels at an eighth of the resolution, 83.8 M parameters. The losses are those of latent
diffusion (arXiv 2112.10752): errors, LPIPS on VGG16, a weak prior, and a patch discriminator from
step 50,000 on. The weights of VGG16 are in `models/vgg16-397923af.pth`, from torchvision; LPIPS's
heads come from `pip install --no-deps lpips==0.1.4`. Images have four tokens of text, because the
data have prompts, which are not used. The recipe has not been run at this size.

`v5p_128` is sized for 64 chips (v5p:4x4x4), `h100_8` for eight GPUs, `cpu` for a laptop, with
EfficientNet-Lite0 in place of LPIPS, whose weights have to be downloaded. `f16_64` halves the
resolution once more and has 64 channels, for the same number of values per image.

To train only the decoder of existing latents, for example of FLUX.1's:

    --config.objective.init_from.autoencoder=models/FLUX.1-dev
    --config.optim.frozen="('encoder/*',)"
"""

import dataclasses

from kontext_jax.config import Config, SheetConfig, pick
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.patch_discriminator import PatchConfig
from kontext_jax.models.perceptual import PerceptualConfig
from kontext_jax.objectives.autoencoder import AdversarialConfig, AutoencoderObjectiveConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.training.checkpoint import CheckpointConfig

VGG = "models/vgg16-397923af.pth"


def autoencoder(rows: int, network: AutoencoderConfig) -> Config:
    """``rows`` rows of four images."""
    side = network.pixels_per_token
    return Config(
        objective=AutoencoderObjectiveConfig(
            autoencoder=network,
            perceptual=PerceptualConfig(weight=1.0, network="vgg", trunk=VGG, dtype="bfloat16"),
            adversarial=AdversarialConfig(
                weight=0.5,
                start=50_000,
                discriminator=PatchConfig(dtype="bfloat16"),
                optim=OptimConfig(
                    learning_rate=1e-4, b1=0.5, b2=0.9, warmup_steps=0, weight_decay=0.0
                ),
            ),
        ),
        data=DataConfig(
            path="data/images_256",
            batch_size=rows,
            geometry=GeometryConfig(sizes=((256, 256),), pixels_per_token=side),
            packing=PackingConfig(
                image_tokens=4 * (256 // side) ** 2, text_tokens=16, max_examples=4
            ),
            text=TextConfig(max_tokens=4),
        ),
        optim=OptimConfig(
            learning_rate=1e-4,
            b1=0.5,
            b2=0.9,
            warmup_steps=1000,
            weight_decay=0.0,
            ema_decay=0.9999,
        ),
        checkpoint=CheckpointConfig(every=5000, keep_every=50_000),
        sheets=SheetConfig(every=5000, num_examples=8, split="train"),
        num_steps=400_000,
        log_every=100,
        compilation_cache="runs/compiled",
    )


def v5p_128() -> Config:
    return autoencoder(rows=128, network=AutoencoderConfig.flux(dtype="bfloat16"))


def h100_8() -> Config:
    return autoencoder(rows=16, network=AutoencoderConfig.flux(dtype="bfloat16"))


def f16_64() -> Config:
    network = AutoencoderConfig.flux(
        channel_multipliers=(1, 1, 2, 4, 4), latent_channels=64, dtype="bfloat16"
    )
    return autoencoder(rows=128, network=network)


def cpu() -> Config:
    network = AutoencoderConfig.flux(channels=32, num_groups=8, num_res_blocks=1)
    config = autoencoder(rows=1, network=network)
    config.objective.perceptual = PerceptualConfig(weight=1.0, input_size=128)
    config.objective.adversarial = dataclasses.replace(
        config.objective.adversarial,
        start=1000,
        discriminator=PatchConfig(channels=32, num_groups=8, num_layers=2),
    )
    config.num_steps = 10_000
    return config


VARIANTS = {"v5p_128": v5p_128, "h100_8": h100_8, "f16_64": f16_64, "cpu": cpu}


def get_config(variant: str = "v5p_128") -> Config:
    return pick(VARIANTS, variant)
