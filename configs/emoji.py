"""Trains on real images: edits between artists' icons, mixed sizes, and zero, one or two contexts.

    mkdir icons && (cd icons && npm pack @iconify-json/{noto,noto-v1,twemoji,fluent-emoji-flat})
    python -m kontext_jax.data.build --source=emoji --input=icons --output=data/emoji \\
        --sizes=32,40,48 --num_train=20000
    python -m kontext_jax.train --config=configs/emoji.py:autoencoder \\
        --workdir=runs/emoji/autoencoder
    python -m kontext_jax.train --config=configs/emoji.py:flow --workdir=runs/emoji/flow
    python -m kontext_jax.data.build --source=emoji --input=icons --output=data/emoji_prompts \\
        --sizes=32,40,48 --seed=1 --num_train=1536
    python -m kontext_jax.encode --config=configs/emoji.py:ladd
    python -m kontext_jax.train --config=configs/emoji.py:ladd --workdir=runs/emoji/ladd
    python -m kontext_jax.evaluate --config=configs/eval_emoji.py --workdir=runs/emoji

The autoencoder's perceptual distance needs EfficientNet-Lite0: `pip install -e '.[emoji,eval]'`.

`autoencoder` and `flow` are sized for two CPU cores and take about 20 minutes together;
`--config.num_steps=2200` resumes `flow` for as long again. `ladd` distils the result.
`autoencoder_gpu`, `flow_gpu` and `ladd_gpu` are wider, deeper variants at 64 to 96 pixels, sized
for one GPU: build their data with `--sizes=64,80,96 --num_train=200000`, and the prompts with
`--num_train=20000`.
"""

import dataclasses

from kontext_jax.config import Config, SheetConfig, pick
from kontext_jax.data.latents import LatentsConfig
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.flow import TimeConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.student import StudentTimes
from kontext_jax.objectives.transformer import NetworksInit
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.training.checkpoint import CheckpointConfig

SMALL = (32, 40, 48)
LARGE = (64, 80, 96)
CFG_SCALE = 1.5


def data(sides: tuple[int, ...], image_tokens: int, batch_size: int) -> DataConfig:
    return DataConfig(
        path="data/emoji",
        batch_size=batch_size,
        caption_dropout=0.1,
        geometry=GeometryConfig(sizes=tuple((side, side) for side in sides), pixels_per_token=8),
        packing=PackingConfig(
            image_tokens=image_tokens, text_tokens=image_tokens * 11 // 16, max_examples=16
        ),
        text=TextConfig(max_tokens=96),
    )


def autoencoder() -> Config:
    return Config(
        objective=AutoencoderObjectiveConfig.tiny(
            autoencoder=AutoencoderConfig.tiny(), kl_weight=1e-4, start=200
        ),
        data=data(SMALL, image_tokens=256, batch_size=3),
        optim=OptimConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50, ema_decay=0.99),
        checkpoint=CheckpointConfig(every=500, keep=1),
        sheets=SheetConfig(every=600),
        num_steps=600,
        log_every=20,
    )


def flow() -> Config:
    return Config(
        objective=FlowMatchingConfig(
            transformer=FluxConfig.tiny(),
            text_encoder=T5Config.tiny_bytes(),
            pooled="mean",
            train_text_encoder=True,
            init_from=FlowInit(autoencoder="runs/emoji/autoencoder"),
            time=TimeConfig(mean=0.5),
        ),
        data=data(SMALL, image_tokens=256, batch_size=6),
        optim=OptimConfig(
            optimizer="muon",
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=100,
            b2=0.99,
            ema_decay=0.998,
        ),
        checkpoint=CheckpointConfig(every=150, keep=1),
        sheets=SheetConfig(
            every=450, num_examples=24, sampler=SamplerConfig(num_steps=20, cfg_scale=CFG_SCALE)
        ),
        num_steps=900,
        log_every=25,
    )


