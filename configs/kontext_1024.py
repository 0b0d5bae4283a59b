"""Trains Kontext at 1024 x 1024 pixels on a pod: 11.9 B parameters, one context per target.

    python -m kontext_jax.data.build --source=folder --input=FOLDER --output=data/edits
    python -m kontext_jax.compile --config=configs/kontext_1024.py --topology=v5p:4x4x4
    python -m kontext_jax.train --config=configs/kontext_1024.py --workdir=runs/kontext \\
        --distributed

Training starts from the text-to-image weights in `models/FLUX.1-dev`, a local copy of the diffusers
pipeline. An empty `--config.objective.init_from.transformer=` trains from scratch; that model knows
a single value of the guidance input, so sample its sheets with
`--config.sheets.sampler.guidance=1`.

A row holds one example: 4096 tokens of the target, 4096 of a context or padding, and 512 of text.
Text-to-image examples mix in; `--config.data.packing.max_examples=2
--config.data.packing.text_tokens=1024` lets examples without a context share rows.

`v5p_128` is sized for 64 chips (v5p:4x4x4), `v5e_256` and `v6e_256` for 256 (v5e:16x16,
v6e:16x16), `h100_64` for 64 GPUs, always one row per chip. The variants differ in what the backward
pass recomputes, which the chips' memory decides; README.md has the numbers. The state is 190 GB of
float32, sharded over all chips of a slice. On GPUs a slice is an NVLink domain, 24 GB per GPU if it
has eight; `--config.mesh.data=1` shards over all of them.

Every image size that a row may contain costs it image slots to encode, so this recipe has a single
size; `geometry.KONTEXT_SIZES` are Kontext's own 17.
"""

from kontext_jax.config import Config, SheetConfig, pick
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.training.checkpoint import CheckpointConfig

MODEL = "models/FLUX.1-dev"


def kontext(rows: int, remat: str) -> Config:
    return Config(
        objective=FlowMatchingConfig(
            transformer=FluxConfig.dev(remat=remat),
            autoencoder_dtype="bfloat16",
            init_from=FlowInit(
                transformer=MODEL, text_encoder=MODEL, clip=MODEL, autoencoder=MODEL
            ),
        ),
        data=DataConfig(
            path="data/edits",
            batch_size=rows,
            geometry=GeometryConfig(sizes=((1024, 1024),)),
            packing=PackingConfig(image_tokens=8192, text_tokens=512, max_examples=1),
            text=TextConfig(
                tokenizer=f"{MODEL}/tokenizer_2",
                max_tokens=512,
                pad=True,
                clip_tokenizer=f"{MODEL}/tokenizer",
            ),
        ),
        optim=OptimConfig(learning_rate=2e-5, warmup_steps=1000),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
        sheets=SheetConfig(
            every=1000, num_examples=8, split="train", sampler=SamplerConfig(num_steps=28)
        ),
        num_steps=100_000,
        compilation_cache="runs/compiled",
    )


def v5p_128() -> Config:
    return kontext(rows=64, remat="save_named")


def v5e_256() -> Config:
    return kontext(rows=256, remat="save_attention")


def v6e_256() -> Config:
    return kontext(rows=256, remat="save_attention")


def h100_64() -> Config:
    return kontext(rows=64, remat="save_attention")


VARIANTS = {"v5p_128": v5p_128, "v5e_256": v5e_256, "v6e_256": v6e_256, "h100_64": h100_64}


def get_config(variant: str = "v5p_128") -> Config:
    return pick(VARIANTS, variant)
