"""Distils Kontext [dev], 11.9 B parameters, from 50 steps to 4 with LADD at 1024 x 1024 pixels.

    python -m kontext_jax.data.build --source=folder --input=FOLDER --output=data/edits
    python -m kontext_jax.encode  --config=configs/ladd_1024.py --distributed
    python -m kontext_jax.compile --config=configs/ladd_1024.py --topology=v5p:4x4x4
    python -m kontext_jax.train   --config=configs/ladd_1024.py --workdir=runs/ladd --distributed
    python -m kontext_jax.sample  --checkpoint=runs/ladd ...

Student, teacher and encoders start from `models/FLUX.1-Kontext-dev`, a local copy of the diffusers
pipeline. `encode` samples the teacher once for every prompt and context of the data set; training
reads these latents and decodes nothing. The student's times are the paper's (arXiv 2403.12015):
{1, 0.75, 0.5, 0.25}, at first only the low ones, then 70 % pure noise. The learning rates are ours,
because the paper gives none. This recipe has not been run yet.

`v5p_128` is sized for 64 chips (v5p:4x4x4), one row per chip, `h100_64` for 64 GPUs. README.md
compares the cost of a step with flow matching's.
"""

from kontext_jax.config import Config, SheetConfig, pick
from kontext_jax.data.latents import LatentsConfig
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.transformer import NetworksInit
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.training.checkpoint import CheckpointConfig

MODEL = "models/FLUX.1-Kontext-dev"
GUIDANCE = 2.5


def ladd(rows: int, remat: str) -> Config:
    return Config(
        objective=LaddConfig(
            transformer=FluxConfig.dev(remat=remat),
            init_from=NetworksInit(
                transformer=MODEL, text_encoder=MODEL, clip=MODEL, autoencoder=MODEL
            ),
            guidance=GUIDANCE,
            heads_optim=OptimConfig(
                learning_rate=1e-5, b1=0.0, b2=0.99, warmup_steps=0, weight_decay=0.0
            ),
        ),
        data=DataConfig(
            path="data/edits",
            batch_size=rows,
            caption_dropout=0.0,
            geometry=GeometryConfig(sizes=((1024, 1024),)),
            packing=PackingConfig(image_tokens=8192, text_tokens=512, max_examples=1),
            text=TextConfig(
                tokenizer=f"{MODEL}/tokenizer_2",
                max_tokens=512,
                pad=True,
                clip_tokenizer=f"{MODEL}/tokenizer",
            ),
            latents=LatentsConfig(
                path="data/edits_latents", samples=1.0, num_steps=50, guidance=GUIDANCE
            ),
        ),
        optim=OptimConfig(
            learning_rate=2e-6, b1=0.0, b2=0.99, warmup_steps=100, weight_decay=0.0, ema_decay=0.999
        ),
        checkpoint=CheckpointConfig(every=500, keep_every=5000),
        sheets=SheetConfig(
            every=500,
            num_examples=8,
            split="train",
            sampler=SamplerConfig(num_steps=4, method="consistency", guidance=GUIDANCE),
        ),
        num_steps=10_000,
        compilation_cache="runs/compiled",
    )


def v5p_128() -> Config:
    return ladd(rows=64, remat="save_attention")


def h100_64() -> Config:
    return ladd(rows=64, remat="save_attention")


VARIANTS = {"v5p_128": v5p_128, "h100_64": h100_64}


def get_config(variant: str = "v5p_128") -> Config:
    return pick(VARIANTS, variant)
