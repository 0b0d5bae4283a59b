"""Evaluates a sweep: ``python -m kontext_jax.evaluate --config=configs/eval_X.py --workdir=DIR``.

A sweep is a grid: each *cell* is one checkpoint with one sampler setting. Every cell generates an
image for every task of every task set, or reconstructs the task's target if its checkpoint is an
autoencoder alone, and judges score the images. Sampling and the judges' networks run on all
devices; the other judges run on the hosts, split over processes. A sweep that was stopped generates
only the missing images when started again, and gives the same results.

Writes ``cells/SET/CELL/`` (see `cell_folder`), ``losses/``, ``summary.json``, ``summary.csv`` and
``report.html``.
"""

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import config_flags

from kontext_jax import cli
from kontext_jax.config import LossConfig
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.evaluation.cell_folder import CellFolder, check_record
from kontext_jax.evaluation.generation import (
    MODEL_KEYS,
    cell_record,
    generate_images,
    load_networks,
    reconstructs,
    takes_guidance,
)
from kontext_jax.evaluation.held_out_loss import (
    MLPERF,
    check_mlperf,
    held_out_loss,
    kinds_of,
    summarise_losses,
)
from kontext_jax.evaluation.judge_panel import JudgePanel, JudgesConfig, make_judges
from kontext_jax.evaluation.judges import Outputs, run_judges
from kontext_jax.evaluation.network_judges import CodeJudge
from kontext_jax.evaluation.scores import ALL, METRICS, summarise
from kontext_jax.evaluation.summary import as_csv
from kontext_jax.evaluation.sweep import Cell, check_names, folder_name, resolve
from kontext_jax.evaluation.tasks.sets import SetConfig, TaskSet, load_sets, triples_of
from kontext_jax.files import check_folder, short_digest, write_text
from kontext_jax.geometry import resize
from kontext_jax.loading.locations import load_meta, split_step
from kontext_jax.loading.models import AutoencoderModel, Model
from kontext_jax.report.report import table, write_report
from kontext_jax.sampling.generator import with_room
from kontext_jax.settings import Settings, check_least, to_dict, validated
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import RGBImage

TIMED = (
    "Seconds per image are the wall time of all batches divided by their number of images. They "
    "include encoding contexts and prompts, all sampling steps, decoding, and transfers to and "
    "from the devices, but not compiling, loading networks, preparing the examples, or writing "
    "images. Seconds to compile are summed over turns, with each turn's longest of all starts."
)

MAX_LOSS_NAME = 60
"""Trailing characters of a checkpoint's name that appear in the name of its loss file."""


@dataclass(kw_only=True, unsafe_hash=True)
class EvalConfig(Settings):
    """A sweep: every cell on every task set.

    Attributes:
      cells: see `sweep.Cell` and `sweep.grid`. The report's headline is about the first cell or, if
        others differ from it only by step (as with ``@all``), the one with the last step.
      sets: task sets, see `tasks.sets.SetConfig`.
      judges: judges to use besides pixels, the toy world's checker and drift.
      loss_sets: task sets on whose targets the held-out loss of each checkpoint is measured.
      loss: times and noise of the held-out loss. `held_out_loss.MLPERF` is MLPerf Training's
        protocol, and requires its number of examples.
      batch_size: rows sampled at once over all devices; 0 for each run's training batch size.
      seed: seed of the initial noise.
      sheet_rows: examples shown in the report.
      curves: title -> workdir of the runs whose training metrics the report plots.
    """

    cells: tuple[Cell, ...] = ()
    sets: tuple[SetConfig, ...] = ()
    judges: JudgesConfig = field(default_factory=JudgesConfig)
    loss_sets: tuple[SetConfig, ...] = ()
    loss: LossConfig = field(default_factory=LossConfig)
    batch_size: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    sheet_rows: int = 24
    curves: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        # Overrides mutate configs in place: copy `MLPERF` and settings that cells share.
        self.loss = copy.deepcopy(self.loss)
        for name in ("cells", "sets", "loss_sets"):
            setattr(self, name, tuple(map(copy.deepcopy, getattr(self, name))))
        check_least(self, batch_size=0, sheet_rows=0)
        set_names = [config.name for config in self.sets]
        check_names([cell.name for cell in self.cells], "cell")
        check_names(set_names, "set")
        check_names([config.name for config in self.loss_sets], "loss set")
        for cell in self.cells:
            unknown = sorted(set(cell.sets) - set(set_names))
            if unknown:
                raise ValueError(
                    f"cell {cell.name!r} names the set {unknown[0]!r}, which is not in sets."
                )
        if not self.cells or not (self.sets or self.loss_sets):
            raise ValueError("a sweep needs at least one cell and one set.")


