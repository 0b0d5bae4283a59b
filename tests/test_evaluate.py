"""A sweep over runs made by hand: a teacher, and a student that is still the same.

In one step both methods of sampling do the same. So the teacher's cell and the student's must make
the same pictures in one step, given the same tasks and noise.
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
from kontext_jax.evaluation import generation, judges
from kontext_jax.evaluation.cell_folder import CellFolder
from kontext_jax.evaluation.held_out_loss import MLPERF
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import Set, SetConfig, load_sets
from kontext_jax.geometry import GeometryConfig, resize, size_of
from kontext_jax.loading import models
from kontext_jax.loading.models import Model
from kontext_jax.metrics.pixels import l1
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.objectives.flow_matching import FlowInit, networks_of
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.transformer import NetworksInit
from kontext_jax.sampler import SamplerConfig
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


def save(workdir: Path, config: Config, params: dict) -> str:
    zero = jnp.zeros((), jnp.int32)
    with closing(Checkpointer(workdir, CheckpointConfig())) as checkpointer:
        state = TrainState(zero, zero, zero, params, {player: zero for player in params}, params)
        meta = {"config": to_dict(config), "metrics": {}, "frozen": {}}
        checkpointer.save(state, {}, meta)
    return str(workdir)


@pytest.fixture(scope="module")
def patched(random_network, tmp_path_factory):
    """What takes long is cut short: one device, a tiny EfficientNet, and no fingerprints."""
    tiny = EfficientNetConfig.tiny()
    network = random_network(lambda: EfficientNet(tiny, rngs=nnx.Rngs(0)))
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "make_mesh", lambda config: mesh_of(1))
        patch.setattr(judges, "load_lite0", lambda mesh, config: network)
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

    def scores(self, cell: str, each: str = "edits") -> list[dict]:
        lines = (self.cell(cell, each) / "scores.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def cell(self, cell: str, each: str = "edits") -> Path:
        return self.folder / "cells" / each / evaluate_module.folder_name(cell)


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory) -> Done:
    loaded = []
    load_model = generation.load_model

    def watched(place, mesh, params):
        loaded.append(place)
        return load_model(place, mesh, params)

    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load_model", watched)
        summary = evaluate(runs.config, folder, {"flow": 2.0})
    return Done(folder, summary, loaded)


def test_cells_get_the_same_tasks_and_noise(done):
    other, teacher, student = (done.scores(name) for name in NAMES[:3])
    assert teacher == student and other != teacher
    assert len({row["l1"] for row in teacher}) == 6
    assert [row["id"] for row in other] == [row["id"] for row in teacher]
    found = [done.summary["cells"][name]["sets"]["edits"] for name in NAMES[1:3]]
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["whole"] == found[1]["whole"]


def test_cells_of_one_run_share_its_networks(done, runs):
    assert done.loaded == [f"{runs.teacher}@0", f"{runs.student}@0", f"{runs.teacher}@0"]


def test_every_task_is_scored_once_and_its_picture_kept(done):
    for name in NAMES:
        for each, number in (("edits", 6), ("sessions", 4)):
            ids = [row["id"] for row in done.scores(name, each)]
            assert len(set(ids)) == len(ids) == number
            assert len(list((done.cell(name, each) / "images").iterdir())) == number
            assert done.summary["cells"][name]["sets"][each]["count"]["all"] == number


def test_the_summary_is_of_the_lines_and_not_of_their_means(done):
    rows = done.scores(NAMES[0])
    found = done.summary["cells"][NAMES[0]]["sets"]["edits"]
    mean, low, high, count = found["metrics"]["l1"]["category"]["all"]
    assert count == 6 and mean == pytest.approx(np.mean([row["l1"] for row in rows]), rel=1e-12)
    assert low is high is None  # of six tasks
    parts = found["metrics"]["l1"]["category"]
    assert parts.keys() == found["count"].keys() and len(parts) > 2
    weighted = sum(parts[name][0] * found["count"][name] for name in parts if name != "all")
    assert weighted / 6 == pytest.approx(mean)
    assert found["whole"].keys() == {"fd_efflite0", "kid_efflite0"}
    assert json.loads((done.folder / "summary.json").read_text()) == json.loads(
        json.dumps(done.summary)
    )


def test_a_copy_keeps_everything_and_does_nothing(done):
    found = done.summary["cells"]["copy"]["sets"]["edits"]
    edits = [row for row in done.scores("copy") if row["category"] != "text_to_image"]
    assert {row["edit_success"] for row in edits} == {0.0} and not found["speed"]
    assert all(row["efflite0_context"] > 1 - 1e-6 for row in edits)


def test_speed_is_told_with_compiling_apart(done):
    speed = done.summary["cells"][NAMES[0]]["sets"]["edits"]["speed"]
    assert speed["seconds_per_image"] * speed["images_per_second_per_chip"] == pytest.approx(1)
    assert speed["compile_seconds"] > 0 and speed["chips"] == 1
    lines = (done.cell(NAMES[0]) / "batches.jsonl").read_text().splitlines()
    batches = [line for line in map(json.loads, filter(None, lines)) if "seconds" in line]
    assert sum(line["images"] for line in batches) == 6
    assert sum(line["seconds"] for line in batches) / 6 == speed["seconds_per_image"]


def test_a_turn_starts_from_the_picture_of_the_turn_before(runs, tmp_path, monkeypatch):
    given = {}
    examples_of = generation.examples_of

    def watched(tasks, made, data):
        examples = examples_of(tasks, made, data)
        given.update((e.id, e.contexts[0]) for e in examples if e.contexts)
        return examples

    monkeypatch.setattr(generation, "examples_of", watched)
    config = dataclasses.replace(
        runs.config, cells=runs.config.cells[1:2], sets=runs.config.sets[1:], loss_sets=()
    )
    evaluate(config, tmp_path, {})
    images = tmp_path / "cells" / "sessions" / "teacher_1" / "images"
    for session in ("world%2Fsession%2F0%2F000000", "world%2Fsession%2F0%2F000001"):
        name = session.replace("%2F", "/")
        np.testing.assert_array_equal(given[f"{name}/2"], load_image(images / f"{session}%2F1.png"))
        assert np.abs(given[f"{name}/1"].astype(int) - given[f"{name}/2"]).max() > 3


def test_prompts_and_contexts_are_never_dropped(done, runs, tmp_path, monkeypatch):
    """Of a run that trained on examples without theirs: dropout left on would show."""
    load_model = generation.load_model

    def dropping(place, mesh, params):
        model = load_model(place, mesh, params)
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
    """All that results are made of; not how long they took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted([*folder.rglob("*.png"), *folder.rglob("scores.jsonl")])
        + sorted([*folder.rglob("whole.json"), *folder.glob("losses/*/*.jsonl")])
    }


