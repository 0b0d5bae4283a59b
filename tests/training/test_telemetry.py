"""Rates per chip, time spent waiting for data, and data that goes bad late."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.chips import CHIPS, Chip
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.training import telemetry
from kontext_jax.training.telemetry import MetricsWindow, TrainingStopped


def new_window(data: DataConfig | None = None) -> MetricsWindow:
    return MetricsWindow(data or DataConfig(), 20, make_mesh(MeshConfig()))


@pytest.mark.parametrize("peak", [None, 5e12])
def test_rates_per_chip_count_all_steps_of_a_window(monkeypatch, peak):
    """Skipped steps were computed too. MFU needs a chip with a known peak."""
    if peak:
        monkeypatch.setitem(CHIPS, jax.devices()[0].device_kind, Chip(peak))
    window = new_window()
    metrics = {"loss": 2.0, "model_flops": 4e12, "examples": 16, "skipped_records": 0}
    for skipped_in_a_row in range(3):
        skipped = int(skipped_in_a_row > 0)
        values = metrics | {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row}
        window.add({name: jnp.asarray(value) for name, value in values.items()})
    summary = window.summary({})
    rate = summary["examples_per_second"]
    assert (summary["loss"], summary["examples"]) == (2.0, 48)
    assert "model_flops" not in summary
    np.testing.assert_allclose(summary["examples_per_second_per_chip"], rate / 8)
    np.testing.assert_allclose(summary["model_tflop_per_second_per_chip"], rate / 8 * 4 / 16)
    assert ("mfu" in summary) == bool(peak)
    if peak:
        np.testing.assert_allclose(summary["mfu"], rate / 8 * 4 / 16 / 5)


def good_step(**changed) -> dict:
    values = {"loss": 2.0, "model_flops": 0.0, "examples": 256, "skipped_records": 0}
    values |= {"skipped": 0, "skipped_in_a_row": 0} | changed
    return {name: jnp.asarray(value) for name, value in values.items()}


@pytest.mark.parametrize("windows_before", [1, 1000])
def test_unreadable_data_stops_a_run_even_after_many_good_steps(windows_before):
    window = new_window(DataConfig(max_skipped=0.01))
    for _ in range(windows_before):
        for _ in range(20):
            window.add(good_step())
        window.summary({})
        window.stop_if_hopeless()
    with pytest.raises(TrainingStopped, match="records could not be read"):
        for _ in range(10):
            window.add(good_step(examples=0, skipped_records=256))
            window.summary({})
            window.stop_if_hopeless()


def test_allowed_share_of_unreadable_records_never_stops_a_run():
    window = new_window(DataConfig(max_skipped=0.01))
    for _ in range(2000):
        window.add(good_step(examples=498, skipped_records=2))
        window.summary({})
        window.stop_if_hopeless()


def test_summary_has_the_share_of_waiting_and_the_skipped_steps(monkeypatch):
    """Pauses are not part of the window's time."""
    clock = iter([0.0, 10.0, 10.0, 14.0, 14.0])
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: next(clock))
    window = new_window()
    window.wait(1.5)
    window.wait(0.5)
    window.pause(2.0)
    for skipped in (0, 1, 0, 1):
        window.add(good_step(skipped=skipped))
    summary = window.summary({})
    assert (summary["data_wait"], summary["steps_per_second"]) == (0.25, 0.5)
    assert summary["skipped_steps"] == 2
    window.add(good_step())
    summary = window.summary(summary)
    assert (summary["data_wait"], summary["skipped_steps"]) == (0.0, 0)


class PendingMetric:
    """A metric that devices have computed if ``ready``."""

    def __init__(self, ready: bool):
        self.ready = ready

    def is_ready(self) -> bool:
        return self.ready


def test_waiting_for_data_counts_only_while_devices_are_idle():
    window = new_window()
    window.wait(0.25)  # no step is queued yet
    for ready, seconds in ((False, 1.0), (True, 0.5), (False, 2.0)):
        window.add(good_step() | {"skipped": PendingMetric(ready)})
        window.wait(seconds)
    assert window._waited == 0.75


def test_summary_has_the_peak_memory_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return self.peak and {"peak_bytes_in_use": self.peak}

    window = new_window()
    window.add(good_step())
    assert "device_memory_gb" not in window.summary({})
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(2e9), Device(5e9), Device(None)])
    window.add(good_step())
    assert window.summary({})["device_memory_gb"] == 5.0


@pytest.mark.parametrize(
    ("real", "made", "words"),
    [
        (
            1.0,
            1.0,
            "took 100% of real and 0% of generated images for real. Its opponent learns not",
        ),
        (0.0, 1.0, "took 0% of real and 0% of generated images for real. It learns nothing"),
        (1.0, 0.0, "took 100% of real and 100% of generated images for real. It learns nothing"),
    ],
)
def test_collapsed_discriminator_is_reported_once(real, made, words):
    """Steps in which it is not due have no accuracy, and do not count."""
    window, warnings = new_window(), []
    names = ("discriminator/accuracy_real", "discriminator/accuracy_made")
    collapsed = dict(zip(names, (real, made), strict=True))

    def steps(number, **accuracies):
        for _ in range(number):
            window.add(good_step(**accuracies))
            window.add(good_step(**dict.fromkeys(names, float("nan"))))
        window.summary({})
        warnings.extend(window.warnings())

    steps(telemetry.COLLAPSED_STEPS - 1, **collapsed)
    steps(1, **dict.fromkeys(names, 0.9))
    steps(telemetry.COLLAPSED_STEPS - 1, **collapsed)
    assert not warnings
    for _ in range(3):
        steps(telemetry.COLLAPSED_STEPS, **collapsed)
    (warning,) = warnings
    assert warning.startswith("discriminator: in 500 steps in a row") and words in warning
