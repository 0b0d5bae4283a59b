"""Trains any objective: ``python -m kontext_jax.train --config=configs/X.py --workdir=DIR``.

Reads top to bottom: config -> mesh -> data -> objective -> state -> loop. Started again with the
same arguments, it goes on exactly where its last checkpoint was taken.
"""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from kontext_jax import cli
from kontext_jax.checkpoint import Checkpointer
from kontext_jax.config import Config, from_dict, to_dict, validated
from kontext_jax.data.pipeline import Loader, check_readable
from kontext_jax.flops import chip_peak, num_chips
from kontext_jax.places import identity_of, usage_of
from kontext_jax.runs import load_frozen, load_initial
from kontext_jax.sharding import batch_part, batch_sharding, check_batch, make_mesh
from kontext_jax.sheets import make_sheet_maker
from kontext_jax.train_state import (
    TrainState,
    abstract_state,
    init_state,
    jit_train_step,
    make_optimizers,
)
from kontext_jax.types import Metrics
from kontext_jax.validation import make_validation
from kontext_jax.writer import Writer

CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, :variant.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps all it writes.")


DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Joins the processes of a TPU pod or cluster (jax.distributed)."
)


class TrainingStopped(cli.UserError):
    """The run cannot go on; the message says why and what to do."""


def train(config: Config, workdir: Path) -> dict[str, float | int]:
    """Runs to ``config.num_steps`` and returns the last logged metrics.

    Raises:
      TrainingStopped: too many steps without a finite gradient, or too many unreadable records.
      FileNotFoundError, ValueError: bad data, checkpoint or settings.
    """
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, config.optim.accumulate_steps, mesh)
    index, count = batch_part(mesh, jax.process_index())
    loader = Loader(config.data, seed=config.seed, process_index=index, process_count=count)
    objective = config.make_objective()
    frozen = load_frozen(config, mesh)
    make_sheet = make_sheet_maker(config, mesh) if config.sheets.every else None
    validate = make_validation(config, mesh) if config.validation.every else None
    optimizers = make_optimizers(objective, config.optim, config.num_steps)
    abstract, shardings = abstract_state(objective, optimizers, mesh)
    checkpointer = Checkpointer(workdir, config.checkpoint)
    meta = {"config": to_dict(config), "frozen": identity_of(frozen), "metrics": {}}
    loader.check_networks(meta["frozen"], usage_of(frozen, config.objective))
    if checkpointer.latest_step() is None:
        state = init_state(objective, optimizers, mesh, config.seed, load_initial(config, mesh))
    else:
        stored = checkpointer.meta()
        _check_same_run(stored, meta)
        meta["metrics"] = stored["metrics"]
        state, position = checkpointer.restore(abstract, shardings)
        loader.restore(position)
    start = int(state.step)
    _announce(config, mesh, loader, abstract, start)

    writer = Writer(workdir, config.num_steps, start)
    train_step = jit_train_step(objective, optimizers, config.optim, config.seed, shardings)
    window = Window(config, mesh)

    def pause(seconds: float) -> None:
        window.pause(seconds)
        writer.pause(seconds)

    profiler = Profiler(config.profiled, workdir / "profile", pause)
    with (
        closing(checkpointer),
        closing(writer),
        closing(loader),
        closing(profiler),
        jax.set_mesh(mesh),
    ):
        for step in range(start + 1, config.num_steps + 1):
            profiler.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                local = next(loader)
                batch = jax.tree.map(
                    lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), local
                )
                state, metrics = train_step(state, frozen, batch)
            profiler.after(step, state)
            window.add(metrics)
            last = step == config.num_steps
            if step % config.log_every == 0 or last:
                meta["metrics"] = window.summary(meta["metrics"])
                writer.metrics(step, meta["metrics"])
                window.stop_if_hopeless()
            began = time.monotonic()
            if validate and (step % config.validation.every == 0 or last):
                writer.metrics(step, validate(state.ema, frozen), log="validation")
            # After it: who is stopped meanwhile, takes the step again, and measures again.
            if step % config.checkpoint.every == 0 or last:
                checkpointer.save(state, loader.state(), meta)
            if make_sheet and (step % config.sheets.every == 0 or last):
                writer.image("sheet", step, make_sheet(state.ema, frozen))
            pause(time.monotonic() - began)
    return meta["metrics"]


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
        self._began, self._paused = time.monotonic(), 0.0

    def add(self, metrics: Metrics) -> None:
        """Takes the metrics of one step."""
        self._metrics.append(metrics)

    def pause(self, seconds: float) -> None:
        """Keeps time spent on saving and pictures out of the rates."""
        self._paused += seconds

    def summary(self, before: dict[str, float | int]) -> dict[str, float | int]:
        """Means over the window's good steps, and rates; starts the next window.

        What had no value in any of them, of a player that was not due, or for all were skipped, is
        as it was ``before``.
        """
        steps = jax.device_get(self._metrics)
        seconds = time.monotonic() - self._began - self._paused
        good = [step for step in steps if not step["skipped"]]
        examples = sum(int(step["examples"]) for step in steps)
        unreadable = sum(int(step["skipped_records"]) for step in steps)
        flops = sum(float(step.pop("model_flops")) for step in steps)
        self._seen += examples + unreadable
        self._unreadable += unreadable
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
                "skipped_in_a_row": self._in_a_row,
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
        if self._in_a_row >= self._config.max_skipped_in_a_row:
            raise TrainingStopped(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, and "
                "were skipped. Go on from the last checkpoint with a lower optim.learning_rate, or "
                "look at the data of these steps."
            )
        try:
            check_readable(self._unreadable, self._seen, self._config.data)
        except ValueError as error:
            raise TrainingStopped(str(error)) from error


