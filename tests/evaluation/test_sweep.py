"""Grids name what varies, runs are pinned to a step, and errors name the cell."""

import dataclasses
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import pytest

from kontext_jax.evaluation.sweep import Cell, check_names, folder_name, grid, resolve
from kontext_jax.sampler import SamplerConfig
from kontext_jax.training.checkpoint import CheckpointConfig, Checkpointer
from kontext_jax.training.train_state import TrainState


def save(workdir: Path, *steps: int) -> str:
    """Writes a run with checkpoints at the given steps."""
    zero = jnp.zeros((), jnp.int32)
    with closing(Checkpointer(workdir, CheckpointConfig(keep=9))) as checkpointer:
        for step in steps:
            params = {"model": {"kernel": jnp.full(2, step, jnp.float32)}}
            state = TrainState(jnp.asarray(step), zero, zero, params, {"model": zero}, params)
            checkpointer.save(state, {}, {"config": {}, "metrics": {}})
    return str(workdir)


def test_a_grid_has_one_cell_per_combination():
    cells = grid(
        "runs/flow",
        params=("ema", "params"),
        num_steps=(4, 28),
        guidance=(1.0, 2.5),
        cfg_scale=(1.0, 3.0, 5.0),
        methods=("euler", "consistency"),
    )
    combinations = {(cell.params, cell.sampler) for cell in cells}
    assert len(cells) == len(combinations) == 2 * 2 * 2 * 3 * 2
    assert {(cell.checkpoint, cell.baseline, cell.shift) for cell in cells} == {
        ("runs/flow", "", "")
    }
    for setting, values in {
        "num_steps": {4, 28},
        "guidance": {1.0, 2.5},
        "cfg_scale": {1.0, 3.0, 5.0},
        "method": {"euler", "consistency"},
    }.items():
        assert {getattr(cell.sampler, setting) for cell in cells} == values
    check_names([cell.name for cell in cells], "cell")
    (cell,) = (
        cell
        for cell in cells
        if cell.params == "params"
        and cell.sampler
        == SamplerConfig(num_steps=4, guidance=2.5, cfg_scale=3.0, method="consistency")
    )
    assert cell.name == "flow params consistency 4 steps guidance 2.5 cfg 3"


def test_grid_names_list_only_the_settings_that_vary():
    assert [cell.name for cell in grid("runs/flow")] == ["flow"]
    assert [cell.name for cell in grid("runs/flow@300")] == ["flow@300"]
    cells = grid("runs/flow@all", num_steps=(1, 2), cfg_scale=(4.0,))
    assert [cell.name for cell in cells] == ["flow 1 steps", "flow 2 steps"]
    assert {cell.checkpoint for cell in cells} == {"runs/flow@all"}
    assert {cell.sampler.cfg_scale for cell in cells} == {4.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": "raw"}, "cell 'x': params 'raw' is not one of ema, params"),
        ({"shift": "big"}, "cell 'x': shift 'big' is not one of resolution, none"),
        (
            {"baseline": "zero"},
            "cell 'x': baseline 'zero' is not one of copy, reconstruction, untrained",
        ),
        ({"checkpoint": ""}, "cell 'x' needs a checkpoint"),
        ({"checkpoint": "", "baseline": "untrained"}, "cell 'x' needs a checkpoint"),
        ({"checkpoint": "", "baseline": "reconstruction"}, "cell 'x' needs a checkpoint"),
        ({"sampler": SamplerConfig(strength=0.5)}, "cell 'x': sampler.strength .* the target"),
    ],
)
def test_errors_name_the_cell_and_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        Cell(**{"name": "x", "checkpoint": "runs/x"} | settings)


def test_a_copy_needs_no_checkpoint_and_the_shift_can_be_set():
    assert resolve([Cell(name="copy", baseline="copy")]) == [Cell(name="copy", baseline="copy")]
    assert Cell(name="x", checkpoint="x", shift="resolution").shift == "resolution"


