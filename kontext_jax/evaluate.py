"""Scores a run on held-out edits: ``python -m kontext_jax.evaluate --config=... --workdir=DIR``.

Samples an image for every example, has the data set's own checker read it back, and compares with
two baselines: copying the context, and the same networks untrained. Writes ``results.jsonl`` (one
line a picture), ``summary.json`` and ``report.html``.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from kontext_jax import cli
from kontext_jax.config import fingerprint, validated
from kontext_jax.data.pipeline import prepare_all
from kontext_jax.data.sources import TripleSource
from kontext_jax.evaluator import Generator
from kontext_jax.metrics import world
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.places import load_generator, load_meta
from kontext_jax.report import write_report
from kontext_jax.runs import load_frozen
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import Triple

ALL = "all"


@dataclass(kw_only=True, unsafe_hash=True)
class EvalConfig:
    """What to score, and on what.

    Attributes:
      checkpoint: workdir of the flow-matching run.
      params: "ema" or "params", the averaged or the raw parameters.
      split: of the data set that the run was trained on.
      num_examples: the first so many; 0 for all.
      sheet_rows: examples shown in the report.
      curves: title -> workdir of the runs whose losses the report draws.
      seed: of the initial noise.
    """

    checkpoint: str = ""
    params: str = "ema"
    split: str = "validation"
    num_examples: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sheet_rows: int = 24
    curves: tuple[tuple[str, str], ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.sampler.strength < 1:
            raise ValueError("sampler.strength below 1 would start from the truth; set 1.")


def evaluate(config: EvalConfig, workdir: Path, seconds: dict[str, float]) -> dict:
    """Scores the run and writes all files.

    Args:
      config: what to score.
      workdir: where the files go.
      seconds: what earlier stages took, for the report.

    Returns:
      What ``summary.json`` holds.

    Raises:
      FileNotFoundError, ValueError: the run or its data is missing, or has no checker.
    """
    began = time.monotonic()
    mesh = make_mesh(config.mesh)
    model, run = load_generator(config.checkpoint, mesh, config.params)
    frozen = load_frozen(run, mesh, load_meta(config.checkpoint)["frozen"])
    source = TripleSource(run.data.path, config.split)
    triples = [source[i] for i in range(min(config.num_examples or len(source), len(source)))]
    if "after" not in json.loads(triples[0].details):
        raise ValueError(
            f"{run.data.path} has no checker to score pictures with; data of --source=world has."
        )
    generate = Generator(
        prepare_all(triples, run.data),
        run.data,
        run.objective,
        config.sampler,
        mesh,
        config.seed,
    )
    sampling = time.monotonic()
    images = {"model": generate(networks_of(model, frozen))}
    sampling = time.monotonic() - sampling
    images["copy"] = [_copy(triple) for triple in triples]
    objective = run.make_objective()
    init = jax.jit(lambda key: objective.init(key)[objective.generator])
    untrained = init(jax.random.key(config.seed))
    images["untrained"] = generate(networks_of(untrained, frozen))

    results = {name: score(triples, made) for name, made in images.items()}
    summary = {
        "checkpoint": config.checkpoint,
        "config": fingerprint(run),
        "num_examples": len(triples),
        "num_steps": config.sampler.num_steps,
        "methods": {name: summarise(rows) for name, rows in results.items()},
        "seconds": seconds
        | {"evaluate": round(time.monotonic() - began, 1), "of_it_sampling": round(sampling, 1)},
    }
    shown = [
        (triples[i], images["model"][i], results["model"][i])
        for i in _spread(triples, config.sheet_rows)
    ]
    if jax.process_index() == 0:
        _write(workdir, results, summary, shown, dict(config.curves))
    return summary


def _write(workdir: Path, results: dict, summary: dict, shown: list, curves: dict) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    write_report(workdir / "report.html", summary, shown, curves)
    with (workdir / "results.jsonl").open("w") as file:
        for name, rows in results.items():
            file.writelines(json.dumps({"method": name} | row) + "\n" for row in rows)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def score(triples: Sequence[Triple], images: Sequence[np.ndarray]) -> list[dict]:
    """One result a picture: the checker's verdict, and the mean absolute error to the truth."""
    rows = []
    for triple, image in zip(triples, images, strict=True):
        verdict = world.check(image, triple.details)
        error = np.abs(image.astype(np.float64) - triple.target).mean() / 255
        rows.append(
            {
                "id": triple.id,
                "category": triple.category,
                "edited": verdict.edited,
                "preserved": verdict.preserved,
                "l1": round(float(error), 5),
            }
        )
    return rows


def summarise(rows: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """Rates by category and over all: success, preservation (None: nothing to preserve), error."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
        groups[ALL].append(row)

    def mean(values):
        return round(float(np.mean(values)), 4) if values else None

    names = sorted(groups, key=lambda name: (name == ALL, name))
    return {
        metric: {name: mean(_values(groups[name], key)) for name in names}
        for metric, key in (("edit_success", "edited"), ("preservation", "preserved"), ("l1", "l1"))
    } | {"count": {name: len(groups[name]) for name in names}}


def _values(rows: Sequence[dict], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row[key] is not None]


def _copy(triple: Triple) -> np.ndarray:
    """The context as it is; grey where there is none."""
    if triple.contexts and triple.contexts[0].shape == triple.target.shape:
        return triple.contexts[0]
    return np.full_like(triple.target, 128)


def _spread(triples: Sequence[Triple], number: int) -> list[int]:
    """The first examples of each category in turn, chosen before any result is known."""
    queues: dict[str, list[int]] = defaultdict(list)
    for i, triple in enumerate(triples):
        queues[triple.category].append(i)
    turns = max(map(len, queues.values()))
    order = [queue[k] for k in range(turns) for queue in queues.values() if k < len(queue)]
    return order[:number]


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


def print_table(summary: dict) -> None:
    """Prints the success of each category, the baselines beside it."""
    methods = summary["methods"]
    print(f"{'edit success':16}" + "".join(f"{name:>12}" for name in methods) + f"{'examples':>10}")
    for category, count in methods["model"]["count"].items():
        rates = [methods[name]["edit_success"][category] for name in methods]
        print(f"{category:16}" + "".join(f"{rate:12.1%}" for rate in rates) + f"{count:10}")


def main() -> None:
    options = flags.FLAGS
    if options.config is None or options.workdir is None:
        raise cli.UserError("give --config=configs/eval_X.py and --workdir=DIR.")
    workdir = Path(options.workdir)
    summary = evaluate(validated(options.config), workdir, parse_seconds(options.seconds))
    print_table(summary)
    print(f"wrote {workdir / 'report.html'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/")
    flags.DEFINE_string("workdir", None, "where the report goes")
    flags.DEFINE_list("seconds", [], "what earlier stages took: data=6,flow=400")
    cli.run("evaluate", main)
