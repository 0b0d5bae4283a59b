"""A sweep over two hand-made runs: a teacher, and a student with the same weights.

Both sampling methods agree in one step. So with one step, the cells of teacher and student must
generate the same images, given the same tasks and noise.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax import cli
from kontext_jax import evaluate as evaluate_module
from kontext_jax.config import Config, LossConfig
from kontext_jax.data.folder import load_image
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.evaluate import EvalConfig, evaluate
from kontext_jax.evaluation import generation, judge_panel
from kontext_jax.evaluation.cell_folder import CellFolder, load_task_image
from kontext_jax.evaluation.held_out_loss import MLPERF
from kontext_jax.evaluation.judge_panel import JudgePanel
from kontext_jax.evaluation.judges import judge_pixels
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import SetConfig, TaskSet, load_sets
from kontext_jax.geometry import GeometryConfig, resize, size_of
from kontext_jax.loading import models
from kontext_jax.loading.models import Model, load_autoencoder
from kontext_jax.metrics.pixels import l1
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowInit, networks_of
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.transformer import NetworksInit
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sampling.generator import reconstruct
from kontext_jax.settings import to_dict
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.training.checkpoint import CheckpointConfig, Checkpointer
from kontext_jax.training.train_state import TrainState
from kontext_jax.types import Task
from kontext_jax.weights import export
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.reading import ArrayReader
from tests.evaluation.tasks.miniature import write_miniature_kontext_bench

NAMES = ["teacher, 2 steps", "teacher & 1", "student & 1", "copy", "untrained"]


class Runs(NamedTuple):
    teacher: str
    student: str
    data: str

    @property
    def config(self) -> EvalConfig:
        one, two = SamplerConfig(num_steps=1), SamplerConfig(num_steps=2, cfg_scale=3.0)
        consistency = dataclasses.replace(one, method="consistency")
        return EvalConfig(
            cells=(
                Cell(name=NAMES[0], checkpoint=self.teacher, sampler=two),
                Cell(name=NAMES[1], checkpoint=self.teacher, sampler=one),
                Cell(name=NAMES[2], checkpoint=self.student, sampler=consistency),
                Cell(name=NAMES[3], baseline="copy"),
                Cell(name=NAMES[4], checkpoint=self.teacher, baseline="untrained", sampler=one),
            ),
            sets=(
                SetConfig(name="edits", path=self.data),
                SetConfig(name="sessions", kind="world", num_examples=2, turns=2),
            ),
            loss_sets=(SetConfig(name="edits", path=self.data),),
            loss=LossConfig(num_times=2, levels="all"),
            batch_size=2,
            sheet_rows=4,
        )


def mesh_of(number: int):
    return make_mesh(MeshConfig(), jax.devices()[:number])


def save(workdir: Path, config: Config, params: dict, **meta) -> str:
    zero = jnp.zeros((), jnp.int32)
    with closing(Checkpointer(workdir, CheckpointConfig())) as checkpointer:
        state = TrainState(zero, zero, zero, params, {player: zero for player in params}, params)
        meta |= {"config": to_dict(config), "metrics": {}, "frozen": {}}
        checkpointer.save(state, {}, meta)
    return str(workdir)


@pytest.fixture(scope="module")
def patched(random_network, tmp_path_factory):
    """Replaces what takes long: one device, a tiny EfficientNet, and no fingerprints."""
    tiny = EfficientNetConfig.tiny()
    network = random_network(lambda: EfficientNet(tiny, rngs=nnx.Rngs(0)))
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "make_mesh", lambda config: mesh_of(1))
        patch.setattr(judge_panel, "load_lite0", lambda mesh, config: network)
        patch.setattr(models, "identity_of", lambda networks: {})
        patch.setattr(generation, "identity_of", lambda networks: {})
        yield
    jax.config.update("jax_compilation_cache_dir", old)


@pytest.fixture(scope="module")
def runs(patched, recipe, random_network, world_folder, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    autoencoder = str(folder / "vae")
    reader = ArrayReader(NETWORKS["autoencoder"], recipe.frozen["autoencoder"])
    export.write_diffusers(reader, Path(autoencoder), {})
    data = DataConfig(
        path=str(world_folder),
        geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
        packing=PackingConfig(image_tokens=32, text_tokens=80, max_examples=2),
    )
    objective = dataclasses.replace(
        recipe.objective.config, init_from=FlowInit(autoencoder=autoencoder)
    )
    config = Config(objective=objective, data=data)
    teacher = save(folder / "teacher", config, recipe.params)

    init_from = NetworksInit(transformer=teacher, text_encoder=teacher, autoencoder=autoencoder)
    config = Config(
        objective=LaddConfig(
            transformer=objective.transformer,
            text_encoder=objective.text_encoder,
            pooled=objective.pooled,
            init_from=init_from,
            heads=HeadsConfig(width=8, dtype="float32"),
        ),
        data=data,
    )
    heads = random_network(lambda: config.make_objective().init(jax.random.key(0)))
    student = {
        "student": {"transformer": recipe.params["model"]["transformer"]},
        "discriminator": heads["discriminator"],
    }
    return Runs(teacher, save(folder / "student", config, student), str(world_folder))


class Done(NamedTuple):
    folder: Path
    summary: dict
    loaded: list

    def scores(self, cell: str, set_name: str = "edits") -> list[dict]:
        lines = (self.cell(cell, set_name) / "scores.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def cell(self, cell: str, set_name: str = "edits") -> Path:
        return self.folder / "cells" / set_name / evaluate_module.folder_name(cell)


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory) -> Done:
    loaded = []
    load_model = generation.load_model

    def recording(location, mesh, params):
        loaded.append(location)
        return load_model(location, mesh, params)

    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load_model", recording)
        summary = evaluate(runs.config, folder, {"flow": 2.0})
    return Done(folder, summary, loaded)


def test_cells_get_the_same_tasks_and_noise(done):
    other, teacher, student = (done.scores(name) for name in NAMES[:3])
    assert teacher == student and other != teacher
    assert len({row["l1"] for row in teacher}) == 6
    assert [row["id"] for row in other] == [row["id"] for row in teacher]
    first, second = (done.summary["cells"][name]["sets"]["edits"] for name in NAMES[1:3])
    assert first["metrics"] == second["metrics"] and first["whole"] == second["whole"]


def test_cells_of_one_run_share_its_networks(done, runs):
    assert done.loaded == [f"{runs.teacher}@0", f"{runs.student}@0", f"{runs.teacher}@0"]


def test_every_task_has_one_score_and_one_image(done):
    for name in NAMES:
        for set_name, number in (("edits", 6), ("sessions", 4)):
            ids = [row["id"] for row in done.scores(name, set_name)]
            assert len(set(ids)) == len(ids) == number
            assert len(list((done.cell(name, set_name) / "images").iterdir())) == number
            assert done.summary["cells"][name]["sets"][set_name]["count"]["all"] == number


def test_the_summary_averages_tasks_not_categories(done):
    rows = done.scores(NAMES[0])
    results = done.summary["cells"][NAMES[0]]["sets"]["edits"]
    mean, low, high, count = results["metrics"]["l1"]["category"]["all"]
    assert count == 6 and mean == pytest.approx(np.mean([row["l1"] for row in rows]), rel=1e-12)
    assert low is high is None  # only six tasks
    parts = results["metrics"]["l1"]["category"]
    assert parts.keys() == results["count"].keys() and len(parts) > 2
    weighted = sum(parts[name][0] * results["count"][name] for name in parts if name != "all")
    assert weighted / 6 == pytest.approx(mean)
    assert results["whole"].keys() == {"fd_efflite0", "kid_efflite0"}
    assert json.loads((done.folder / "summary.json").read_text()) == json.loads(
        json.dumps(done.summary)
    )


def test_a_copy_carries_out_no_edit_and_has_no_speed(done):
    results = done.summary["cells"]["copy"]["sets"]["edits"]
    edits = [row for row in done.scores("copy") if row["category"] != "text_to_image"]
    assert {row["edit_success"] for row in edits} == {0.0} and not results["speed"]
    assert all(row["efflite0_context"] > 1 - 1e-6 for row in edits)


def test_speed_excludes_compilation(done):
    speed = done.summary["cells"][NAMES[0]]["sets"]["edits"]["speed"]
    assert speed["seconds_per_image"] * speed["images_per_second_per_chip"] == pytest.approx(1)
    assert speed["compile_seconds"] > 0 and speed["chips"] == 1
    lines = (done.cell(NAMES[0]) / "batches.jsonl").read_text().splitlines()
    batches = [line for line in map(json.loads, filter(None, lines)) if "seconds" in line]
    assert sum(line["images"] for line in batches) == 6
    assert sum(line["seconds"] for line in batches) / 6 == speed["seconds_per_image"]


def test_a_turn_starts_from_the_image_of_the_turn_before(runs, tmp_path, monkeypatch):
    contexts = {}
    examples_of = generation.examples_of

    def recording(tasks, generated, data):
        examples = examples_of(tasks, generated, data)
        contexts.update((e.id, e.contexts[0]) for e in examples if e.contexts)
        return examples

    monkeypatch.setattr(generation, "examples_of", recording)
    config = dataclasses.replace(
        runs.config, cells=runs.config.cells[1:2], sets=runs.config.sets[1:], loss_sets=()
    )
    evaluate(config, tmp_path, {})
    images = tmp_path / "cells" / "sessions" / "teacher_1" / "images"
    for session in ("world%2Fsession%2F0%2F000000", "world%2Fsession%2F0%2F000001"):
        name = session.replace("%2F", "/")
        first, second = contexts[f"{name}/1"], contexts[f"{name}/2"]
        np.testing.assert_array_equal(second, load_image(images / f"{session}%2F1.png"))
        assert np.abs(first.astype(int) - second).max() > 3


def test_prompts_and_contexts_are_never_dropped(done, runs, tmp_path, monkeypatch):
    """The run was trained with a dropout of 1, which would show if it were applied."""
    load_model = generation.load_model

    def dropping(location, mesh, params):
        model = load_model(location, mesh, params)
        data = dataclasses.replace(model.data, caption_dropout=1.0, context_dropout=1.0)
        return model._replace(data=data)

    monkeypatch.setattr(generation, "load_model", dropping)
    config = dataclasses.replace(
        runs.config, cells=runs.config.cells[1:2], sets=runs.config.sets[:1]
    )
    summary = evaluate(config, tmp_path, {})
    assert Done(tmp_path, {}, []).scores(NAMES[1]) == done.scores(NAMES[1])
    losses = summary["losses"]["edits"]
    assert list(losses.values())[0] == done.summary["losses"]["edits"][next(iter(losses))]


def files(folder: Path) -> dict[str, bytes]:
    """All result files whose content does not depend on timing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted([*folder.rglob("*.png"), *folder.rglob("scores.jsonl")])
        + sorted([*folder.rglob("whole.json"), *folder.glob("losses/*/*.jsonl")])
    }


