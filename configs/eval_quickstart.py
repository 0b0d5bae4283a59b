"""Scores the quickstart's model on held-out combinations, and writes the report.

python -m kontext_jax.evaluate --config=configs/eval_quickstart.py --workdir=runs/quickstart

The cells ask how few steps will do: the teacher with many and with few, the student of
``configs/quickstart.py:ladd``, and, to see what its training is worth, the teacher's own networks
in the student's place.
"""

from kontext_jax.cells import Cell
from kontext_jax.evaluate import EvalConfig
from kontext_jax.sampler import SamplerConfig

TEACHER, STUDENT = "runs/quickstart/flow", "runs/quickstart/ladd"


def guided(num_steps: int) -> SamplerConfig:
    return SamplerConfig(num_steps=num_steps, cfg_scale=2.0)


def consistency(num_steps: int) -> SamplerConfig:
    return SamplerConfig(num_steps=num_steps, method="consistency")


def students(
    name: str, checkpoint: str, steps: tuple[int, ...], shift: str = ""
) -> tuple[Cell, ...]:
    return tuple(
        Cell(name=f"{name} {n}", checkpoint=checkpoint, sampler=consistency(n), shift=shift)
        for n in steps
    )


def get_config() -> EvalConfig:
    return EvalConfig(
        checkpoint=TEACHER,
        num_examples=384,
        sampler=guided(12),
        cells=(
            Cell(name="teacher 50", checkpoint=TEACHER, sampler=guided(50)),
            Cell(name="teacher 4", checkpoint=TEACHER, sampler=guided(4)),
            *students("untrained", TEACHER, (4, 1), shift="none"),
            *students("student", STUDENT, (4, 2, 1)),
        ),
        num_cell_examples=192,  # a minute or two, nearly all of it for the 50 steps
        curves=(
            ("autoencoder", "runs/quickstart/autoencoder"),
            ("flow matching", "runs/quickstart/flow"),
        ),
    )
