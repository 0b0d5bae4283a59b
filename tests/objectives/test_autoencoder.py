"""The autoencoder's losses, the balance of its two players, and their train step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.autoencoder import AutoencoderConfig
from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.models.moving_average import MovingAverage
from kontext_jax.models.patch_discriminator import PatchConfig
from kontext_jax.models.perceptual import FeatureDistance, PerceptualConfig
from kontext_jax.objectives import autoencoder as module
from kontext_jax.objectives.autoencoder import (
    AdversarialConfig,
    AutoencoderObjective,
    AutoencoderObjectiveConfig,
    images_of,
    r1_penalty,
)
from kontext_jax.optim import OptimConfig

KEY = jax.random.key(3)
NETWORK = AutoencoderConfig.tiny(channels=8, channel_multipliers=(1, 1), latent_channels=4)
PATCHES = PatchConfig(channels=8, num_layers=1, num_groups=4)
START = 4
AFTER_START = jnp.array(START)


def objective_of(perceptual: float = 1.0, kl_weight: float = 0.1, **adversarial):
    settings = {"weight": 0.5, "start": START, "discriminator": PATCHES} | adversarial
    return AutoencoderObjective(
        AutoencoderObjectiveConfig(
            autoencoder=NETWORK,
            kl_weight=kl_weight,
            perceptual=PerceptualConfig(weight=perceptual),
            adversarial=AdversarialConfig(**settings),
        )
    )


@pytest.fixture(scope="module")
def players(random_network):
    return random_network(lambda: objective_of().init(jax.random.key(0)))


@pytest.fixture(scope="module")
def frozen(random_network):
    config = EfficientNetConfig.tiny()
    network = random_network(lambda: FeatureDistance(config, rngs=nnx.Rngs(0)), seed=1)
    return {"perceptual": network}


@pytest.fixture(scope="module")
def batch(recipe):
    """Two rows with images of two sizes; some slots are empty."""
    rng = np.random.default_rng(0)
    images = {
        "16x16": rng.integers(0, 256, (2, 2, 16, 16, 3), np.uint8),
        "24x12": rng.integers(0, 256, (2, 1, 12, 24, 3), np.uint8),
    }
    segments = {"16x16": [[1, 2], [1, 0]], "24x12": [[1], [0]]}
    segments = {size: np.asarray(x, np.int32) for size, x in segments.items()}
    mixed = recipe.rows([2, 1]).replace(images=images, image_segments=segments)
    return jax.tree.map(jnp.asarray, mixed)


@functools.partial(jax.jit, static_argnames=("objective", "player"))
def value_and_gradient(objective, player, players, frozen, batch, step, **forwarded):
    def loss(network):
        models, inputs = players | {player: network}, {"batch": batch} | forwarded
        return objective.loss(player, models, frozen, inputs, KEY, step)

    return jax.value_and_grad(loss, has_aux=True)(players[player])


def test_defaults_are_the_errors_and_the_prior(players, batch):
    """Against the formula in float64, given the latents."""
    objective = AutoencoderObjective(AutoencoderObjectiveConfig(autoencoder=NETWORK, kl_weight=0.1))
    assert objective.players == ("autoencoder",) and not objective.frozen()
    model = players["autoencoder"]
    (loss, sums), _ = value_and_gradient(
        objective, "autoencoder", {"autoencoder": model}, {}, batch, AFTER_START
    )

    @jax.jit
    def outputs(model, batch):
        groups = images_of(batch)
        keys = module._keys(KEY, batch)
        latents = [objective._encode(model, g, k)[0] for g, k in zip(groups, keys, strict=True)]
        return groups, [model.moments(g.pixels) for g in groups], list(map(model.decode, latents))

    expected, count = 0.0, 0.0
    for group, moments, output in zip(*outputs(model, batch), strict=True):
        x, y, mean, logvar = (np.asarray(a, np.float64) for a in (*group[:1], output, *moments))
        kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
        terms = [np.abs(x - y), (x - y) ** 2, 0.1 * kl]
        per_image = sum(term.mean(axis=(1, 2, 3)) for term in terms)
        expected, count = expected + per_image @ np.asarray(group.used), count + group.used.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert sums.weight == count == 4 and not sums.forwarded


def test_gradient_is_that_of_the_formula_and_the_weight_balances_the_last_layer(
    players, frozen, batch
):
    """One backward pass equals two, and lambda is their ratio at the decoder's last kernel."""
    objective = objective_of()
    (loss, sums), gradient = value_and_gradient(
        objective, "autoencoder", players, frozen, batch, AFTER_START
    )

    @jax.jit
    def separately(players):
        groups, keys = images_of(batch), module._keys(KEY, batch)

        def parts(model):
            latents, terms = zip(
                *[objective._encode(model, *pair) for pair in zip(groups, keys, strict=True)],
                strict=True,
            )
            outputs = [model.decode(z) for z in latents]
            fidelity, _ = objective._fidelity(frozen, groups, outputs)
            adversary = objective._adversary(players["discriminator"], groups, outputs)
            return jnp.stack([fidelity, adversary, 0.1 * sum(term["kl"] for term in terms)])

        model = players["autoencoder"]
        return parts(model), jax.jacrev(parts)(model)

    (fidelity, adversary, prior), gradients = separately(players)
    last = gradients.decoder.conv_out.kernel[...]
    norms = [jnp.linalg.norm(last[i].ravel()) for i in range(2)]
    factor = 0.5 * float(norms[0] / (norms[1] + 1e-4))
    np.testing.assert_allclose(sums.metrics["adaptive_weight"] / sums.weight, factor, rtol=1e-4)
    np.testing.assert_allclose(loss, fidelity + factor * adversary + prior, rtol=1e-5)
    jax.tree.map(
        lambda total, x: np.testing.assert_allclose(
            total,
            x[0] + factor * x[1] + x[2],
            rtol=1e-3,
            atol=1e-4 * float(jnp.abs(total).max() + 1),
        ),
        gradient,
        gradients,
    )


