"""Ahead-of-time compilation: full rows, the target platform, and the report."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kontext_jax import compile as compiling
from kontext_jax.chips import CHIPS
from kontext_jax.compilation import hlo
from kontext_jax.config import Config
from kontext_jax.data import latents
from kontext_jax.data.latents import EncodedExample, LatentsConfig, StoreSettings
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, Loader
from kontext_jax.data.sources import TripleSource
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig
from kontext_jax.models import layers
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sharding import MESH_AXES, MeshConfig, make_mesh, platform
from kontext_jax.types import Latents, Triple
from kontext_jax.weights import export
from kontext_jax.weights.networks import NETWORKS
from kontext_jax.weights.reading import ArrayReader

ROOT = Path(__file__).parents[1]
CHANNELS = 24
DATA = DataConfig(
    batch_size=8,
    geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
    packing=PackingConfig(image_tokens=64, text_tokens=72, max_examples=4),
    text=TextConfig(max_tokens=64),
)


def config(**kwargs) -> Config:
    """Returns flow matching with minimal networks, whose weights do not exist."""
    transformer = FluxConfig.tiny(
        hidden_size=32,
        num_heads=2,
        depth=1,
        depth_single=2,
        axes_dim=(4, 6, 6),
        vec_in_dim=32,
        context_in_dim=32,
    )
    return Config(
        objective=FlowMatchingConfig(
            transformer=transformer,
            text_encoder=T5Config.tiny_bytes(
                num_layers=1, d_model=32, d_kv=8, d_ff=32, num_heads=8
            ),
            pooled="mean",
            init_from=FlowInit(autoencoder="no", text_encoder="no", transformer="no"),
            **kwargs,
        ),
        data=DATA,
    )


def with_latents(data: DataConfig, folder: Path) -> DataConfig:
    """Returns settings that read latents from ``folder``, where it writes latents that are 0."""
    folder.mkdir()
    source, zeros = TripleSource(data.path, data.split), np.zeros((16, CHANNELS), latents.DTYPE)

    def encoded(triple: Triple) -> EncodedExample:
        image = Latents((32, 32), zeros)
        return EncodedExample(triple.id, image, (image,) * len(triple.contexts))

    latents.write_chunk(latents.chunk_path(folder, data.split, 0, 1), map(encoded, source))
    settings = StoreSettings(
        data=source.fingerprint,
        split=data.split,
        geometry=latents.as_json(data.geometry),
        networks={},
    )
    latents.finish(folder, settings, CHANNELS, 1)
    return dataclasses.replace(data, latents=LatentsConfig(path=str(folder)))


@pytest.mark.parametrize("inputs", ["pixels", "latents"])
def test_full_rows_have_the_shapes_of_the_loader(world_folder, tmp_path, inputs):
    data = dataclasses.replace(DATA, path=str(world_folder), negatives=inputs == "latents")
    if inputs == "latents":
        data = with_latents(data, tmp_path / "store")
    loader = Loader(data, seed=0)
    batch = next(loader)
    loader.close()
    row = compiling.full_row(data, CHANNELS if inputs == "latents" else 0)
    assert jax.tree.structure(row) == jax.tree.structure(batch)
    for x, expected in zip(jax.tree.leaves(row), jax.tree.leaves(batch), strict=True):
        assert ((data.batch_size, *x.shape), x.dtype) == (expected.shape, expected.dtype)


def test_a_full_row_has_images_of_the_largest_size():
    """With FLUX's sizes: two images of 1328 x 800 pixels, which is more than 1024 x 1024."""
    packing = PackingConfig(image_tokens=8320, text_tokens=512, max_examples=1)
    row = compiling.full_row(DataConfig(packing=packing))
    assert {key: x.shape for key, x in row.images.items()} == {"1328x800": (2, 1328, 800, 3)}
    assert np.sum(row.segments == 1) == 2 * 4150 and np.sum(row.is_target) == 4150
    assert np.sum(row.text_segments == 1) == 512
    with pytest.raises(ValueError, match="takes 4150 tokens, but a row holds 4096"):
        compiling.full_row(DataConfig(packing=PackingConfig(image_tokens=4096)))


