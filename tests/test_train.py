"""Whole runs, as short as they can be."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kontext_jax import train as train_module
from kontext_jax.config import Config, SheetConfig, ValidationConfig
from kontext_jax.data import store
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, Loader
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.loading.locations import load_config, open_network
from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.settings import to_dict
from kontext_jax.toy_data import world
from kontext_jax.train import train
from kontext_jax.training.checkpoint import CheckpointConfig, Checkpointer
from kontext_jax.training.preemption import MAX_STEPS_AHEAD, Preempted
from kontext_jax.training.telemetry import TrainingStopped
from kontext_jax.training.train_state import TrainState
from kontext_jax.training.writer import Writer
from kontext_jax.weights.fingerprint import fingerprint_of
from tests.logs import timeless


@pytest.fixture(autouse=True, scope="module")
def compile_once(tmp_path_factory):
    """Runs of one config share their compiled programs."""
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", old)


def config_of(objective, folder: Path, num_steps: int, **optim) -> Config:
    return Config(
        objective=objective,
        data=DataConfig(
            path=str(folder),
            batch_size=8,
            caption_dropout=0.2,
            geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
            packing=PackingConfig(image_tokens=32, text_tokens=80, max_examples=2),
            text=TextConfig(max_tokens=40),
        ),
        optim=OptimConfig(**({"learning_rate": 1e-3, "warmup_steps": 2} | optim)),
        checkpoint=CheckpointConfig(every=6),
        sheets=SheetConfig(every=0),
        num_steps=num_steps,
        log_every=1,
        max_skipped_in_a_row=3,
    )


def autoencoder_config(folder: Path, levels: int = 3, **optim) -> Config:
    network = AutoencoderConfig.tiny(channels=8, channel_multipliers=(1,) * levels)
    return config_of(AutoencoderObjectiveConfig(autoencoder=network), folder, 6, **optim)


def flow_config(folder: Path, autoencoder: Path) -> Config:
    objective = FlowMatchingConfig(
        pooled="mean",
        transformer=FluxConfig.tiny(
            hidden_size=32,
            num_heads=2,
            depth=1,
            depth_single=1,
            axes_dim=(4, 6, 6),
            vec_in_dim=32,
            context_in_dim=32,
            remat="none",
        ),
        text_encoder=T5Config.tiny_bytes(num_layers=1, d_model=32, d_kv=8, d_ff=32),
        train_text_encoder=True,
        init_from=FlowInit(autoencoder=str(autoencoder)),
    )
    return config_of(objective, folder, 12)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def autoencoder(world_folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "autoencoder"
    train(autoencoder_config(world_folder), workdir)
    return workdir


@pytest.mark.slow
def test_compiled_programs_are_kept_where_the_config_says(world_folder, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    config = autoencoder_config(world_folder, levels=1)
    config.num_steps, config.compilation_cache = 1, str(tmp_path / "compiled")
    compilation_cache.reset_cache()  # JAX opens its cache once
    try:
        train(config, tmp_path / "run")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert any("train_step" in path.name for path in (tmp_path / "compiled").iterdir())


def test_an_autoencoder_run_leaves_all_that_is_needed(world_folder, autoencoder):
    assert load_config(autoencoder) == autoencoder_config(world_folder)
    logged = lines(autoencoder)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[-1]["autoencoder/loss"] < logged[0]["autoencoder/loss"]
    assert all(line["examples_per_second"] > 0 for line in logged)
    rates = [line["autoencoder/learning_rate"] for line in logged]
    np.testing.assert_allclose(rates, [0, 5e-4, *[1e-3] * 4], rtol=1e-6)
    assert not {"model_flops", "model_tflop_per_second_per_chip", "mfu"} & set(logged[-1])
    network = open_network(autoencoder, "autoencoder")
    last = logged[-1]
    variance = last["autoencoder/latent_square"] - last["autoencoder/latent_mean"] ** 2
    assert network.config.shift_factor == last["autoencoder/latent_mean"]
    np.testing.assert_allclose(network.config.scale_factor, variance**-0.5)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    world_folder, autoencoder, tmp_path, monkeypatch
):
    """Killed in step 9, it goes on from step 6: the same data, losses and parameters."""
    config = flow_config(world_folder, autoencoder)
    train(config, tmp_path / "straight")

    opened, read = [], Loader.__next__
    reads = iter(range(8))

    def dying(loader):
        if next(reads, None) is None:
            raise Killed
        return read(loader)

    class Watched(Checkpointer):
        def __init__(self, *args):
            super().__init__(*args)
            opened.append(self)

    monkeypatch.setattr(Loader, "__next__", dying)
    monkeypatch.setattr(train_module, "Checkpointer", Watched)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed")
    opened[-1].close()  # what is being written gets written
    monkeypatch.undo()
    assert [line["step"] for line in lines(tmp_path / "killed")][-1] == 8
    train(config, tmp_path / "killed")

    straight, killed = lines(tmp_path / "straight"), lines(tmp_path / "killed")
    assert [line["step"] for line in killed] == list(range(1, 13))
    for line, other in zip(straight, killed, strict=True):
        assert timeless(line) == timeless(other)
    assert all(line["model_tflop_per_second_per_chip"] > 0 for line in straight)
    assert len({line["model/loss"] for line in straight}) == 12
    assert straight[-1]["skipped_in_a_row"] == 0


def test_other_data_settings_are_refused_on_going_on(world_folder, autoencoder):
    config = autoencoder_config(world_folder)
    data = dataclasses.replace(config.data, caption_dropout=0.5)
    other = dataclasses.replace(config, data=data, num_steps=8)
    with pytest.raises(ValueError, match="for another caption_dropout than this run reads"):
        train(other, autoencoder)


def test_a_finished_run_is_left_alone(world_folder, autoencoder):
    before = lines(autoencoder)
    train(autoencoder_config(world_folder), autoencoder)
    assert lines(autoencoder) == before


def traces(workdir: Path) -> list[Path]:
    return list(workdir.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_a_run_traces_the_steps_it_is_asked_for(world_folder, autoencoder, tmp_path):
    """Whole steps, by their numbers. A run that goes on is free to ask; later ones write none."""
    assert not (autoencoder / "profile").exists()
    shutil.copytree(autoencoder, tmp_path, dirs_exist_ok=True)
    config = dataclasses.replace(autoencoder_config(world_folder), num_steps=9)
    train(dataclasses.replace(config, profile_steps="2:9"), tmp_path)
    [trace] = traces(tmp_path)
    plane = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in plane.planes for line in plane.lines for event in line.events]
    stats = [dict(event.stats) for event in events if event.name == "train"]
    assert [s["step_num"] for s in stats] == [7, 8]
    assert all(line["steps_per_second"] > 0 for line in lines(tmp_path))

    later = dataclasses.replace(config, num_steps=10, profile_steps="2:9")
    train(later, tmp_path)
    assert traces(tmp_path) == [trace]


def test_a_setting_younger_than_the_checkpoint_has_had_its_default(
    world_folder, autoencoder, monkeypatch
):
    meta = Checkpointer.meta

    def older(checkpointer):
        stored = meta(checkpointer)
        del stored["config"]["optim"]["moments_dtype"]
        return stored

    monkeypatch.setattr(Checkpointer, "meta", older)
    train(autoencoder_config(world_folder), autoencoder)
    with pytest.raises(ValueError, match="This run was made with another optim: give it"):
        train(autoencoder_config(world_folder, moments_dtype="bfloat16"), autoencoder)


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [({"attention": "xla"}, True), ({"remat": "save_named"}, True), ({"theta": 1e3}, False)],
    ids=str,
)
def test_how_the_transformer_is_computed_may_change(change, goes_on):
    """In a run that goes on; what it computes may not."""

    def meta(**changes):
        objective = FlowMatchingConfig(transformer=FluxConfig(**changes))
        return {"config": to_dict(Config(objective=objective)), "frozen": {}}

    same = nullcontext() if goes_on else pytest.raises(ValueError, match="another objective: give")
    with same:
        train_module._check_same_run(meta(), meta(**change))


def test_a_run_without_finite_gradients_stops_and_goes_on_as_it_says(world_folder, tmp_path):
    config = autoencoder_config(world_folder, levels=2, learning_rate=float("inf"), warmup_steps=0)
    config.checkpoint = CheckpointConfig(every=1)
    with pytest.raises(TrainingStopped, match="3 steps in a row .*lower optim.learning_rate"):
        train(config, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [1, 1, 1]
    config.optim = dataclasses.replace(config.optim, learning_rate=1e-4, clip_norm=0.5)
    train(config, tmp_path)
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [1, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="is at step 6, beyond num_steps 5: give more, or a new"):
        train(dataclasses.replace(config, num_steps=5), tmp_path)
    config.optim = dataclasses.replace(config.optim, b2=0.9)
    with pytest.raises(ValueError, match="made with another optim"):
        train(config, tmp_path)


def test_a_run_that_is_told_to_end_saves_its_step(world_folder, tmp_path, monkeypatch):
    """And goes on as if it had not been; the signal is then whose it was before."""
    config = autoencoder_config(world_folder)
    config.sheets = SheetConfig(every=4, num_examples=2)
    train(config, tmp_path / "straight")
    read, reads, told = Loader.__next__, iter(range(1, 9)), []

    def ending(loader):
        if next(reads) == 4 - MAX_STEPS_AHEAD:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(loader)

    before = signal.signal(signal.SIGTERM, lambda *_: told.append("before"))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Loader, "__next__", ending)
            with pytest.raises(Preempted, match="asked to stop .*Step 4 is saved; the same"):
                train(config, tmp_path / "ended")
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == ["before"]
    assert Checkpointer(tmp_path / "ended").steps() == [4]
    assert not list((tmp_path / "ended").glob("sheet-*"))  # there is no time for it
    train(config, tmp_path / "ended")
    straight, ended = lines(tmp_path / "straight"), lines(tmp_path / "ended")
    assert [timeless(line) for line in ended] == [timeless(line) for line in straight]
    networks = [open_network(tmp_path / run, "autoencoder") for run in ("straight", "ended")]
    assert fingerprint_of(networks[0]) == fingerprint_of(networks[1])


def test_waiting_for_the_device_before_a_pause_is_training_time(
    world_folder, tmp_path, monkeypatch
):
    """Else rates would be too high where steps still run when a checkpoint is due."""

    def running(state):
        if isinstance(state, TrainState):
            time.sleep(1)

    monkeypatch.setattr(jax, "block_until_ready", running)
    config = dataclasses.replace(autoencoder_config(world_folder), num_steps=4)
    config.checkpoint = CheckpointConfig(every=2)
    train(config, tmp_path)
    assert lines(tmp_path)[2]["steps_per_second"] < 1  # the line after the checkpoint


PROCESS = """
import json, os, sys
import jax
jax.distributed.initialize(os.environ["ADDRESS"], 2, int(os.environ["PROCESS"]))
from pathlib import Path
from kontext_jax import cli, train
from kontext_jax.config import Config
from kontext_jax.settings import from_dict
from kontext_jax.training.preemption import Preempted
try:
    train.train(from_dict(json.loads(sys.argv[1]), Config), Path(sys.argv[2]))
