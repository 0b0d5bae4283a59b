import dataclasses

from kontext_jax.models.dino import DinoConfig
from kontext_jax.models.flux import FluxConfig
from kontext_jax.weights.networks import (
    COMPUTE_SETTINGS,
    FEATURE_NETWORKS,
    NETWORKS,
    architecture,
)


def test_compute_settings_are_not_part_of_the_architecture():
    config = FluxConfig()
    flux_settings = dict(dtype="float32", timestep_dtype="bfloat16", remat="none", attention="xla")
    dino_settings = dict(input_size=28, taps=(0,))
    assert flux_settings.keys() | dino_settings.keys() == set(COMPUTE_SETTINGS)
    assert architecture(dataclasses.replace(config, **flux_settings)) == architecture(config)
    assert architecture(dataclasses.replace(config, theta=1e3)) != architecture(config)
    assert architecture(DinoConfig.vits14(**dino_settings)) == architecture(DinoConfig.vits14())


def test_pipeline_networks_have_folders_and_feature_networks_do_not():
    assert not NETWORKS.keys() & FEATURE_NETWORKS.keys()
    assert all(network.folder for network in NETWORKS.values())
    assert not any(network.folder for network in FEATURE_NETWORKS.values())
