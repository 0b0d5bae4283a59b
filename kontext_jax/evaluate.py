"""Evaluates in sweeps: ``python -m kontext_jax.evaluate --config=configs/eval_X.py --workdir=DIR``.

Every *cell* (a checkpoint, its averaged or raw parameters, and a way to sample) makes a picture for
every task of every *set*, and judges say what they are worth. Sampling and networks of judges are
split over all devices; other judges' work, over processes. Started again after a stop, it makes the
pictures that are missing, and comes to the same results.

Writes ``cells/SET/CELL/`` (``results.py``), ``losses/``, ``summary.json``, ``summary.csv`` and
``report.html``.
"""

import copy
import csv
import dataclasses
import io
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
    OF_MODELS,
    load_networks,
    make,
    record_of,
    takes_guidance,
)
from kontext_jax.evaluation.held_out_loss import (
    MLPERF,
    check_mlperf,
    held_out_loss,
    kinds_of,
    summarise_losses,
)
from kontext_jax.evaluation.judges import JudgePanel, JudgesConfig, Outputs, judge, make_judges
from kontext_jax.evaluation.scores import ALL, METRICS, summarise
from kontext_jax.evaluation.sweep import Cell, check_names, folder_name, resolve
from kontext_jax.evaluation.tasks.sets import Set, SetConfig, load_sets, triples_of
from kontext_jax.files import short_digest, write_text
from kontext_jax.geometry import resize
from kontext_jax.loading.locations import split_step
from kontext_jax.loading.models import Model
from kontext_jax.report.report import table, write_report
from kontext_jax.sampling.generator import with_room
from kontext_jax.settings import Settings, check_least, to_dict, validated
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import RGBImage

TIMED = (
    "Seconds per image are wall time of all batches, by the number of their images. They include "
    "encoding contexts and prompts, all sampling steps, decoding, and the way to the devices and "
    "back; not compiling, which is done before, nor loading networks, preparing the examples and "
    "writing pictures. Seconds to compile are, for each turn, those of the start that took longest."
)

LOSS_NAME = 60
"""Last characters of a checkpoint's name that the name of its losses' file has."""