def ladd() -> Config:
    teacher = flow()
    return Config(
        objective=LaddConfig(
            transformer=teacher.objective.transformer,
            text_encoder=teacher.objective.text_encoder,
            pooled=teacher.objective.pooled,
            init_from=NetworksInit(
                transformer="runs/emoji/flow",
                text_encoder="runs/emoji/flow",
                autoencoder="runs/emoji/autoencoder",
            ),
            student_times=StudentTimes(warmup_steps=20),
            renoise=TimeConfig(mean=-1.0, std=1.0, shift="none"),
            student_every=3,
            heads=HeadsConfig(width=64, dtype="float32"),
            heads_optim=OptimConfig(learning_rate=1e-3, b1=0.0, warmup_steps=0, weight_decay=0.0),
        ),
        data=dataclasses.replace(
            teacher.data,
            path="data/emoji_prompts",
            caption_dropout=0.0,
            latents=LatentsConfig(
                path="runs/emoji/bank", samples=1.0, num_steps=20, cfg_scale=CFG_SCALE
            ),
        ),
        optim=OptimConfig(
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=50,
            b1=0.0,
            b2=0.99,
            weight_decay=0.0,
            ema_decay=0.98,
        ),
        checkpoint=CheckpointConfig(every=300, keep=1),
        sheets=SheetConfig(
            every=600,
            num_examples=24,
            sampler=SamplerConfig(num_steps=2, method="consistency"),
        ),
        num_steps=600,
        log_every=25,
    )


def autoencoder_gpu() -> Config:
    config = autoencoder()
    config.objective.autoencoder = AutoencoderConfig.tiny(
        channels=64, num_res_blocks=2, latent_channels=8, num_groups=32, dtype="bfloat16"
    )
    config.data = data(LARGE, image_tokens=768, batch_size=16)
    config.optim = OptimConfig(
        learning_rate=3e-4, schedule="cosine", warmup_steps=500, ema_decay=0.999
    )
    config.num_steps = 20_000
    return config


def flow_gpu() -> Config:
    config = flow()
    config.objective.transformer = FluxConfig.tiny(
        in_channels=32,
        hidden_size=512,
        num_heads=8,
        axes_dim=(16, 24, 24),
        depth=6,
        depth_single=12,
        vec_in_dim=256,
        context_in_dim=256,
        dtype="bfloat16",
        remat="full",
    )
    config.objective.text_encoder = T5Config.tiny_bytes(
        d_model=256, d_kv=64, d_ff=512, num_layers=4, dtype="bfloat16"
    )
    config.data = data(LARGE, image_tokens=768, batch_size=64)
    config.optim = OptimConfig(
        learning_rate=5e-4, schedule="cosine", warmup_steps=1000, b2=0.99, ema_decay=0.9995
    )
    config.sheets.every = 5000
    config.checkpoint.every = 2500
    config.num_steps = 100_000
    return config


def ladd_gpu() -> Config:
    config, teacher = ladd(), flow_gpu()
    config.objective.transformer = teacher.objective.transformer
    config.objective.text_encoder = teacher.objective.text_encoder
    config.objective.heads = HeadsConfig(width=128)
    config.objective.heads_optim.learning_rate = 2e-4
    config.objective.student_times = StudentTimes()
    config.data = dataclasses.replace(
        config.data, packing=teacher.data.packing, geometry=teacher.data.geometry, batch_size=64
    )
    config.data.latents.num_steps = 50
    config.optim = OptimConfig(
        learning_rate=5e-5, warmup_steps=200, b1=0.0, b2=0.99, weight_decay=0.0, ema_decay=0.999
    )
    config.checkpoint.every = config.sheets.every = 2000
    config.num_steps = 20_000
    return config


VARIANTS = {
    "autoencoder": autoencoder,
    "flow": flow,
    "ladd": ladd,
    "autoencoder_gpu": autoencoder_gpu,
    "flow_gpu": flow_gpu,
    "ladd_gpu": ladd_gpu,
}


def get_config(variant: str = "flow") -> Config:
    return pick(VARIANTS, variant)
