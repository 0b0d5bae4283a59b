"""All processes stop after the same step."""

import os
import signal

import jax.numpy as jnp

from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.training.preemption import MAX_STEPS_AHEAD, Preemption


def test_reduced_request_takes_effect_max_steps_ahead_later():
    """Closing restores the previous signal handler."""
    previous = signal.getsignal(signal.SIGTERM)
    preemption = Preemption(make_mesh(MeshConfig()))
    stops = []
    try:
        for step in range(6):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            requested = preemption.requested()
            assert len(requested.addressable_shards) == requested.size == 8
            assert requested.tolist() == [step >= 2] * 8
            stops.append(preemption.should_stop(jnp.any(requested)))
    finally:
        preemption.close()
    assert stops == [False] * (2 + MAX_STEPS_AHEAD) + [True] * (4 - MAX_STEPS_AHEAD)
    assert signal.getsignal(signal.SIGTERM) == previous