def _check_same_run(stored: dict, current: dict) -> None:
    """Refuses to go on with another objective or optimizer, or on other frozen networks."""
    before, now = (_what_counts(meta["config"]) for meta in (stored, current))
    changed = [name for name in before if before[name] != now[name]]
    frozen = stored["frozen"] | current["frozen"]
    changed += [n for n in frozen if stored["frozen"].get(n) != current["frozen"].get(n)]
    if changed:
        raise ValueError(
            f"This run was made with another {' and '.join(changed)}: give it the settings of its "
            "checkpoint, or a new --workdir."
        )


def _what_counts(config: dict) -> dict:
    """The settings that a run cannot change. One younger than the checkpoint has its default.

    Where networks come from does not count: the frozen are known by their values, and what the
    others started from is past. Nor does which kernel is used, or what the backward pass keeps.
    """
    settings = to_dict(from_dict(config))
    objective = {k: v for k, v in settings["objective"].items() if k != "init_from"}
    for part in objective.values():
        if isinstance(part, dict):
            for name in ("remat", "attention"):
                part.pop(name, None)
    return {"objective": objective, "optim": settings["optim"], "seed": settings["seed"]}


def _announce(config: Config, mesh, loader: Loader, abstract, start: int) -> None:
    """Says what is about to run."""
    sizes = {
        player: sum(x.size for x in jax.tree.leaves(network))
        for player, network in abstract.params.items()
    }
    plan = loader.plan
    shape = "x".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "1"
    print(
        f"{config.objective.kind}: "
        + ", ".join(f"{player} {size:,} parameters" for player, size in sizes.items())
        + f"; {mesh.size} {mesh.devices.flat[0].platform} device(s), mesh {shape}\n"
        f"data: {plan.num_examples} examples in {plan.num_rows} rows an epoch, "
        f"{plan.fill:.1%} of image tokens and {plan.text_fill:.1%} of text tokens used, "
        f"{config.data.batch_size} rows a step\n"
        f"steps {start} to {config.num_steps}",
        flush=True,
    )


def main() -> None:
    if WORKDIR.value is None or CONFIG.value is None:
        raise cli.UserError("give --config=configs/X.py[:variant] and --workdir=DIR.")
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    train(validated(CONFIG.value), Path(WORKDIR.value))


if __name__ == "__main__":
    cli.run("train", main)
