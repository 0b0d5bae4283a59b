"""Compares the teacher, its untrained student, LADD and ADD with few sampling steps, for one seed.

python -m kontext_jax.evaluate --config=configs/eval_distillation.py:SEED \\
    --workdir=runs/distillation/eval-SEED

SEED selects the students trained with that seed, and also seeds the sampling noise.
"""

from configs.eval_quickstart import DATA, TEACHER, students, teacher
from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import SetConfig


def get_config(seed: str = "0") -> EvalConfig:
    return EvalConfig(
        cells=(
            *(teacher(n) for n in (50, 8, 4, 2, 1)),
            *students("untrained", TEACHER, (4, 2, 1), shift="none"),
            *students("LADD", f"runs/distillation/ladd-{seed}", (4, 2, 1)),
            *students("ADD", f"runs/distillation/add-{seed}", (4, 1)),
            Cell(name="truth, reconstructed", checkpoint=TEACHER, baseline="reconstruction"),
        ),
        sets=(SetConfig(name="edits", path=DATA, num_examples=384),),
        sheet_rows=12,
        seed=int(seed),
    )
