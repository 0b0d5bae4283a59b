"""Trains FLUX from scratch at 256 x 256 pixels, as MLPerf Training's text-to-image benchmark does.

    python -m kontext_jax.data.build --source=folder --input=cc12m --output=data/cc12m_256
    python -m kontext_jax.train --config=configs/flow_256.py --workdir=runs/flow_256 --distributed

The model is FLUX.1 [schnell] with 256 image tokens and 256 text tokens, padded prompts, and the
frozen encoders of `models/FLUX.1-schnell`. The settings follow the reference (mlcommons/training,
text_to_image, v5.1 and later): 512 examples per step, AdamW with betas 0.9 and 0.95 and weight
decay 0.1, learning rate 2e-4 after 1600 warmup steps (the reference's value at this batch size;
mlcommons/logging, rcps_flux1.json, v6.0), gradients clipped at 1, uniform times without shift, and
a caption dropout of 0.1. The data are 1,099,776 images of CC12M. The reference reaches the
validation loss of 0.586 after 7.2 million examples, which are 14,100 steps.

One difference is known: weight decay skips biases and norms here, and does not in the reference.
`configs/eval_mlperf.py` computes the benchmark's loss; no run has been trained to its target yet.

`v5p_128` is sized for 64 chips (v5p:4x4x4), `v5e_256` and `v6e_256` for 256 (v5e:16x16,
v6e:16x16), `h100_64` for 64 GPUs. README.md has the numbers of the first.
"""

from kontext_jax.config import Config, SheetConfig, pick
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.flow import TimeConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.training.checkpoint import CheckpointConfig

MODEL = "models/FLUX.1-schnell"


def flow(remat: str) -> Config:
    return Config(
        objective=FlowMatchingConfig(
            transformer=FluxConfig.schnell(remat=remat),
            autoencoder_dtype="bfloat16",
            init_from=FlowInit(text_encoder=MODEL, clip=MODEL, autoencoder=MODEL),
            time=TimeConfig(distribution="uniform", shift="none"),
        ),
        data=DataConfig(
            path="data/cc12m_256",
            batch_size=512,
            caption_dropout=0.1,
            geometry=GeometryConfig(sizes=((256, 256),)),
            packing=PackingConfig(image_tokens=256, text_tokens=256, max_examples=1),
            text=TextConfig(
                tokenizer=f"{MODEL}/tokenizer_2",
                max_tokens=256,
                pad=True,
                clip_tokenizer=f"{MODEL}/tokenizer",
            ),
        ),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=1600, b2=0.95, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=1000, keep_every=5000),
        sheets=SheetConfig(
            every=1000, num_examples=12, split="train", sampler=SamplerConfig(num_steps=28)
        ),
        num_steps=15_000,
        compilation_cache="runs/compiled",
    )


def v5p_128() -> Config:
    return flow(remat="save_named")


def v5e_256() -> Config:
    return flow(remat="save_attention")


def v6e_256() -> Config:
    return flow(remat="save_named")


def h100_64() -> Config:
    return flow(remat="save_named")


VARIANTS = {"v5p_128": v5p_128, "v5e_256": v5e_256, "v6e_256": v6e_256, "h100_64": h100_64}


def get_config(variant: str = "v5p_128") -> Config:
    return pick(VARIANTS, variant)