def evaluate(config: EvalConfig, workdir: Path, seconds: Mapping[str, float]) -> dict:
    """Generates and scores everything that is missing, and writes all files.

    Args:
      config: the sweep.
      workdir: folder of the results.
      seconds: durations of earlier stages by name, for the report.

    Returns:
      The content of ``summary.json``.

    Raises:
      FileNotFoundError, ValueError: a run, data set or network is missing, or has changed since the
        sweep was started.
    """
    start = time.monotonic()
    check_folder(workdir)
    mesh = make_mesh(config.mesh)
    # All checks that can fail come first; loading and sampling take long.
    cells = resolve(config.cells)
    _check_guidance(cells)
    loaded = load_sets([*config.sets, *config.loss_sets])
    sets, loss_sets = loaded[: len(config.sets)], loaded[len(config.sets) :]
    _check_sweep(cells, sets, loss_sets, config, workdir)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
    panel = make_judges(config.judges, mesh)
    for name, reason in panel.left_out.items():
        cli.say(f"judge {name} is left out: {reason}")
    summary: dict[str, Any] = {
        "config": to_dict(config),
        "sets": _summarise_sets(config.sets, sets),
        "loss_sets": _summarise_sets(config.loss_sets, loss_sets),
        "judges": panel.record,
        "left_out": panel.left_out,
        "timed": TIMED,
        "losses": {},
        "latents": _latents_of_runs(config.curves, cells),
    }
    summaries: dict[str, Any] = {}
    for key in dict.fromkeys(cell.networks_key for cell in cells):
        group = [cell for cell in cells if cell.networks_key == key]
        model = None  # frees the previous networks before the next are loaded
        model = load_networks(group[0], mesh, config.seed, config.batch_size)
        for cell in group:
            results = {}
            for task_set in _sets_of(cell, sets):
                results[task_set.name] = _evaluate_cell(
                    cell, model, task_set, panel, workdir, mesh, config.seed
                )
                cli.say(f"{task_set.name}: {cell.name}  {_one_line(results[task_set.name])}")
            summaries[cell.name] = _describe_cell(cell, model) | {"sets": results}
        if isinstance(model, AutoencoderModel) and "latents" in model.record:
            summary["latents"][group[0].name] = model.record["latents"]
        learns_flow = isinstance(model, Model) and model.objective.kind == "flow_matching"
        if learns_flow and any(not cell.baseline for cell in group):
            name = f"{group[0].checkpoint} {group[0].params}"
            for task_set in loss_sets:
                losses = _measure_loss(name, model, task_set, workdir, mesh, config)
                summary["losses"].setdefault(task_set.name, {})[name] = losses
                cli.say(f"{task_set.name}: {name}  held-out loss {losses['mean']:.4f}")
    summary["cells"] = {cell.name: summaries[cell.name] for cell in cells}
    summary["seconds"] = {**seconds, "evaluate": round(time.monotonic() - start, 1)}
    if jax.process_index() == 0:
        write_report(
            workdir,
            summary,
            {task_set.name: task_set.tasks for task_set in sets},
            sheet_rows=config.sheet_rows,
            curves=dict(config.curves),
        )
        write_text(workdir / "summary.csv", as_csv(summary))
        text = json.dumps(_finite(summary), indent=2, allow_nan=False)
        write_text(workdir / "summary.json", text + "\n")  # last: it marks a finished sweep
    multihost_utils.sync_global_devices("the report is written")
    return summary