@pytest.mark.parametrize("moment", [1, 3, 7, 12])
def test_stopped_and_started_again_it_comes_to_the_same(done, runs, tmp_path, monkeypatch, moment):
    """Stopped in the midst of the pictures of a batch, of a turn, of the last cell."""
    calls = 0
    save = CellFolder.save

    def stopping(self, pictures):
        nonlocal calls
        calls += 1
        if calls == moment:
            save(self, dict(list(pictures.items())[:1]))
            raise KeyboardInterrupt
        save(self, pictures)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CellFolder, "save", stopping)
        evaluate(runs.config, tmp_path, {})
    assert not (tmp_path / "summary.json").exists()
    summary = evaluate(runs.config, tmp_path, {})
    assert files(tmp_path) == files(done.folder)
    for name, cell in done.summary["cells"].items():
        for each, found in cell["sets"].items():
            again = summary["cells"][name]["sets"][each]
            assert {k: v for k, v in again.items() if k != "speed"} == {
                k: v for k, v in found.items() if k != "speed"
            }
    assert summary["losses"] == done.summary["losses"]


def test_finished_it_samples_nothing_and_a_new_judge_looks_at_what_is_there(
    done, runs, tmp_path, monkeypatch
):
    config = dataclasses.replace(runs.config, cells=runs.config.cells[1:2], loss_sets=())
    evaluate(config, tmp_path, {})
    monkeypatch.setattr(generation, "Generator", None)
    evaluate(config, tmp_path, {})
    config.judges = dataclasses.replace(config.judges, efflite0=False)
    summary = evaluate(config, tmp_path, {})
    found = summary["cells"][NAMES[1]]["sets"]["edits"]
    assert not found["whole"] and "efflite0" not in found["metrics"] and "l1" in found["metrics"]


