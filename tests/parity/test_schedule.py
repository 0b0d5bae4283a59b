"""Compares the sampler's noise levels with diffusers' scheduler in FLUX's pipelines."""

import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax import flow, geometry

REASON = "needs the convert extra: pip install -e '.[convert]'"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
def test_times_of_kontext_sizes(num_steps):
    tokens = [geometry.num_tokens(size, 16) for size in geometry.KONTEXT_SIZES]
    times = flow.schedule(num_steps, jnp.asarray(tokens), flow.TimeConfig())
    assert times.shape == (num_steps + 1, 17)
    for i, number in enumerate(tokens):
        np.testing.assert_allclose(times[:, i], theirs.times(num_steps, number), atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
def test_times_of_schnell(num_steps):
    times = flow.schedule(num_steps, 4096, flow.TimeConfig(shift="none"))
    np.testing.assert_allclose(times, theirs.times(num_steps, None), atol=1e-6)
