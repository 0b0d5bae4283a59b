import dataclasses

from kontext_jax.models.dino import DinoConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.weights.networks import (
    COMPUTE_SETTINGS,
    FEATURE_NETWORKS,
    NETWORKS,
    architecture,
)


def test_how_a_network_is_computed_is_no_part_of_what_it_is():
    config = FluxConfig()
    others = dict(dtype="float32", timestep_dtype="bfloat16", remat="none", attention="xla")
    looks = dict(input_size=28, taps=(0,))
    assert others.keys() | looks.keys() == set(COMPUTE_SETTINGS)
    assert architecture(dataclasses.replace(config, **others)) == architecture(config)
    assert architecture(dataclasses.replace(config, theta=1e3)) != architecture(config)
    assert architecture(DinoConfig.vits14(**looks)) == architecture(DinoConfig.vits14())


def test_a_network_is_part_of_pipelines_or_looks_at_images():
    assert not NETWORKS.keys() & FEATURE_NETWORKS.keys()
    assert all(network.folder for network in NETWORKS.values())
    assert not any(network.folder for network in FEATURE_NETWORKS.values())