@pytest.mark.slow
def test_a_step_on_latents_compiles_without_the_latents():
    settings = config()
    settings.data = dataclasses.replace(DATA, latents=LatentsConfig(path="nowhere"), negatives=True)
    step = compiling.compile_step(settings, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert step.batch.images == {} and step.batch.latents.shape == (8, 64, CHANNELS)
    assert step.batch.negative.text_ids.shape == (8, 72)
    assert "convolution" not in step.hlo_text  # no image is encoded
    assert compiling.make_report(settings, make_mesh(MeshConfig()), step).examples == 16


def linear_jaxpr() -> str:
    def init():
        return layers.Linear(6, 4, ("embed", "mlp"), rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"))

    x = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
    return str(jax.make_jaxpr(lambda linear, x: linear(x))(nnx.eval_shape(init), x))


def test_a_layer_is_traced_for_the_platform_of_the_mesh():
    tpu = AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, abstract_device=tpu)
    on_cpu = linear_jaxpr()
    with use_abstract_mesh(mesh):
        assert platform() == "tpu"
        on_tpu = linear_jaxpr()
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert platform() == "cpu"
        assert linear_jaxpr() == on_cpu
    assert platform() == "cpu"
    assert "f32[10,6]" in on_cpu  # rows and tokens are merged into one axis
    assert "f32[10,6]" not in on_tpu


@pytest.mark.slow
def test_the_report_adds_up():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    step = compiling.compile_step(config(), mesh)
    report = compiling.make_report(config(), mesh, step)
    assert (report.num_devices, report.mesh) == (4, {"data": 2, "fsdp": 2})
    assert (report.rows, report.examples) == (8, 16)
    assert set(report.parameters) == {"transformer", "text_encoder", "autoencoder"}
    assert report.memory["opt_state"] > 2 * report.memory["params"] - 1
    assert report.memory["ema"] == report.memory["params"]
    size = 4 * report.parameters["transformer"]
    assert size / 2 <= report.memory["params"] < 0.52 * size
    assert report.memory["peak"] > sum(
        report.memory[name] for name in ("params", "opt_state", "ema", "temporaries")
    )
    assert not report.cost.unknown_loops
    # Two forward passes and a backward pass of the transformer, and the encoders.
    assert report.cost.flops > 4 / 3 * report.model_flops > 0
    assert report.cost.collectives
    assert report.fits and not report.seconds  # no data sheet of a CPU is known
    json.dumps(dataclasses.asdict(report))


def test_the_printed_report_names_the_limit_and_what_is_not_counted(capsys):
    report = compiling.Report(
        device_kind="TPU v5 lite",
        num_devices=8,
        mesh={"fsdp": 8},
        rows=8,
        examples=8,
        parameters={"transformer": 100},
        memory={"peak": 17_200_000_000},
        capacity=float(CHIPS["TPU v5 lite"].memory),
        cost=hlo.Cost(
            flops=197e12,
            bytes=1e9,
            collectives={"all-gather": hlo.Traffic(3.0, 1e9)},
            opaque={"kernel": 2.0},
            unknown_loops=1,
        ),
        model_flops=0.5 * 197e12,
        seconds={"compute": 1.0, "memory": 0.5, "links": 2.0},
        mfu=(0.25, 0.5 / 3.5),
    )
    assert not report.fits
    compiling.print_report(report)
    output = capsys.readouterr().out
    for words in ("limited by links", "MFU 25.0%", "2 x kernel", "1 loops of unknown length"):
        assert words in output


def test_missing_frozen_weights_are_assumed_to_be_flux_s():
    settings = config(lora=LoraConfig(rank=4), autoencoder_dtype="bfloat16")
    frozen = compiling.abstract_frozen(settings)
    assert set(frozen) == {"transformer", "text_encoder", "autoencoder"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}
    assert frozen["autoencoder"].config.token_channels == 24
    assert frozen["autoencoder"].config.dtype == "bfloat16"
    unmatched = config()
    unmatched.objective.transformer.in_channels = 20
    with pytest.raises(ValueError, match="tokens of 20 channels that are 8 pixels wide"):
        compiling.abstract_frozen(unmatched)


def test_a_batch_that_does_not_divide_is_refused():
    settings = config()
    settings.optim = OptimConfig(accumulate_steps=3)
    with pytest.raises(ValueError, match="batch_size 8 must be a multiple of 24"):
        compiling.compile_step(settings, make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (19.4G) exceeds available HBM (15.75G). HLO module: jit_f.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.4G of 15.75G hbm. "
        "Exceeded hbm capacity by 3.7G.\nTotal hbm usage >= 19.9G",
    ],
)
def test_out_of_memory_errors_are_one_sentence(message):
    sentence = compiling._error_message(jax.errors.JaxRuntimeError(message))
    assert sentence.startswith("the step does not fit: it needs 19.4G of a device's 15.75G bytes.")


