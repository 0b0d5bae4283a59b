"""Complete runs, as short as possible."""

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
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from kontext_jax import train as train_module
from kontext_jax.config import Config, SheetConfig, ValidationConfig
from kontext_jax.convert import convert
from kontext_jax.data import store
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, Loader
from kontext_jax.data.sources import TripleSource
from kontext_jax.data.text import TextConfig
from kontext_jax.evaluation import judge_panel
from kontext_jax.evaluation.latent_statistics import NUM_IMAGES
from kontext_jax.geometry import GeometryConfig
from kontext_jax.loading.locations import load_config, load_meta, open_network
from kontext_jax.models.autoencoder import AutoencoderConfig, to_pixels
from kontext_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.patch_discriminator import PatchConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.objectives.autoencoder import AdversarialConfig, AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.settings import to_dict
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.toy_data import world
from kontext_jax.train import train
from kontext_jax.training.checkpoint import CheckpointConfig, Checkpointer
from kontext_jax.training.preemption import MAX_STEPS_AHEAD, Preempted
from kontext_jax.training.telemetry import TrainingStopped
from kontext_jax.training.train_state import TrainState
from kontext_jax.weights.fingerprint import fingerprint_of
from kontext_jax.weights.loading import load
from tests.logs import read_log, without_timings


@pytest.fixture(autouse=True, scope="module")
def compile_once(tmp_path_factory):
    """Shares compiled programs between the runs of one config."""
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


