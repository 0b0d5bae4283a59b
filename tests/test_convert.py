"""Tests of `convert` on full folders: from a pipeline to a run and back, in every layout."""

import dataclasses
import json
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from kontext_jax import sample
from kontext_jax.config import Config, SheetConfig
from kontext_jax.convert import convert
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.data.text import TextConfig
from kontext_jax.flow import TimeConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.loading import locations, models
from kontext_jax.models.dino import DinoConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.train import train
from kontext_jax.training.checkpoint import CheckpointConfig
from kontext_jax.weights import export, files
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.fingerprint import fingerprint, fingerprint_of
from kontext_jax.weights.networks import FEATURE_NETWORKS
from kontext_jax.weights.pipeline import write_scheduler
from kontext_jax.weights.reading import ArrayReader

NAMES = ("transformer", "autoencoder", "text_encoder", "clip")


@pytest.fixture(scope="module")
def config(pipeline_folder, world_folder) -> Config:
    """A config that fine-tunes a pipeline's transformer, as with Kontext's released weights."""
    readers = locations.open_networks(pipeline_folder)
    location = str(pipeline_folder)
    settings = {
        name: dataclasses.replace(readers[name].config, dtype="float32", remat="none")
        for name in ("transformer", "text_encoder", "clip")
    }
    return Config(
        objective=FlowMatchingConfig(
            **settings,
            init_from=FlowInit(
                transformer=location, text_encoder=location, clip=location, autoencoder=location
            ),
            guidance=2.5,
        ),
        data=DataConfig(
            path=str(world_folder),
            batch_size=8,
            geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
            packing=PackingConfig(image_tokens=32, text_tokens=24, max_examples=1),
            text=TextConfig(
                tokenizer=f"{location}/tokenizer_2",
                max_tokens=24,
                pad=True,
                clip_tokenizer=f"{location}/tokenizer",
            ),
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=0, ema_decay=0.5),
        checkpoint=CheckpointConfig(every=2),
        sheets=SheetConfig(every=0),
        num_steps=2,
        log_every=1,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config, workdir)
    return workdir


def fingerprints(location: Path) -> dict[str, str]:
    readers = locations.open_networks(location)
    return {name: fingerprint_of(reader) for name, reader in readers.items()}


def test_every_layout_holds_the_same_bits(pipeline_folder, tmp_path):
    """With the schedule of [schnell], which is not the default."""
    pipeline_folder = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    shutil.rmtree(pipeline_folder / "scheduler")
    write_scheduler(pipeline_folder, TimeConfig(shift="none"))
    converted = convert(pipeline_folder, tmp_path / "bfl", "bfl")
    convert(tmp_path / "bfl", tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "diffusers", "diffusers")
    assert set(converted) == set(NAMES) and len(set(converted.values())) == 4
    for location in (pipeline_folder, *(tmp_path / n for n in ("bfl", "orbax", "diffusers"))):
        assert fingerprints(location) == converted
    before, after = (
        files.TensorFiles(folder / "transformer")
        for folder in (pipeline_folder, tmp_path / "diffusers")
    )
    assert before.entries.keys() == after.entries.keys()
    for name in before.entries:
        np.testing.assert_array_equal(before.read(name), after.read(name))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"):
        assert (pipeline_folder / name).read_text() == (tmp_path / "diffusers" / name).read_text()


@pytest.mark.slow
def test_exports_of_a_run_carry_its_record(run, pipeline_folder, tmp_path):
    converted = convert(run, tmp_path / "diffusers", "diffusers")
    before = fingerprints(pipeline_folder)
    assert [n for n in NAMES if before[n] != converted[n]] == ["transformer"]  # the rest is frozen
    convert(tmp_path / "diffusers", tmp_path / "orbax", "orbax")
    record = locations.open_network(tmp_path / "orbax", "transformer").record
    assert record["step"] == 2 and record["params"] == "ema"
    assert record["fingerprint"] == converted["transformer"]
    assert record["position_scheme"] == "offset" and record["geometry"]["sizes"] == [[32, 32]]
    raw = convert(run, tmp_path / "raw.safetensors", "bfl", params="params", network="transformer")
    assert raw["transformer"] != converted["transformer"]


@pytest.mark.slow
def test_every_layout_gives_the_same_image(run, tmp_path):
    context = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    sampler = SamplerConfig(num_steps=2, cfg_scale=2.0)

    def image(location):
        return sample.generate(str(location), "make it red", [context], sampler)[0]

    expected = image(run)
    assert expected.std() > 1
    for layout in ("diffusers", "orbax"):
        convert(run, tmp_path / layout, layout)
        np.testing.assert_array_equal(image(tmp_path / layout), expected)