@dataclass(kw_only=True, unsafe_hash=True)
class EvalConfig(Settings):
    """A sweep: every cell on every set.

    Attributes:
      cells: see `cells.Cell` and `cells.grid`; the report's headline is about the first one or, of
        checkpoints that differ from it in their step alone (as `@all` gives them), the last.
      sets: see `data.sets.SetConfig`.
      judges: who looks at the pictures, beside pixels, the world's checker and drift.
      loss_sets: on whose truths the held-out loss of each checkpoint is measured.
      loss: how; `losses.MLPERF` is MLPerf Training's way, and wants its number of examples.
      batch_size: rows sampled at once, over all devices; 0 for as many as each run trains on.
      seed: of the initial noise.
      sheet_rows: examples shown in the report.
      curves: title -> workdir of the runs whose training losses the report draws.
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
        # Copies, for overrides change what they are given: `MLPERF`, or what cells share.
        self.loss = copy.deepcopy(self.loss)
        for name in ("cells", "sets", "loss_sets"):
            setattr(self, name, tuple(map(copy.deepcopy, getattr(self, name))))
        if self.batch_size < 0:
            raise ValueError(
                f"batch_size {self.batch_size} must be 0, for as many as each run trains on, or "
                "more."
            )
        check_least(self, sheet_rows=0)
        check_names([cell.name for cell in self.cells], "cell")
        names = [each.name for each in self.sets]
        check_names(names, "set")
        check_names([each.name for each in self.loss_sets], "loss set")
        for cell in self.cells:
            unknown = sorted(set(cell.sets) - set(names))
            if unknown:
                raise ValueError(f"cell {cell.name!r} is for {unknown[0]!r}, which is no set.")
        if not self.cells or not (self.sets or self.loss_sets):
            raise ValueError("a sweep needs one cell and one set, or more.")


def evaluate(config: EvalConfig, workdir: Path, seconds: Mapping[str, float]) -> dict:
    """Makes and judges what is missing, and writes all files.

    Args:
      config: the sweep.
      workdir: where the files go.
      seconds: what earlier stages took, for the report.

    Returns:
      What ``summary.json`` holds.

    Raises:
      FileNotFoundError, ValueError: a run, data or network is missing, or other than it was.
    """
    began = time.monotonic()
    _check_folder(workdir)
    mesh = make_mesh(config.mesh)
    cells = resolve(config.cells)  # early, for it may fail soon
    _check_guidance(cells)
    loaded = load_sets([*config.sets, *config.loss_sets])
    sets, loss_sets = loaded[: len(config.sets)], loaded[len(config.sets) :]
    _check(cells, sets, loss_sets, config, workdir)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
    panel = make_judges(config.judges, mesh)
    for name, why in panel.left_out.items():
        cli.say(f"judge {name} is left out: {why}")
    summary: dict[str, Any] = {
        "config": to_dict(config),
        "sets": {c.name: _of_set(c, each) for c, each in zip(config.sets, sets, strict=True)},
        "loss_sets": {
            c.name: _of_set(c, each) for c, each in zip(config.loss_sets, loss_sets, strict=True)
        },
        "judges": panel.record,
        "left_out": panel.left_out,
        "timed": TIMED,
        "losses": {},
    }
    found_of: dict[str, Any] = {}
    for networks in dict.fromkeys(cell.networks for cell in cells):
        group = [cell for cell in cells if cell.networks == networks]
        model = None  # the last one makes room for the next
        model = load_networks(group[0], mesh, config.seed, config.batch_size)
        for cell in group:
            found = {}
            for each in _sets_of(cell, sets):
                found[each.name] = _found(cell, model, each, panel, workdir, mesh, config.seed)
                cli.say(f"{each.name}: {cell.name}  {_in_short(found[each.name])}")
            found_of[cell.name] = _about(cell, model) | {"sets": found}
        learns_flow = model is not None and model.objective.kind == "flow_matching"
        if learns_flow and any(not cell.baseline for cell in group):
            for each in loss_sets:
                name = f"{group[0].checkpoint} {group[0].params}"
                losses = _losses(name, model, each, workdir, mesh, config)
                summary["losses"].setdefault(each.name, {})[name] = losses
                cli.say(f"{each.name}: {name}  held-out loss {losses['mean']:.4f}")
    summary["cells"] = {cell.name: found_of[cell.name] for cell in cells}
    summary["seconds"] = {**seconds, "evaluate": round(time.monotonic() - began, 1)}
    if jax.process_index() == 0:
        write_report(
            workdir,
            summary,
            {each.name: each.tasks for each in sets},
            sheet_rows=config.sheet_rows,
            curves=dict(config.curves),
        )
        write_text(workdir / "summary.csv", as_csv(summary))
        text = json.dumps(_finite(summary), indent=2, allow_nan=False)
        write_text(workdir / "summary.json", text + "\n")  # all is done
    multihost_utils.sync_global_devices("the report is written")
    return summary


def _found(
    cell: Cell,
    model: Model | None,
    each: Set,
    panel: JudgePanel,
    workdir: Path,
    mesh: Mesh,
    seed: int,
) -> dict[str, Any]:
    """What the summary says of one cell on one set, once its pictures are made and judged."""
    folder = CellFolder(_folder(workdir, cell, each), record_of(cell, each, model, seed))
    scores = folder.scores(panel.record, [task.id for task in each.tasks])
    if not _everywhere(scores is not None):
        images = make(cell, model, each, folder, mesh, seed)
        scores = _judge(panel, each, folder, images)
    return _summarised(*scores, folder.batches())


def _sets_of(cell: Cell, sets: Sequence[Set]) -> Iterator[Set]:
    """Those that the cell makes pictures for."""
    return (each for each in sets if not cell.sets or each.name in cell.sets)


def _folder(workdir: Path, cell: Cell, each: Set) -> Path:
    return workdir / "cells" / folder_name(each.name) / folder_name(cell.name)


def _of_set(config: SetConfig, each: Set) -> dict[str, Any]:
    return {
        "num_tasks": len(each.tasks),
        "fingerprint": each.fingerprint,
        "held_out": config.held_out,
    }


def _finite(value: Any) -> Any:
    """JSON in which None stands for numbers that it cannot write."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_folder(workdir: Path) -> None:
    nearest = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file, and --workdir is to be a folder: give another.")


