"""Compares our networks with stored outputs of PyTorch's, see ``parity/make_golden.py``."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kontext_jax import flow
from kontext_jax.weights.networks import ALL_NETWORKS
from tests.parity import draws, ours

GOLDEN = Path(__file__).parent / "golden" / "parity.npz"


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture
def load(golden, tmp_path):
    """A function from a part of the golden file to our network, loaded from PyTorch's layout."""

    def make(part: str, kind: str, **settings):
        (tmp_path / "config.json").write_text(str(golden[f"{part}/config"]))
        weights = draws.weights(json.loads(str(golden[f"{part}/shapes"])))
        save_file(weights, tmp_path / f"{ALL_NETWORKS[kind].stem}.safetensors")
        return ours.load(tmp_path, kind, **settings)

    return make


@jax.jit
def call(model, *args):
    return model(*args)


def test_transformer_and_every_gradient(golden, load):
    """FLUX.1 [dev], with examples of zero, one and two contexts packed into one row."""
    model = load("dev", "transformer")
    out, grads = ours.velocity_and_grad(model, draws.examples("packed", model.config))
    np.testing.assert_allclose(out, golden["dev/velocity"], atol=2e-5)
    grads = ours.tensors(grads, "transformer")
    names = json.loads(str(golden["dev/names"]))
    assert set(names) == set(grads)
    for name, checksum in zip(names, golden["dev/checksums"], strict=True):
        actual, norm = draws.checksum(name, grads[name]), checksum[0]
        np.testing.assert_allclose(actual, checksum, atol=2e-5 * norm, err_msg=name)


def test_transformer_without_guidance(golden, load):
    model = load("schnell", "transformer")
    out = ours.velocity(model, draws.examples("text_to_image", model.config))
    np.testing.assert_allclose(out, golden["schnell/velocity"], atol=2e-5)


def test_autoencoder(golden, load):
    model = load("autoencoder", "autoencoder")
    images = draws.pixels("images", *golden["autoencoder/decoded"].shape)
    mean, logvar = jax.jit(lambda model, x: model.moments(x))(model, images)
    np.testing.assert_allclose(mean, golden["autoencoder/mean"], atol=5e-5)
    np.testing.assert_allclose(logvar, golden["autoencoder/logvar"], atol=5e-5)
    latents = draws.normal("latents", *mean.shape)
    decoded = jax.jit(lambda model, x: model.decode(x))(model, latents)
    np.testing.assert_allclose(decoded, golden["autoencoder/decoded"], atol=5e-5)


def test_t5(golden, load):
    model, ids, mask = load("t5", "text_encoder"), golden["t5/ids"], golden["t5/mask"]
    out = call(model, jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32))
    np.testing.assert_allclose(out, golden["t5/pads_read"], atol=2e-5)
    out = call(model, jnp.asarray(ids), jnp.asarray(mask, jnp.int32))
    np.testing.assert_allclose(np.asarray(out)[mask], golden["t5/pads_masked"], atol=2e-5)


def test_clip(golden, load):
    out = call(load("clip", "clip"), jnp.asarray(golden["clip/ids"]))
    np.testing.assert_allclose(out, golden["clip/pooled"], atol=2e-5)


def test_dino(golden, load):
    model = load("dino", "dino", input_size=42, taps=(0, 3))
    (first, last), pooled = call(model, draws.pixels("dino", 2, 42, 42, 3))
    np.testing.assert_allclose(first, golden["dino/first"], atol=2e-5)
    np.testing.assert_allclose(last, golden["dino/last"], atol=2e-5)
    np.testing.assert_allclose(pooled, golden["dino/pooled"], atol=2e-5)


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_schedule(golden, variant):
    shift, tokens = ("resolution", golden["schedule/tokens"]) if variant == "dev" else ("none", [1])
    stored = [name for name in golden if name.startswith(f"schedule/{variant}/")]
    assert stored
    for name in stored:
        num_steps = int(name.split("/")[-1])
        times = flow.schedule(num_steps, jnp.asarray(tokens), flow.TimeConfig(shift=shift))
        np.testing.assert_allclose(times, golden[name], atol=1e-6)