def of_copies(runs: Runs) -> EvalConfig:
    """What needs no network, on one set."""
    cells, sets = runs.config.cells[3:4], runs.config.sets[:1]
    config = dataclasses.replace(runs.config, cells=cells, sets=sets, loss_sets=())
    config.judges = dataclasses.replace(config.judges, efflite0=False)
    return config


@pytest.mark.parametrize("name", ["scores.jsonl", "whole.json"])
def test_what_was_damaged_is_judged_again(runs, tmp_path, name):
    first = evaluate(of_copies(runs), tmp_path, {})
    before = files(tmp_path)
    file = tmp_path / "cells" / "edits" / "copy" / name
    file.write_bytes(file.read_bytes()[:-30])
    again = evaluate(of_copies(runs), tmp_path, {})
    assert files(tmp_path) == before and again["cells"] == first["cells"]


def test_a_finished_cell_gets_back_a_picture_that_is_lost(runs, tmp_path, monkeypatch):
    evaluate(of_copies(runs), tmp_path, {})
    before = files(tmp_path)
    first, second, *_ = sorted((tmp_path / "cells" / "edits" / "copy" / "images").iterdir())
    asked = []
    decide = evaluate_module._everywhere

    def watched(value):
        asked.append(value)
        return decide(value)

    monkeypatch.setattr(evaluate_module, "_everywhere", watched)
    evaluate(of_copies(runs), tmp_path, {})
    first.unlink()
    second.write_bytes(b"")
    evaluate(of_copies(runs), tmp_path, {})
    assert files(tmp_path) == before
    assert asked == [True, False]


def test_a_record_tells_models_apart_by_how_their_networks_are_used(recipe):
    data = DataConfig(geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8))
    networks = networks_of(recipe.params["model"], recipe.frozen)
    model = Model(recipe.objective.config, data, networks, {"transformer": ["0"]})
    cell, tasks = Cell(name="x", checkpoint="x"), Set("edits", [], "0")

    def record(model: Model | None) -> dict:
        return generation.record_of(cell, tasks, model, 0)

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
        generation.OF_MODELS
    )


def test_pictures_are_judged_at_the_size_that_was_asked_for(tmp_path):
    """Smaller ones hide what is wrong with them."""
    seen = []

    def judge(outputs):
        seen.extend([*outputs.sizes, *map(size_of, outputs.truths)])
        return judges.judge_pixels(outputs)

    truth = np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8)
    task = Task("a", (), "do", "local", (48, 24), truth=truth)
    folder = CellFolder(tmp_path, {})
    panel = judges.JudgePanel([judge], {}, {})
    small = resize(truth, (24, 12))
    [row], _ = evaluate_module._judge(panel, Set("edits", [task], "0"), folder, [small])
    assert seen == [(48, 24)] * 2
    assert row["l1"] == l1(resize(small, (48, 24)), truth) > 0.1


def test_pictures_of_other_settings_are_refused_before_anything_is_made(
    done, runs, tmp_path, monkeypatch
):
    """Even those of the last cell, whose networks would be loaded last."""
    (tmp_path / "cells" / "edits").mkdir(parents=True)
    (tmp_path / "cells" / "edits" / "untrained").symlink_to(done.cell("untrained"))
    before = files(tmp_path)
    monkeypatch.setattr(evaluate_module, "load_networks", None)
    config = dataclasses.replace(runs.config, seed=1)
    with pytest.raises(ValueError, match="untrained holds pictures of another seed: give another"):
        evaluate(config, tmp_path, {})
    assert files(tmp_path) == before and len(list((tmp_path / "cells" / "edits").iterdir())) == 1


