"""Tests of LPIPS's weights: the mapping of tensors to parameters, and invalid files."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights import lpips
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.lpips import load_lpips
from tests.weights import legacy

CONVOLUTIONS = {  # torchvision's index of a layer: its shape there, and our name
    0: ((64, 3, 11, 11), "stages/0/0"),
    3: ((192, 64, 5, 5), "stages/1/0"),
    6: ((384, 192, 3, 3), "stages/2/0"),
    8: ((256, 384, 3, 3), "stages/3/0"),
    10: ((256, 256, 3, 3), "stages/4/0"),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def trunk():
    rng, tensors = np.random.default_rng(0), {}
    for layer, (shape, _) in CONVOLUTIONS.items():
        tensors[f"features.{layer}.weight"] = rng.standard_normal(shape, np.float32)
        tensors[f"features.{layer}.bias"] = rng.standard_normal(shape[0], np.float32)
    return tensors | {"classifier.6.bias": np.zeros(1000, np.float32)}


@pytest.fixture(scope="module")
def heads():
    rng, shapes = np.random.default_rng(1), [shape for shape, _ in CONVOLUTIONS.values()]
    return {
        f"lin{i}.model.1.weight": rng.uniform(size=(1, shape[0], 1, 1)).astype(np.float32)
        for i, shape in enumerate(shapes)
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory, trunk, heads):
    folder = tmp_path_factory.mktemp("lpips")
    return legacy.save(folder / "a.pth", trunk), legacy.save(folder / "heads.pth", heads)


def check(network, trunk, heads):
    params = {name: np.asarray(x) for name, x in named_leaves(network).items()}
    for layer, (_, ours) in CONVOLUTIONS.items():
        kernel = trunk[f"features.{layer}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(params.pop(f"{ours}/kernel"), kernel, strict=True)
        bias = trunk[f"features.{layer}.bias"]
        np.testing.assert_array_equal(params.pop(f"{ours}/bias"), bias, strict=True)
    for i, head in enumerate(heads.values()):
        np.testing.assert_array_equal(params.pop(f"heads/{i}"), head[0, :, 0, 0], strict=True)
    assert not params


def test_every_tensor_is_loaded_into_its_parameter(files, trunk, heads, mesh):
    check(load_lpips(*files, "alex", mesh), trunk, heads)


def test_safetensors_in_half_precision_are_loaded(tmp_path, files, trunk, heads, mesh):
    halves = {name: x.astype(np.float16) for name, x in trunk.items()}
    save_file(halves, tmp_path / "alex.safetensors")
    network = load_lpips(str(tmp_path / "alex.safetensors"), str(files[1]), "alex", mesh)
    check(network, {name: x.astype(np.float32) for name, x in halves.items()}, heads)


def test_the_network_is_sharded_over_the_mesh(files, mesh):
    kernel = named_leaves(load_lpips(*files, "alex", mesh))["stages/4/0/kernel"]
    assert kernel.sharding.mesh == mesh and not kernel.is_fully_replicated


def test_layers_of_vgg_have_torchvision_s_indices():
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    expected = {f"features.{i}.{kind}" for i in indices for kind in ("weight", "bias")}
    expected |= {f"lin{i}.model.1.weight" for i in range(5)}
    assert set(lpips._names("vgg").values()) == expected


def test_one_message_names_everything_that_does_not_fit(tmp_path, trunk, heads, mesh):
    wrong = {name: x for name, x in trunk.items() if name != "features.0.bias"}
    wrong["features.3.bias"] = np.zeros(5, np.float32)
    wrong["features.1.weight"] = np.zeros(5, np.float32)
    short = {name: x for name, x in heads.items() if name != "lin4.model.1.weight"}
    short["lin0.model.1.weight"] = np.zeros((64, 1), np.float32)
    paths = legacy.save(tmp_path / "a.pth", wrong), legacy.save(tmp_path / "heads.pth", short)
    with pytest.raises(WeightsError) as error:
        load_lpips(*paths, "alex", mesh)
    errors = (
        "features.0.bias is missing; lin4.model.1.weight is missing; features.1.weight is "
        "unexpected; lin0.model.1.weight is (64, 1), not (1, 64, 1, 1); features.3.bias is (5,), "
        "not (192,)."
    )
    assert str(error.value) == f"{paths[0]} and {paths[1]} do not fit LPIPS on alex: {errors}"


def test_heads_default_to_the_installed_package_s(tmp_path, monkeypatch, files, trunk, heads, mesh):
    """The package is not imported, because that would import torch."""
    folder = tmp_path / "some_lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "some_lpips" / "__init__.py").write_text("raise AssertionError('imported')\n")
    legacy.save(folder / "alex.pth", heads)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lpips, "PACKAGE", "some_lpips")
    check(load_lpips(files[0], "", "alex", mesh), trunk, heads)


def test_missing_files_are_reported_with_their_source(tmp_path, monkeypatch, files, mesh):
    monkeypatch.setattr(lpips, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="not installed: pip install --no-deps lpips==0.1"):
        load_lpips(files[0], "", "alex", mesh)
    url = "download https://download.pytorch.org/models/vgg16-397923af.pth"
    with pytest.raises(FileNotFoundError, match=f"LPIPS's trunk '' does not exist; {url}"):
        load_lpips("", files[1], "vgg", mesh)
    with pytest.raises(FileNotFoundError, match="heads.none"):
        load_lpips(files[0], tmp_path / "heads.none", "alex", mesh)
    with pytest.raises(ValueError, match="net 'squeeze' is not one of alex, vgg"):
        load_lpips(*files, "squeeze", mesh)
