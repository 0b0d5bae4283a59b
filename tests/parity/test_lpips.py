"""LPIPS against the package ``lpips``, its heads on random trunks, to 1e-5 of the distances."""

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
"""Of images, height and width; the first are as small as can be."""


@functools.cache
def theirs(net: str):
    """Kernels keep the variance of what they are given through the ReLUs."""
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for name, parameter in network.net.named_parameters():
        drawn = draws.normal(name, *parameter.shape)
        deviation = (2 / np.prod(drawn.shape[1:])) ** 0.5 if drawn.ndim == 4 else 0.1
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(drawn * np.float32(deviation)))
    return network


def load(net: str, folder: Path, is_zip: bool = True):
    """Our network of their trunk, from a file like torchvision's."""
    parameters = theirs(net).net.state_dict().items()
    tensors = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in parameters}
    tensors["classifier.6.bias"] = torch.zeros(1000)
    torch.save(tensors, folder / "file.pth", _use_new_zipfile_serialization=is_zip)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return load_lpips(folder / "file.pth", "", net, mesh)


def pairs(size: tuple[int, int]) -> list[np.ndarray]:
    """Two pairs: of other images, and of an image and one halfway to another."""
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
            wanted = theirs(net)(*(torch.from_numpy(x).permute(0, 3, 1, 2) for x in images))
        found = jax.jit(lambda model, *images: model(*images))(model, *images)
        wanted = wanted.numpy().reshape(2)
        assert wanted[0] > wanted[1] > 0.005
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_gradients(tmp_path):
    first, second = pairs((48, 71))
    pixels = torch.from_numpy(first).requires_grad_()
    seen = (x.permute(0, 3, 1, 2) for x in (pixels, torch.from_numpy(second)))
    theirs("alex")(*seen).sum().backward()
    model = load("alex", tmp_path)
    found = jax.jit(jax.grad(lambda x, y: jnp.sum(model(x, y))))(first, second)
    wanted = pixels.grad.numpy()
    assert (np.abs(wanted) > 0).mean() > 0.99
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_files_hold_what_was_saved(tmp_path, is_zip):
    """Every dtype that is read, views of one storage, parameters, and a module's own dict."""
    numbers = torch.arange(24.0).reshape(2, 3, 4)
    tensors = torch.nn.Conv2d(2, 3, 5).state_dict()
    tensors |= {
        "turned": numbers.permute(2, 0, 1),
        "part": numbers[:, 1:, ::2],
        "bfloat16": numbers.to(torch.bfloat16),
        "float16": numbers.to(torch.float16),
        "int64": torch.tensor(7),
        "none": torch.zeros(2, 0, 5),
        "parameter": torch.nn.Parameter(numbers),
    }
    torch.save(tensors, tmp_path / "file.pth", _use_new_zipfile_serialization=is_zip)
    found = read_tensors(tmp_path / "file.pth")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert str(tensor.dtype) == f"torch.{found[name].dtype}"
        wanted = tensor.detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(found[name].astype(np.float64), wanted, strict=True)