@pytest.fixture(scope="module")
def autoencoder(world_folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "autoencoder"
    train(autoencoder_config(world_folder), workdir)
    return workdir


@pytest.mark.slow
def test_compiled_programs_are_cached_in_the_configured_folder(world_folder, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    config = autoencoder_config(world_folder, levels=1)
    config.num_steps, config.compilation_cache = 1, str(tmp_path / "compiled")
    compilation_cache.reset_cache()  # JAX opens its cache only once
    try:
        train(config, tmp_path / "run")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert any("train_step" in path.name for path in (tmp_path / "compiled").iterdir())


def test_autoencoder_run_leaves_its_config_and_metrics(world_folder, autoencoder):
    assert load_config(autoencoder) == autoencoder_config(world_folder)
    logged = read_log(autoencoder)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[-1]["autoencoder/loss"] < logged[0]["autoencoder/loss"]
    assert all(line["examples_per_second"] > 0 for line in logged)
    rates = [line["autoencoder/learning_rate"] for line in logged]
    np.testing.assert_allclose(rates, [0, 5e-4, *[1e-3] * 4], rtol=1e-6)
    assert logged[-1]["model_tflop_per_second_per_chip"] > 0


@pytest.mark.parametrize("params", ["ema", "params"])
def test_latents_are_scaled_by_the_statistics_of_their_own_parameters(
    world_folder, autoencoder, params
):
    """They are measured for averaged parameters, and estimated by the log for raw ones."""
    reader = open_network(autoencoder, "autoencoder", params)
    network = load(reader, reader.config, make_mesh(MeshConfig()), dtype=None)
    source = TripleSource(world_folder, "train")
    images = np.stack([source[i].target for i in range(len(source))])
    latents = np.asarray(network.moments(to_pixels(jnp.asarray(images)))[0], np.float64)
    if params == "params":
        last = read_log(autoencoder)[-1]
        mean = last["autoencoder/latent_mean"]
        variance = last["autoencoder/latent_square"] - mean**2
    else:
        assert len(source) <= NUM_IMAGES
        mean, variance = latents.mean(), latents.var()
    np.testing.assert_allclose(reader.config.shift_factor, mean, rtol=1e-4)
    np.testing.assert_allclose(reader.config.scale_factor, variance**-0.5, rtol=1e-4)
    if params == "ema":
        cells = latents.reshape(-1, latents.shape[-1])
        expected = {
            "mean": cells.mean(axis=0),
            "std": cells.std(axis=0),
            "kurtosis": (((cells - cells.mean(axis=0)) / cells.std(axis=0)) ** 4).mean(axis=0),
        }
        for name, values in expected.items():
            measured = reader.record["latents"]["channels"][name]
            np.testing.assert_allclose(measured, values, rtol=1e-3, atol=1e-5)
        assert min(reader.record["latents"]["channels"]["kl"]) >= 0


@pytest.mark.parametrize("format", ["diffusers", "bfl", "orbax"])
def test_exports_keep_the_statistics_of_latents(autoencoder, tmp_path, format):
    output = tmp_path / ("ae.safetensors" if format == "bfl" else "vae")
    convert(autoencoder, output, format)
    channels = open_network(output, "autoencoder").record["latents"]["channels"]
    assert channels == load_meta(autoencoder)["latents"]["channels"]
    assert {name: len(values) for name, values in channels.items()} == dict.fromkeys(
        ("mean", "std", "kurtosis", "kl"), 6
    )


def test_checkpoints_without_latent_statistics_use_the_log(autoencoder, monkeypatch):
    meta = Checkpointer.meta

    def without_latents(checkpointer):
        return {name: value for name, value in meta(checkpointer).items() if name != "latents"}

    monkeypatch.setattr(Checkpointer, "meta", without_latents)
    network = open_network(autoencoder, "autoencoder")
    assert network.config.shift_factor == read_log(autoencoder)[-1]["autoencoder/latent_mean"]


@pytest.fixture
def tiny_lite0(random_network, monkeypatch):
    """Validation with a small network in place of EfficientNet-Lite0."""
    config = EfficientNetConfig.tiny()
    network = random_network(lambda: EfficientNet(config, rngs=nnx.Rngs(0)))
    monkeypatch.setattr(judge_panel, "load_lite0", lambda mesh, config: network)


@pytest.mark.slow
def test_run_with_discrete_latents_records_the_use_of_its_codes(world_folder, tmp_path, tiny_lite0):
    config = autoencoder_config(world_folder, levels=1)
    config.validation = ValidationConfig(every=1, num_examples=2)
    config.objective.autoencoder = dataclasses.replace(
        config.objective.autoencoder, latent_channels=3, fsq_levels=(5, 4, 3)
    )
    config.num_steps = 1
    train(config, tmp_path)
    reader = open_network(tmp_path, "autoencoder")
    codes = reader.record["latents"]["codes"]
    assert codes["number"] == 60 and 0 < codes["used"] <= 1
    assert 1 <= codes["perplexity"] <= 60 * codes["used"]
    assert reader.config.fsq_levels == (5, 4, 3)
    [validated] = read_log(tmp_path, "validation")
    assert validated["bits_per_pixel"] == pytest.approx(np.log2(60))
    assert 0 < validated["code_usage"] <= 1 <= validated["code_perplexity"]


@pytest.mark.slow
def test_run_with_a_discriminator_resumes_exactly(world_folder, tmp_path, tiny_lite0):
    """It starts in step 3, and the run stops after step 4."""
    config = autoencoder_config(world_folder, levels=1)
    config.objective.adversarial = AdversarialConfig(
        weight=0.5, start=2, discriminator=PatchConfig(channels=8, num_layers=1, num_groups=4)
    )
    config.validation = ValidationConfig(every=6, num_examples=2)
    config.sheets = SheetConfig(every=6, num_examples=2)
    config.checkpoint = CheckpointConfig(every=2)
    train(config, tmp_path / "uninterrupted")
    first = dataclasses.replace(
        config, num_steps=4, validation=ValidationConfig(), sheets=SheetConfig(every=0)
    )
    train(first, tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    whole, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    log, log_resumed = (list(map(without_timings, read_log(x))) for x in (whole, resumed))
    assert log == log_resumed
    second, third = log[1:3]
    assert "discriminator/loss" not in second and third["discriminator/loss"] > 0
    assert second["autoencoder/adaptive_weight"] == 0 < third["autoencoder/adaptive_weight"]
    network, network_resumed = (open_network(x, "autoencoder") for x in (whole, resumed))
    assert fingerprint_of(network) == fingerprint_of(network_resumed)
    assert read_log(whole, "validation")[-1]["psnr"] > 0
    assert (whole / "sheet-0000006.png").exists()


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_run_resumes_exactly(world_folder, autoencoder, tmp_path, monkeypatch):
    """Killed in step 9, it resumes from step 6 with the same data, losses and parameters."""
    config = flow_config(world_folder, autoencoder)
    train(config, tmp_path / "uninterrupted")

    checkpointers, read_batch = [], Loader.__next__
    batches = iter(range(8))

    def read_or_die(loader):
        if next(batches, None) is None:
            raise Killed
        return read_batch(loader)

    class RecordedCheckpointer(Checkpointer):
        def __init__(self, *args):
            super().__init__(*args)
            checkpointers.append(self)

    monkeypatch.setattr(Loader, "__next__", read_or_die)
    monkeypatch.setattr(train_module, "Checkpointer", RecordedCheckpointer)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed")
    checkpointers[-1].close()  # completes the checkpoint that is being written
    monkeypatch.undo()
    assert [line["step"] for line in read_log(tmp_path / "killed")][-1] == 8
    train(config, tmp_path / "killed")

    expected, resumed = read_log(tmp_path / "uninterrupted"), read_log(tmp_path / "killed")
    assert [line["step"] for line in resumed] == list(range(1, 13))
    for line, other in zip(expected, resumed, strict=True):
        assert without_timings(line) == without_timings(other)
    assert all(line["model_tflop_per_second_per_chip"] > 0 for line in expected)
    assert len({line["model/loss"] for line in expected}) == 12
    assert expected[-1]["skipped_in_a_row"] == 0


def test_resuming_with_other_data_settings_is_refused(world_folder, autoencoder):
    config = autoencoder_config(world_folder)
    data = dataclasses.replace(config.data, caption_dropout=0.5)
    other = dataclasses.replace(config, data=data, num_steps=8)
    with pytest.raises(ValueError, match="saved with a different caption_dropout, so"):
        train(other, autoencoder)


def test_finished_run_is_left_unchanged(world_folder, autoencoder):
    before = read_log(autoencoder)
    train(autoencoder_config(world_folder), autoencoder)
    assert read_log(autoencoder) == before


def traces(workdir: Path) -> list[Path]:
    return list(workdir.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_run_traces_the_configured_steps(world_folder, autoencoder, tmp_path):
    """A resumed run may set profile_steps; a run that starts after them writes no trace."""
    assert not (autoencoder / "profile").exists()
    shutil.copytree(autoencoder, tmp_path, dirs_exist_ok=True)
    config = dataclasses.replace(autoencoder_config(world_folder), num_steps=9)
    train(dataclasses.replace(config, profile_steps="2:9"), tmp_path)
    [trace] = traces(tmp_path)
    profile = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    stats = [dict(event.stats) for event in events if event.name == "train"]
    assert [stat["step_num"] for stat in stats] == [7, 8]
    assert all(line["steps_per_second"] > 0 for line in read_log(tmp_path))

    later = dataclasses.replace(config, num_steps=10, profile_steps="2:9")
    train(later, tmp_path)
    assert traces(tmp_path) == [trace]


def test_settings_added_since_the_checkpoint_take_their_defaults(
    world_folder, autoencoder, monkeypatch
):
    meta = Checkpointer.meta

    def without_setting(checkpointer):
        stored = meta(checkpointer)
        del stored["config"]["optim"]["moments_dtype"]
        return stored

    monkeypatch.setattr(Checkpointer, "meta", without_setting)
    train(autoencoder_config(world_folder), autoencoder)
    with pytest.raises(ValueError, match="This run was started with another optim: use the"):
        train(autoencoder_config(world_folder, moments_dtype="bfloat16"), autoencoder)


@pytest.mark.parametrize(
    ("change", "resumes"),
    [({"attention": "xla"}, True), ({"remat": "save_named"}, True), ({"theta": 1e3}, False)],
    ids=str,
)
def test_resumed_run_may_change_how_but_not_what_the_transformer_computes(change, resumes):
    def meta(**changes):
        objective = FlowMatchingConfig(transformer=FluxConfig(**changes))
        return {"config": to_dict(Config(objective=objective)), "frozen": {}}

    refused = pytest.raises(ValueError, match="another objective: use")
    with nullcontext() if resumes else refused:
        train_module._check_same_run(meta(), meta(**change))


def test_run_without_finite_gradients_stops_and_resumes_as_advised(world_folder, tmp_path):
    config = autoencoder_config(world_folder, levels=2, learning_rate=float("inf"), warmup_steps=0)
    config.checkpoint = CheckpointConfig(every=1)
    with pytest.raises(TrainingStopped, match="3 steps in a row .*lower optim.learning_rate"):
        train(config, tmp_path)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]
    assert [line["skipped_steps"] for line in read_log(tmp_path)] == [1, 1, 1]
    config.optim = dataclasses.replace(config.optim, learning_rate=1e-4, clip_norm=0.5)
    train(config, tmp_path)
    assert [line["skipped_steps"] for line in read_log(tmp_path)] == [1, 1, 0, 0, 0, 0]
    with pytest.raises(
        ValueError, match="is at step 6, beyond num_steps 5: raise num_steps, or use a new"
    ):
        train(dataclasses.replace(config, num_steps=5), tmp_path)
    config.optim = dataclasses.replace(config.optim, b2=0.9)
    with pytest.raises(ValueError, match="started with another optim"):
        train(config, tmp_path)


def test_preempted_run_saves_its_step_and_resumes_exactly(world_folder, tmp_path, monkeypatch):
    """It also restores the previous signal handler."""
    config = autoencoder_config(world_folder)
    config.sheets = SheetConfig(every=4, num_examples=2)
    train(config, tmp_path / "uninterrupted")
    read_batch, steps, handled = Loader.__next__, iter(range(1, 9)), []

    def read_under_preemption(loader):
        if next(steps) == 4 - MAX_STEPS_AHEAD:
            os.kill(os.getpid(), signal.SIGTERM)
        return read_batch(loader)

    original = signal.signal(signal.SIGTERM, lambda *_: handled.append("previous handler"))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Loader, "__next__", read_under_preemption)
            with pytest.raises(Preempted, match="asked to stop .*Step 4 is saved; the same"):
                train(config, tmp_path / "preempted")
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, original)
    assert handled == ["previous handler"]
    assert Checkpointer(tmp_path / "preempted").steps() == [4]
    assert not list((tmp_path / "preempted").glob("sheet-*"))  # preemption leaves no time for it
    train(config, tmp_path / "preempted")
    runs = [tmp_path / run for run in ("uninterrupted", "preempted")]
    expected, resumed = (list(map(without_timings, read_log(run))) for run in runs)
    assert resumed == expected
    networks = [open_network(run, "autoencoder") for run in runs]
    assert fingerprint_of(networks[0]) == fingerprint_of(networks[1])


def test_waiting_for_the_device_before_a_pause_is_training_time(
    world_folder, tmp_path, monkeypatch
):
    """Otherwise rates are too high if steps still run when a checkpoint is due."""

    def wait(state):
        if isinstance(state, TrainState):
            time.sleep(1)

    monkeypatch.setattr(jax, "block_until_ready", wait)
    config = dataclasses.replace(autoencoder_config(world_folder), num_steps=4)
    config.checkpoint = CheckpointConfig(every=2)
    train(config, tmp_path)
    assert read_log(tmp_path)[2]["steps_per_second"] < 1  # the line after the checkpoint


PROCESS = """
import json, os, sys
import jax
import jax.numpy as jnp
jax.distributed.initialize(os.environ["ADDRESS"], 2, int(os.environ["PROCESS"]))
from pathlib import Path
from kontext_jax import train
from kontext_jax.config import Config
from kontext_jax.settings import from_dict
from kontext_jax.training.preemption import Preempted
try:
    train.train(from_dict(json.loads(sys.argv[1]), Config), Path(sys.argv[2]))
except Preempted as stopped:
    sys.exit(str(stopped))
"""


@pytest.mark.slow
def test_both_processes_save_the_same_step_if_one_is_preempted(world_folder, tmp_path):
    config = dataclasses.replace(autoencoder_config(world_folder), num_steps=100_000)
    config.checkpoint = CheckpointConfig(every=100_000)
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
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
        deadline = time.monotonic() + 1200
        while not (tmp_path / "metrics.jsonl").exists() or len(read_log(tmp_path)) < 3:
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        messages = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    [step] = Checkpointer(tmp_path).steps()
    assert step > 3
    for process, message in zip(processes, messages, strict=True):
        assert process.returncode == 1 and f"Step {step} is saved" in message


def test_run_with_too_many_unreadable_records_stops(tmp_path):
    folder = tmp_path / "world"
    store.write({"train": world.triples(40, split="train")}, folder, num_shards=4)
    [shard] = folder.glob("triples-train*-00001-of-*")
    shard.write_bytes(shard.read_bytes()[:200])
    config = autoencoder_config(folder)
    with pytest.raises(TrainingStopped, match=r"records could not be read.*max_skipped = 0.01"):
        train(config, tmp_path / "run")
    tolerant = dataclasses.replace(config, data=dataclasses.replace(config.data, max_skipped=0.9))
    train(tolerant, tmp_path / "tolerant")
    assert sum(line["skipped_records"] for line in read_log(tmp_path / "tolerant")) > 0


def test_missing_autoencoder_is_named(world_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="init_from.autoencoder: There are no weights at"):
        train(flow_config(world_folder, tmp_path / "nowhere"), tmp_path / "flow")


@pytest.mark.parametrize("kind", ["autoencoder", pytest.param("flow", marks=pytest.mark.slow)])
def test_validation_scores_held_out_examples_and_does_not_change_the_run(
    world_folder, autoencoder, tmp_path, kind, tiny_lite0
):
    """A run with validation in every second step learns bitwise the same."""
    config = autoencoder_config(world_folder)
    if kind == "flow":
        config = flow_config(world_folder, autoencoder)
        config.num_steps = 6
    train(config, tmp_path / "without")
    config.validation = ValidationConfig(
        every=2, num_examples=5, num_pictures=3, sampler=SamplerConfig(num_steps=2)
    )
    train(config, tmp_path / "with")

    def log_of(run: str, log: str = "metrics") -> list[dict]:
        return list(map(without_timings, read_log(tmp_path / run, log)))

    assert log_of("without") == log_of("with")
    name = {"autoencoder": "autoencoder", "flow": "transformer"}[kind]
    networks = [open_network(tmp_path / run, name) for run in ("without", "with")]
    assert fingerprint_of(networks[0]) == fingerprint_of(networks[1])

    validation = log_of("with", "validation")
    assert [line["step"] for line in validation] == [2, 4, 6]
    assert {"l1", "psnr", "ssim", "edit_success"} <= validation[0].keys()
    assert validation[0]["l1"] != validation[2]["l1"]
    assert ("loss" in validation[0]) == (kind == "flow")
    assert (validation[0].get("fd_efflite0", 0) > 0) == (kind == "autoencoder")
    if kind == "flow":
        losses = [value for name, value in validation[0].items() if name.startswith("loss_t0")]
        # Each level has equally many examples.
        assert validation[0]["loss"] == pytest.approx(np.mean(losses))
        assert {"loss_edit", "loss_t0.0625", "loss_t0.188"} <= validation[0].keys()
    # Resuming the finished run leaves its validation log unchanged.
    shutil.rmtree(tmp_path / "with" / "tensorboard")
    train(config, tmp_path / "with")
    assert log_of("with", "validation") == validation