except Preempted as stopped:
    sys.exit(str(stopped))
"""


@pytest.mark.slow
def test_two_processes_of_which_one_is_told_to_end_save_one_step(world_folder, tmp_path):
    config = dataclasses.replace(autoencoder_config(world_folder), num_steps=100_000)
    config.checkpoint = CheckpointConfig(every=100_000)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "ADDRESS": address}
    command = [sys.executable, "-c", PROCESS, json.dumps(to_dict(config)), str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | environment | {"PROCESS": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        until = time.monotonic() + 200
        while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path)) < 3:
            assert time.monotonic() < until and all(p.poll() is None for p in processes)
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    [step] = Checkpointer(tmp_path).steps()
    assert step > 3
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 1 and f"Step {step} is saved" in text


def test_a_run_with_too_many_unreadable_records_stops(tmp_path):
    folder = tmp_path / "world"
    store.write({"train": world.triples(40, split="train")}, folder, num_shards=4)
    [shard] = folder.glob("triples-train*-00001-of-*")
    shard.write_bytes(shard.read_bytes()[:200])
    config = autoencoder_config(folder)
    with pytest.raises(TrainingStopped, match=r"records could not be read.*max_skipped = 0.01"):
        train(config, tmp_path / "run")
    tolerant = dataclasses.replace(config, data=dataclasses.replace(config.data, max_skipped=0.9))
    train(tolerant, tmp_path / "tolerant")
    assert sum(line["skipped_records"] for line in lines(tmp_path / "tolerant")) > 0


def test_a_run_needs_its_autoencoder(world_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="init_from.autoencoder: There are no weights at"):
        train(flow_config(world_folder, tmp_path / "nowhere"), tmp_path / "flow")


def test_the_console_shows_rates_under_short_names(tmp_path, capsys):
    writer = Writer(tmp_path, num_steps=9)
    rates = {"examples_per_second_per_chip": 2.25, "model_tflop_per_second_per_chip": 502.1}
    shares = {"data_wait": 0.0123, "mfu": 0.5077}
    writer.metrics(2, rates | shares | {"model/loss": 0.5})
    writer.close()
    expected = "step 2/9  loss 0.5  samples/s/chip 2.25  TFLOP/s/chip 502.1  data wait 1.2%  "
    expected += "MFU 50.8%  ETA"
    assert capsys.readouterr().out.startswith(expected)
    assert lines(tmp_path) == [{"step": 2} | rates | shares | {"model/loss": 0.5}]


def test_only_lines_of_training_tell_when_it_ends(tmp_path, capsys):
    """What was measured took its time between two steps: it has no pace."""
    writer = Writer(tmp_path, num_steps=9)
    writer.metrics(2, {"loss": 0.5}, log="validation")
    writer.close()
    assert capsys.readouterr().out == "step 2/9  validation  loss 0.5\n"


def test_the_log_forgets_steps_that_are_run_again(tmp_path):
    writer = Writer(tmp_path, num_steps=9)
    for step in (2, 4, 6):
        writer.metrics(step, {"loss": step / 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut short by a kill
    writer = Writer(tmp_path, num_steps=9, start_step=4)
    writer.metrics(6, {"loss": 7.0})
    writer.close()
    assert lines(tmp_path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 6, "loss": 7.0},
    ]


@pytest.mark.parametrize("kind", ["autoencoder", pytest.param("flow", marks=pytest.mark.slow)])
def test_validation_tells_of_held_out_examples_and_disturbs_nothing(
    world_folder, autoencoder, tmp_path, kind
):
    """A run that is looked at in every other step learns the same, to the last bit."""
    config = autoencoder_config(world_folder)
    if kind == "flow":
        config = flow_config(world_folder, autoencoder)
        config.num_steps = 6
    train(config, tmp_path / "alone")
    config.validation = ValidationConfig(
        every=2, num_examples=5, num_pictures=3, sampler=SamplerConfig(num_steps=2)
    )
    train(config, tmp_path / "watched")

    def told(run: str, log: str = "metrics") -> list[dict]:
        text = (tmp_path / run / f"{log}.jsonl").read_text()
        found = [json.loads(line) for line in text.splitlines()]
        return list(map(timeless, found))

    assert told("alone") == told("watched")
    of_player = {"autoencoder": "autoencoder", "flow": "transformer"}[kind]
    networks = [open_network(tmp_path / run, of_player) for run in ("alone", "watched")]
    assert fingerprint_of(networks[0]) == fingerprint_of(networks[1])

    found = told("watched", "validation")
    assert [line["step"] for line in found] == [2, 4, 6]
    assert {"l1", "psnr", "ssim", "edit_success"} <= found[0].keys()
    assert found[0]["l1"] != found[2]["l1"]
    assert ("loss" in found[0]) == (kind == "flow")
    if kind == "flow":
        losses = [value for name, value in found[0].items() if name.startswith("loss_t0")]
        assert found[0]["loss"] == pytest.approx(np.mean(losses))  # as many at each level
        assert {"loss_edit", "loss_t0.0625", "loss_t0.188"} <= found[0].keys()
    # What is measured does not depend on when: the last checkpoint, measured anew, says the same.
    shutil.rmtree(tmp_path / "watched" / "tensorboard")
    train(config, tmp_path / "watched")
    assert told("watched", "validation") == found
