"""Evaluates the quickstart's models on held-out combinations and writes the report.

python -m kontext_jax.evaluate --config=configs/eval_quickstart.py --workdir=runs/quickstart

The cells measure how few sampling steps are enough: the teacher with many and few steps, the
student of `configs/quickstart.py:ladd`, and, as the student's baseline, the teacher's own networks
sampled like a student. Some cells also edit their own outputs over four turns and are asked for
edits that are already done; both show what an edit changes that it should leave alone.
"""

import dataclasses
from collections.abc import Iterable

from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import SetConfig
from kontext_jax.sampler import SamplerConfig

TEACHER, STUDENT = "runs/quickstart/flow", "runs/quickstart/ladd"
DATA = "runs/quickstart/world"


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


def teacher(num_steps: int) -> Cell:
    return Cell(name=f"teacher {num_steps}", checkpoint=TEACHER, sampler=guided(num_steps))


def edits_only(cells: Iterable[Cell]) -> list[Cell]:
    return [dataclasses.replace(cell, sets=("edits",)) for cell in cells]


def get_config() -> EvalConfig:
    untrained = Cell(
        name="new networks", checkpoint=TEACHER, baseline="untrained", sampler=guided(12)
    )
    reconstruction = Cell(
        name="truth, reconstructed", checkpoint=TEACHER, baseline="reconstruction"
    )
    edits = SetConfig(name="edits", path=DATA, num_examples=384)
    return EvalConfig(
        cells=(
            teacher(12),
            *edits_only([teacher(50), teacher(4)]),
            *edits_only(students("untrained", TEACHER, (4, 1), shift="none")),
            *edits_only([untrained, reconstruction]),
            *students("student", STUDENT, (4,)),
            *edits_only(students("student", STUDENT, (2,))),
            *students("student", STUDENT, (1,)),
            Cell(name="copy", baseline="copy"),
        ),
        sets=(
            edits,
            SetConfig(name="four turns", kind="world", num_examples=32, turns=4),
            SetConfig(name="done already", kind="world", num_examples=64, probe="done"),
        ),
        loss_sets=(edits,),
        curves=(
            ("autoencoder", "runs/quickstart/autoencoder"),
            ("flow matching", TEACHER),
            ("student", STUDENT),
        ),
    )