def test_discrete_latents_have_gradients_and_no_prior(random_network, batch):
    network = dataclasses.replace(NETWORK, fsq_levels=(5, 4, 3, 3))
    objective = AutoencoderObjective(AutoencoderObjectiveConfig(autoencoder=network))
    players = random_network(lambda: objective.init(jax.random.key(0)))
    (loss, sums), gradient = value_and_gradient(
        objective, "autoencoder", players, {}, batch, AFTER_START
    )
    assert "kl" not in sums.metrics
    np.testing.assert_allclose(loss, sums.metrics["l1"] + sums.metrics["l2"], rtol=1e-6)
    assert np.any(gradient.encoder.conv_in.kernel[...])


def test_codebook_has_a_commitment_loss_and_follows_the_cells(random_network, batch):
    network = dataclasses.replace(NETWORK, codebook_size=16)
    objective = AutoencoderObjective(AutoencoderObjectiveConfig(autoencoder=network))
    players = random_network(lambda: objective.init(jax.random.key(0)))
    model = players["autoencoder"]
    model.codebook.shares[...] = jnp.full((16,), 1 / 16)
    (loss, sums), gradient = value_and_gradient(
        objective, "autoencoder", players, {}, batch, AFTER_START
    )
    terms, shares, commitment = sums.metrics, 0.0, 0.0
    for group in images_of(batch):
        cells = model.cells(group.pixels)
        error = jnp.mean(jnp.square(cells - model.quantize(cells)), axis=(1, 2, 3))
        commitment += group.used @ error
        codes = model.codebook.codes(cells).reshape(len(group.used), -1)
        shares += group.used @ jax.nn.one_hot(codes, 16).mean(axis=1)
    assert "kl" not in terms and "averages" not in terms
    np.testing.assert_allclose(terms["commitment"], commitment, rtol=1e-4)
    expected = terms["l1"] + terms["l2"] + 0.25 * terms["commitment"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    step = 0.01 * (sums.weight / 16 - shares)
    np.testing.assert_allclose(gradient.codebook.shares[...], step, atol=1e-5)
    assert np.any(gradient.encoder.conv_in.kernel[...])


def test_adversary_has_no_part_before_its_start(players, frozen, batch):
    objective, without = objective_of(), objective_of(weight=0.0)
    (loss, sums), gradient = value_and_gradient(
        objective, "autoencoder", players, frozen, batch, AFTER_START - 1
    )
    alone = {"autoencoder": players["autoencoder"]}
    (expected, _), expected_gradient = value_and_gradient(
        without, "autoencoder", alone, frozen, batch, AFTER_START - 1
    )
    assert sums.metrics["adaptive_weight"] == 0
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        gradient,
        expected_gradient,
    )
    assert objective.start == {"discriminator": START}


