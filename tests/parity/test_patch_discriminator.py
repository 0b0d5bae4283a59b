"""The patch discriminator equals pix2pix's in PyTorch, with GroupNorm in place of BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.patch_discriminator import PatchConfig, PatchDiscriminator

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: convert)")

CONFIG = PatchConfig(channels=8, num_layers=3, num_groups=4)


def reference(network: PatchDiscriminator):
    """The same layers in PyTorch, for a network of one scale."""
    config, scale, layers = network.config, network.scales[0], []
    convs = [*scale.convs, scale.out]
    for i, conv in enumerate(convs):
        outputs = conv.kernel.shape[-1]
        stride = 2 if i < config.num_layers else 1
        layer = torch.nn.Conv2d(
            conv.kernel.shape[2], outputs, 4, stride, padding=1, bias=conv.bias is not None
        )
        layer.weight.data = torch.tensor(np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1).copy())
        if conv.bias is not None:
            layer.bias.data = torch.tensor(np.asarray(conv.bias[...]))
        layers.append(layer)
        if 0 < i < len(convs) - 1:
            norm = torch.nn.GroupNorm(config.num_groups, outputs, eps=1e-6)
            norm.weight.data = torch.tensor(np.asarray(scale.norms[i - 1].scale[...]))
            norm.bias.data = torch.tensor(np.asarray(scale.norms[i - 1].bias[...]))
            layers.append(norm)
        if i < len(convs) - 1:
            layers.append(torch.nn.LeakyReLU(0.2))
    return torch.nn.Sequential(*layers)


def test_logits_and_gradients_match_pytorch(random_network):
    network = random_network(lambda: PatchDiscriminator(CONFIG, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).standard_normal((2, 40, 32, 3), np.float32)
    ours, gradient = jax.jit(
        lambda x: (network(x)[0], jax.grad(lambda x: jnp.sum(jnp.sin(network(x)[0])))(x))
    )(images)
    inputs = torch.tensor(images.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    theirs = reference(network)(inputs)
    theirs.sin().sum().backward()
    np.testing.assert_allclose(ours, theirs[:, 0].detach(), atol=2e-5)
    np.testing.assert_allclose(gradient, inputs.grad.permute(0, 2, 3, 1), atol=2e-5)