@pytest.mark.parametrize("moment", [1, 3, 7, 12])
def test_a_resumed_sweep_gives_the_same_results(done, runs, tmp_path, monkeypatch, moment):
    """The sweep stops after the first image of a batch, at several batches of the sweep."""
    calls = 0
    save = CellFolder.save

    def stopping(self, images):
        nonlocal calls
        calls += 1
        if calls == moment:
            save(self, dict(list(images.items())[:1]))
            raise KeyboardInterrupt
        save(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CellFolder, "save", stopping)
        evaluate(runs.config, tmp_path, {})
    assert not (tmp_path / "summary.json").exists()
    summary = evaluate(runs.config, tmp_path, {})
    assert files(tmp_path) == files(done.folder)
    for name, cell in done.summary["cells"].items():
        for set_name, results in cell["sets"].items():
            resumed = summary["cells"][name]["sets"][set_name]
            assert resumed | {"speed": None} == results | {"speed": None}
    assert summary["losses"] == done.summary["losses"]


def test_new_judges_score_the_images_of_a_finished_sweep(done, runs, tmp_path, monkeypatch):
    config = dataclasses.replace(runs.config, cells=runs.config.cells[1:2], loss_sets=())
    evaluate(config, tmp_path, {})
    monkeypatch.setattr(generation, "Generator", None)
    evaluate(config, tmp_path, {})
    config.judges = dataclasses.replace(config.judges, efflite0=False)
    summary = evaluate(config, tmp_path, {})
    results = summary["cells"][NAMES[1]]["sets"]["edits"]
    assert (
        not results["whole"] and "efflite0" not in results["metrics"] and "l1" in results["metrics"]
    )


