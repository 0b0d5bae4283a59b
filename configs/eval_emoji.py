"""How far the emoji model's student gets in few steps; no checker reads these pictures.

python -m kontext_jax.evaluate --config=configs/eval_emoji.py --workdir=runs/emoji
"""

from configs.emoji import CFG_SCALE
from kontext_jax.cells import Cell
from kontext_jax.evaluate import EvalConfig
from kontext_jax.sampler import SamplerConfig

TEACHER, STUDENT = "runs/emoji/flow", "runs/emoji/ladd"


def get_config() -> EvalConfig:
    def teacher(num_steps: int) -> Cell:
        sampler = SamplerConfig(num_steps=num_steps, cfg_scale=CFG_SCALE)
        return Cell(name=f"teacher {num_steps}", checkpoint=TEACHER, sampler=sampler)

    def student(name: str, checkpoint: str, num_steps: int, shift: str = "") -> Cell:
        sampler = SamplerConfig(num_steps=num_steps, method="consistency")
        return Cell(name=f"{name} {num_steps}", checkpoint=checkpoint, shift=shift, sampler=sampler)

    return EvalConfig(
        checkpoint=TEACHER,
        num_examples=256,
        sampler=SamplerConfig(num_steps=20, cfg_scale=CFG_SCALE),
        cells=(
            *(teacher(n) for n in (50, 8, 4, 2, 1)),
            *(student("untrained", TEACHER, n, shift="none") for n in (4, 2, 1)),
            *(student("LADD", STUDENT, n) for n in (4, 2, 1)),
        ),
        curves=(("flow matching", TEACHER),),
    )
