"""A session fixture of the small networks."""

import functools

import pytest
from flax import nnx

from kontext_jax.weights.networks import ALL_NETWORKS
from tests.weights.small import CONFIGS


def _new(name):
    return ALL_NETWORKS[name].model(CONFIGS[name], rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def networks(random_network):
    """One network of each kind, by name, with random float32 parameters."""
    return {name: random_network(functools.partial(_new, name)) for name in CONFIGS}