def _check_guidance(cells: Sequence[Cell]) -> None:
    """Refuses to compare values of an input that there is not.

    Raises:
      ValueError: cells differ by that alone.
    """
    alike: dict[Cell, dict[float, Cell]] = defaultdict(dict)
    for cell in cells:
        if cell.baseline in ("", "untrained"):
            sampler = dataclasses.replace(cell.sampler, guidance=0.0)
            key = dataclasses.replace(cell, name="", sampler=sampler)
            alike[key][cell.sampler.guidance] = cell
    for group in alike.values():
        first, *others = group.values()
        if others and not takes_guidance(first):
            raise ValueError(
                f"cells {first.name!r} and {others[0].name!r} differ by guidance alone, an input "
                f"that the transformer of {first.checkpoint} does not have: leave one out, or vary "
                "cfg_scale."
            )


def _check(
    cells: Sequence[Cell],
    sets: Sequence[Set],
    loss_sets: Sequence[Set],
    config: EvalConfig,
    workdir: Path,
) -> None:
    """Refuses what could not be done, before anything is.

    Raises:
      ValueError: truths are missing, or MLPerf's examples, or a folder holds other pictures.
    """
    for cell in cells:
        for each in _sets_of(cell, sets):
            missing = [task.id for task in each.tasks if task.truth is None]
            if cell.baseline == "reconstruction" and missing:
                raise ValueError(
                    f"cell {cell.name!r}: {missing[0]} of {each.name!r} has no truth to "
                    "reconstruct; name the sets that the cell is for."
                )
            record = record_of(cell, each, None, config.seed)
            check_record(_folder(workdir, cell, each), record, unknown=OF_MODELS)
    for each in loss_sets:
        number = len(triples_of(each.tasks))
        if not number:
            raise ValueError(f"loss set {each.name!r} has no truths.")
        if config.loss == MLPERF:
            check_mlperf(number)


def _everywhere(value: bool) -> bool:
    """Whether it is so on all processes: file systems may show some of them an older state."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def _about(cell: Cell, model: Model | None) -> dict[str, Any]:
    place, step = split_step(cell.checkpoint)
    return to_dict(cell) | {
        "checkpoint": str(place) if cell.checkpoint else "",
        "step": step,
        "shift": cell.shift or (model.objective.time.shift if model else ""),
        "takes_guidance": model is not None and model.objective.transformer.guidance_embed,
        "weights": model.identity if model else {},
    }


def _judge(
    panel: JudgePanel, each: Set, folder: CellFolder, images: Sequence[RGBImage]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a line a task, what is said of all together), once they are written."""
    # At the size that was asked for, so that models which make smaller pictures are no better off.
    sized = [resize(image, task.size) for image, task in zip(images, each.tasks, strict=True)]
    columns, whole = judge(panel.judges, Outputs(each.name, each.tasks, sized))
    rows = [
        {
            "id": task.id,
            "category": task.category,
            "group": task.group or task.id,
            "turn": task.turn,
            **{metric: column[i] for metric, column in columns.items()},
        }
        for i, task in enumerate(each.tasks)
    ]
    said = {"judges": panel.record, "scores": dict(whole)}
    folder.write_scores(rows, said)
    return rows, said