def of_copies(runs: Runs) -> EvalConfig:
    """The sweep's copy cell on one set, which needs no network."""
    cells, sets = runs.config.cells[3:4], runs.config.sets[:1]
    config = dataclasses.replace(runs.config, cells=cells, sets=sets, loss_sets=())
    config.judges = dataclasses.replace(config.judges, efflite0=False)
    return config


@pytest.mark.parametrize("name", ["scores.jsonl", "whole.json"])
def test_damaged_scores_are_computed_again(runs, tmp_path, name):
    first = evaluate(of_copies(runs), tmp_path, {})
    before = files(tmp_path)
    file = tmp_path / "cells" / "edits" / "copy" / name
    file.write_bytes(file.read_bytes()[:-30])
    again = evaluate(of_copies(runs), tmp_path, {})
    assert files(tmp_path) == before and again["cells"] == first["cells"]


def test_a_finished_cell_regenerates_lost_images(runs, tmp_path, monkeypatch):
    evaluate(of_copies(runs), tmp_path, {})
    before = files(tmp_path)
    first, second, *_ = sorted((tmp_path / "cells" / "edits" / "copy" / "images").iterdir())
    is_complete = []
    all_processes = evaluate_module._all_processes

    def recording(value):
        is_complete.append(value)
        return all_processes(value)

    monkeypatch.setattr(evaluate_module, "_all_processes", recording)
    evaluate(of_copies(runs), tmp_path, {})
    first.unlink()
    second.write_bytes(b"")
    evaluate(of_copies(runs), tmp_path, {})
    assert files(tmp_path) == before
    assert is_complete == [True, False]


