"""Runs of students: they start from a teacher, resume, generate and are exported."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from kontext_jax.config import Config, SheetConfig
from kontext_jax.convert import convert
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.loading.locations import load_config, open_network
from kontext_jax.loading.models import load_frozen, load_initial, load_model, teacher_time
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowInit
from kontext_jax.objectives.guidance import GuidanceConfig
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.transformer import NetworksInit
from kontext_jax.optim import OptimConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.train import train
from kontext_jax.training.checkpoint import CheckpointConfig, Checkpointer
from kontext_jax.weights.fingerprint import fingerprint, fingerprint_of
from tests.logs import read_log, without_timings

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def compile_once(tmp_path_factory):
    """Shares compiled programs between the runs of one config."""
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", old)


@pytest.fixture(scope="module")
def teacher(world_folder, recipe, tmp_path_factory) -> Config:
    """The config of a finished flow matching run; its workdir is ``teacher`` in a new folder."""
    folder = tmp_path_factory.mktemp("runs")
    config = Config(
        objective=AutoencoderObjectiveConfig(autoencoder=AutoencoderConfig.tiny(channels=8)),
        data=DataConfig(
            path=str(world_folder),
            batch_size=8,
            geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
            packing=PackingConfig(image_tokens=32, text_tokens=80, max_examples=2),
            text=TextConfig(max_tokens=40),
        ),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(every=2),
        sheets=SheetConfig(every=0),
        num_steps=1,
        log_every=1,
    )
    train(config, folder / "autoencoder")
    objective = dataclasses.replace(
        recipe.objective.config, init_from=FlowInit(autoencoder=str(folder / "autoencoder"))
    )
    # FLUX's modulations and last layer start at zero: prompts have no effect for two steps.
    config = dataclasses.replace(config, objective=objective, num_steps=3)
    train(config, folder / "teacher")
    return config


def student(teacher: Config, kind, num_steps: int, transformer=None, **settings) -> Config:
    autoencoder = teacher.objective.init_from.autoencoder
    run = str(Path(autoencoder).parent / "teacher")
    objective = kind(
        transformer=transformer or teacher.objective.transformer,
        text_encoder=teacher.objective.text_encoder,
        pooled="mean",
        init_from=NetworksInit(transformer=run, text_encoder=run, autoencoder=autoencoder),
        **settings,
    )
    return dataclasses.replace(teacher, objective=objective, num_steps=num_steps)


def ladd(teacher: Config, num_steps: int) -> Config:
    return student(
        teacher,
        LaddConfig,
        num_steps,
        heads=HeadsConfig(width=8, dtype="float32"),
        heads_optim=OptimConfig(learning_rate=1e-2, b1=0.0, warmup_steps=0),
    )


def metrics_of(workdir: Path) -> list[dict]:
    return list(map(without_timings, read_log(workdir)))


def test_student_starts_with_the_weights_of_its_teacher(teacher):
    config = ladd(teacher, 1)
    mesh = make_mesh(MeshConfig())
    frozen, initial = load_frozen(config, mesh), load_initial(config, mesh)
    transformer = initial["student"]["transformer"]
    jax.tree.map(np.testing.assert_array_equal, transformer, frozen["teacher"])
    assert set(frozen) == {"autoencoder", "teacher", "text_encoder"}
    stored = open_network(config.objective.init_from.transformer, "transformer")
    assert fingerprint(frozen["teacher"]) == fingerprint_of(stored)
    # The teacher is sampled with its own schedule, the student at its training times.
    assert teacher_time(config) == teacher.objective.time != config.objective.time


@pytest.mark.parametrize(("setting", "computed"), [("", "float32"), ("bfloat16", "bfloat16")])
def test_the_dtype_of_the_frozen_autoencoder_is_its_own_or_the_setting(teacher, setting, computed):
    config = student(teacher, LaddConfig, 1, autoencoder_dtype=setting)
    frozen = load_frozen(config, make_mesh(MeshConfig()), only=["autoencoder"])
    assert frozen["autoencoder"].config.dtype == computed
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"float32"}


def test_resumed_run_repeats_an_uninterrupted_run(teacher, tmp_path):
    """Networks, optimizer moments, averages and random draws: every metric is bitwise equal."""
    config = ladd(teacher, 6)
    train(config, tmp_path / "uninterrupted")
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=3))
    save = Checkpointer.save

    class Killed(Exception):
        pass

    def save_and_die(self, state, *args):
        save(self, state, *args)
        if int(state.step) == 3:
            self._manager.wait_until_finished()
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpointer, "save", save_and_die)
        train(config, tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    uninterrupted, resumed = (metrics_of(tmp_path / run) for run in ("uninterrupted", "resumed"))
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    assert resumed == uninterrupted
    assert len({line["student/loss"] for line in uninterrupted}) == 6


def test_student_is_loaded_and_exported_like_any_model(teacher, tmp_path):
    train(ladd(teacher, 2), tmp_path / "student")
    model = load_model(tmp_path / "student", make_mesh(MeshConfig()))
    assert "teacher" not in model.networks and "transformer" in model.networks
    assert model.objective.time.shift == "none"
    convert(tmp_path / "student", tmp_path / "exported", "orbax")
    for location in (tmp_path / "student", tmp_path / "exported"):
        reader = open_network(location, "transformer")
        assert fingerprint_of(reader) == fingerprint(model.networks["transformer"])
    teacher_run = load_config(tmp_path / "student").objective.init_from.transformer
    untrained = open_network(teacher_run, "transformer")
    assert fingerprint_of(untrained) != fingerprint(model.networks["transformer"])


def test_resuming_with_another_teacher_is_refused(teacher, tmp_path):
    config = ladd(teacher, 1)
    train(config, tmp_path)
    teacher_run = Path(config.objective.init_from.transformer)
    shorter = dataclasses.replace(teacher, num_steps=2)
    train(shorter, tmp_path / "other")
    changed = dataclasses.replace(
        config.objective.init_from,
        transformer=str(tmp_path / "other"),
        text_encoder=str(tmp_path / "other"),
    )
    config = dataclasses.replace(
        config, num_steps=2, objective=dataclasses.replace(config.objective, init_from=changed)
    )
    with pytest.raises(
        ValueError, match="This run was started with another teacher and text_encoder"
    ):
        train(config, tmp_path)
    assert teacher_run.exists()


def test_guidance_student_gains_the_input_that_its_teacher_lacks(teacher, tmp_path):
    transformer = dataclasses.replace(teacher.objective.transformer, guidance_embed=True)
    data = dataclasses.replace(teacher.data, negatives=True)
    config = student(
        dataclasses.replace(teacher, data=data), GuidanceConfig, 2, transformer=transformer
    )
    mesh = make_mesh(MeshConfig())
    initial = load_initial(config, mesh)["student"]["transformer"]
    assert not np.any(initial.guidance_in.out_layer.kernel[...])
    assert np.any(initial.guidance_in.in_layer.kernel[...])
    train(config, tmp_path)
    assert all(np.isfinite(line["student/loss"]) for line in metrics_of(tmp_path))
    model = load_model(tmp_path, mesh)
    assert np.any(model.networks["transformer"].guidance_in.out_layer.kernel[...])
