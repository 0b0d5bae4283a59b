"""Traces of a few steps, for xprof."""

import time
from collections.abc import Callable
from pathlib import Path

import jax

from kontext_jax.training.train_state import TrainState


class Profiler:
    """Traces a range of steps, data loading included. Each host writes its own file.

    A run that is resumed within the range traces the rest of it.
    """

    def __init__(self, steps: range, folder: Path, pause: Callable[[float], None]):
        """``pause`` receives the seconds spent on starting and writing the trace."""
        self._steps, self._folder, self._pause = steps, folder, pause
        self._on = False

    def before(self, step: int, state: TrainState) -> None:
        """Starts the trace if ``step`` is in the range."""
        if step in self._steps and not self._on:
            # Waiting for devices counts as training time, so wait before starting the clock.
            jax.block_until_ready(state)
            start = time.monotonic()
            jax.profiler.start_trace(str(self._folder))
            self._on = True
            self._pause(time.monotonic() - start)

    def after(self, step: int, state: TrainState) -> None:
        """Writes the trace once devices have finished the last step of the range."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what has been traced, if the run ends within the range."""
        if self._on:
            start = time.monotonic()
            jax.profiler.stop_trace()
            self._on = False
            self._pause(time.monotonic() - start)
            print(f"wrote {self._folder}", flush=True)