def _evaluate_cell(
    cell: Cell,
    model: Model | AutoencoderModel | None,
    task_set: TaskSet,
    panel: JudgePanel,
    workdir: Path,
    mesh: Mesh,
    seed: int,
) -> dict[str, Any]:
    """Generates and scores one cell's images for one set, and returns their summary."""
    folder = CellFolder(
        _cell_path(workdir, cell, task_set), cell_record(cell, task_set, model, seed)
    )
    scores = folder.scores(panel.record, [task.id for task in task_set.tasks])
    if not _all_processes(scores is not None):
        images = generate_images(cell, model, task_set, folder, mesh, seed)
        if isinstance(model, AutoencoderModel) and model.autoencoder.config.is_discrete:
            panel = panel._replace(judges=[*panel.judges, CodeJudge(model.autoencoder, mesh)])
        scores = _score(panel, task_set, folder, images)
    rows, overall = scores
    return _summarise_cell(rows, overall, folder.batches())


def _latents_of_runs(
    curves: Sequence[tuple[str, str]], cells: Sequence[Cell]
) -> dict[str, dict[str, Any]]:
    """Title -> statistics of the latents, for runs of autoencoders that are not cells."""
    evaluated = {split_step(cell.checkpoint)[0] for cell in cells}
    latents = {}
    for title, run in curves:
        with contextlib.suppress(FileNotFoundError):
            meta = {} if Path(run) in evaluated else load_meta(run)
            latents |= {title: meta["latents"]} if "latents" in meta else {}
    return latents


def _sets_of(cell: Cell, sets: Sequence[TaskSet]) -> list[TaskSet]:
    """The sets that the cell is evaluated on."""
    return [task_set for task_set in sets if not cell.sets or task_set.name in cell.sets]


def _cell_path(workdir: Path, cell: Cell, task_set: TaskSet) -> Path:
    return workdir / "cells" / folder_name(task_set.name) / folder_name(cell.name)


def _summarise_sets(configs: Sequence[SetConfig], sets: Sequence[TaskSet]) -> dict[str, Any]:
    return {
        config.name: {
            "num_tasks": len(task_set.tasks),
            "fingerprint": task_set.fingerprint,
            "held_out": config.held_out,
        }
        for config, task_set in zip(configs, sets, strict=True)
    }