def test_other_compiler_errors_are_their_first_line():
    error = jax.errors.JaxRuntimeError("INTERNAL: no\nmore")
    assert compiling._error_message(error) == "INTERNAL: no"


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the command in a new process, because JAX looks for libtpu only once per process.

    libtpu does not know XLA's flags for CPUs, which conftest.py sets.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "kontext_jax.compile", *arguments],
        cwd=ROOT,
        env=inherited | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.slow
def test_a_step_compiles_for_several_slices_of_tpus_that_are_not_attached(tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: aot)")
    table = tmp_path / "table.json"
    slices = ("--config=configs/quickstart.py", "--topology=v5e:2x2", "--num_slices=2")
    done = run(*slices, f"--json={table}")
    assert done.returncode == 0, done.stderr
    assert "8 x TPU v5 lite, mesh data=2 fsdp=4" in done.stdout and "limited by" in done.stdout
    report = json.loads(table.read_text())
    assert report["cost"]["unknown_loops"] == 0
    # Full recomputation: two forward passes of the transformer, and the text encoder.
    assert 4 / 3 < report["cost"]["flops"] / report["model_flops"] < 3
    assert report["memory"]["peak"] < report["capacity"]
    refused = run(*slices, "--config.mesh.fsdp=1", "--config.mesh.tensor=8")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert (
        "compile: A mesh of data=1, fsdp=1, context=1, tensor=8 does not fit 2 slices"
        in (refused.stderr.splitlines()[-1])
    )


@pytest.mark.slow
def test_a_step_that_does_not_fit_tpus_that_are_not_attached_is_refused():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: aot)")
    refused = run(
        "--config=configs/quickstart.py:autoencoder",
        "--topology=v5e:2x2",
        "--config.data.batch_size=65536",
    )
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "compile: the step does not fit: it needs" in refused.stderr.splitlines()[-1]
    refused = run("--config=configs/quickstart.py", "--topology=v5e:3x5")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "compile: --topology=v5e:3x5 is not a TPU topology" in refused.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def narrow_autoencoder(random_network, tmp_path_factory) -> Path:
    """An autoencoder with FLUX's cells and channels, and a quarter of its width."""
    config = AutoencoderConfig.flux(channels=32, num_res_blocks=1)
    network = random_network(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    folder = tmp_path_factory.mktemp("autoencoder")
    export.write_diffusers(ArrayReader(NETWORKS["autoencoder"], network), folder, {})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "topology", "executed"),
    [
        ("kontext_1024", "v5p:2x2x1", (1.05, 2.2)),
        ("flow_256", "v6e:2x2", (1.05, 2.2)),
        # Student and teacher repeat their forward passes, and no image is encoded.
        ("ladd_1024", "v5p:2x2x1", (1.15, 1.35)),
    ],
)
def test_configs_for_pods_compile(config, topology, executed, narrow_autoencoder, tmp_path):
    """With narrower networks, fewer blocks and fewer chips; README.md has the full sizes.

    Rows, their packing, heads of 128 channels and thus all kernels are those of the config.
    """
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: aot)")
    table = tmp_path / "table.json"
    done = run(
        f"--config=configs/{config}.py",
        f"--topology={topology}",
        f"--json={table}",
        "--config.objective.transformer.hidden_size=512",
        "--config.objective.transformer.num_heads=4",
        "--config.objective.transformer.depth=1",
        "--config.objective.transformer.depth_single=2",
        "--config.objective.transformer.context_in_dim=512",
        "--config.objective.text_encoder.d_model=512",
        "--config.objective.text_encoder.d_ff=1280",
        "--config.objective.text_encoder.num_heads=8",
        "--config.objective.text_encoder.num_layers=1",
        "--config.objective.clip.num_layers=1",
        f"--config.objective.init_from.autoencoder={narrow_autoencoder}",
        "--config.data.batch_size=4",
    )
    assert done.returncode == 0, done.stderr
    assert "mesh fsdp=4" in done.stdout
    report = json.loads(table.read_text())
    # All kernels have known FLOPs. With this few blocks, the encoders raise the ratio.
    assert "tpu_custom_call" not in report["cost"]["opaque"]
    least, most = executed
    assert least < report["cost"]["flops"] / report["model_flops"] < most
    assert report["memory"]["peak"] < report["capacity"]


def test_num_slices_without_a_topology_is_refused():
    refused = run("--config=configs/quickstart.py", "--num_slices=2")
    assert refused.returncode == 1
    assert "compile: --num_slices needs --topology" in refused.stderr.splitlines()[-1]