def test_other_weights_are_refused_once_they_are_known(runs, tmp_path):
    evaluate(of_copies(runs), tmp_path, {})
    file = tmp_path / "cells" / "edits" / "copy" / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": {"transformer": ["0"]}}))
    with pytest.raises(ValueError, match="copy holds pictures of another weights: "):
        evaluate(of_copies(runs), tmp_path, {})


@pytest.mark.parametrize("inside", ["", "below/it"])
def test_a_file_is_no_workdir(runs, tmp_path, monkeypatch, inside):
    monkeypatch.setattr(evaluate_module, "load_sets", None)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file, and --workdir is to be a folder"):
        evaluate(runs.config, tmp_path / "notes" / inside, {})


def test_losses_that_are_not_the_same_have_files_of_their_own(tmp_path):
    """Names that look alike or are too long; then other settings, other tasks, another set."""
    mine, each = LossConfig(), Set("edits", [], "0")
    asked = [
        ("r/x@30 ema", each, mine),
        ("r_x@30 ema", each, mine),
        ("/" + "夜" * 300 + "@30 ema", each, mine),
        ("/" + "夜" * 301 + "@30 ema", each, mine),
        ("r/x@30 ema", each, LossConfig(num_times=3)),
        ("r/x@30 ema", each._replace(fingerprint="1"), mine),
        ("r/x@30 ema", each._replace(name="others"), mine),
    ]
    made = [evaluate_module._losses_file(tmp_path, *one) for one in asked]
    for file in made:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert len(set(made)) == len(asked)
    assert made[0].parent == tmp_path / "losses" / "edits"
    assert made[0].name.startswith("r_x@30_ema-")
    assert made == [evaluate_module._losses_file(tmp_path, *one) for one in asked]


def not_numbers(monkeypatch) -> None:
    """What a run that diverged has in the place of its transformer's weights."""
    load_model = generation.load_model

    def diverged(place, mesh, params):
        model = load_model(place, mesh, params)
        broken = jax.tree.map(lambda x: x * jnp.nan, model.networks["transformer"])
        return model._replace(networks=model.networks | {"transformer": broken})

    monkeypatch.setattr(generation, "load_model", diverged)


def test_pictures_of_what_is_not_finite_are_refused(runs, tmp_path, monkeypatch):
    not_numbers(monkeypatch)
    config = dataclasses.replace(runs.config, cells=runs.config.cells[1:2], loss_sets=())
    with pytest.raises(ValueError, match=f"^cell '{NAMES[1]}': the numbers .* are not finite. The"):
        evaluate(config, tmp_path, {})
    assert not list(tmp_path.rglob("*.png"))


def test_losses_that_are_not_finite_are_refused(runs, tmp_path, monkeypatch):
    not_numbers(monkeypatch)
    config = dataclasses.replace(runs.config, cells=runs.config.cells[1:2], sets=())
    with pytest.raises(ValueError, match="held-out loss of .*teacher@0 ema is not finite for "):
        evaluate(config, tmp_path, {})


def test_the_summary_is_json_that_everyone_reads(runs, tmp_path):
    def constant(name):
        raise AssertionError(f"{name} is no JSON")

    evaluate(of_copies(runs), tmp_path, {"data": float("inf"), "flow": float("nan"), "rest": 2.5})
    text = (tmp_path / "summary.json").read_text()
    seconds = json.loads(text, parse_constant=constant)["seconds"]
    assert (seconds["data"], seconds["flow"], seconds["rest"]) == (None, None, 2.5)


