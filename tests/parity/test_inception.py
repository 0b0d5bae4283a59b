"""Compares FID's InceptionV3 with pytorch_fid's, with random weights."""

import functools

import jax
import numpy as np
import pytest

from kontext_jax.models.features import pooled_features
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.weights.inception import load_inception
from tests.parity import draws

REASON = "needs torch, torchvision and pytorch-fid"
torch = pytest.importorskip("torch", reason=REASON)
inception = pytest.importorskip("pytorch_fid.inception", reason=REASON)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """pytorch_fid's network, and ours from a legacy file that PyTorch wrote."""
    path = tmp_path_factory.mktemp("fid") / "file.pth"
    bare = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    tensors = {}
    for name, tensor in bare.state_dict().items():
        drawn = torch.from_numpy(np.asarray(draws.weight(name, tensor.shape)))
        if name.endswith("conv.weight"):
            drawn = 1.2 * drawn  # so that differences between images survive the ReLUs
        if name.endswith("running_var"):
            drawn = (5 * drawn).exp()  # mostly from 0.1 to 10
        tensors[name] = drawn.to(tensor.dtype)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with pytest.MonkeyPatch.context() as patch:
        # Replaces the download of its weights by the file.
        load = functools.partial(torch.load, path, weights_only=True)
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: load())
        theirs = inception.InceptionV3().eval()
    return theirs, load_inception(path, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("size", [(299, 299), (64, 80), (512, 400)], ids=str)
def test_pooled_features_of_images_of_any_size(networks, size):
    """Within 1e-5 of the largest feature; images differ by more than a tenth of it."""
    theirs, ours = networks
    images = draws.pixels("images", 3, *size, 3)
    images[1] *= 0.3
    images[2] = 0.5 * images[2, ::-1] + 0.4
    images = np.round(127.5 * (images + 1)).astype(np.uint8)
    with torch.no_grad():
        (expected,) = theirs(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    expected = expected[:, :, 0, 0].numpy()
    actual = pooled_features(ours, list(images), make_mesh(MeshConfig(), jax.devices()[:1]))
    largest = np.abs(expected).max()
    assert all(np.abs(expected[i] - expected[i - 1]).max() > 0.1 * largest for i in range(3))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * largest)
