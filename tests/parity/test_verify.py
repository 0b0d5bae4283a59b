"""``convert --verify``: networks of every layout against PyTorch's, and mistakes that it finds."""

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
    found = [LINE.fullmatch(line).groups() for line in lines(tmp_path / "out")]
    assert [name for name, _, _ in found] == list(NETWORKS)
    for name, difference, largest in found:
        assert 0.1 < float(largest) < 20, name
        assert float(difference) < 2e-5 * float(largest), name


@pytest.mark.parametrize("name", ["transformer.safetensors", "text_encoder"])
def test_one_network_alone(pipeline_folder, tmp_path, name):
    layout, network = ("bfl", "transformer") if "." in name else ("diffusers", "clip")
    convert(pipeline_folder, tmp_path / name, layout, network=network)
    (line,) = lines(tmp_path / name)
    assert LINE.fullmatch(line)[1] == network


@pytest.fixture
def swapped_names(monkeypatch):
    """Queries and keys of the double blocks have one another's names in diffusers' layout."""
    rows = flux.rows

    def swapped(row):
        if not row.param.startswith("double_blocks/img_attn/qkv"):
            return row
        query, key, value = row.diffusers
        return dataclasses.replace(row, diffusers=(key, query, value))

    monkeypatch.setattr(flux, "rows", lambda config: [swapped(row) for row in rows(config)])


@pytest.mark.parametrize("layout", ["diffusers", "bfl", "orbax"])
def test_a_tensor_of_another_name_is_found(pipeline_folder, tmp_path, swapped_names, layout):
    """Read again, every bit is where it was written to."""
    convert(pipeline_folder, tmp_path / "out", layout, network="transformer")
    with pytest.raises(WeightsError, match="transformer is not the same network in PyTorch: the v"):
        lines(tmp_path / "out")


def test_another_function_is_found(pipeline_folder):
    """Rotary angles that are a little slower."""
    readers = locations.open_networks(pipeline_folder / "transformer")
    reader = readers["transformer"]
    reader.config = dataclasses.replace(reader.config, theta=9000.0)
    with pytest.raises(WeightsError, match=r"differs by \S+ where the largest is"):
        list(verify.verify(pipeline_folder / "transformer", readers))


def test_files_that_pytorch_would_fill_up_are_refused(pipeline_folder, tmp_path):
    """An embedding of guidance that is there, and that the config does not speak of."""
    folder = shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    readers = locations.open_networks(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"guidance_embeds": False}))
    with pytest.raises(WeightsError, match="not find itself in .*: unexpected_keys .*guidance"):
        list(verify.verify(folder, readers))


def test_without_pytorch_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "kontext_jax.weights.verify")
    with pytest.raises(ImportError, match=r"needs torch and diffusers .*: pip install -e '.\[conv"):
        importlib.import_module("kontext_jax.weights.verify")


def test_the_command_refuses_to_verify_adapters_before_it_starts(pipeline_folder, tmp_path):
    arguments = [f"--input={pipeline_folder}", f"--output={tmp_path / 'out'}", "--format=lora"]
    done = subprocess.run(
        [sys.executable, "-m", "kontext_jax.convert", *arguments, "--verify"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("leave out --network, --dtype, --lora and --verify.")
    assert not list(tmp_path.iterdir())
