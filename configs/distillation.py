"""LADD against ADD, from the quickstart's teacher; `launch/distillation.sh` runs all of it.

Both students start as the same teacher, and train on the same prompts and contexts for about the
same time on a CPU, which gives ADD the fewer steps. LADD's targets are the teacher's samples of 50
steps with classifier-free guidance 2. ADD's are the images of the data set, as its paper has it,
but seen through the autoencoder: this one loses so much that its heads learned nothing else.
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
