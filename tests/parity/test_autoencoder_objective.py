"""The adaptive weight and its gradients, against PyTorch with two backward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from kontext_jax.models.patch_discriminator import PatchConfig, PatchDiscriminator
from kontext_jax.objectives.autoencoder import (
    AdversarialConfig,
    AutoencoderObjective,
    AutoencoderObjectiveConfig,
    Images,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: convert)")

from tests.parity.test_patch_discriminator import reference  # noqa: E402

NETWORK = AutoencoderConfig.tiny(channels=8, channel_multipliers=(1, 1))
PATCHES = PatchConfig(channels=8, num_layers=2, num_groups=4)


def chw(x) -> "torch.Tensor":
    """A float64 tensor of an array with channels last."""
    return torch.tensor(np.moveaxis(np.asarray(x, np.float64), -1, 1).copy())


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_balance_matches_pytorch(random_network, kind):
    adversarial = AdversarialConfig(weight=0.5, loss=kind, discriminator=PATCHES)
    objective = AutoencoderObjective(
        AutoencoderObjectiveConfig(autoencoder=NETWORK, adversarial=adversarial)
    )
    model = random_network(lambda: Autoencoder(NETWORK, rngs=nnx.Rngs(0)))
    discriminator = random_network(lambda: PatchDiscriminator(PATCHES, rngs=nnx.Rngs(0)), seed=1)
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((3, 16, 24, 8)), jnp.float32)
    pixels = jnp.asarray(rng.uniform(-1, 1, (3, 16, 24, 3)), jnp.float32)
    groups = [Images(pixels, jnp.array([1.0, 0.0, 1.0]))]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def balanced(features):
        outputs = [model.decoder.conv_out(features)]
        fidelity = functools.partial(objective._fidelity, {}, groups)
        adversary = functools.partial(objective._adversary, discriminator, groups)
        return objective._balanced(
            model, [features], outputs, fidelity, adversary, jnp.array(2.0), jnp.array(0)
        )

    (loss, sums), gradient = balanced(features)

    last = torch.nn.Conv2d(8, 3, 3, padding=1).double()
    last.weight.data = torch.tensor(
        np.asarray(model.decoder.conv_out.kernel[...], np.float64).transpose(3, 2, 0, 1).copy()
    )
    last.bias.data = torch.tensor(np.asarray(model.decoder.conv_out.bias[...], np.float64))
    theirs, target = chw(features).requires_grad_(), chw(pixels)[[0, 2]]
    images = last(theirs)[[0, 2]]
    error = images - target
    fidelity = (error.abs().mean((1, 2, 3)) + error.square().mean((1, 2, 3))).sum()
    logits = reference(discriminator).double()(images)
    generator = -logits if kind == "hinge" else torch.nn.functional.softplus(-logits)
    adversary = generator.mean((1, 2, 3)).sum()
    norms = [
        torch.autograd.grad(x, last.weight, retain_graph=True)[0].norm()
        for x in (fidelity, adversary)
    ]
    factor = 0.5 * norms[0] / (norms[1] + 1e-4)
    total = fidelity + factor.detach() * adversary
    total.backward()
    np.testing.assert_allclose(sums["adaptive_weight"] / 2, factor.item(), rtol=1e-4)
    np.testing.assert_allclose(loss, total.item(), rtol=1e-4)
    expected = theirs.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())