def test_a_record_changes_with_the_settings_of_the_networks(recipe):
    data = DataConfig(geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8))
    networks = networks_of(recipe.params["model"], recipe.frozen)
    model = Model(recipe.objective.config, data, networks, {"transformer": ["0"]})
    cell, task_set = Cell(name="x", checkpoint="x"), TaskSet("edits", [], "0")

    def record(model: Model | None) -> dict:
        return generation.cell_record(cell, task_set, model, 0)

    time = dataclasses.replace(model.objective.time, shift="none")
    geometry = dataclasses.replace(data.geometry, position_scheme="index")
    others = (
        model._replace(objective=dataclasses.replace(model.objective, time=time)),
        model._replace(data=dataclasses.replace(data, geometry=geometry)),
        model._replace(data=dataclasses.replace(data, text=TextConfig(max_tokens=7))),
    )
    assert all(record(other) != record(model) for other in others)
    moved = dataclasses.replace(data, text=TextConfig(tokenizer="elsewhere"))
    assert record(model._replace(data=moved)) == record(model)
    assert {k for k, v in record(None).items() if v != record(model)[k]} == set(
        generation.MODEL_KEYS
    )


def test_images_are_scored_at_the_size_of_the_task(tmp_path):
    """At a smaller size, errors are harder to see."""
    sizes = []

    def judge(outputs):
        sizes.extend([*outputs.sizes, *map(size_of, outputs.targets)])
        return judge_pixels(outputs)

    target = np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8)
    task = Task("a", (), "do", "local", (48, 24), truth=target)
    folder = CellFolder(tmp_path, {})
    panel = JudgePanel([judge], {}, {})
    small = resize(target, (24, 12))
    [row], _ = evaluate_module._score(panel, TaskSet("edits", [task], "0"), folder, [small])
    assert sizes == [(48, 24)] * 2
    assert row["l1"] == l1(resize(small, (48, 24)), target) > 0.1


def test_images_of_other_settings_are_refused_before_any_work(done, runs, tmp_path, monkeypatch):
    """The offending cell is the last one, whose networks would be loaded last."""
    (tmp_path / "cells" / "edits").mkdir(parents=True)
    (tmp_path / "cells" / "edits" / "untrained").symlink_to(done.cell("untrained"))
    before = files(tmp_path)
    monkeypatch.setattr(evaluate_module, "load_networks", None)
    config = dataclasses.replace(runs.config, seed=1)
    with pytest.raises(
        ValueError, match="untrained holds images made with different seed: use another"
    ):
        evaluate(config, tmp_path, {})
    assert files(tmp_path) == before and len(list((tmp_path / "cells" / "edits").iterdir())) == 1


def test_different_weights_are_refused_once_they_are_known(runs, tmp_path):
    evaluate(of_copies(runs), tmp_path, {})
    file = tmp_path / "cells" / "edits" / "copy" / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": {"transformer": ["0"]}}))
    with pytest.raises(ValueError, match="copy holds images made with different weights: "):
        evaluate(of_copies(runs), tmp_path, {})


@pytest.mark.parametrize("inside", ["", "below/it"])
def test_a_file_is_refused_as_workdir(runs, tmp_path, monkeypatch, inside):
    monkeypatch.setattr(evaluate_module, "load_sets", None)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file, but --workdir must be a folder"):
        evaluate(runs.config, tmp_path / "notes" / inside, {})


def test_different_losses_have_different_files(tmp_path):
    """Similar or long names, other settings, other tasks, another set."""
    loss, edits = LossConfig(), TaskSet("edits", [], "0")
    cases = [
        ("r/x@30 ema", edits, loss),
        ("r_x@30 ema", edits, loss),
        ("/" + "夜" * 300 + "@30 ema", edits, loss),
        ("/" + "夜" * 301 + "@30 ema", edits, loss),
        ("r/x@30 ema", edits, LossConfig(num_times=3)),
        ("r/x@30 ema", edits._replace(fingerprint="1"), loss),
        ("r/x@30 ema", edits._replace(name="others"), loss),
    ]
    paths = [evaluate_module._loss_file(tmp_path, *case) for case in cases]
    for file in paths:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert len(set(paths)) == len(cases)
    assert paths[0].parent == tmp_path / "losses" / "edits"
    assert paths[0].name.startswith("r_x@30_ema-")
    assert paths == [evaluate_module._loss_file(tmp_path, *case) for case in cases]


def load_nan_weights(monkeypatch) -> None:
    """Makes all weights of loaded transformers NaN, as after a diverged run."""
    load_model = generation.load_model

    def diverged(location, mesh, params):
        model = load_model(location, mesh, params)
        broken = jax.tree.map(lambda x: x * jnp.nan, model.networks["transformer"])
        return model._replace(networks=model.networks | {"transformer": broken})

    monkeypatch.setattr(generation, "load_model", diverged)


