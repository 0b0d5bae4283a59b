"""Compiling ahead of time: full rows, the platform that is compiled for, and what is reported."""

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

from kontext_jax import cli
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
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.t5 import T5Config
from kontext_jax.objectives.flow_matching import FlowInit, FlowMatchingConfig
from kontext_jax.optim import OptimConfig
from kontext_jax.sharding import MESH_AXES, MeshConfig, make_mesh, platform
from kontext_jax.types import Latents, Triple

ROOT = Path(__file__).parents[1]
CHANNELS = 24
DATA = DataConfig(
    batch_size=8,
    geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
    packing=PackingConfig(image_tokens=64, text_tokens=72, max_examples=4),
    text=TextConfig(max_tokens=64),
)


def config(**kwargs) -> Config:
    """Flow matching with networks as small as can be, whose weights are nowhere."""
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


def store_of(data: DataConfig, folder: Path) -> DataConfig:
    """Reading latents, all of them 0, in place of the data set's pixels."""
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


@pytest.mark.parametrize("fed", ["pixels", "latents"])
def test_rows_have_the_shapes_that_the_loader_yields(world_folder, tmp_path, fed):
    data = dataclasses.replace(DATA, path=str(world_folder), negatives=fed == "latents")
    if fed == "latents":
        data = store_of(data, tmp_path / "store")
    loader = Loader(data, seed=0)
    read = next(loader)
    loader.close()
    made = compiling.full_row(data, CHANNELS if fed == "latents" else 0)
    assert jax.tree.structure(made) == jax.tree.structure(read)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(read), strict=True):
        assert ((data.batch_size, *ours.shape), ours.dtype) == (theirs.shape, theirs.dtype)


def test_a_row_is_filled_with_images_of_the_largest_size():
    """FLUX's own: two of 1328 x 800 pixels, which is more than 1024 x 1024."""
    packing = PackingConfig(image_tokens=8320, text_tokens=512, max_examples=1)
    row = compiling.full_row(DataConfig(packing=packing))
    assert {key: x.shape for key, x in row.images.items()} == {"1328x800": (2, 1328, 800, 3)}
    assert np.sum(row.segments == 1) == 2 * 4150 and np.sum(row.is_target) == 4150
    assert np.sum(row.text_segments == 1) == 512
    with pytest.raises(ValueError, match="takes 4150 tokens, a row holds 4096"):
        compiling.full_row(DataConfig(packing=PackingConfig(image_tokens=4096)))


@pytest.mark.slow
def test_a_step_on_latents_is_compiled_without_a_store():
    settings = config()
    settings.data = dataclasses.replace(DATA, latents=LatentsConfig(path="nowhere"), negatives=True)
    step = compiling.compile_step(settings, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert step.batch.images == {} and step.batch.latents.shape == (8, 64, CHANNELS)
    assert step.batch.negative.text_ids.shape == (8, 72)
    assert "convolution" not in step.text  # nothing is encoded
    assert compiling.make_report(settings, make_mesh(MeshConfig()), step).examples == 16


def lowered_linear() -> str:
    make = lambda: layers.Linear(  # noqa: E731
        6, 4, ("embed", "mlp"), rngs=nnx.Rngs(0), dtype=jnp.dtype("float32")
    )
    x = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
    return str(jax.make_jaxpr(lambda linear, x: linear(x))(nnx.eval_shape(make), x))


def test_the_form_of_a_layer_is_that_of_the_platform_compiled_for():
    tpu = AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, abstract_device=tpu)
    on_cpu = lowered_linear()
    with use_abstract_mesh(mesh):
        assert platform() == "tpu"
        on_tpu = lowered_linear()
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert platform() == "cpu"
        assert lowered_linear() == on_cpu
    assert platform() == "cpu"
    assert "f32[10,6]" in on_cpu  # rows and tokens as one axis
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
    # The transformer's forward pass twice and its backward pass, and the encoders.
    assert report.cost.flops > 4 / 3 * report.model_flops > 0
    assert report.cost.collectives
    assert report.fits and not report.seconds  # of a CPU nothing is known
    json.dumps(dataclasses.asdict(report))


def test_the_roofline_names_its_limit(capsys):
    kind = "TPU v5 lite"
    chip = CHIPS[kind]
    cost = hlo.Cost(
        flops=197e12,
        bytes=0.5 * chip.memory_bandwidth,
        collectives={"all-gather": hlo.Traffic(3.0, 2 * chip.link_bandwidth)},
        opaque={"kernel": 2.0},
        unknown_loops=1,
    )
    seconds, mfu = compiling.roofline(cost, 0.5 * 197e12, chip)
    assert seconds == {"compute": 1, "memory": 0.5, "links": 2}
    np.testing.assert_allclose(mfu, (0.25, 0.5 / 3.5))
    report = compiling.Report(
        device_kind=kind,
        num_devices=8,
        mesh={"fsdp": 8},
        rows=8,
        examples=8,
        parameters={"transformer": 100},
        memory={"peak": 17_200_000_000},
        capacity=float(chip.memory),
        cost=cost,
        model_flops=0.5 * 197e12,
        seconds=seconds,
        mfu=mfu,
    )
    assert not report.fits
    compiling.print_report(report)
    said = capsys.readouterr().out
    for words in ("links limits", "MFU 25.0%", "2 x kernel", "1 loops of unknown length"):
        assert words in said


