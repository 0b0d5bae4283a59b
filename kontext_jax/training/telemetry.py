"""Metrics between two log lines: means, rates, MFU, memory, and whether to give up."""

import time

import jax
import numpy as np
from jax.sharding import Mesh

from kontext_jax.chips import chip_of, num_chips
from kontext_jax.cli import UserError
from kontext_jax.data.pipeline import MIN_RECORDS, DataConfig, check_readable
from kontext_jax.types import Metrics

MAX_SEEN = 100 * MIN_RECORDS
"""Records after which the counts are halved, so that data that goes bad late is noticed soon."""


COLLAPSED_STEPS = 500
"""Steps in a row with a discriminator that is always or never right, after which it is reported."""


class TrainingStopped(UserError):
    """The run cannot go on; the message says why and what to do."""


class MetricsWindow:
    """Collects the metrics of the steps between two log lines, without waiting for devices."""

    def __init__(self, data: DataConfig, max_skipped_in_a_row: int, mesh: Mesh):
        """``data`` and ``max_skipped_in_a_row`` say when `stop_if_hopeless` gives up."""
        kind = mesh.devices.flat[0].device_kind
        self._data, self._max_skipped_in_a_row = data, max_skipped_in_a_row
        self._chips, self._peak = num_chips(mesh.size, kind), chip_of(kind).peak_flops
        self._seen = self._unreadable = self._in_a_row = 0
        self._collapsed: dict[str, int] = {}
        self._warnings: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self._metrics: list[Metrics] = []
        self._start, self._paused, self._waited = time.monotonic(), 0.0, 0.0

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of one step."""
        self._metrics.append(metrics)

    def pause(self, seconds: float) -> None:
        """Excludes time spent on saving, validation or sheets from the rates."""
        self._paused += seconds

    def wait(self, seconds: float) -> None:
        """Adds the time it took to get a batch; it counts only if devices were idle by then."""
        if not self._metrics or self._metrics[-1]["skipped"].is_ready():
            self._waited += seconds

    def summary(self, previous: dict[str, float | int]) -> dict[str, float | int]:
        """Means over the window's good steps, and rates; starts the next window.

        A metric without a value in this window, because its player was not due or every step was
        skipped, keeps its ``previous`` value. ``data_wait`` is the share of time that devices
        waited for this process's data, ``device_memory_gb`` the peak of its fullest device.
        """
        steps = jax.device_get(self._metrics)
        seconds, waited = time.monotonic() - self._start - self._paused, self._waited
        good = [step for step in steps if not step["skipped"]]
        examples = sum(int(step["examples"]) for step in steps)
        unreadable = sum(int(step["skipped_records"]) for step in steps)
        flops = sum(float(step.pop("model_flops")) for step in steps)
        self._seen += examples + unreadable
        self._unreadable += unreadable
        if self._seen > MAX_SEEN:
            self._seen, self._unreadable = self._seen // 2, self._unreadable // 2
        self._in_a_row = max(int(step["skipped_in_a_row"]) for step in steps)
        self._reset()
        values = {name: [step[name] for step in good] for name in steps[0] if name != "skipped"}
        finite = {name: [x for x in column if not np.isnan(x)] for name, column in values.items()}
        self._watch_discriminators(finite)
        means = {name: float(np.mean(column)) for name, column in finite.items() if column}
        return (
            previous
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

    def _watch_discriminators(self, columns: dict[str, list]) -> None:
        for name in columns:
            player, _, metric = name.rpartition("/")
            if metric != "accuracy_real":
                continue
            pairs = np.stack([columns[name], columns[f"{player}/accuracy_made"]], axis=1)
            for real, made in np.round(pairs, 3).tolist():
                count = self._collapsed.get(player, 0) + 1
                self._collapsed[player] = count if {real, made} <= {0.0, 1.0} else 0
                if self._collapsed[player] == COLLAPSED_STEPS:
                    self._warnings.append(
                        f"{player}: in {COLLAPSED_STEPS} steps in a row it took {real:.0%} of real "
                        f"and {1 - made:.0%} of generated images for real. {_advice(real, made)}"
                    )

    def warnings(self) -> list[str]:
        """Sentences about discriminators that collapsed in the last window; each is said once."""
        said, self._warnings = self._warnings, []
        return said

    def _per_chip(self, examples: float, flops: float) -> dict[str, float]:
        """Rates per chip, from total rates; fewer if FLOPs are not modelled or the peak unknown."""
        rates = {"examples_per_second_per_chip": examples / self._chips}
        if flops:
            rates["model_tflop_per_second_per_chip"] = flops / self._chips / 1e12
        if flops and self._peak:
            rates["mfu"] = flops / self._chips / self._peak
        return rates

    def stop_if_hopeless(self) -> None:
        """Gives up on data that cannot be read, or on steps that are all skipped.

        All processes see the same counts, so all of them stop.

        Raises:
          TrainingStopped: with the reason and the fix.
        """
        try:
            check_readable(self._unreadable, self._seen, self._data)
        except ValueError as error:
            raise TrainingStopped(str(error)) from error
        if self._in_a_row >= self._max_skipped_in_a_row:
            raise TrainingStopped(
                f"{self._in_a_row} steps in a row had no example, or a loss or gradient that is "
                "not finite, and were skipped. Look at the data of these steps, or resume from the "
                "last checkpoint with a lower optim.learning_rate."
            )


def _advice(real: float, made: float) -> str:
    """What to do about a discriminator with these accuracies, each 0 or 1."""
    if real and made:
        return "Its opponent learns nothing from it: lower its learning rate, or raise r1_weight."
    return "It learns nothing: lower both learning rates, or start it earlier."


def _memory() -> dict[str, float]:
    """Peak memory of this process's fullest device; CPUs do not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"device_memory_gb": max(peaks) / 1e9} if peaks else {}
