"""Fine-tunes released FLUX.1 weights into an editing model on your own triples.

    python -m kontext_jax.data.build --source=folder --input=FOLDER --output=data/edits
    python -m kontext_jax.train --config=configs/finetune.py --workdir=runs/kontext
    python -m kontext_jax.train --config=configs/finetune.py:lora --workdir=runs/kontext_lora
    python -m kontext_jax.convert --input=runs/kontext --output=kontext --format=diffusers

`models/FLUX.1-dev` is a local copy of the diffusers pipeline. FLUX.1 [dev], Krea and Kontext itself
have the same shapes; `--config.objective.init_from.transformer=` also accepts a single file in
Black Forest Labs' layout, or a run. An editing model has no parameters that a text-to-image model
lacks: contexts are more tokens.

`full` trains all 11.9 B parameters. Float32 weights, gradients, moments and averaged parameters
take 238 GB over the chips of a slice, beside activations and the frozen text encoders. `lora`
keeps the transformer in bfloat16, as stored, and trains adapters of rank 16 on attention and MLPs.
Neither has been run at full size on released weights: their parts are tested at small sizes, and
their shapes at full size.

Sheets show training examples, because a folder has a validation split only if its `triples.jsonl`
marks lines with `"split": "validation"`. If yours does, add `--config.sheets.split=validation`;
`--config.validation.every=500` then also measures the held-out loss and samples.
"""

from kontext_jax.config import Config, SheetConfig, pick
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.training.checkpoint import CheckpointConfig

MODEL = "models/FLUX.1-dev"


def full() -> Config:
    return Config(
        objective=FlowMatchingConfig(
            init_from=FlowInit(transformer=MODEL, text_encoder=MODEL, clip=MODEL, autoencoder=MODEL)
        ),
        data=DataConfig(
            path="data/edits",
            batch_size=64,
            packing=PackingConfig(image_tokens=8320, text_tokens=512, max_examples=1),
            text=TextConfig(
                tokenizer=f"{MODEL}/tokenizer_2",
                max_tokens=512,
                pad=True,
                clip_tokenizer=f"{MODEL}/tokenizer",
            ),
        ),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=500),
        checkpoint=CheckpointConfig(every=500),
        sheets=SheetConfig(
            every=500, num_examples=8, split="train", sampler=SamplerConfig(num_steps=28)
        ),
        num_steps=10_000,
    )


def lora() -> Config:
    config = full()
    config.objective.lora = LoraConfig(rank=16)
    config.optim = OptimConfig(learning_rate=1e-4, warmup_steps=500, ema_decay=0.99)
    config.data.batch_size = 8
    config.num_steps = 2_000
    return config


VARIANTS = {"full": full, "lora": lora}


def get_config(variant: str = "full") -> Config:
    return pick(VARIANTS, variant)