@pytest.mark.parametrize("player", ["autoencoder", "discriminator"])
def test_batch_of_mixed_sizes_has_the_loss_of_its_images_one_by_one(players, frozen, batch, player):
    objective = objective_of(adaptive=False, r1_weight=0.5)
    forwarded = {}
    if player == "discriminator":
        forwarded = {"reconstructions": [jnp.cos(3 * x.pixels) for x in images_of(batch)]}

    def loss_of(segments):
        only = batch.replace(image_segments=segments)
        inputs = (objective, player, players, frozen, only, AFTER_START)
        (loss, sums), _ = value_and_gradient(*inputs, **forwarded)
        return np.asarray([loss, sums.weight])

    total, separate = loss_of(batch.image_segments), np.zeros(2)
    for size, segments in batch.image_segments.items():
        for slot in zip(*np.nonzero(segments), strict=True):
            nothing = {key: np.zeros_like(x) for key, x in batch.image_segments.items()}
            nothing[size][slot] = segments[slot]
            separate += loss_of(nothing)
    np.testing.assert_allclose(separate, total, rtol=1e-5)
    assert total[1] == 4


def test_discriminator_has_known_losses(players, batch):
    """Equal logits of real and made images: hinge is their mean, as long as they are small."""
    objective = objective_of(r1_weight=2.0)
    same = [x.pixels for x in images_of(batch)]
    (loss, sums), _ = value_and_gradient(
        objective, "discriminator", players, {}, batch, AFTER_START, reconstructions=same
    )
    logits = [players["discriminator"](x) for x in same]
    expected = sum(
        float(g.used @ (np.maximum(1 - y, 0) + np.maximum(1 + y, 0)).mean(axis=(1, 2)))
        for g, (y,) in zip(images_of(batch), jax.device_get(logits), strict=True)
    )
    np.testing.assert_allclose(loss - 2.0 * sums.metrics["r1"], expected, rtol=1e-4)
    accuracy = sums.metrics["accuracy_real"] + sums.metrics["accuracy_made"]
    np.testing.assert_allclose(accuracy, sums.weight, rtol=1e-6)


def test_r1_is_the_squared_gradient_of_each_image_s_mean_logit(players):
    discriminator = players["discriminator"]
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
    penalty = jax.jit(r1_penalty)(discriminator, images)
    mean = jax.jit(lambda x: jnp.mean(discriminator(x)[0], axis=(1, 2)))
    gradient = jax.jit(jax.grad(lambda x: mean(x)[0]))(images)
    step = 1e-2 / jnp.linalg.norm(gradient.ravel())
    slope = (mean(images + step * gradient) - mean(images - step * gradient))[0] / (2 * step)
    np.testing.assert_allclose(penalty[0], slope, rtol=1e-2)
    assert not np.any(gradient[1])


