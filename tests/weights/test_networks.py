import dataclasses

from kontext_jax.models.flux import FluxConfig
from kontext_jax.weights.networks import COMPUTE_SETTINGS, architecture


def test_how_a_network_is_computed_is_no_part_of_what_it_is():
    config = FluxConfig()
    others = dict(dtype="float32", timestep_dtype="bfloat16", remat="none", attention="xla")
    assert others.keys() == set(COMPUTE_SETTINGS)
    assert architecture(dataclasses.replace(config, **others)) == architecture(config)
    assert architecture(dataclasses.replace(config, theta=1e3)) != architecture(config)
