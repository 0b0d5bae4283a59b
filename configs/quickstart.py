"""Trains a small editing model from scratch on two CPU cores in 20 minutes.

`launch/quickstart.sh` runs every stage, in this order:

    python -m kontext_jax.data.build --source=world --output=runs/quickstart/world
    python -m kontext_jax.train --config=configs/quickstart.py:autoencoder \\
        --workdir=runs/quickstart/autoencoder
    python -m kontext_jax.train --config=configs/quickstart.py:flow --workdir=runs/quickstart/flow
    python -m kontext_jax.data.build --source=world --seed=1 --num_train=3072 \\
        --output=runs/quickstart/prompts
    python -m kontext_jax.encode --config=configs/quickstart.py:ladd
    python -m kontext_jax.train --config=configs/quickstart.py:ladd --workdir=runs/quickstart/ladd
    python -m kontext_jax.evaluate --config=configs/eval_quickstart.py --workdir=runs/quickstart

The data are procedural 32 x 32 scenes with exact ground truth (`kontext_jax.toy_data.world`).
`autoencoder` compresses the images, `flow` trains a flow-matching transformer on the latents, and
`ladd` distils it: `encode` samples the teacher for new prompts, and a student learns from these
samples to need four, two or one steps. README.md has the measured success rates and times.
"""

import dataclasses

from kontext_jax.config import Config, SheetConfig, ValidationConfig, pick
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

DATA = "runs/quickstart/world"
AUTOENCODER = "runs/quickstart/autoencoder"
FLOW = "runs/quickstart/flow"
PROMPTS = "runs/quickstart/prompts"
BANK = "runs/quickstart/bank"


def data(batch_size: int) -> DataConfig:
    return DataConfig(
        path=DATA,
        batch_size=batch_size,
        caption_dropout=0.1,
        geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
        packing=PackingConfig(image_tokens=64, text_tokens=72, max_examples=4),
        text=TextConfig(max_tokens=64),
    )


def autoencoder() -> Config:
    return Config(
        objective=AutoencoderObjectiveConfig.tiny(
            autoencoder=AutoencoderConfig.tiny(), kl_weight=1e-4, start=200
        ),
        data=data(batch_size=4),
        optim=OptimConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50, ema_decay=0.99),
        checkpoint=CheckpointConfig(every=1200, keep=1),
        sheets=SheetConfig(every=600),
        num_steps=1200,
        log_every=50,
    )


def flow() -> Config:
    return Config(
        objective=FlowMatchingConfig(
            transformer=FluxConfig.tiny(),
            text_encoder=T5Config.tiny_bytes(),
            pooled="mean",
            train_text_encoder=True,
            init_from=FlowInit(autoencoder=AUTOENCODER),
            time=TimeConfig(mean=0.5),
        ),
        data=data(batch_size=16),
        optim=OptimConfig(
            optimizer="muon",
            learning_rate=4e-3,
            schedule="cosine",
            warmup_steps=100,
            b2=0.99,
            ema_decay=0.995,
        ),
        checkpoint=CheckpointConfig(every=800, keep=1),
        sheets=SheetConfig(every=800, sampler=SamplerConfig(num_steps=12, cfg_scale=2.0)),
        validation=ValidationConfig(
            every=400, num_pictures=48, sampler=SamplerConfig(num_steps=12, cfg_scale=2.0)
        ),
        num_steps=1600,
        log_every=50,
    )


def ladd() -> Config:
    return Config(
        objective=LaddConfig(
            transformer=FluxConfig.tiny(),
            text_encoder=T5Config.tiny_bytes(),
            pooled="mean",
            init_from=NetworksInit(transformer=FLOW, text_encoder=FLOW, autoencoder=AUTOENCODER),
            student_times=StudentTimes(warmup_steps=50),
            # At equal noise, small images keep less signal than large ones: renoise less.
            renoise=TimeConfig(mean=-1.0, std=1.0, shift="none"),
            # The discriminator has to stay ahead: a student that moves first learns noise.
            student_every=3,
            heads=HeadsConfig(width=64, dtype="float32"),
            heads_optim=OptimConfig(learning_rate=1e-3, b1=0.0, warmup_steps=0, weight_decay=0.0),
        ),
        data=dataclasses.replace(
            data(batch_size=16),
            path=PROMPTS,
            caption_dropout=0.0,
            latents=LatentsConfig(path=BANK, samples=1.0, num_steps=12, cfg_scale=2.0),
        ),
        optim=OptimConfig(
            learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=150,
            b1=0.0,
            b2=0.99,
            weight_decay=0.0,
            ema_decay=0.98,
        ),
        checkpoint=CheckpointConfig(every=600, keep=1),
        sheets=SheetConfig(every=600, sampler=SamplerConfig(num_steps=2, method="consistency")),
        num_steps=600,
        log_every=50,
    )


VARIANTS = {"autoencoder": autoencoder, "flow": flow, "ladd": ladd}


def get_config(variant: str = "flow") -> Config:
    return pick(VARIANTS, variant)
