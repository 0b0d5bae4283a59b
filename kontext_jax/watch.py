"""What watches a run: rates and means, traces, and whether it has to end."""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from kontext_jax import cli
from kontext_jax.config import Config
from kontext_jax.data.pipeline import MIN_SEEN, check_readable
from kontext_jax.flops import chip_peak, num_chips
from kontext_jax.sharding import device_sharding
from kontext_jax.train_state import TrainState
from kontext_jax.types import Metrics

MAX_SEEN = 100 * MIN_SEEN
"""Records after which half of what was seen is forgotten: data that breaks late shows at once."""


AHEAD = 2
"""Steps that the host may have queued beside the one that devices are at."""


class TrainingStopped(cli.UserError):
    """The run cannot go on; the message says why and what to do."""


class Preemption:
    """Whether the run was told to end (SIGTERM), as clouds and schedulers do before they end it.

    Those who tell it wait for half a minute, or a little more, so that a checkpoint is all there is
    time for. One of many processes may be told and all have to end after the same step: so what
    each was told goes through the train step, and its answer for all is read `AHEAD` steps later.
    Reading it waits for that step: what else is queued would have to be done before the checkpoint.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = device_sharding(mesh)
        self._answers: deque[Bool[Array, ""]] = deque()
        self._told = False
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_) -> None:
        self._told = True

    def told(self) -> Bool[Array, " devices"]:
        """Whether this process was told, for the train step."""
        mine = np.full(len(self._sharding.addressable_devices), self._told)
        return jax.make_array_from_process_local_data(self._sharding, mine)

    def reached(self, anyone: Bool[Array, ""]) -> bool:
        """Whether to end after this step; ``anyone`` is the step's answer."""
        self._answers.append(anyone)
        return len(self._answers) > AHEAD and bool(self._answers.popleft())

    def close(self) -> None:
        """Leaves the signal to whom it belonged before."""
        if self._listens:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


class Profiler:
    """Traces some steps for xprof, their reading of data included. Each host writes its own file.

    A run that goes on within these steps traces the rest of them.
    """

    def __init__(self, steps: range, folder: Path, pause: Callable[[float], None]):
        """``pause`` is told the seconds spent on the trace itself."""
        self._steps, self._folder, self._pause = steps, folder, pause
        self._on = False

    def before(self, step: int, state: TrainState) -> None:
        """Starts before the first of the steps."""
        if step in self._steps and not self._on:
            # Waiting for the device is training time, so it comes before the clock of the pause.
            jax.block_until_ready(state)
            began = time.monotonic()
            jax.profiler.start_trace(str(self._folder))
            self._on = True
            self._pause(time.monotonic() - began)

    def after(self, step: int, state: TrainState) -> None:
        """Writes the trace once the device is done with the last of the steps."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what there is if the run ends among the steps."""
        if self._on:
            began = time.monotonic()
            jax.profiler.stop_trace()
            self._on = False
            self._pause(time.monotonic() - began)
            print(f"wrote {self._folder}", flush=True)


class Window:
    """Gathers the metrics of the steps between two lines of the log, without waiting for them."""

    def __init__(self, config: Config, mesh: Mesh):
        kind = mesh.devices.flat[0].device_kind
        self._config, self._chips, self._peak = config, num_chips(mesh.size, kind), chip_peak(kind)
        self._seen = self._unreadable = self._in_a_row = 0
        self._start()

    def _start(self) -> None:
        self._metrics: list[Metrics] = []
        self._began, self._paused, self._waited = time.monotonic(), 0.0, 0.0

    def add(self, metrics: Metrics) -> None:
        """Takes the metrics of one step."""
        self._metrics.append(metrics)

    def pause(self, seconds: float) -> None:
        """Keeps time spent on saving and pictures out of the rates."""
        self._paused += seconds

    def wait(self, seconds: float) -> None:
        """Takes the time until a batch came; it counts if devices had nothing left to do then."""
        if not self._metrics or self._metrics[-1]["skipped"].is_ready():
            self._waited += seconds

    def summary(self, before: dict[str, float | int]) -> dict[str, float | int]:
        """Means over the window's good steps, and rates; starts the next window.

        What had no value in any of them, of a player that was not due, or for all were skipped, is
        as it was ``before``. ``data_wait`` is the share of the time that devices waited for this
        process's data, ``device_memory_gb`` the most that any of its devices has held.
        """
        steps = jax.device_get(self._metrics)
        seconds, waited = time.monotonic() - self._began - self._paused, self._waited
        good = [step for step in steps if not step["skipped"]]
        examples = sum(int(step["examples"]) for step in steps)
        unreadable = sum(int(step["skipped_records"]) for step in steps)
        flops = sum(float(step.pop("model_flops")) for step in steps)
        self._seen += examples + unreadable
        self._unreadable += unreadable
        if self._seen > MAX_SEEN:
            self._seen, self._unreadable = self._seen // 2, self._unreadable // 2
        self._in_a_row = max(int(step["skipped_in_a_row"]) for step in steps)
        self._start()
        values = {name: [step[name] for step in good] for name in steps[0] if name != "skipped"}
        finite = {name: [x for x in given if not np.isnan(x)] for name, given in values.items()}
        means = {name: float(np.mean(given)) for name, given in finite.items() if given}
        return (
            before
            | means
            | {
                "examples": examples,
                "skipped_records": unreadable,
                "skipped_steps": len(steps) - len(good),
                "skipped_in_a_row": self._in_a_row,
                "data_wait": waited / seconds,
                **_memory(),
                "steps_per_second": len(steps) / seconds,
                "examples_per_second": examples / seconds,
                **self._per_chip(examples / seconds, flops / seconds),
            }
        )

    def _per_chip(self, examples: float, flops: float) -> dict[str, float]:
        """Rates of one chip, from those of all; without FLOPs, or a known peak, it says less."""
        rates = {"examples_per_second_per_chip": examples / self._chips}
        if flops:
            rates["model_tflop_per_second_per_chip"] = flops / self._chips / 1e12
        if flops and self._peak:
            rates["mfu"] = flops / self._chips / self._peak
        return rates

    def stop_if_hopeless(self) -> None:
        """Raises TrainingStopped if the run should not go on; all processes agree on it."""
        try:
            check_readable(self._unreadable, self._seen, self._config.data)
        except ValueError as error:
            raise TrainingStopped(str(error)) from error
        if self._in_a_row >= self._config.max_skipped_in_a_row:
            raise TrainingStopped(
                f"{self._in_a_row} steps in a row had no example, or a loss or gradient that is "
                "not finite, and were skipped. Look at the data of these steps, or go on from the "
                "last checkpoint with a lower optim.learning_rate."
            )


def _memory() -> dict[str, float]:
    """The most that any device of this process has held at once; CPUs do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"device_memory_gb": max(peaks) / 1e9} if peaks else {}