def test_the_summary_says_what_was_measured(done, runs, tmp_path):
    found = json.loads((done.folder / "summary.json").read_text())
    assert found["config"] == to_dict(runs.config)
    record = json.loads((done.cell("copy") / "record.json").read_text())
    edits = {"num_tasks": 6, "fingerprint": record["tasks"], "held_out": True}
    assert found["sets"]["edits"] == edits
    assert found["loss_sets"] == {"edits": found["sets"]["edits"]}
    assert found["sets"]["sessions"]["fingerprint"] != record["tasks"]


def test_a_judge_that_is_left_out_is_told(runs, tmp_path, monkeypatch, capsys):
    def missing(mesh, config):
        raise FileNotFoundError("there is no file of it.")

    monkeypatch.setattr(judges, "load_lite0", missing)
    config = of_copies(runs)
    config.judges = dataclasses.replace(config.judges, efflite0=True)
    evaluate(config, tmp_path, {})
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "judge efflite0 is left out: there is no file of it."
    assert len(others) == 1


def test_tables_are_written_when_the_report_is(runs, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(of_copies(runs), tmp_path, {})
    assert not (tmp_path / "summary.csv").exists() and not (tmp_path / "summary.json").exists()


def test_a_turn_s_longest_compilation_counts():
    def turn(number: int, seconds: float) -> dict:
        return {"turn": number, "device": "x", "chips": 1, "compile_seconds": seconds}

    batch = {"turn": 1, "device": "x", "chips": 2, "batch": 0, "images": 4, "seconds": 8.0}
    lines = [turn(1, 40.0), batch, turn(1, 3.0), turn(2, 2.0), batch, turn(2, 5.0)]
    speed = evaluate_module._speed(lines)
    assert speed["compile_seconds"] == 45.0 and speed["seconds_per_image"] == 2.0


def test_starts_on_other_devices_have_rates_of_their_own():
    """Those of the devices that made the most images count."""

    def batch(device: str, chips: int, images: int, seconds: float) -> dict:
        about = {"turn": 1, "device": device, "chips": chips}
        return about | {"images": images, "seconds": seconds}

    lines = [batch("x", 8, 3, 9.0), batch("x", 4, 4, 8.0), batch("y", 8, 4, 1.0)]
    lines.append(batch("x", 4, 1, 2.0))
    assert evaluate_module._speed(lines) == {
        "seconds_per_image": 2.0,
        "images_per_second_per_chip": 0.125,
        "compile_seconds": 0.0,
        "device": "x",
        "chips": 4,
    }


def test_overrides_change_this_sweep_alone():
    """A config holds MLPerf's own settings, and cells may share theirs."""
    sampler, each = SamplerConfig(), SetConfig(name="a", path="a")
    cell = Cell(name="x", checkpoint="x", sampler=sampler)
    config = EvalConfig(
        cells=(cell, Cell(name="y", checkpoint="y", sampler=sampler)),
        sets=(each,),
        loss_sets=(each,),
        loss=MLPERF,
    )
    assert config.loss == MLPERF
    config.loss.num_times = 4
    config.cells[0].sampler.num_steps = 1
    config.sets[0].num_examples = 7
    assert MLPERF.num_times == 8 and config.loss != MLPERF
    assert cell.sampler.num_steps == config.cells[1].sampler.num_steps == 28
    assert each.num_examples == config.loss_sets[0].num_examples == 0


def test_a_changed_protocol_is_not_mlperf_s(runs, tmp_path, monkeypatch):
    config = dataclasses.replace(runs.config, sets=(), loss=MLPERF)
    checked = []
    monkeypatch.setattr(evaluate_module, "check_mlperf", checked.append)
    loss_sets = load_sets(config.loss_sets)
    evaluate_module._check([], [], loss_sets, config, tmp_path)
    assert checked == [6]
    config.loss.num_times = 4
    evaluate_module._check([], [], loss_sets, config, tmp_path)
    assert checked == [6]


@pytest.mark.parametrize("setting", ["batch_size", "sheet_rows"])
def test_negative_numbers_are_refused(runs, setting):
    with pytest.raises(ValueError, match=f"{setting} -3 must be 0"):
        dataclasses.replace(runs.config, **{setting: -3})


def test_a_config_of_training_is_refused(tmp_path, monkeypatch):
    flags = SimpleNamespace(config=Config(), workdir=str(tmp_path), distributed=False, seconds=[])
    monkeypatch.setattr(evaluate_module, "flags", SimpleNamespace(FLAGS=flags))
    with pytest.raises(cli.UserError, match="EvalConfig"):
        evaluate_module.main()


def test_values_of_an_input_that_there_is_not_are_not_compared(runs, tmp_path, monkeypatch):
    def cell(name: str, guidance: float, **more) -> Cell:
        sampler = SamplerConfig(num_steps=1, guidance=guidance)
        return Cell(name=name, checkpoint=runs.teacher, sampler=sampler, **more)

    check = evaluate_module._check_guidance
    same, other = cell("2.5", 2.5), cell("4", 4.0)
    sentence = "cells '2.5' and '4' differ by guidance alone, .* leave one out"
    config = dataclasses.replace(runs.config, cells=(same, other))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=sentence):
        patch.setattr(evaluate_module, "load_sets", None)
        evaluate(config, tmp_path, {})
    check([same, cell("again", 2.5)])
    check([same, cell("raw", 4.0, params="params")])
    check([same, cell("shifted", 4.0, shift="resolution")])
    check([cell("a", 1.0, baseline="reconstruction"), cell("b", 2.0, baseline="reconstruction")])
    with pytest.raises(ValueError, match="cells 'a' and 'b' differ"):
        check([cell("a", 1.0, baseline="untrained"), cell("b", 2.0, baseline="untrained")])
    monkeypatch.setattr(evaluate_module, "takes_guidance", lambda cell: True)
    check([same, other])


