"""Compares LPIPS with the package ``lpips`` (its heads, random trunks), within 1e-5, relative."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.weights.lpips import load_lpips
from kontext_jax.weights.torch_legacy import read_tensors
from tests.parity import draws

torch = pytest.importorskip("torch", reason="needs the convert extra: pip install -e '.[convert]'")
lpips = pytest.importorskip("lpips", reason="needs PyTorch's LPIPS: pip install lpips torchvision")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning"),
]

SIZES = {"alex": [(31, 64), (80, 53)], "vgg": [(16, 40), (48, 33)]}
"""Sizes of images, (height, width); the first of each are the smallest possible."""


@functools.cache
def theirs(net: str):
    """Returns the package's network with kernels that preserve variance through the ReLUs."""
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for name, parameter in network.net.named_parameters():
        drawn = draws.normal(name, *parameter.shape)
        deviation = (2 / np.prod(drawn.shape[1:])) ** 0.5 if drawn.ndim == 4 else 0.1
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(drawn * np.float32(deviation)))
    return network


def load(net: str, folder: Path, is_zip: bool = True):
    """Loads our network with their trunk, from a file in torchvision's layout."""
    parameters = theirs(net).net.state_dict().items()
    tensors = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in parameters}
    tensors["classifier.6.bias"] = torch.zeros(1000)
    torch.save(tensors, folder / "file.pth", _use_new_zipfile_serialization=is_zip)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return load_lpips(folder / "file.pth", "", net, mesh)


def pairs(size: tuple[int, int]) -> list[np.ndarray]:
    """Returns two pairs: two random images, and an image and its mean with another one."""
    first = draws.pixels("first", 2, *size, 3)
    second = draws.pixels("second", 2, *size, 3)
    second[1] = (first[1] + second[1]) / 2
    return [first, second]


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_distances(tmp_path, net, is_zip):
    model = load(net, tmp_path, is_zip)
    for size in SIZES[net]:
        images = pairs(size)
        with torch.no_grad():
            expected = theirs(net)(*(torch.from_numpy(x).permute(0, 3, 1, 2) for x in images))
        actual = jax.jit(lambda model, *images: model(*images))(model, *images)
        expected = expected.numpy().reshape(2)
        assert expected[0] > expected[1] > 0.005
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_gradients(tmp_path):
    first, second = pairs((48, 71))
    pixels = torch.from_numpy(first).requires_grad_()
    images = (x.permute(0, 3, 1, 2) for x in (pixels, torch.from_numpy(second)))
    theirs("alex")(*images).sum().backward()
    model = load("alex", tmp_path)
    actual = jax.jit(jax.grad(lambda x, y: jnp.sum(model(x, y))))(first, second)
    expected = pixels.grad.numpy()
    assert (np.abs(expected) > 0).mean() > 0.99
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_read_tensors_returns_what_torch_saved(tmp_path, is_zip):
    """With every supported dtype, views of one storage, parameters, and a module's state dict."""
    numbers = torch.arange(24.0).reshape(2, 3, 4)
    tensors = torch.nn.Conv2d(2, 3, 5).state_dict()
    tensors |= {
        "transposed": numbers.permute(2, 0, 1),
        "strided": numbers[:, 1:, ::2],
        "bfloat16": numbers.to(torch.bfloat16),
        "float16": numbers.to(torch.float16),
        "int64": torch.tensor(7),
        "none": torch.zeros(2, 0, 5),
        "parameter": torch.nn.Parameter(numbers),
    }
    torch.save(tensors, tmp_path / "file.pth", _use_new_zipfile_serialization=is_zip)
    actual = read_tensors(tmp_path / "file.pth")
    assert list(actual) == list(tensors)
    for name, tensor in tensors.items():
        assert str(tensor.dtype) == f"torch.{actual[name].dtype}"
        expected = tensor.detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(actual[name].astype(np.float64), expected, strict=True)