def test_a_cast_rounds_to_the_nearest_value(pipeline_folder, tmp_path):
    half = tmp_path / "half"
    convert(pipeline_folder, half, "diffusers", network="transformer", dtype="bfloat16")
    rounded, exact = (
        locations.open_network(location, "transformer") for location in (half, pipeline_folder)
    )
    key = ("double_blocks/img_attn/qkv/kernel", 1)
    assert rounded.read(key).dtype == "bfloat16"
    assert (rounded.read(key) == exact.read(key).astype("bfloat16")).all()
    assert rounded.record["fingerprint"] == fingerprint_of(rounded)
    assert rounded.record["made_from"] == fingerprint_of(exact)


@pytest.mark.slow
def test_adapters_are_trained_alone_and_exported_merged_or_alone(config, run, tmp_path):
    lora = LoraConfig(rank=2, alpha=4.0, targets=("double_blocks/*", "single_blocks/linear1"))
    objective = dataclasses.replace(config.objective, lora=lora)
    train(dataclasses.replace(config, objective=objective), tmp_path / "lora")
    base = locations.open_network(config.objective.init_from.transformer, "transformer")
    merged = locations.open_network(tmp_path / "lora", "transformer")
    changed = {
        param.split("/")[0] + "/" + param.split("/")[-1]
        for param, layer in base.network.layer_keys(base.config)
        if (base.read((param, layer)) != merged.read((param, layer))).any()
    }
    assert changed == {"double_blocks/kernel", "single_blocks/kernel"}

    convert(tmp_path / "lora", tmp_path / "file", "lora")
    adapters, _, _ = locations.load_adapters(tmp_path / "lora")
    init_from = dataclasses.replace(objective.init_from, lora=str(tmp_path / "file"))
    continued = dataclasses.replace(
        config, objective=dataclasses.replace(objective, init_from=init_from)
    )
    initial = models.load_initial(continued, make_mesh(MeshConfig(), jax.devices()[:1]))
    for path, adapter in initial["model"]["lora"].items():
        np.testing.assert_array_equal(adapter.b, adapters[path].b)

    def image(location, lora=""):
        sampler = SamplerConfig(num_steps=2)
        pixels, _ = sample.generate(str(location), "it", [], sampler, dtype="float32", lora=lora)
        return pixels.astype(int)

    convert(tmp_path / "lora", tmp_path / "merged", "diffusers")
    from_run, from_merged = image(tmp_path / "lora"), image(tmp_path / "merged")
    assert np.abs(from_run - from_merged).max() <= 1  # only rounding differs
    applied_twice = image(tmp_path / "merged", str(tmp_path / "file"))
    assert np.abs(applied_twice - from_merged).max() > 1
    pipeline, file = Path(config.objective.init_from.transformer), tmp_path / "file"
    convert(pipeline, tmp_path / "bfl", "bfl", network="transformer", lora=file)
    assert fingerprint_of(locations.open_network(tmp_path / "bfl", "transformer")) == (
        fingerprint_of(locations.open_network(tmp_path / "lora", "transformer"))
    )

    def load_into(**changes):
        other = dataclasses.replace(lora, **changes)
        changed = dataclasses.replace(objective, init_from=init_from, lora=other)
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        return models.load_initial(dataclasses.replace(config, objective=changed), mesh)["model"]

    padded = load_into(rank=3)["lora"]["single_blocks/linear1"]
    stored = adapters["single_blocks/linear1"]
    np.testing.assert_allclose(
        padded.scale * padded.a[...] @ padded.b[...],
        stored.scale * stored.a[...] @ stored.b[...],
        atol=1e-8,
    )
    with pytest.raises(ValueError, match="proj has rank 2.*Set its targets and rank"):
        load_into(rank=1)
    with pytest.raises(ValueError, match="single_blocks/linear1 is no target"):
        load_into(targets=("double_blocks/*",))


@pytest.mark.slow
def test_a_run_starts_from_init_from_and_resumes(config, run, tmp_path):
    mesh = make_mesh(MeshConfig())
    initial = models.load_initial(config, mesh)["model"]["transformer"]
    base = locations.open_network(config.objective.init_from.transformer, "transformer")
    key = ("single_blocks/linear1/kernel", 1)
    np.testing.assert_array_equal(initial.single_blocks.linear1.kernel[1], base.read(key))
    assert not initial.single_blocks.linear1.kernel[...].sharding.is_fully_replicated

    shutil.copytree(run, tmp_path / "run")
    longer = dataclasses.replace(config, num_steps=3)
    assert train(longer, tmp_path / "run")["examples"] > 0