def test_frozen_networks_that_are_not_at_hand_are_flux_s():
    frozen = compiling.abstract_frozen(config(lora=LoraConfig(rank=4)))
    assert set(frozen) == {"transformer", "text_encoder", "autoencoder"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}
    assert frozen["autoencoder"].config.token_channels == 24
    odd = config()
    odd.objective.transformer.in_channels = 20
    with pytest.raises(ValueError, match="20 channels and are 8 pixels wide"):
        compiling.abstract_frozen(odd)


def test_rows_that_do_not_divide_are_refused():
    run = config()
    run.optim = OptimConfig(accumulate_steps=3)
    with pytest.raises(ValueError, match="batch_size 8 must be a multiple of 24"):
        compiling.compile_step(run, make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (19.4G) exceeds available HBM (15.75G). HLO module: jit_f.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.4G of 15.75G hbm. "
        "Exceeded hbm capacity by 3.7G.\nTotal hbm usage >= 19.9G",
    ],
)
def test_a_program_that_does_not_fit_gets_one_sentence(words):
    said = compiling._reason(jax.errors.JaxRuntimeError(words))
    assert said.startswith("the step does not fit: it needs 19.4G of a device's 15.75G bytes.")


def test_other_errors_of_the_compiler_are_told_in_a_line():
    assert compiling._reason(jax.errors.JaxRuntimeError("INTERNAL: no\nmore")) == "INTERNAL: no"


def test_a_topology_without_its_compiler_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(cli.UserError, match="pip install 'kontext-jax\\[aot\\]'"):
        compiling.topology_devices("v5e:2x4")


def run(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: JAX looks for libtpu once."""
    return subprocess.run(
        [sys.executable, "-m", "kontext_jax.compile", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_a_step_compiles_for_tpus_that_are_elsewhere(tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: aot)")
    table = tmp_path / "table.json"
    done = run("--config=configs/quickstart.py", "--topology=v5e:2x4", f"--json={table}")
    assert done.returncode == 0, done.stderr
    assert "8 x TPU v5 lite, mesh fsdp=8" in done.stdout and "limits" in done.stdout
    report = json.loads(table.read_text())
    assert report["cost"]["unknown_loops"] == 0
    # Full recomputation: the transformer's forward pass twice, and the text encoder.
    assert 4 / 3 < report["cost"]["flops"] / report["model_flops"] < 3
    assert report["memory"]["peak"] < report["capacity"]

    refused = run(
        "--config=configs/quickstart.py", "--topology=v5e:2x2", "--config.data.batch_size=65536"
    )
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "compile: the step does not fit: it needs" in refused.stderr.splitlines()[-1]
    refused = run("--config=configs/quickstart.py", "--topology=v5e:3x5")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "compile: --topology=v5e:3x5 is no slice of TPUs" in refused.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "topology", "executed"),
    [
        ("kontext_1024", "v5p:2x2x1", (1.05, 2.2)),
        ("flow_256", "v6e:2x2", (1.05, 2.2)),
        # Student and teacher repeat their forward passes, and nothing encodes images.
        ("ladd_1024", "v5p:2x2x1", (1.15, 1.35)),
    ],
)
def test_the_configs_for_pods_compile(config, topology, executed, tmp_path):
    """Fewer blocks and chips, all else at full size; README.md has the whole of it."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: aot)")
    table = tmp_path / "table.json"
    done = run(
        f"--config=configs/{config}.py",
        f"--topology={topology}",
        f"--json={table}",
        "--config.objective.transformer.depth=1",
        "--config.objective.transformer.depth_single=2",
        "--config.objective.text_encoder.num_layers=1",
        "--config.data.batch_size=4",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(table.read_text())
    # The kernels are there, and their FLOPs are known; with so few blocks the encoders show.
    assert "tpu_custom_call" not in report["cost"]["opaque"]
    least, most = executed
    assert least < report["cost"]["flops"] / report["model_flops"] < most
    assert report["memory"]["peak"] < report["capacity"]


@pytest.mark.slow
def test_a_step_compiles_for_several_slices():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: aot)")
    slices = ("--config=configs/quickstart.py", "--topology=v5e:2x2", "--num_slices=2")
    done = run(*slices)
    assert done.returncode == 0, done.stderr
    assert "8 x TPU v5 lite, mesh data=2 fsdp=4" in done.stdout
    refused = run(*slices, "--config.mesh.fsdp=1", "--config.mesh.tensor=8")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert (
        "compile: A mesh of data=1, fsdp=1, context=1, tensor=8 does not fit 2 slices"
        in (refused.stderr.splitlines()[-1])
    )


def test_several_slices_need_to_be_told_apart():
    refused = run("--config=configs/quickstart.py", "--num_slices=2")
    assert refused.returncode == 1
    assert "compile: --num_slices needs --topology" in refused.stderr.splitlines()[-1]
