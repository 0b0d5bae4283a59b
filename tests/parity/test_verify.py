"""Tests of ``convert --verify``: every layout agrees with PyTorch, and errors are found."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest

from kontext_jax.convert import convert
from kontext_jax.loading import locations
from kontext_jax.weights import flux
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.networks import NETWORKS

REASON = "needs the convert extra: pip install -e '.[convert]'"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from kontext_jax.weights import verify  # noqa: E402

pytestmark = pytest.mark.slow

LINE = re.compile(r"(\w+): PyTorch and JAX agree to (\S+) of outputs up to (\S+)")


def lines(output) -> list[str]:
    return list(verify.verify(output, locations.open_networks(output)))


@pytest.mark.parametrize(
    ("layout", "dtype"), [("diffusers", "bfloat16"), ("bfl", None), ("orbax", "bfloat16")]
)
def test_networks_of_every_layout_agree(pipeline_folder, tmp_path, layout, dtype):
    convert(pipeline_folder, tmp_path / "out", layout, dtype=dtype)
    results = [LINE.fullmatch(line).groups() for line in lines(tmp_path / "out")]
    assert [name for name, _, _ in results] == list(NETWORKS)
    for name, difference, largest in results:
        assert 0.1 < float(largest) < 20, name
        assert float(difference) < 2e-5 * float(largest), name


@pytest.mark.parametrize("name", ["transformer.safetensors", "text_encoder"])
def test_a_single_network_agrees(pipeline_folder, tmp_path, name):
    layout, network = ("bfl", "transformer") if "." in name else ("diffusers", "clip")
    convert(pipeline_folder, tmp_path / name, layout, network=network)
    (line,) = lines(tmp_path / name)
    assert LINE.fullmatch(line)[1] == network


@pytest.fixture
def swapped_names(monkeypatch):
    """Swaps the names of queries and keys of the double blocks in diffusers' layout."""
    rows = flux.rows

    def swapped(row):
        if not row.param.startswith("double_blocks/img_attn/qkv"):
            return row
        query, key, value = row.diffusers
        return dataclasses.replace(row, diffusers=(key, query, value))

    monkeypatch.setattr(flux, "rows", lambda config: [swapped(row) for row in rows(config)])


@pytest.mark.parametrize("layout", ["diffusers", "bfl", "orbax"])
def test_swapped_names_are_found(pipeline_folder, tmp_path, swapped_names, layout):
    """Reading the output back by the same name table does not find them."""
    convert(pipeline_folder, tmp_path / "out", layout, network="transformer")
    with pytest.raises(WeightsError, match="transformer differs in PyTorch: the velocity is off"):
        lines(tmp_path / "out")


def test_another_function_is_found(pipeline_folder):
    """With rotary frequencies that differ slightly."""
    readers = locations.open_networks(pipeline_folder / "transformer")
    reader = readers["transformer"]
    reader.config = dataclasses.replace(reader.config, theta=9000.0)
    with pytest.raises(WeightsError, match=r"is off by \S+ where the largest value is"):
        list(verify.verify(pipeline_folder / "transformer", readers))


def test_tensors_that_pytorch_would_ignore_are_refused(pipeline_folder, tmp_path):
    """Tensors of a guidance embedding that the config disables."""
    folder = shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    readers = locations.open_networks(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"guidance_embeds": False}))
    with pytest.raises(WeightsError, match="PyTorch cannot load .*: unexpected_keys .*guidance"):
        list(verify.verify(folder, readers))


def test_missing_pytorch_is_reported_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "kontext_jax.weights.verify")
    with pytest.raises(ImportError, match=r"needs torch and diffusers .*: pip install -e '.\[conv"):
        importlib.import_module("kontext_jax.weights.verify")


def test_the_command_refuses_to_verify_adapters(pipeline_folder, tmp_path):
    arguments = [f"--input={pipeline_folder}", f"--output={tmp_path / 'out'}", "--format=lora"]
    process = subprocess.run(
        [sys.executable, "-m", "kontext_jax.convert", *arguments, "--verify"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.strip().endswith("leave out --network, --dtype, --lora and --verify.")
    assert not list(tmp_path.iterdir())