@pytest.mark.slow
def test_a_run_refuses_frozen_weights_that_have_changed(config, pipeline_folder, tmp_path):
    location = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    init_from = dataclasses.replace(config.objective.init_from, clip=str(location))
    objective = dataclasses.replace(config.objective, init_from=init_from)
    changed = dataclasses.replace(config, objective=objective, num_steps=1)
    train(changed, tmp_path / "run")
    file = location / "text_encoder" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="started with another clip: use the settings"):
        train(dataclasses.replace(changed, num_steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match="The clip that .* was trained with has changed"):
        convert(tmp_path / "run", tmp_path / "out", "diffusers")


def test_missing_tensors_are_initialised_only_if_named(config, pipeline_folder, tmp_path):
    """From [schnell], which has no guidance input, to [dev], which has one."""
    folder = shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    tensors = files.TensorFiles(folder)
    kept = [
        files.NewTensor(
            name, entry.shape, files.TENSOR_DTYPES[entry.dtype], lambda n=name: tensors.read(n)
        )
        for name, entry in tensors.entries.items()
        if "guidance" not in name
    ]
    files.write_file(tmp_path / "file", kept, {})
    (tmp_path / "file").replace(folder / "diffusion_pytorch_model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | {"guidance_embeds": False}
    (folder / "config.json").write_text(json.dumps(settings))

    def initial(*except_for):
        init_from = FlowInit(transformer=str(folder), except_for=except_for)
        objective = dataclasses.replace(config.objective, init_from=init_from)
        changed = dataclasses.replace(config, objective=objective)
        return models.load_initial(changed, make_mesh(MeshConfig()))["model"]["transformer"]

    with pytest.raises(WeightsError, match="guidance_embed is False, not True"):
        initial()
    (folder / "config.json").write_text(json.dumps(settings | {"guidance_embeds": True}))
    with pytest.raises(WeightsError, match="guidance_embedder.linear_1.weight is missing; .*_2.bi"):
        initial()
    (folder / "config.json").write_text(json.dumps(settings))
    network = initial("*guidance_embedder*")
    fresh = config.make_objective().init(jax.random.key(config.seed))["model"]["transformer"]
    np.testing.assert_allclose(
        network.guidance_in.in_layer.kernel[...],
        fresh.guidance_in.in_layer.kernel[...],
        atol=1e-7,
    )
    base = locations.open_network(pipeline_folder, "transformer")
    np.testing.assert_array_equal(network.img_in.kernel[...], base.read(("img_in/kernel", None)))


@pytest.mark.parametrize("format", ["diffusers", "bfl", "orbax"])
def test_a_full_disk_leaves_no_partial_output(pipeline_folder, tmp_path, format):
    """Files are limited to 20 kB, so that writing fails midway, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            convert(pipeline_folder, tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_found_when_reading_back(pipeline_folder, tmp_path, monkeypatch):
    write = files.write_file

    def flip(path, tensors, metadata):
        write(path, tensors, metadata)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))

    monkeypatch.setattr(export, "write_file", flip)
    with pytest.raises(
        WeightsError, match="written transformer differs from its source in .*; check the disk"
    ):
        convert(pipeline_folder, tmp_path / "t.safetensors", "bfl", network="transformer")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_not_overwritten(pipeline_folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists; delete it or name another --output"):
        convert(pipeline_folder, tmp_path / "out", "bfl")


@pytest.mark.parametrize(
    ("location", "arguments", "message"),
    [
        ("nowhere", {}, "There are no weights at .*nowhere"),
        ("", {"network": "clip", "format": "bfl"}, "layout does not include the clip"),
        ("vae", {"network": "transformer"}, "There is no transformer in .*vae; there is autoenc"),
        ("", {"format": "lora"}, "no run with checkpoints"),
        ("", {"format": "bfl", "output": "a.safetensors"}, "a.safetensors would be a folder"),
    ],
)
def test_invalid_conversions_are_refused(pipeline_folder, tmp_path, location, arguments, message):
    with pytest.raises((OSError, ValueError), match=message):
        arguments = dict(arguments)
        output = tmp_path / arguments.pop("output", "out")
        convert(pipeline_folder / location, output, **{"format": "diffusers"} | arguments)
    assert not list(tmp_path.iterdir())


def test_a_feature_network_is_read_but_not_converted(random_network, tmp_path):
    kind, config = FEATURE_NETWORKS["dino"], DinoConfig.tiny()
    network = random_network(lambda: kind.model(config, rngs=nnx.Rngs(0)))
    export.write_diffusers(ArrayReader(kind, network), tmp_path / "dino", {})
    reader = locations.open_network(tmp_path / "dino", "dino")
    assert fingerprint_of(reader) == fingerprint(network)
    with pytest.raises(ValueError, match="dino holds a dino, which is not part of a pipeline and"):
        convert(tmp_path / "dino", tmp_path / "out", "orbax")


def test_weights_of_another_architecture_are_refused(config):
    transformer = dataclasses.replace(config.objective.transformer, depth=3, mlp_ratio=2.0)
    objective = dataclasses.replace(config.objective, transformer=transformer)
    with pytest.raises(WeightsError, match="depth is 2, not 3; mlp_ratio is 4.0, not 2.0"):
        models.load_initial(
            dataclasses.replace(config, objective=objective), make_mesh(MeshConfig())
        )


def test_the_index_of_a_pipeline_without_clip_has_null_for_clip(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "in")
    shutil.rmtree(folder / "text_encoder")
    convert(folder, tmp_path / "out", "diffusers")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    with pytest.raises(ValueError, match="holds no clip; sampling needs a complete pipeline"):
        sample.generate(str(tmp_path / "out"), "", [], SamplerConfig(num_steps=1))
