"""Trains one LADD and one ADD student from the quickstart's teacher, to compare the two.

    python -m kontext_jax.encode --config=configs/distillation.py:ladd
    python -m kontext_jax.train --config=configs/distillation.py:ladd --config.seed=0 \\
        --workdir=runs/distillation/ladd-0
    python -m kontext_jax.train --config=configs/distillation.py:add --config.seed=0 \\
        --workdir=runs/distillation/add-0
    python -m kontext_jax.evaluate --config=configs/eval_distillation.py:0 \\
        --workdir=runs/distillation/eval-0

`launch/distillation.sh` runs this for three seeds in about an hour on two CPU cores; it needs the
quickstart's outputs in `runs/quickstart`. README.md has the results.

Both students start from the same teacher and train on the same prompts and contexts for about the
same CPU time, so ADD takes fewer steps. LADD's targets are the teacher's samples, drawn in 50 steps
with a classifier-free guidance scale of 2. ADD's targets are the images of the data set, as in its
paper, but encoded and decoded by the autoencoder: it loses so much that with the original images
the discriminator heads learned nothing but that loss.
"""

import dataclasses

from configs import quickstart
from kontext_jax.config import Config, pick
from kontext_jax.data.latents import LatentsConfig
from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.objectives.add import AddConfig, AddInit

BANK = "runs/distillation/bank"


def ladd() -> Config:
    config = quickstart.ladd()
    bank = dataclasses.replace(config.data.latents, path=BANK, num_steps=50)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, latents=bank),
        optim=dataclasses.replace(config.optim, warmup_steps=200),
        checkpoint=dataclasses.replace(config.checkpoint, every=900),
        sheets=dataclasses.replace(config.sheets, every=900),
        num_steps=900,
    )


def add() -> Config:
    config = quickstart.ladd()
    teacher = config.objective
    objective = AddConfig(
        transformer=teacher.transformer,
        text_encoder=teacher.text_encoder,
        pooled=teacher.pooled,
        init_from=AddInit(**dataclasses.asdict(teacher.init_from)),
        features="efficientnet",
        reconstruct_real=True,
        efficientnet=EfficientNetConfig.lite0(input_size=64),
        heads=teacher.heads,
        heads_optim=teacher.heads_optim,
    )
    return dataclasses.replace(
        config,
        objective=objective,
        data=dataclasses.replace(config.data, latents=LatentsConfig()),
        optim=dataclasses.replace(config.optim, learning_rate=1e-4, warmup_steps=30),
        checkpoint=dataclasses.replace(config.checkpoint, every=120),
        sheets=dataclasses.replace(config.sheets, every=120),
        num_steps=120,
        log_every=10,
    )


VARIANTS = {"ladd": ladd, "add": add}


def get_config(variant: str = "ladd") -> Config:
    return pick(VARIANTS, variant)
