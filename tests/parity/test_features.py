"""Compares feature networks with transformers and efficientnet_lite_pytorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.weights import efficientnet
from tests.parity import draws, ours

REASON = "needs the convert extra: pip install -e '.[convert]'"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow

TAPS = (0, 2, 4)


@pytest.mark.parametrize("size", [70, 28, 42, 112], ids="{} pixels".format)
def test_dino_and_its_gradient_for_images_of_any_size(tmp_path, size):
    """Positions are learned at 70 pixels, and interpolated for other sizes."""
    network = theirs.dino()
    model = ours.load(theirs.save(network, tmp_path), "dino", input_size=size, taps=TAPS)
    images = draws.pixels("images", 2, size, size, 3)

    pixels = torch.from_numpy(images).requires_grad_()
    maps, pooled = theirs.features(network, pixels, TAPS)
    directions = [draws.normal(f"along/{i}", *x.shape) for i, x in enumerate([*maps, pooled])]
    outputs = zip([*maps, pooled], directions, strict=True)
    sum((x * torch.from_numpy(d)).mean() for x, d in outputs).backward()

    @jax.jit
    def features_and_grad(images):
        def loss(images):
            outputs = jax.tree.leaves(model(images))
            return sum(jnp.mean(x * d) for x, d in zip(outputs, directions, strict=True)), outputs

        return jax.grad(loss, has_aux=True)(images)

    grad, outputs = features_and_grad(images)
    for actual, expected in zip(outputs, [*maps, pooled], strict=True):
        expected = expected.detach().numpy()
        assert expected.std() > 0.5
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    expected = pixels.grad.numpy()
    np.testing.assert_allclose(grad, expected, atol=2e-5 * np.abs(expected).max())


def test_efficientnet_lite0(tmp_path):
    """With random weights from a legacy file that PyTorch wrote."""
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason=REASON)
    network = lite.EfficientNet.from_name("efficientnet-lite0").eval()
    tensors = {}
    for name, tensor in network.state_dict().items():
        drawn = torch.from_numpy(np.asarray(draws.weight(name, tensor.shape)))
        tensors[name] = (drawn.exp() if name.endswith("var") else drawn).to(tensor.dtype)
    network.load_state_dict(tensors)
    torch.save(tensors, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    config = EfficientNetConfig.lite0()
    model = efficientnet.load(tmp_path / "file.pth", config, make_mesh(MeshConfig()))

    images = draws.pixels("images", 2, 224, 224, 3)
    inputs = torch.from_numpy((images * 127.5 + 0.5) / 128).permute(0, 3, 1, 2)
    maps = {}
    for i in config.taps:
        network._blocks[i].register_forward_hook(lambda *args, i=i: maps.update({i: args[-1]}))
    with torch.no_grad():
        pooled, logits = network.extract_features(inputs).mean((2, 3)), network(inputs)
    call = jax.jit(lambda model, x: (*model(x).maps, model(x).pooled, model.logits(x)))
    outputs = [*(maps[i].permute(0, 2, 3, 1) for i in config.taps), pooled, logits]
    for actual, expected in zip(call(model, images), outputs, strict=True):
        expected = expected.numpy()
        assert expected.std() > 0.01
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