@pytest.mark.parametrize("takes", [True, False])
def test_a_place_says_whether_guidance_is_an_input(monkeypatch, takes):
    transformer = SimpleNamespace(config=SimpleNamespace(guidance_embed=takes))
    monkeypatch.setattr(generation, "open_network", lambda place, name, params: transformer)
    assert generation.takes_guidance(Cell(name="x", checkpoint="x")) is takes
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cell 'x': There are no weights at "):
        generation.takes_guidance(Cell(name="x", checkpoint="no/where"))


@pytest.mark.slow
def test_eight_devices_come_to_the_same(done, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "make_mesh", lambda config: mesh_of(8))
    summary = evaluate(runs.config, tmp_path, {})
    for name in NAMES:
        for each in ("edits", "sessions"):
            for mine, others in zip(
                Done(tmp_path, {}, []).scores(name, each), done.scores(name, each), strict=True
            ):
                assert mine["id"] == others["id"]
                assert mine["l1"] == pytest.approx(others["l1"], abs=2e-3)  # half a level of 255
    for each, losses in summary["losses"].items():
        for name, found in losses.items():
            expected = done.summary["losses"][each][name]
            assert found["count"] == expected["count"]
            assert found["mean"] == pytest.approx(expected["mean"], rel=1e-5)


def test_kontext_bench_is_read_run_and_reported(runs, tmp_path):
    write_miniature_kontext_bench(tmp_path / "bench")
    config = dataclasses.replace(
        runs.config,
        cells=runs.config.cells[1:2],
        sets=(SetConfig(name="KontextBench", kind="kontext_bench", path=str(tmp_path / "bench")),),
        loss_sets=(),
    )
    summary = evaluate(config, tmp_path / "out", {})
    found = summary["cells"][NAMES[1]]["sets"]["KontextBench"]
    categories = {"local", "global", "text", "style", "character", "all"}
    assert found["count"].keys() == categories
    assert found["metrics"]["efflite0_context"]["category"].keys() == categories
    assert "l1" not in found["metrics"] and not found["whole"]  # there are no truths
    page = (tmp_path / "out" / "report.html").read_text()
    assert "KontextBench" in page and "character" in page

    table = tmp_path / "bench" / "test" / "metadata.jsonl"
    table.write_text(table.read_text().replace("Style Reference", "Style Transfer"))
    with pytest.raises(ValueError, match="Style Transfer"):
        evaluate(config, tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


def test_a_missing_run_is_told_with_the_cell_before_anything_is_made(runs, tmp_path):
    config = runs.config
    config.cells += (Cell(name="lost", checkpoint=f"{tmp_path}/nowhere@5"),)
    with pytest.raises(FileNotFoundError, match="cell 'lost': There is no run with checkpoints in"):
        evaluate(config, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_run_that_makes_no_pictures_is_told_with_the_cell(runs, tmp_path):
    config = dataclasses.replace(
        runs.config, cells=(Cell(name="odd", checkpoint=str(tmp_path)),), loss_sets=()
    )
    with pytest.raises(ValueError, match="cell 'odd': There are no weights at"):
        evaluate(config, tmp_path / "out", {})


def test_names_are_for_one_cell_and_those_of_sets_exist(runs):
    with pytest.raises(ValueError, match="names of their own; 'copy' is there twice"):
        dataclasses.replace(runs.config, cells=(*runs.config.cells, runs.config.cells[3]))
    cells = (dataclasses.replace(runs.config.cells[0], sets=("edits", "others")),)
    with pytest.raises(ValueError, match=f"cell '{NAMES[0]}' is for 'others', which is no set"):
        dataclasses.replace(runs.config, cells=cells)


def test_mlperf_s_protocol_wants_all_of_its_examples(runs, tmp_path):
    config = dataclasses.replace(runs.config, sets=(), loss=MLPERF)
    with pytest.raises(ValueError, match="has 29696 examples, this one 6"):
        evaluate(config, tmp_path / "out", {})


def test_a_cell_may_be_for_some_sets_only(runs, tmp_path):
    cells = (dataclasses.replace(runs.config.cells[3], sets=("sessions",)),)
    config = dataclasses.replace(runs.config, cells=cells)
    summary = evaluate(config, tmp_path, {})
    assert summary["cells"]["copy"]["sets"].keys() == {"sessions"} and not summary["losses"]


def test_numbers_go_to_a_table(done):
    head, *lines = (done.folder / "summary.csv").read_text().splitlines()
    assert head == "cell,set,metric,by,of,mean,low,high,count"
    found = done.summary["cells"]["copy"]["sets"]["edits"]["metrics"]["l1"]["category"]["all"]
    told = ",".join("" if value is None else str(value) for value in found)
    assert f"copy,edits,l1,category,all,{told}" in lines
    checkpoint, losses = next(iter(done.summary["losses"]["edits"].items()))
    assert f"{checkpoint},edits,held_out_loss,loss,all,{losses['mean']},,,12" in lines


KILLED = """
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
def test_killed_at_random_moments_it_comes_to_the_same(runs, tmp_path):
    """By SIGKILL, in a process of its own, again and again until it gets through."""
    config = dataclasses.replace(runs.config, batch_size=1)
    config.judges = dataclasses.replace(config.judges, efflite0=False)
    command = [sys.executable, "-c", KILLED, json.dumps(to_dict(config))]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True)
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
    assert files(killed) == files(tmp_path / "whole")


PROCESS = """
import jax
import os
jax.distributed.initialize(os.environ["ADDRESS"], 2, int(os.environ["PROCESS"]))
"""


@pytest.mark.slow
def test_two_processes_share_the_work(runs, tmp_path):
    """Each with two devices; what one alone leaves, to rounding."""
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
    command = [sys.executable, "-c", PROCESS + KILLED, json.dumps(to_dict(config))]
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
        for mine, other in pairs:
            assert mine["id"] == other["id"]
            assert mine["l1"] == pytest.approx(other["l1"], abs=2e-3)
            assert mine["edit_success"] == other["edit_success"]
    for name, losses in alone["losses"]["edits"].items():
        found = together.summary["losses"]["edits"][name]
        assert found["mean"] == pytest.approx(losses["mean"], rel=1e-5)
