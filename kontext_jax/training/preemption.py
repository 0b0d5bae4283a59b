"""Preemption: clouds and schedulers ask a run to stop before they take its machines away."""

import signal
import threading
from collections import deque

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from kontext_jax.cli import UserError
from kontext_jax.sharding import device_sharding

MAX_STEPS_AHEAD = 2
"""Steps that the host may queue beyond the one that devices are running."""


class Preempted(UserError):
    """The run was asked to stop and has saved its state; the same command resumes it."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: schedulers can tell it from a failure and requeue the run."""


class Preemption:
    """Listens for SIGTERM, and lets all processes stop after the same step.

    Clouds kill a machine about half a minute after the signal, enough time for one checkpoint. The
    signal may reach only one of many processes, so each passes its own request into the train
    step, which reduces them over all devices. The result is read `MAX_STEPS_AHEAD` steps later,
    which also bounds how many queued steps must finish before the checkpoint.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = device_sharding(mesh)
        self._pending: deque[Bool[Array, ""]] = deque()
        self._requested = False
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._previous_handler = signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_) -> None:
        self._requested = True

    def requested(self) -> Bool[Array, " devices"]:
        """Whether this process was asked to stop, as an input of the train step."""
        local = np.full(len(self._sharding.addressable_devices), self._requested)
        return jax.make_array_from_process_local_data(self._sharding, local)

    def should_stop(self, any_requested: Bool[Array, ""]) -> bool:
        """Whether to stop after this step, given the step's ``stop_requested``."""
        self._pending.append(any_requested)
        return len(self._pending) > MAX_STEPS_AHEAD and bool(self._pending.popleft())

    def close(self) -> None:
        """Restores the previous signal handler."""
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)