def test_images_that_are_not_finite_are_refused(runs, tmp_path, monkeypatch):
    load_nan_weights(monkeypatch)
    config = dataclasses.replace(runs.config, cells=runs.config.cells[1:2], loss_sets=())
    with pytest.raises(ValueError, match=f"^cell '{NAMES[1]}': the sampled .* are not finite. The"):
        evaluate(config, tmp_path, {})
    assert not list(tmp_path.rglob("*.png"))


def test_losses_that_are_not_finite_are_refused(runs, tmp_path, monkeypatch):
    load_nan_weights(monkeypatch)
    config = dataclasses.replace(runs.config, cells=runs.config.cells[1:2], sets=())
    with pytest.raises(ValueError, match="held-out loss of .*teacher@0 ema is not finite for "):
        evaluate(config, tmp_path, {})


def test_the_summary_is_strict_json(runs, tmp_path):
    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    evaluate(of_copies(runs), tmp_path, {"data": float("inf"), "flow": float("nan"), "rest": 2.5})
    text = (tmp_path / "summary.json").read_text()
    seconds = json.loads(text, parse_constant=constant)["seconds"]
    assert (seconds["data"], seconds["flow"], seconds["rest"]) == (None, None, 2.5)


def test_the_summary_records_config_and_sets(done, runs, tmp_path):
    summary = json.loads((done.folder / "summary.json").read_text())
    assert summary["config"] == to_dict(runs.config)
    record = json.loads((done.cell("copy") / "record.json").read_text())
    edits = {"num_tasks": 6, "fingerprint": record["tasks"], "held_out": True}
    assert summary["sets"]["edits"] == edits
    assert summary["loss_sets"] == {"edits": summary["sets"]["edits"]}
    assert summary["sets"]["sessions"]["fingerprint"] != record["tasks"]


def test_a_judge_that_is_left_out_is_reported(runs, tmp_path, monkeypatch, capsys):
    def missing(mesh, config):
        raise FileNotFoundError("its file is missing.")

    monkeypatch.setattr(judge_panel, "load_lite0", missing)
    config = of_copies(runs)
    config.judges = dataclasses.replace(config.judges, efflite0=True)
    evaluate(config, tmp_path, {})
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "judge efflite0 is left out: its file is missing."
    assert len(others) == 1


