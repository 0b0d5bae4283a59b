"""Traces consist of complete steps."""

import itertools
from pathlib import Path

import jax
import pytest

from kontext_jax.config import Config
from kontext_jax.training import profiler as module
from kontext_jax.training.profiler import Profiler
from kontext_jax.training.train_state import TrainState


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (range(1, 6), ["wait for 1", "start DIR", "wait for 3", "stop"]),
        (
            range(3, 6),
            ["wait for 2", "start DIR", "wait for 3", "stop"],
        ),  # resumes within the range
        (range(1, 3), ["wait for 1", "start DIR", "stop"]),  # ends within the range
        (range(4, 6), []),
    ],
)
def test_trace_has_complete_steps_and_its_overhead_is_paused(monkeypatch, run, expected):
    events, paused, clock = [], [], itertools.count()
    monkeypatch.setattr(jax, "block_until_ready", lambda s: events.append(f"wait for {s.step}"))
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda folder: events.append(f"start {folder}")
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))

    def after(step):
        return TrainState(step, 0, 0, {}, {}, {})

    profiler = Profiler(Config(profile_steps="2:4").profiled, Path("DIR"), paused.append)
    for step in run:
        profiler.before(step, after(step - 1))
        profiler.after(step, after(step))
    profiler.close()
    assert events == expected
    assert paused == [1] * (2 * bool(expected))
