"""Scores a run on held-out edits: ``python -m kontext_jax.evaluate --config=... --workdir=DIR``.

Samples an image for every example, has the data set's own checker, if there is one, read it back,
and compares with two baselines: copying the context, and the same networks untrained. Other runs
and samplers, the *cells* (``cells.py``), can be set beside each other on the same examples. Writes
``results.jsonl`` (one line a picture), ``summary.json`` and ``report.html``.
"""

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from kontext_jax import cli
from kontext_jax.cells import Cell, Played, load_cells, play
from kontext_jax.config import fingerprint, validated
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.data.sources import TripleSource
from kontext_jax.evaluator import Generator, Image
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.report import METRICS, cell_table, headline, write_report
from kontext_jax.runs import Run, load_run
from kontext_jax.sampler import SamplerConfig, check_blind
from kontext_jax.scores import score, spread, summarise
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.sheets import SheetRow
from kontext_jax.types import Example, Triple


@dataclass(kw_only=True, unsafe_hash=True)
class EvalConfig:
    """What to score, and on what.

    Attributes:
      checkpoint: workdir of the run: its data set gives the examples, and the report's headline is
        about it.
      params: "ema" or "params", the averaged or the raw parameters.
      split: of the data set that the run was trained on.
      num_examples: the first so many; 0 for all.
      cells: other runs and samplers to compare, the slowest first: the others' speed is told
        as a multiple of its.
      num_cell_examples: of the examples, the first so many for each cell; 0 for all.
      sheet_rows: examples shown in the report; of the cells, which have a row to themselves, half
        as many.
      curves: title -> workdir of the runs whose losses the report draws.
      seed: of the initial noise.
    """

    checkpoint: str = ""
    params: str = "ema"
    split: str = "validation"
    num_examples: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    cells: tuple[Cell, ...] = ()
    num_cell_examples: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sheet_rows: int = 24
    curves: tuple[tuple[str, str], ...] = ()
    seed: int = 0

    def __post_init__(self):
        check_blind(self.sampler, "sampler")
        names = [cell.name for cell in self.cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"cells need names of their own; {twice[0]!r} is there twice.")


def evaluate(config: EvalConfig, workdir: Path, seconds: dict[str, float]) -> dict:
    """Scores the run and the cells, and writes all files.

    Args:
      config: what to score.
      workdir: where the files go.
      seconds: what earlier stages took, for the report.

    Returns:
      What ``summary.json`` holds.

    Raises:
      FileNotFoundError, ValueError: a run or its data is missing.
    """
    began = time.monotonic()
    mesh = make_mesh(config.mesh)
    load = functools.cache(functools.partial(load_run, mesh=mesh))
    run = load(config.checkpoint, config.params)
    data = run.config.data
    source = TripleSource(data.path, config.split)
    triples = [source[i] for i in range(min(config.num_examples or len(source), len(source)))]
    cell_runs = load_cells(config.cells, run, load)  # before anything that takes long
    examples = prepare_all(triples, data)
    images, sampling = _methods(config, run, triples, examples, mesh)
    results = {name: score(triples, made) for name, made in images.items()}
    summary = {
        "checkpoint": config.checkpoint,
        "config": fingerprint(run.config),
        "num_examples": len(triples),
        "num_steps": config.sampler.num_steps,
        "methods": {name: summarise(rows) for name, rows in results.items()},
    }
    lines = _lines("method", results)
    cell_rows = []
    if config.cells:
        few = slice(config.num_cell_examples or None)
        played = play(config.cells, cell_runs, run, triples[few], examples[few], mesh, config.seed)
        summary["cells"] = played.summary
        lines += _lines("cell", played.results)
        cell_rows = _cell_rows(triples[few], played, config.sheet_rows // 2)
    summary["seconds"] = seconds | {
        "evaluate": round(time.monotonic() - began, 1),
        "of_it_sampling": round(sampling, 1),
    }
    shown = [
        (triples[i], images["model"][i], results["model"][i])
        for i in spread(triples, config.sheet_rows)
    ]
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_report(workdir / "report.html", summary, shown, dict(config.curves), cell_rows)
        (workdir / "results.jsonl").write_text("".join(lines))
        (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _methods(
    config: EvalConfig, run: Run, triples: Sequence[Triple], examples: Sequence[Example], mesh: Mesh
) -> tuple[dict[str, Sequence[Image]], float]:
    """(pictures by the model and the baselines, seconds that the model's took to sample)."""
    generate = Generator(
        examples, run.config.data, run.config.objective, config.sampler, mesh, config.seed
    )
    began = time.monotonic()
    images = {"model": generate(run.networks)}
    seconds = time.monotonic() - began
    images["copy"] = [_copy(triple) for triple in triples]
    objective = run.config.make_objective()
    init = jax.jit(lambda key: objective.init(key)[objective.generator])
    untrained = init(jax.random.key(config.seed))
    images["untrained"] = generate(networks_of(untrained, run.frozen))
    return images, seconds


def _lines(kind: str, results: dict[str, list[dict]]) -> list[str]:
    return [json.dumps({kind: name} | row) + "\n" for name, rows in results.items() for row in rows]


def _cell_rows(triples: Sequence[Triple], played: Played, number: int) -> list[SheetRow]:
    """Examples with each cell's picture of them."""
    rows = []
    for i in spread(triples, number):
        triple, pictures = triples[i], [images[i] for images in played.images.values()]
        verdicts = [results[i]["edited"] for results in played.results.values()]
        note = triple.category.replace("_", " ")
        if None not in verdicts:
            note += f": edited by {sum(verdicts)} of {len(verdicts)}"
        rows.append(SheetRow(triple.contexts, triple.prompt, pictures, triple.target, note))
    return rows


def _copy(triple: Triple) -> np.ndarray:
    """The context as it is; grey where there is none."""
    if triple.contexts and triple.contexts[0].shape == triple.target.shape:
        return triple.contexts[0]
    return np.full_like(triple.target, 128)


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


def print_tables(summary: dict) -> None:
    """Prints each category's headline, the baselines beside it; then the cells, if any."""
    methods = summary["methods"]
    metric = headline(methods)
    title, show = METRICS[metric]
    print(f"{title.lower():22}" + "".join(f"{name:>12}" for name in methods) + f"{'examples':>10}")
    for category, count in methods["model"]["count"].items():
        values = [methods[name][metric][category] for name in methods]
        print(f"{category:22}" + "".join(f"{show(x):>12}" for x in values) + f"{count:10}")
    if "cells" not in summary:
        return
    rows = cell_table(summary["cells"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for first, *others in rows:
        line = "".join(f"{x:>{width + 3}}" for x, width in zip(others, widths[1:], strict=True))
        print(f"{first:{widths[0]}}{line}")


def main() -> None:
    options = flags.FLAGS
    if options.config is None or options.workdir is None:
        raise cli.UserError("give --config=configs/eval_X.py and --workdir=DIR.")
    workdir = Path(options.workdir)
    summary = evaluate(validated(options.config), workdir, parse_seconds(options.seconds))
    print_tables(summary)
    print(f"wrote {workdir / 'report.html'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/")
    flags.DEFINE_string("workdir", None, "where the report goes")
    flags.DEFINE_list("seconds", [], "what earlier stages took: data=6,flow=400")
    cli.run("evaluate", main)