def test_lecam_holds_logits_near_the_other_side_s_average(players, batch):
    objective = objective_of(lecam_weight=0.5, lecam_decay=0.9)
    averages = jnp.array([0.2, -0.1])
    discriminator = jax.tree.map(lambda x: x, players["discriminator"])
    discriminator.logits = nnx.data(MovingAverage(averages, axes=(None,)))
    made = [jnp.cos(3 * x.pixels) for x in images_of(batch)]
    inputs = ("discriminator", players | {"discriminator": discriminator}, {}, batch, AFTER_START)
    (loss, sums), gradient = value_and_gradient(objective, *inputs, reconstructions=made)
    penalty, totals = 0.0, np.zeros(2)
    for group, fake in zip(images_of(batch), made, strict=True):
        x, y = discriminator(group.pixels)[0], discriminator(fake)[0]
        each = np.maximum(x + 0.1, 0) ** 2 + np.maximum(0.2 - y, 0) ** 2
        penalty += group.used @ each.mean(axis=(1, 2))
        totals += [group.used @ z.mean(axis=(1, 2)) for z in (x, y)]
    np.testing.assert_allclose(sums.metrics["lecam"], penalty, rtol=1e-4)
    inputs = ("discriminator", players, {}, batch, AFTER_START)
    (without, _), _ = value_and_gradient(objective_of(), *inputs, reconstructions=made)
    np.testing.assert_allclose(loss, without + 0.5 * penalty, rtol=1e-4)
    step = 0.1 * (sums.weight * averages - totals)
    np.testing.assert_allclose(gradient.logits[...], step, atol=1e-5)


@pytest.fixture(scope="module")
def step_inputs(random_network, frozen, batch):
    """An objective whose players both train from the first step, and inputs for eight devices.

    Both have moving averages: of a codebook, and of logits.
    """
    optim = OptimConfig(learning_rate=0.01, warmup_steps=0, eps=1e-2, ema_decay=0.5)
    network = dataclasses.replace(NETWORK, codebook_size=8)
    config = objective_of(start=0, r1_weight=0.1, lecam_weight=0.1, optim=optim).config
    objective = AutoencoderObjective(dataclasses.replace(config, autoencoder=network))
    players = random_network(lambda: objective.init(jax.random.key(0)))
    players["autoencoder"].codebook.shares[...] = jnp.full((8,), 1 / 8)
    four = jax.tree.map(lambda x: np.concatenate([x] * 4), batch)
    return objective, players, frozen, four


def test_each_player_is_updated_by_its_own_loss(step_inputs, make_descent):
    objective, players, frozen, batch = step_inputs
    step = make_descent(objective)
    for fixed, updated in (objective.players, objective.players[::-1]):
        after, metrics = step(players, frozen, batch, {fixed: 0.0, updated: 0.1})
        same = jax.tree.map(np.array_equal, after, players)
        assert all(jax.tree.leaves(same[fixed])) and not all(jax.tree.leaves(same[updated]))
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "context": 2}, {"data": 2, "context": 2, "tensor": 2}],
    ids=str,
)
def test_step_is_the_same_on_eight_devices(step_inputs, three_steps_on, assert_same_steps, sizes):
    on_eight = three_steps_on(*step_inputs, sizes)
    assert_same_steps(on_eight, three_steps_on(*step_inputs, {}))


def test_flops_count_images_and_networks(batch):
    """A discriminator and a distance add to the autoencoder's; absent images do not count."""
    plain = objective_of(perceptual=0.0, weight=0.0)
    both = objective_of(perceptual=0.0)
    assert both.flops(batch) > plain.flops(batch) > 0
    segments = {size: np.zeros_like(x) for size, x in batch.image_segments.items()}
    segments["16x16"][0, 0] = 1
    one = float(plain.flops(batch.replace(image_segments=segments)))
    segments["16x16"][1, 1] = 2
    two = float(plain.flops(batch.replace(image_segments=segments)))
    assert two == 2 * one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "wgan"}, "adversarial.loss 'wgan' is not one of hinge, non_saturating"),
        ({"start": -1}, "adversarial.start -1 must be 0 or more"),
        ({"lecam_decay": 1.0}, "adversarial.lecam_decay 1.0 must be from 0 to below 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**settings)