def _summarised(
    rows: Sequence[Mapping], whole: Mapping[str, Any], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the summary says of one cell on one set."""
    metrics = {
        name: {
            by: {key: list(estimate) for key, estimate in estimates.items()}
            for by, estimates in found.items()
        }
        for name, found in summarise(rows).items()
    }
    counts = Counter(row["category"] for row in rows)
    return {
        "count": dict(sorted(counts.items())) | {ALL: len(rows)},
        "metrics": metrics,
        "whole": whole["scores"],
        "speed": _speed(batches),
    }


def _speed(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates of the batches that were sampled; nothing where none was, as of copies.

    A turn is compiled anew at each start, most of it from a cache: the longest time counts. Where
    starts had other devices, rates are of those that made the most images.
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


def _losses(
    name: str, model: Model, each: Set, workdir: Path, mesh: Mesh, config: EvalConfig
) -> dict[str, Any]:
    """The held-out loss of a checkpoint on the tasks that have truths.

    Raises:
      ValueError: the losses are not finite, or the file is of other networks.
    """
    triples = triples_of(each.tasks)
    examples = prepare_all(triples, model.data)
    data = with_room(model.data, examples)
    file = _losses_file(workdir, name, each, config.loss)
    rows = held_out_loss(model.networks, examples, data, model.objective, config.loss, mesh, file)
    wrong = [row["id"] for row in rows if not math.isfinite(row["loss"])]
    if wrong:
        raise ValueError(
            f"the held-out loss of {name} is not finite for {wrong[0]!r}: its weights are damaged, "
            "or its training diverged. Take another checkpoint, or leave its cells out."
        )
    return summarise_losses(rows, kinds_of(triples))


def _losses_file(workdir: Path, name: str, each: Set, loss: LossConfig) -> Path:
    """One of its own for names that look alike, other settings, and other tasks."""
    short = folder_name(name.strip("/"))[-LOSS_NAME:]
    all_of_it = json.dumps([name, to_dict(loss), each.fingerprint])
    digest = short_digest(all_of_it)[:8]
    return workdir / "losses" / folder_name(each.name) / f"{short}-{digest}.jsonl"


def _in_short(found: Mapping[str, Any]) -> str:
    """The first numbers of a cell on a set."""
    shown = []
    for metric in list(found["metrics"])[:3]:
        mean = found["metrics"][metric]["category"][ALL][0]
        shown.append(f"{METRICS[metric].title} {METRICS[metric].show(mean)}")
    if found["speed"]:
        shown.append(f"{found['speed']['seconds_per_image']:.3g} s an image")
    return "  ".join(shown)


def as_csv(summary: Mapping[str, Any]) -> str:
    """A line for each number: of a cell, or of a checkpoint where it is a held-out loss."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", "set", "metric", "by", "of", "mean", "low", "high", "count"])
    for cell, about in summary["cells"].items():
        for name, found in about["sets"].items():
            for metric, by in found["metrics"].items():
                for kind, estimates in by.items():
                    for key, values in estimates.items():
                        writer.writerow([cell, name, metric, kind, key, *values])
            for part in ("whole", "speed"):
                for metric, value in found[part].items():
                    writer.writerow([cell, name, metric, part, ALL, value, "", "", ""])
    for name, losses in summary["losses"].items():
        for checkpoint, found in losses.items():
            parts = {ALL: found} | {f"t={level['t']:g}": level for level in found["levels"]}
            for key, part in (parts | found["kinds"]).items():
                row = [checkpoint, name, "held_out_loss", "loss", key, part["mean"]]
                writer.writerow([*row, "", "", part["count"]])
    return text.getvalue()


def parse_seconds(items: Sequence[str]) -> dict[str, float]:
    """``["data=6", "flow=400"]`` as a dict.

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
    workdir = Path(options.workdir)
    summary = evaluate(validated(options.config), workdir, parse_seconds(options.seconds))
    if jax.process_index() == 0:
        print(table(summary))
        print(f"wrote {workdir / 'report.html'}")


if __name__ == "__main__":
    # The module that config files import, for this one's `EvalConfig` is another class.
    from kontext_jax import evaluate as module

    config_flags.DEFINE_config_file("config", help_string="a file of configs/")
    flags.DEFINE_string("workdir", None, "where the results go")
    flags.DEFINE_list("seconds", [], "what earlier stages took: data=6,flow=400")
    flags.DEFINE_bool("distributed", False, "joins the processes of a pod or cluster")
    cli.run("evaluate", module.main)
