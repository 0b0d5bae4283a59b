"""The files of configs/, and the checks of settings."""

import dataclasses
import functools
import os
from pathlib import Path

import pytest

import configs.autoencoder
import configs.distillation
import configs.emoji
import configs.eval_autoencoder
import configs.eval_distillation
import configs.eval_emoji
import configs.eval_kontext
import configs.eval_mlperf
import configs.eval_quickstart
import configs.finetune
import configs.flow_256
import configs.kontext_1024
import configs.ladd_1024
import configs.quickstart
import configs.rate_distortion
from kontext_jax.config import Config, SheetConfig, ValidationConfig, pick
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.sampler import SamplerConfig
from kontext_jax.settings import from_dict, to_dict, validated

GOLDEN = Path(__file__).parent / "golden"
MODULES = (
    configs.autoencoder,
    configs.quickstart,
    configs.distillation,
    configs.emoji,
    configs.finetune,
    configs.flow_256,
    configs.kontext_1024,
    configs.ladd_1024,
    configs.rate_distortion,
)
EVALUATIONS = {
    "eval_autoencoder": configs.eval_autoencoder,
    "eval_distillation": configs.eval_distillation,
    "eval_emoji": configs.eval_emoji,
    "eval_kontext": configs.eval_kontext,
    "eval_mlperf": configs.eval_mlperf,
    "eval_quickstart": configs.eval_quickstart,
}
RUNS = [
    (module.__name__.removeprefix("configs."), variant, make)
    for module in MODULES
    for variant, make in module.VARIANTS.items()
]
IDS = [f"{name}-{variant}" for name, variant, _ in RUNS]


def flat(values: dict, prefix: str = "") -> list[str]:
    """One line per setting, sorted."""
    lines = []
    for name, value in sorted(values.items()):
        if isinstance(value, dict):
            lines += flat(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {value}")
    return lines


@pytest.mark.parametrize(("name", "variant", "make"), RUNS, ids=IDS)
def test_config_equals_its_snapshot(name, variant, make):
    """Snapshots show every change of a run in a diff; UPDATE_GOLDEN=1 rewrites them."""
    text = "\n".join(flat(to_dict(make()))) + "\n"
    path = GOLDEN / f"{name}-{variant}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_every_config_is_tested_and_has_a_snapshot():
    files = {path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py")}
    assert files == {name for name, _, _ in RUNS} | set(EVALUATIONS)
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {f"{n}-{v}" for n, v, _ in RUNS}


@pytest.mark.parametrize(("name", "variant", "make"), RUNS, ids=IDS)
def test_config_survives_json(name, variant, make):
    config = make()
    assert from_dict(to_dict(config), Config) == config


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_survives_json(name):
    config = EVALUATIONS[name].get_config()
    values = to_dict(config)
    assert from_dict(values, EvalConfig) == config
    values["cells"][1]["sampler"]["steps"] = 4
    with pytest.raises(ValueError, match="SamplerConfig has no setting steps"):
        from_dict(values, EvalConfig)


def test_validated_settings_are_frozen():
    """Compiled programs are keyed by them."""
    config = validated(Config())
    for frozen in (config, config.optim, config.objective.transformer):
        with pytest.raises(AttributeError, match=f"{type(frozen).__name__}.seed is frozen"):
            frozen.seed = 3
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, b1=0.8))
    changed.optim.b1 = 0.7
    assert (config.optim.b1, changed.optim.b1) == (0.9, 0.7)


def test_unknown_setting_is_refused():
    values = to_dict(Config())
    values["optim"]["lr"] = 1
    with pytest.raises(ValueError, match="OptimConfig has no setting lr"):
        from_dict(values, Config)


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="no variant 'flo'; there are autoencoder, flow"):
        pick(configs.quickstart.VARIANTS, "flo")


def test_profiled_steps():
    assert list(Config(profile_steps="10:13").profiled) == [10, 11, 12]
    assert not Config().profiled


@pytest.mark.parametrize("steps", ["3", "5:5", "7:5", "0:3", "a:b", "-1:3", "1:2:3", " 1:2", "1:"])
def test_profile_steps_must_be_a_range(steps):
    with pytest.raises(ValueError, match=f"profile_steps '{steps}' must be first:end with 0 < fi"):
        Config(profile_steps=steps)


@pytest.mark.parametrize(
    "make", [SheetConfig, ValidationConfig, functools.partial(Cell, name="x", checkpoint="y")]
)
def test_scored_images_cannot_start_from_the_target(make):
    with pytest.raises(
        ValueError, match="sampler.strength below 1 would start from the target image"
    ):
        make(sampler=SamplerConfig(strength=0.9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(log_every=0), "log_every 0 must be 1 or more"),
        (lambda: Config(num_steps=0), "num_steps 0 must be 1 or more"),
        (lambda: Config(seed=-1), "seed -1 must be 0 or more"),
        (lambda: Config(max_skipped_in_a_row=0), "max_skipped_in_a_row 0 must be 1 or more"),
        (lambda: SheetConfig(num_examples=0), "sheets.num_examples 0 must be 1 or more"),
        (lambda: ValidationConfig(num_pictures=-3), "validation.num_pictures -3 must be 0 or more"),
        (lambda: DataConfig(num_workers=-1), "data.num_workers -1 must be 0 or more"),
        (lambda: DataConfig(batch_size=0), "data.batch_size 0 must be 1 or more"),
        (lambda: DataConfig(caption_dropout=1.5), "data.caption_dropout 1.5 must be from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_settings_that_are_urls_are_refused():
    config = Config()
    config.data.path = "gs://bucket/data"
    with pytest.raises(ValueError, match="^config.data.path=gs://bucket/data: only local paths"):
        validated(config)


def test_the_comparison_of_autoencoders_has_a_cell_for_each_location(tmp_path):
    """A run has curves; the steps of ``@all`` are named when they are known."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    config = configs.eval_autoencoder.get_config(f"{run}@all,{run}@7,models/vae")
    assert [cell.checkpoint for cell in config.cells] == [f"{run}@all", f"{run}@7", "models/vae"]
    assert [cell.name for cell in config.cells] == [str(run), f"{run}@7", "models/vae"]
    assert config.curves == ((str(run), str(run)),)
