"""Tests of the weights of FID's network: names, folded norms, and files that do not fit."""

import hashlib
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from kontext_jax.models.inception import Inception, InceptionConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights import inception
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.inception import FID_SHA256, URL, is_fid, load_inception
from tests.weights import legacy

TINY = InceptionConfig.tiny()

A = "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
B = "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3"
C = "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool"
D = "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"
E = "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"
BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D}
BLOCKS |= {"7b": E, "7c": E}

STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
CONVOLUTIONS = {f"Conv2d_{name}": f"conv2d_{name}" for name in STEM}  # ours, by PyTorch's names
CONVOLUTIONS |= {
    f"Mixed_{block}.branch{branch}": f"mixed_{block}/branch{branch}"
    for block, branches in BLOCKS.items()
    for branch in branches.split()
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def tensors():
    """The tensors of a file with the widths of TINY."""
    params = named_leaves(nnx.eval_shape(lambda: Inception(TINY, rngs=nnx.Rngs(0))))
    rng, arrays = np.random.default_rng(0), {}
    for name, ours in CONVOLUTIONS.items():
        height, width, inputs, outputs = params[f"{ours}/kernel"].shape
        shape = (outputs, inputs, height, width)
        arrays[f"{name}.conv.weight"] = rng.standard_normal(shape, np.float32)
        for kind in ("weight", "bias", "running_mean"):
            arrays[f"{name}.bn.{kind}"] = rng.standard_normal(outputs, np.float32)
        arrays[f"{name}.bn.running_var"] = rng.uniform(0, 2, outputs).astype(np.float32)
        arrays[f"{name}.bn.num_batches_tracked"] = np.array(3, np.int64)
    arrays["fc.weight"] = rng.standard_normal((1008, 128), np.float32)
    return arrays | {"fc.bias": rng.standard_normal(1008, np.float32)}


def test_norms_are_folded_into_the_convolutions_before_them(tmp_path, tensors, mesh):
    network = load_inception(legacy.save(tmp_path / "file.pth", tensors), mesh, TINY)
    params = named_leaves(network)
    assert len(CONVOLUTIONS) == 94
    assert params.keys() == {
        f"{ours}/{kind}" for ours in CONVOLUTIONS.values() for kind in ("kernel", "bias")
    }
    for name, ours in CONVOLUTIONS.items():
        weight, gamma, beta, mean, variance = (
            tensors[f"{name}.{kind}"].astype(np.float64)
            for kind in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        patch = np.random.default_rng(1).standard_normal(weight.shape[1:])
        out = np.einsum("ihw,oihw->o", patch, weight)
        expected = gamma * (out - mean) / np.sqrt(variance + 1e-3) + beta
        kernel, bias = (np.asarray(params[f"{ours}/{kind}"]) for kind in ("kernel", "bias"))
        assert kernel.dtype == bias.dtype == np.float32
        actual = np.einsum("ihw,hwio->o", patch, kernel.astype(np.float64)) + bias
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4, err_msg=name)


def test_safetensors_with_the_same_tensors_give_the_same_network(tmp_path, tensors, mesh):
    """With or without the norms' batch counters, which are not read."""
    expected = load_inception(legacy.save(tmp_path / "file.pth", tensors), mesh, TINY)
    uncounted = {name: x for name, x in tensors.items() if "num_batches" not in name}
    for stored in (tensors, uncounted):
        save_file(stored, tmp_path / "file.safetensors")
        network = load_inception(tmp_path / "file.safetensors", mesh, TINY)
        jax.tree.map(np.testing.assert_array_equal, network, expected)


def test_one_message_names_everything_that_does_not_fit(tmp_path, tensors, mesh):
    path, changed = tmp_path / "file.pth", dict(tensors)
    del changed["Mixed_7c.branch_pool.bn.bias"], changed["fc.bias"]
    changed["AuxLogits.fc.weight"] = np.zeros(1, np.float32)
    changed["Mixed_5b.branch1x1.conv.weight"] = np.zeros((4, 12, 3, 3), np.float32)
    changed["fc.weight"] = np.zeros((1000, 128), np.float32)
    with pytest.raises(WeightsError) as error:
        load_inception(legacy.save(path, changed), mesh, TINY)
    errors = (
        "Mixed_7c.branch_pool.bn.bias is missing; fc.bias is missing; "
        "AuxLogits.fc.weight is unexpected; "
        "Mixed_5b.branch1x1.conv.weight is (4, 12, 3, 3), not (4, 12, 1, 1); "
        "fc.weight is (1000, 128), not (1008, 128)."
    )
    assert str(error.value) == f"{path} does not fit FID's network: {errors}"


def test_invalid_files_are_refused(tmp_path, mesh):
    for name in ("file.pth", "file.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no archive of torch.save")
        with pytest.raises(WeightsError, match=re.escape(name)):
            load_inception(tmp_path / name, mesh)


def test_a_missing_file_is_reported_with_its_url(tmp_path, mesh):
    path = tmp_path / "none.pth"
    assert URL.startswith("https://github.com/mseitzer/pytorch-fid/releases/download/")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path} does not exist; ") + f".*{URL}"):
        load_inception(path, mesh)


def test_only_the_published_file_is_fid(tmp_path, tensors, monkeypatch):
    assert len(FID_SHA256) == 64 and URL.endswith(f"-{FID_SHA256[:8]}.pth")
    path = legacy.save(tmp_path / "file.pth", tensors)
    assert not is_fid(path)
    monkeypatch.setattr(inception, "FID_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert is_fid(path)
    save_file(tensors, tmp_path / "file.safetensors")
    assert not is_fid(tmp_path / "file.safetensors")  # its origin is unknown
    with path.open("ab") as file:
        file.write(b"\0")
    assert not is_fid(path)
