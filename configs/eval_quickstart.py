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


def get_config() -> EvalConfig:
    return EvalConfig(
        checkpoint=TEACHER,
        num_examples=384,
        sampler=guided(12),
        cells=(
            Cell(name="teacher 50", checkpoint=TEACHER, sampler=guided(50)),
            Cell(name="teacher 4", checkpoint=TEACHER, sampler=guided(4)),
            Cell(name="untrained 4", checkpoint=TEACHER, sampler=consistency(4), shift="none"),
            Cell(name="untrained 1", checkpoint=TEACHER, sampler=consistency(1), shift="none"),
            Cell(name="student 4", checkpoint=STUDENT, sampler=consistency(4)),
            Cell(name="student 2", checkpoint=STUDENT, sampler=consistency(2)),
            Cell(name="student 1", checkpoint=STUDENT, sampler=consistency(1)),
        ),
        num_cell_examples=192,  # a minute or two, nearly all of it for the 50 steps
        curves=(
            ("autoencoder", "runs/quickstart/autoencoder"),
            ("flow matching", "runs/quickstart/flow"),
        ),
    )