def _finite(value: Any) -> Any:
    """The JSON value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_guidance(cells: Sequence[Cell]) -> None:
    """Refuses to compare values of guidance if the transformer has no guidance input.

    Raises:
      ValueError: two cells of a transformer without that input differ only by guidance.
    """
    groups: dict[Cell, dict[float, Cell]] = defaultdict(dict)
    for cell in cells:
        if cell.baseline in ("", "untrained"):
            sampler = dataclasses.replace(cell.sampler, guidance=0.0)
            key = dataclasses.replace(cell, name="", sampler=sampler)
            groups[key][cell.sampler.guidance] = cell
    for group in groups.values():
        first, *others = group.values()
        if others and not takes_guidance(first):
            raise ValueError(
                f"cells {first.name!r} and {others[0].name!r} differ only by guidance, but the "
                f"transformer of {first.checkpoint} has no guidance input: leave one out, or vary "
                "cfg_scale."
            )


def _check_sweep(
    cells: Sequence[Cell],
    sets: Sequence[TaskSet],
    loss_sets: Sequence[TaskSet],
    config: EvalConfig,
    workdir: Path,
) -> None:
    """Refuses a sweep that cannot finish, before any work is done.

    Raises:
      ValueError: targets are missing, an MLPerf set has the wrong size, or a cell's folder holds
        images of other settings.
    """
    for cell in cells:
        for task_set in _sets_of(cell, sets):
            missing = [task.id for task in task_set.tasks if task.truth is None]
            if missing and reconstructs(cell):
                raise ValueError(
                    f"cell {cell.name!r}: task {missing[0]} of {task_set.name!r} has no target to "
                    "reconstruct; list the sets that have targets in the cell's sets, or set a "
                    "probe, whose targets are the contexts."
                )
            record = cell_record(cell, task_set, None, config.seed)
            check_record(_cell_path(workdir, cell, task_set), record, unknown=MODEL_KEYS)
    for task_set in loss_sets:
        number = len(triples_of(task_set.tasks))
        if not number:
            raise ValueError(f"loss set {task_set.name!r} has no targets.")
        if config.loss == MLPERF:
            check_mlperf(number)


def _all_processes(value: bool) -> bool:
    """Whether the value is true on all processes; shared file systems may lag on some of them."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def _describe_cell(cell: Cell, model: Model | AutoencoderModel | None) -> dict[str, Any]:
    location, step = split_step(cell.checkpoint)
    objective = model.objective if isinstance(model, Model) else None
    config = model.autoencoder.config if isinstance(model, AutoencoderModel) else None
    return to_dict(cell) | {
        "checkpoint": str(location) if cell.checkpoint else "",
        "step": step,
        "shift": cell.shift or (objective.time.shift if objective else ""),
        "takes_guidance": objective is not None and objective.transformer.guidance_embed,
        "weights": model.identity if model else {},
        # Of the cells that are autoencoders alone.
        "autoencoder": {
            "downsample": config.downsample,
            "channels": config.latent_channels,
            "codes": config.num_codes,
        }
        if config
        else {},
    }


