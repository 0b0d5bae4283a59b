"""Traces hold whole steps."""

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
        (range(3, 6), ["wait for 2", "start DIR", "wait for 3", "stop"]),  # goes on within them
        (range(1, 3), ["wait for 1", "start DIR", "stop"]),  # ends within them
        (range(4, 6), []),
    ],
)
def test_a_trace_holds_whole_steps_and_its_own_time_is_paused(monkeypatch, run, expected):
    told, paused, clock = [], [], itertools.count()
    monkeypatch.setattr(jax, "block_until_ready", lambda s: told.append(f"wait for {s.step}"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: told.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))

    def after(step):
        return TrainState(step, 0, 0, {}, {}, {})

    profiler = Profiler(Config(profile_steps="2:4").profiled, Path("DIR"), paused.append)
    for step in run:
        profiler.before(step, after(step - 1))
        profiler.after(step, after(step))
    profiler.close()
    assert told == expected
    assert paused == [1] * (2 * bool(expected))