def test_the_summary_is_written_after_the_report(runs, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(of_copies(runs), tmp_path, {})
    assert not (tmp_path / "summary.csv").exists() and not (tmp_path / "summary.json").exists()


def test_the_longest_compilation_of_a_turn_counts():
    def turn(number: int, seconds: float) -> dict:
        return {"turn": number, "device": "x", "chips": 1, "compile_seconds": seconds}

    batch = {"turn": 1, "device": "x", "chips": 2, "batch": 0, "images": 4, "seconds": 8.0}
    lines = [turn(1, 40.0), batch, turn(1, 3.0), turn(2, 2.0), batch, turn(2, 5.0)]
    speed = evaluate_module._speed(lines)
    assert speed["compile_seconds"] == 45.0 and speed["seconds_per_image"] == 2.0


def test_rates_are_of_the_devices_that_made_the_most_images():
    def batch(device: str, chips: int, images: int, seconds: float) -> dict:
        line = {"turn": 1, "device": device, "chips": chips}
        return line | {"images": images, "seconds": seconds}

    lines = [batch("x", 8, 3, 9.0), batch("x", 4, 4, 8.0), batch("y", 8, 4, 1.0)]
    lines.append(batch("x", 4, 1, 2.0))
    assert evaluate_module._speed(lines) == {
        "seconds_per_image": 2.0,
        "images_per_second_per_chip": 0.125,
        "compile_seconds": 0.0,
        "device": "x",
        "chips": 4,
    }


def test_overrides_do_not_change_shared_configs():
    """The sweep uses the constant `MLPERF`, and its cells and sets share settings."""
    sampler, shared_set = SamplerConfig(), SetConfig(name="a", path="a")
    cell = Cell(name="x", checkpoint="x", sampler=sampler)
    config = EvalConfig(
        cells=(cell, Cell(name="y", checkpoint="y", sampler=sampler)),
        sets=(shared_set,),
        loss_sets=(shared_set,),
        loss=MLPERF,
    )
    assert config.loss == MLPERF
    config.loss.num_times = 4
    config.cells[0].sampler.num_steps = 1
    config.sets[0].num_examples = 7
    assert MLPERF.num_times == 8 and config.loss != MLPERF
    assert cell.sampler.num_steps == config.cells[1].sampler.num_steps == 28
    assert shared_set.num_examples == config.loss_sets[0].num_examples == 0


def test_only_mlperf_s_exact_protocol_needs_its_number_of_examples(runs, tmp_path, monkeypatch):
    config = dataclasses.replace(runs.config, sets=(), loss=MLPERF)
    checked = []
    monkeypatch.setattr(evaluate_module, "check_mlperf", checked.append)
    loss_sets = load_sets(config.loss_sets)
    evaluate_module._check_sweep([], [], loss_sets, config, tmp_path)
    assert checked == [6]
    config.loss.num_times = 4
    evaluate_module._check_sweep([], [], loss_sets, config, tmp_path)
    assert checked == [6]


@pytest.mark.parametrize("setting", ["batch_size", "sheet_rows"])
def test_negative_numbers_are_refused(runs, setting):
    with pytest.raises(ValueError, match=f"{setting} -3 must be 0"):
        dataclasses.replace(runs.config, **{setting: -3})


def test_a_training_config_is_refused(tmp_path, monkeypatch):
    flags = SimpleNamespace(config=Config(), workdir=str(tmp_path), distributed=False, seconds=[])
    monkeypatch.setattr(evaluate_module, "flags", SimpleNamespace(FLAGS=flags))
    with pytest.raises(cli.UserError, match="EvalConfig"):
        evaluate_module.main()


def test_cells_that_differ_only_by_an_unused_guidance_are_refused(runs, tmp_path, monkeypatch):
    def cell(name: str, guidance: float, **more) -> Cell:
        sampler = SamplerConfig(num_steps=1, guidance=guidance)
        return Cell(name=name, checkpoint=runs.teacher, sampler=sampler, **more)

    check = evaluate_module._check_guidance
    same, other = cell("2.5", 2.5), cell("4", 4.0)
    message = "cells '2.5' and '4' differ only by guidance, .* leave one out"
    config = dataclasses.replace(runs.config, cells=(same, other))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(evaluate_module, "load_sets", None)
        evaluate(config, tmp_path, {})
    check([same, cell("again", 2.5)])
    check([same, cell("raw", 4.0, params="params")])
    check([same, cell("shifted", 4.0, shift="resolution")])
    check([cell("a", 1.0, baseline="reconstruction"), cell("b", 2.0, baseline="reconstruction")])
    with pytest.raises(ValueError, match="cells 'a' and 'b' differ only"):
        check([cell("a", 1.0, baseline="untrained"), cell("b", 2.0, baseline="untrained")])
    monkeypatch.setattr(evaluate_module, "takes_guidance", lambda cell: True)
    check([same, other])


@pytest.mark.parametrize("takes", [True, False])
def test_takes_guidance_reads_the_transformer_s_config(monkeypatch, takes):
    transformer = SimpleNamespace(config=SimpleNamespace(guidance_embed=takes))
    monkeypatch.setattr(generation, "open_network", lambda location, name, params: transformer)
    assert generation.takes_guidance(Cell(name="x", checkpoint="x")) is takes
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cell 'x': There are no weights at "):
        generation.takes_guidance(Cell(name="x", checkpoint="no/where"))


@pytest.mark.slow
def test_eight_devices_give_the_same_results(done, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "make_mesh", lambda config: mesh_of(8))
    summary = evaluate(runs.config, tmp_path, {})
    for name in NAMES:
        for set_name in ("edits", "sessions"):
            rows = Done(tmp_path, {}, []).scores(name, set_name)
            for row, expected in zip(rows, done.scores(name, set_name), strict=True):
                assert row["id"] == expected["id"]
                assert row["l1"] == pytest.approx(expected["l1"], abs=2e-3)  # half a level of 255
    for set_name, checkpoints in summary["losses"].items():
        for name, losses in checkpoints.items():
            expected = done.summary["losses"][set_name][name]
            assert losses["count"] == expected["count"]
            assert losses["mean"] == pytest.approx(expected["mean"], rel=1e-5)


def test_kontext_bench_end_to_end(runs, tmp_path):
    write_miniature_kontext_bench(tmp_path / "bench")
    config = dataclasses.replace(
        runs.config,
        cells=runs.config.cells[1:2],
        sets=(SetConfig(name="KontextBench", kind="kontext_bench", path=str(tmp_path / "bench")),),
        loss_sets=(),
    )
    summary = evaluate(config, tmp_path / "out", {})
    results = summary["cells"][NAMES[1]]["sets"]["KontextBench"]
    categories = {"local", "global", "text", "style", "character", "all"}
    assert results["count"].keys() == categories
    assert results["metrics"]["efflite0_context"]["category"].keys() == categories
    assert "l1" not in results["metrics"] and not results["whole"]  # it has no targets
    page = (tmp_path / "out" / "report.html").read_text()
    assert "KontextBench" in page and "character" in page

    table = tmp_path / "bench" / "test" / "metadata.jsonl"
    table.write_text(table.read_text().replace("Style Reference", "Style Transfer"))
    with pytest.raises(ValueError, match="Style Transfer"):
        evaluate(config, tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


def test_a_missing_run_is_an_error_with_the_cell_before_any_work(runs, tmp_path):
    config = runs.config
    config.cells += (Cell(name="lost", checkpoint=f"{tmp_path}/nowhere@5"),)
    with pytest.raises(FileNotFoundError, match="cell 'lost': There is no run with checkpoints in"):
        evaluate(config, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_location_without_weights_is_an_error_with_the_cell(runs, tmp_path):
    config = dataclasses.replace(
        runs.config, cells=(Cell(name="odd", checkpoint=str(tmp_path)),), loss_sets=()
    )
    with pytest.raises(ValueError, match="cell 'odd': There are no weights at"):
        evaluate(config, tmp_path / "out", {})


def test_cell_names_are_unique_and_their_sets_exist(runs):
    with pytest.raises(ValueError, match="cell names must be unique; 'copy' is used twice"):
        dataclasses.replace(runs.config, cells=(*runs.config.cells, runs.config.cells[3]))
    cells = (dataclasses.replace(runs.config.cells[0], sets=("edits", "others")),)
    with pytest.raises(ValueError, match=f"cell '{NAMES[0]}' names the set 'others', which is"):
        dataclasses.replace(runs.config, cells=cells)


def test_mlperf_s_protocol_needs_all_of_its_examples(runs, tmp_path):
    config = dataclasses.replace(runs.config, sets=(), loss=MLPERF)
    with pytest.raises(ValueError, match="has 29696 examples, but this one has 6: "):
        evaluate(config, tmp_path / "out", {})


def test_a_cell_can_be_limited_to_some_sets(runs, tmp_path):
    cells = (dataclasses.replace(runs.config.cells[3], sets=("sessions",)),)
    config = dataclasses.replace(runs.config, cells=cells)
    summary = evaluate(config, tmp_path, {})
    assert summary["cells"]["copy"]["sets"].keys() == {"sessions"} and not summary["losses"]


def test_all_numbers_are_in_the_csv(done):
    head, *lines = (done.folder / "summary.csv").read_text().splitlines()
    assert head == "cell,set,metric,by,of,mean,low,high,count"
    values = done.summary["cells"]["copy"]["sets"]["edits"]["metrics"]["l1"]["category"]["all"]
    fields = ",".join("" if value is None else str(value) for value in values)
    assert f"copy,edits,l1,category,all,{fields}" in lines
    checkpoint, losses = next(iter(done.summary["losses"]["edits"].items()))
    assert f"{checkpoint},edits,held_out_loss,loss,all,{losses['mean']},,,12" in lines


SWEEP = """
import json
import sys
from pathlib import Path
from kontext_jax.evaluate import EvalConfig, evaluate
from kontext_jax.loading import models
from kontext_jax.settings import from_dict
models.identity_of = lambda networks: {}  # as the runs were saved
evaluate(from_dict(json.loads(sys.argv[1]), EvalConfig), Path(sys.argv[2]), {})
"""


@pytest.mark.slow
def test_a_sweep_killed_at_random_times_gives_the_same_results(runs, tmp_path):
    """SIGKILLs a subprocess at four random times, then lets it finish."""
    config = dataclasses.replace(runs.config, batch_size=1)
    config.judges = dataclasses.replace(config.judges, efflite0=False)
    command = [sys.executable, "-c", SWEEP, json.dumps(to_dict(config))]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([*command, str(tmp_path / "uninterrupted")], env=environment, check=True)
    rng, killed, codes = np.random.default_rng(), tmp_path / "killed", []
    for _ in range(4):
        process = subprocess.Popen([*command, str(killed)], env=environment)
        while not killed.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 6))
        process.send_signal(signal.SIGKILL)
        codes.append(process.wait())
    assert -signal.SIGKILL in codes
    subprocess.run([*command, str(killed)], env=environment, check=True)
    assert files(killed) == files(tmp_path / "uninterrupted")


PROCESS = """
import jax
import os
jax.distributed.initialize(os.environ["ADDRESS"], 2, int(os.environ["PROCESS"]))
"""


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(runs, tmp_path):
    """Two processes with two devices each, equal up to rounding."""
    config = dataclasses.replace(runs.config, cells=runs.config.cells[1:4])
    config.judges = dataclasses.replace(config.judges, efflite0=False)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "ADDRESS": address,
    }
    command = [sys.executable, "-c", PROCESS + SWEEP, json.dumps(to_dict(config))]
    processes = [
        subprocess.Popen([*command, str(tmp_path)], env=environment | {"PROCESS": str(i)})
        for i in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    together = Done(tmp_path, json.loads((tmp_path / "summary.json").read_text()), [])
    alone = evaluate(config, tmp_path / "alone", {})
    for name in (NAMES[1], NAMES[2], "copy"):
        pairs = zip(
            together.scores(name), Done(tmp_path / "alone", {}, []).scores(name), strict=True
        )
        for row, expected in pairs:
            assert row["id"] == expected["id"]
            assert row["l1"] == pytest.approx(expected["l1"], abs=2e-3)
            assert row["edit_success"] == expected["edit_success"]
    for name, losses in alone["losses"]["edits"].items():
        mean = together.summary["losses"]["edits"][name]["mean"]
        assert mean == pytest.approx(losses["mean"], rel=1e-5)


# ---- autoencoders --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoencoders(runs, random_network, tmp_path_factory) -> EvalConfig:
    """A sweep of an exported autoencoder and a run of one with discrete latents."""
    objective = AutoencoderObjectiveConfig(
        autoencoder=AutoencoderConfig(
            channels=4, channel_multipliers=(1, 1, 1), num_res_blocks=1, num_groups=2,
            latent_channels=2, fsq_levels=(4, 2), remat="none",
        )
    )  # fmt: skip
    config = Config(objective=objective, data=DataConfig(path=runs.data))
    params = random_network(lambda: config.make_objective().init(jax.random.key(0)))
    channels = {name: [0.5, 1.0] for name in ("mean", "std", "kurtosis", "kl")}
    latents = {"mean": 0.5, "square": 1.0, "channels": channels}
    workdir = tmp_path_factory.mktemp("discrete")
    exported = str(Path(runs.teacher).parent / "vae")
    return EvalConfig(
        cells=(
            Cell(name="exported", checkpoint=exported),
            Cell(name="discrete", checkpoint=save(workdir, config, params, latents=latents)),
        ),
        sets=(SetConfig(name="edits", path=runs.data),),
        sheet_rows=3,
    )


def test_a_sweep_of_autoencoders_reconstructs_the_targets(autoencoders, tmp_path, monkeypatch):
    """A sweep that is killed in a chunk gives the same results as one that is not."""
    monkeypatch.setattr(generation, "CHUNK", 4)
    summary = evaluate(autoencoders, tmp_path / "whole", {})
    results = {name: cell["sets"]["edits"] for name, cell in summary["cells"].items()}
    assert results["exported"]["whole"].keys() == {"fd_efflite0", "kid_efflite0"}
    assert results["discrete"]["whole"]["bits_per_pixel"] == 3 / 4**2
    assert 1 / 8 <= results["discrete"]["whole"]["code_usage"] <= 1
    assert summary["latents"].keys() == {"discrete"}  # the export is of a network never measured
    [task, *_] = load_sets(autoencoders.sets)[0].tasks
    for cell in autoencoders.cells:
        model = load_autoencoder(cell.checkpoint, mesh_of(1))
        [expected] = reconstruct(model.autoencoder, [task.truth], mesh_of(1))
        image = load_task_image(tmp_path / "whole" / "cells" / "edits" / cell.name, task.id)
        assert np.abs(image.astype(int) - expected).max() <= 1  # batches differ in rounding
        row = Done(tmp_path / "whole", {}, []).scores(cell.name)[0]
        assert row["id"] == task.id and row["l1"] == l1(image, task.truth)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "error × 4" in page and "one of 8 codes per 4 × 4 pixels" in page

    calls = []
    save_images = CellFolder.save

    def stopping(self, images):
        calls.append(len(images))
        save_images(self, dict(list(images.items())[:1]) if len(calls) == 2 else images)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CellFolder, "save", stopping)
        evaluate(autoencoders, tmp_path / "resumed", {})
    assert calls == [4, 2]
    again = evaluate(autoencoders, tmp_path / "resumed", {})
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert again["cells"] == summary["cells"]


def test_an_autoencoder_needs_targets_and_has_no_untrained_baseline(autoencoders, tmp_path):
    cell = autoencoders.cells[1]
    untrained = dataclasses.replace(cell, baseline="untrained")
    with pytest.raises(ValueError, match="cell 'discrete': an autoencoder has no untrained"):
        generation.load_networks(untrained, mesh_of(1), 0)
    task_set = TaskSet("a", [Task("a", (), "do", "local", (8, 8))], "0")
    with pytest.raises(ValueError, match="'discrete': task a of 'a' has no target .* a probe"):
        evaluate_module._check_sweep([cell], [task_set], [], autoencoders, tmp_path)
    for baseline in ("", "reconstruction"):
        assert generation.reconstructs(dataclasses.replace(cell, baseline=baseline))


def test_latents_of_runs_that_are_no_cells_are_in_the_summary(autoencoders):
    [exported, discrete] = autoencoders.cells
    curves = (("run", discrete.checkpoint), ("gone", "no/where"))
    assert evaluate_module._latents_of_runs(curves, [discrete]) == {}
    assert evaluate_module._latents_of_runs(curves, [exported]).keys() == {"run"}
