"""How far the emoji model's student gets in few steps; no checker reads these pictures.

python -m kontext_jax.evaluate --config=configs/eval_emoji.py --workdir=runs/emoji
"""

from configs.emoji import CFG_SCALE
from configs.eval_quickstart import students
from kontext_jax.cells import Cell
from kontext_jax.evaluate import EvalConfig
from kontext_jax.sampler import SamplerConfig

TEACHER, STUDENT = "runs/emoji/flow", "runs/emoji/ladd"


def get_config() -> EvalConfig:
    def teacher(num_steps: int) -> Cell:
        sampler = SamplerConfig(num_steps=num_steps, cfg_scale=CFG_SCALE)
        return Cell(name=f"teacher {num_steps}", checkpoint=TEACHER, sampler=sampler)

    return EvalConfig(
        checkpoint=TEACHER,
        num_examples=256,
        sampler=SamplerConfig(num_steps=20, cfg_scale=CFG_SCALE),
        cells=(
            *(teacher(n) for n in (50, 8, 4, 2, 1)),
            *students("untrained", TEACHER, (4, 2, 1), shift="none"),
            *students("LADD", STUDENT, (4, 2, 1)),
        ),
        curves=(("flow matching", TEACHER),),
    )