def test_cells_that_differ_only_in_sampling_share_networks():
    cell = Cell(name="a", checkpoint="x")
    sampler = SamplerConfig(num_steps=1)
    same = dataclasses.replace(cell, name="b", shift="none", sets=("s",), sampler=sampler)
    assert same.networks_key == cell.networks_key
    assert dataclasses.replace(cell, baseline="reconstruction").networks_key == cell.networks_key
    for other in ({"checkpoint": "y"}, {"params": "params"}, {"baseline": "untrained"}):
        assert dataclasses.replace(cell, **other).networks_key != cell.networks_key


def test_the_latest_checkpoint_is_pinned(tmp_path):
    run = save(tmp_path / "run", 3, 12)
    (cell,) = resolve([Cell(name="x", checkpoint=run, params="params", sets=("s",))])
    assert cell == Cell(name="x", checkpoint=f"{run}@12", params="params", sets=("s",))
    save(tmp_path / "run", 20)
    assert resolve([cell]) == [cell]


def test_a_given_step_is_kept_and_all_expands_to_every_step(tmp_path):
    run = save(tmp_path / "run", 3, 12)
    cells = resolve(
        [
            Cell(name="old", checkpoint=f"{run}@3"),
            Cell(name="each", checkpoint=f"{run}@all", baseline="untrained", sets=("s",)),
        ]
    )
    assert [(cell.name, cell.checkpoint) for cell in cells] == [
        ("old", f"{run}@3"),
        ("each @3", f"{run}@3"),
        ("each @12", f"{run}@12"),
    ]
    assert [cell.baseline for cell in cells] == ["", "untrained", "untrained"]
    assert [cell.sets for cell in cells] == [(), ("s",), ("s",)]


def test_a_run_s_folder_may_end_in_at_and_a_number(tmp_path):
    run = save(tmp_path / "run@5", 7)
    (cell,) = resolve([Cell(name="x", checkpoint=run)])
    assert cell.checkpoint == f"{run}@7"
    assert resolve([cell]) == [cell]
    (cell,) = resolve([Cell(name="x", checkpoint=f"{run}@all")])
    assert (cell.name, cell.checkpoint) == ("x @7", f"{run}@7")


def test_a_location_that_is_not_a_run_is_unchanged(tmp_path):
    (tmp_path / "pipeline").mkdir()
    cell = Cell(name="x", checkpoint=str(tmp_path / "pipeline"))
    assert resolve([cell]) == [cell]
    raw = Cell(name="mine", checkpoint=str(tmp_path / "pipeline"), params="params")
    with pytest.raises(
        ValueError, match="cell 'mine': .*pipeline is not a run and has only one set of"
    ):
        resolve([cell, raw])


def test_an_error_about_a_missing_checkpoint_names_the_cell(tmp_path):
    run = save(tmp_path / "run", 3, 12)
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    for location, message in (
        (f"{tmp_path}/begun@all", "no checkpoint"),
        (f"{run}@4", "steps 3, 12, but not 4"),
        (f"{tmp_path}/none@4", "no run with checkpoints in .*none'"),
        (f"{tmp_path}/none@all", "no run with checkpoints in .*none'"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^cell 'mine': .*{message}"):
            resolve([Cell(name="x", checkpoint=run), Cell(name="mine", checkpoint=location)])


def test_names_must_give_different_folders(tmp_path):
    assert folder_name("flow, 2 steps & more") == "flow_2_steps_more"
    assert folder_name("a-b.c@12") == "a-b.c@12"
    run = save(tmp_path / "run", 3)
    copy = Cell(name="x @3", baseline="copy")
    for other in ("x @3", "x, @3"):
        with pytest.raises(ValueError, match=r"cell names must be unique; 'x,? @3' is used"):
            resolve([copy, Cell(name=other, checkpoint=run)])
    with pytest.raises(ValueError, match="'x @3' is used twice"):
        resolve([copy, Cell(name="x", checkpoint=f"{run}@all")])
    check_names(["a b", "a-b", "ab"], "set")
    with pytest.raises(ValueError, match="set names must be unique; 'a b'"):
        check_names(["a b", "c", "a/b"], "set")
