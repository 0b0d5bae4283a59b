"""Trains any objective: ``python -m kontext_jax.train --config=configs/X.py --workdir=DIR``.

Read it from top to bottom: config -> mesh -> data -> objective -> state -> loop. The same command
resumes a stopped run exactly at its latest checkpoint.
"""

import time
from contextlib import closing
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from kontext_jax import cli
from kontext_jax.config import Config
from kontext_jax.data.pipeline import Loader
from kontext_jax.evaluation.latent_statistics import make_latent_statistics
from kontext_jax.evaluation.sheets import make_sheet_maker
from kontext_jax.evaluation.validation import make_validation
from kontext_jax.loading.locations import identity_of, usage_of
from kontext_jax.loading.models import load_frozen, load_initial
from kontext_jax.settings import from_dict, to_dict, validated
from kontext_jax.sharding import batch_part, batch_sharding, check_batch, make_mesh
from kontext_jax.training.checkpoint import Checkpointer
from kontext_jax.training.preemption import Preempted, Preemption
from kontext_jax.training.profiler import Profiler
from kontext_jax.training.telemetry import MetricsWindow
from kontext_jax.training.train_state import (
    abstract_state,
    init_state,
    jit_train_step,
    learning_rates,
    make_optimizers,
)
from kontext_jax.training.writer import Writer

CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, :variant.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run: checkpoints and logs.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes of a TPU pod or cluster (jax.distributed)."
)


def train(config: Config, workdir: Path) -> dict[str, float | int]:
    """Trains until ``config.num_steps`` and returns the last logged metrics.

    Raises:
      Preempted: the run was asked to stop and has saved its state.
      TrainingStopped: too many steps without an example or a finite gradient, or too many
        unreadable records.
      FileNotFoundError, ValueError: data, checkpoint or settings are wrong.
    """
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, config.optim.accumulate_steps, mesh)
    index, count = batch_part(mesh, jax.process_index())
    loader = Loader(config.data, seed=config.seed, process_index=index, process_count=count)
    objective = config.make_objective()
    frozen = load_frozen(config, mesh)
    is_autoencoder = config.objective.kind == "autoencoder"
    measure_latents = make_latent_statistics(config, mesh) if is_autoencoder else None
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
    if start > config.num_steps:
        raise ValueError(
            f"{workdir} is at step {start}, beyond num_steps {config.num_steps}: raise num_steps, "
            "or use a new --workdir."
        )
    _announce(config, mesh, loader, abstract, start)

    writer = Writer(workdir, config.num_steps, start)
    preemption = Preemption(mesh)
    train_step = jit_train_step(objective, optimizers, config.optim, config.seed, shardings)
    window = MetricsWindow(config.data, config.max_skipped_in_a_row, mesh)
    profiler = Profiler(config.profiled, workdir / "profile", window.pause)

    def save() -> None:
        if measure_latents:
            meta["latents"] = measure_latents(state.ema["autoencoder"])
        checkpointer.save(state, loader.state(), meta)

    with (
        closing(preemption),
        closing(checkpointer),
        closing(writer),
        closing(loader),
        closing(profiler),
        jax.set_mesh(mesh),
    ):
        for step in range(start + 1, config.num_steps + 1):
            profiler.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                fetch_start = time.monotonic()
                local = next(loader)
                window.wait(time.monotonic() - fetch_start)
                batch = jax.tree.map(
                    lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), local
                )
                state, metrics = train_step(state, frozen, batch, preemption.requested())
            profiler.after(step, state)
            last = step == config.num_steps
            stops = preemption.should_stop(metrics.pop("stop_requested")) and not last
            window.add(metrics)
            if step % config.log_every == 0 or last or stops:
                meta["metrics"] = window.summary(meta["metrics"])
                meta["metrics"] |= learning_rates(objective, config.optim, config.num_steps, state)
                writer.metrics(step, meta["metrics"])
                for warning in window.warnings():
                    writer.warn(step, warning)
                window.stop_if_hopeless()
            validates, saves, draws = (
                every and (step % every == 0 or last)
                for every in (config.validation.every, config.checkpoint.every, config.sheets.every)
            )
            if stops:
                save()
                raise Preempted(
                    f"asked to stop (SIGTERM). Step {step} is saved; the same command resumes "
                    "from there."
                )
            if validates or saves or draws:
                # Waiting for devices counts as training time, so wait before starting the clock.
                jax.block_until_ready(state)
            pause_start = time.monotonic()
            if validates:
                writer.metrics(step, validate(state.ema, frozen), log="validation")
            # Save after validating, so that a run killed during validation repeats both.
            if saves:
                save()
            if draws:
                writer.image("sheet", step, make_sheet(state.ema, frozen))
            window.pause(time.monotonic() - pause_start)
    return meta["metrics"]


def _check_same_run(stored: dict, current: dict) -> None:
    """Refuses to resume with another objective, optimizer or seed, or other frozen networks."""
    before, now = (_fixed_settings(meta["config"]) for meta in (stored, current))
    changed = [name for name in before if before[name] != now[name]]
    frozen = stored["frozen"] | current["frozen"]
    changed += [n for n in frozen if stored["frozen"].get(n) != current["frozen"].get(n)]
    if changed:
        raise ValueError(
            f"This run was started with another {' and '.join(changed)}: use the settings of its "
            "checkpoint, or a new --workdir."
        )


def _fixed_settings(config: dict) -> dict:
    """The settings that a run cannot change.

    Settings added since the checkpoint was written take their defaults. The locations of networks
    may change: frozen ones are compared by value, and trained ones are in the checkpoint. So may
    attention kernels, gradient checkpointing, and the learning rate and clipping of a run that
    became unstable.
    """
    settings = to_dict(from_dict(config, Config))
    objective = {k: v for k, v in settings["objective"].items() if k != "init_from"}
    for part in (*objective.values(), settings["optim"]):
        if isinstance(part, dict):
            for name in ("remat", "attention", "learning_rate", "clip_norm"):
                part.pop(name, None)
    return {"objective": objective, "optim": settings["optim"], "seed": settings["seed"]}


def _announce(config: Config, mesh, loader: Loader, abstract, start: int) -> None:
    """Prints what is about to run."""
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
    cli.check_config(CONFIG.value, Config)
    if DISTRIBUTED.value:
        cli.join_processes()
    config, workdir = validated(CONFIG.value), Path(WORKDIR.value)
    with cli.lock(workdir):
        train(config, workdir)


if __name__ == "__main__":
    cli.run("train", main)
