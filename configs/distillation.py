"""LADD against ADD, from the quickstart's teacher; `launch/distillation.sh` runs all of it.

Both students start as the same teacher and train on the same prompts and contexts, as many steps of
as many examples. LADD's targets are the teacher's samples of 50 steps with classifier-free guidance
2. ADD's are the images of the data set, as its paper has it: what guidance adds, it does not see.
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
    return dataclasses.replace(config, data=dataclasses.replace(config.data, latents=bank))


def add() -> Config:
    config = quickstart.ladd()
    teacher = config.objective
    objective = AddConfig(
        transformer=teacher.transformer,
        text_encoder=teacher.text_encoder,
        pooled=teacher.pooled,
        init_from=AddInit(**dataclasses.asdict(teacher.init_from)),
        features="efficientnet",
        efficientnet=EfficientNetConfig.lite0(input_size=64),
        heads=teacher.heads,
        heads_optim=teacher.heads_optim,
    )
    data = dataclasses.replace(config.data, latents=LatentsConfig())
    return dataclasses.replace(config, objective=objective, data=data)


VARIANTS = {"ladd": ladd, "add": add}


def get_config(variant: str = "ladd") -> Config:
    return pick(VARIANTS, variant)
