"""Small autoencoders of photographs with different latents, for `launch/rate_distortion.py`.

The latents have an eighth of the images' resolution, and

    kl_1e-4, kl_1e-2, kl_1e-1   16 continuous channels, with that weight of the prior
    fsq_6, fsq_12, fsq_24       2, 4 or 8 channels of 8 levels: so many bits a cell
    vq_10                       a codebook of 1,024 vectors of 4 channels

All have a perceptual distance and a patch discriminator. Without both:

    --config.objective.perceptual.weight=0 --config.objective.adversarial.weight=0
"""

import functools

from kontext_jax.config import Config, SheetConfig, pick
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.training.checkpoint import CheckpointConfig

DATA = "runs/rate_distortion/photographs_64"
NUM_STEPS = 1000


def _kl(weight: float):
    return {"latent_channels": 16}, weight


def _fsq(channels: int):
    return {"latent_channels": channels, "fsq_levels": (8,) * channels}, 0.0


LATENTS = {
    "kl_1e-4": _kl(1e-4),
    "kl_1e-2": _kl(1e-2),
    "kl_1e-1": _kl(1e-1),
    "fsq_6": _fsq(2),
    "fsq_12": _fsq(4),
    "fsq_24": _fsq(8),
    "vq_10": ({"latent_channels": 4, "codebook_size": 1024}, 0.0),
}
"""Latents by name: settings of the network, and the weight of the prior."""


def autoencoder(latents: str) -> Config:
    network, kl_weight = LATENTS[latents]
    return Config(
        objective=AutoencoderObjectiveConfig.tiny(
            autoencoder=AutoencoderConfig(
                channels=16,
                channel_multipliers=(1, 2, 4, 4),
                num_res_blocks=1,
                num_groups=8,
                remat="none",
                **network,
            ),
            kl_weight=kl_weight,
            start=NUM_STEPS // 4,
        ),
        data=DataConfig(
            path=DATA,
            batch_size=4,
            geometry=GeometryConfig(sizes=((64, 64),), pixels_per_token=16),
            packing=PackingConfig(image_tokens=64, text_tokens=64, max_examples=4),
            text=TextConfig(max_tokens=16),
        ),
        optim=OptimConfig(
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=50,
            b2=0.99,
            weight_decay=0.0,
            ema_decay=0.99,
        ),
        checkpoint=CheckpointConfig(every=NUM_STEPS, keep=1),
        sheets=SheetConfig(every=NUM_STEPS),
        num_steps=NUM_STEPS,
        log_every=50,
    )


VARIANTS = {name: functools.partial(autoencoder, name) for name in LATENTS}


def get_config(variant: str = "kl_1e-4") -> Config:
    return pick(VARIANTS, variant)