def _score(
    panel: JudgePanel, task_set: TaskSet, folder: CellFolder, images: Sequence[RGBImage]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Scores the images and writes the scores; returns (one row per task, scores of the set)."""
    # At the size the task asks for, so that models with smaller outputs have no advantage.
    pairs = zip(images, task_set.tasks, strict=True)
    resized = [resize(image, task.size) for image, task in pairs]
    columns, set_scores = run_judges(panel.judges, Outputs(task_set.name, task_set.tasks, resized))
    rows = [
        {
            "id": task.id,
            "category": task.category,
            "group": task.group or task.id,
            "turn": task.turn,
            **{metric: column[i] for metric, column in columns.items()},
        }
        for i, task in enumerate(task_set.tasks)
    ]
    overall = {"judges": panel.record, "scores": dict(set_scores)}
    folder.write_scores(rows, overall)
    return rows, overall


def _summarise_cell(
    rows: Sequence[Mapping], overall: Mapping[str, Any], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The summary of one cell on one set."""
    metrics = {
        name: {
            by: {key: list(estimate) for key, estimate in estimates.items()}
            for by, estimates in breakdowns.items()
        }
        for name, breakdowns in summarise(rows).items()
    }
    counts = Counter(row["category"] for row in rows)
    return {
        "count": dict(sorted(counts.items())) | {ALL: len(rows)},
        "metrics": metrics,
        "whole": overall["scores"],
        "speed": _speed(batches),
    }


def _speed(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sampling rates; empty if nothing was sampled, as for copies.

    Every start of a sweep compiles each turn again, mostly from a cache, so the longest compilation
    counts. If starts used different devices, the rates are of those that made the most images.
    """
    compiled: dict[int, float] = {}
    for line in lines:
        if "compile_seconds" in line:
            compiled[line["turn"]] = max(compiled.get(line["turn"], 0.0), line["compile_seconds"])
    images: Counter = Counter()
    seconds: Counter = Counter()
    for line in lines:
        if "seconds" in line:
            devices = line["device"], line["chips"]
            images[devices] += line["images"]
            seconds[devices] += line["seconds"]
    if not images:
        return {}
    [(devices, number)] = images.most_common(1)
    device, chips = devices
    return {
        "seconds_per_image": seconds[devices] / number,
        "images_per_second_per_chip": number / (seconds[devices] * chips),
        "compile_seconds": sum(compiled.values()),
        "device": device,
        "chips": chips,
    }


def _measure_loss(
    name: str, model: Model, task_set: TaskSet, workdir: Path, mesh: Mesh, config: EvalConfig
) -> dict[str, Any]:
    """The held-out loss of a checkpoint on the tasks that have targets.

    Raises:
      ValueError: a loss is not finite, or the file holds losses of other networks.
    """
    triples = triples_of(task_set.tasks)
    examples = prepare_all(triples, model.data)
    data = with_room(model.data, examples)
    file = _loss_file(workdir, name, task_set, config.loss)
    rows = held_out_loss(model.networks, examples, data, model.objective, config.loss, mesh, file)
    bad = [row["id"] for row in rows if not math.isfinite(row["loss"])]
    if bad:
        raise ValueError(
            f"the held-out loss of {name} is not finite for {bad[0]!r}: its weights are damaged, "
            "or its training diverged. Use another checkpoint, or leave its cells out."
        )
    return summarise_losses(rows, kinds_of(triples))


def _loss_file(workdir: Path, name: str, task_set: TaskSet, loss: LossConfig) -> Path:
    """The file of a checkpoint's losses; a hash keeps similar names, settings and tasks apart."""
    short = folder_name(name.strip("/"))[-MAX_LOSS_NAME:]
    digest = short_digest(json.dumps([name, to_dict(loss), task_set.fingerprint]))[:8]
    return workdir / "losses" / folder_name(task_set.name) / f"{short}-{digest}.jsonl"


def _one_line(results: Mapping[str, Any]) -> str:
    """The first three metrics of a cell on a set, and its speed."""
    shown = []
    for metric in list(results["metrics"])[:3]:
        mean = results["metrics"][metric]["category"][ALL][0]
        shown.append(f"{METRICS[metric].title} {METRICS[metric].show(mean)}")
    if results["speed"]:
        shown.append(f"{results['speed']['seconds_per_image']:.3g} s an image")
    return "  ".join(shown)


def parse_seconds(items: Sequence[str]) -> dict[str, float]:
    """Parses ``["data=6", "flow=400"]`` to a dict.

    Raises:
      ValueError: an item is not NAME=NUMBER.
    """
    try:
        pairs = (item.split("=") for item in items)
        return {name: float(value) for name, value in pairs}
    except ValueError as error:
        raise ValueError(f"--seconds must look like data=6,flow=400, not {items}.") from error


def main() -> None:
    options = flags.FLAGS
    if options.config is None or options.workdir is None:
        raise cli.UserError("give --config=configs/eval_X.py and --workdir=DIR.")
    cli.check_config(options.config, EvalConfig)
    if options.distributed:
        cli.join_processes()
    config, workdir = validated(options.config), Path(options.workdir)
    with cli.lock(workdir):
        summary = evaluate(config, workdir, parse_seconds(options.seconds))
    if jax.process_index() == 0:
        print(table(summary))
        print(f"wrote {workdir / 'report.html'}")


if __name__ == "__main__":
    # Config files import this module, so their `EvalConfig` is not the one of `__main__`.
    from kontext_jax import evaluate as module

    config_flags.DEFINE_config_file("config", help_string="a file of configs/")
    flags.DEFINE_string("workdir", None, "folder of the results")
    flags.DEFINE_list("seconds", [], "durations of earlier stages, for the report: data=6,flow=400")
    flags.DEFINE_bool("distributed", False, "join the processes of a pod or cluster")
    cli.run("evaluate", module.main)
