"""Evaluates the emoji teacher and its student with few sampling steps.

python -m kontext_jax.evaluate --config=configs/eval_emoji.py --workdir=runs/emoji

Icons have no checker like the world's, so edits are compared with the reference images only.
"""

from configs.emoji import CFG_SCALE
from configs.eval_quickstart import students
from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import SetConfig
from kontext_jax.sampler import SamplerConfig

TEACHER, STUDENT, DATA = "runs/emoji/flow", "runs/emoji/ladd", "data/emoji"


def get_config() -> EvalConfig:
    def teacher(num_steps: int) -> Cell:
        sampler = SamplerConfig(num_steps=num_steps, cfg_scale=CFG_SCALE)
        return Cell(name=f"teacher {num_steps}", checkpoint=TEACHER, sampler=sampler)

    edits = SetConfig(name="icons", path=DATA, num_examples=256)
    return EvalConfig(
        cells=(
            *(teacher(n) for n in (50, 8, 4, 2, 1)),
            *students("untrained", TEACHER, (4, 2, 1), shift="none"),
            *students("LADD", STUDENT, (4, 2, 1)),
        ),
        sets=(edits,),
        loss_sets=(edits,),
        curves=(("flow matching", TEACHER), ("LADD", STUDENT)),
    )
