"""The commands, as a user types them: the whole path, and what a mistake looks like."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_jax import cli
from kontext_jax.config import Config
from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import SetConfig
from kontext_jax.sampling.provenance import read_provenance

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"kontext_jax.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def ok(module: str, *arguments: str) -> str:
    done = run(module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(module: str, *arguments: str) -> str:
    """The one line that a mistake gets."""
    done = run(module, *arguments)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines and "Traceback" not in done.stderr
    return lines[-1]


@pytest.mark.slow
def test_the_whole_path_from_nothing_to_a_report(tmp_path):
    data, autoencoder, flow = (str(tmp_path / name) for name in ("world", "autoencoder", "flow"))
    sizes = ["--num_train=48", "--num_validation=12"]
    ok("data.build", "--source=world", f"--output={data}", *sizes)
    common = [f"--config.data.path={data}", "--config.num_steps=2", "--config.log_every=1"]
    ok(
        "train",
        "--config=configs/quickstart.py:autoencoder",
        f"--workdir={autoencoder}",
        *common,
    )
    ok(
        "train",
        "--config=configs/quickstart.py",
        f"--workdir={flow}",
        f"--config.objective.init_from.autoencoder={autoencoder}",
        *common,
    )
    image = tmp_path / "out.png"
    context = tmp_path / "context.png"
    Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(context)
    settings = ["--prompt=make it night, 夜", f"--context={context}", "--num_steps=2"]
    ok("sample", f"--checkpoint={flow}", *settings, f"--output={image}")
    with Image.open(image) as made:
        assert made.size == (32, 32)
    record = read_provenance(image)
    assert record["prompt"] == "make it night, 夜"
    fingerprint = record["model"]["transformer"][0]
    assert len(fingerprint) == 16 and record["num_steps"] == 2
    assert tmp_path.name not in image.read_bytes().decode("latin-1")

    exported, again = tmp_path / "exported", tmp_path / "again.png"
    said = ok("convert", f"--input={flow}", f"--output={exported}", "--format=diffusers")
    assert f"transformer: fingerprint {fingerprint}" in said
    ok("sample", f"--checkpoint={exported}", *settings, f"--output={again}")
    assert image.read_bytes() == again.read_bytes()  # picture and record

    config = tmp_path / "eval.py"
    config.write_text(
        "from kontext_jax.evaluation.sweep import Cell\n"
        "from kontext_jax.evaluation.tasks.sets import SetConfig\n"
        "from kontext_jax.evaluate import EvalConfig\n"
        "from kontext_jax.sampler import SamplerConfig\n"
        "def get_config():\n"
        "    two = SamplerConfig(num_steps=2)\n"
        f"    edits = SetConfig(name='edits', path={data!r})\n"
        "    return EvalConfig(\n"
        f"        cells=(Cell(name='model', checkpoint={flow!r}, sampler=two),\n"
        f"               Cell(name='exported', checkpoint={str(exported)!r}, sampler=two),\n"
        "               Cell(name='copy', baseline='copy'),\n"
        f"               Cell(name='new', checkpoint={flow!r}, baseline='untrained',\n"
        "                    sampler=two)),\n"
        f"        sets=(edits,), loss_sets=(edits,), curves=(('flow', {flow!r}),))\n"
    )
    out = tmp_path / "out"
    table = ok("evaluate", f"--config={config}", f"--workdir={out}", "--seconds=data=1,flow=2")
    assert "edits: 12 tasks" in table and "edit carried out" in table
    summary = json.loads((out / "summary.json").read_text())
    found = {name: cell["sets"]["edits"] for name, cell in summary["cells"].items()}
    assert list(found) == ["model", "exported", "copy", "new"]
    assert found["copy"]["metrics"]["edit_success"]["category"]["all"][0] == 0
    assert found["copy"]["metrics"]["preservation"]["category"]["all"][0] == 1
    scores = [(out / f"cells/edits/{name}/scores.jsonl").read_text() for name in found]
    assert scores[0] == scores[1] != scores[3]  # the same pictures, to the last bit
    assert [len(text.splitlines()) for text in scores] == [12] * 4
    means = [losses["mean"] for losses in summary["losses"]["edits"].values()]
    assert len(means) == 2 and means[0] == means[1]
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page and "<svg" in page
    assert not re.search(r"(src|href)=['\"]?(http|//)", page)  # nothing is fetched
    assert "Field nonsense" in refused(
        "train", "--config=configs/quickstart.py", "--config.nonsense=1", "--workdir=x"
    )


INTERRUPTED = """
import signal, sys
from kontext_jax.cli import run

def body():
    signal.raise_signal(signal.SIGINT)

run(sys.argv.pop(1), body)
"""


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("train", "train: stopped; the same command goes on."),
        ("evaluate", "evaluate: stopped; the same command goes on."),
        ("encode", "encode: stopped; the same command goes on."),
        ("sample", "sample: stopped."),
    ],
)
def test_who_stops_a_command_is_told_whether_it_can_go_on(name, sentence):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, name], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, f"{sentence}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=configs/no.py:x"],
        ["--workdir=x", "--config", "configs/no.py"],
        ["-config", "configs/no.py", "--workdir=x"],
    ],
)
def test_a_config_file_that_is_missing_is_named_in_every_form(arguments):
    with pytest.raises(ValueError, match=r"^there is no config file configs/no\.py\.$"):
        cli.check_config_file(["train", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=configs/quickstart.py:flow"],
        ["--config", "configs/quickstart.py", "--config.seed", "3"],
        ["--workdir=x", "--config"],
        [],
    ],
)
def test_config_files_that_are_there_are_passed_on(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli.check_config_file(["train", *arguments])


def test_a_config_of_another_command_is_named_with_its_own():
    cli.check_config(Config(), Config)
    with pytest.raises(cli.UserError, match="the kind Config, .* run kontext_jax.train with it"):
        cli.check_config(Config(), EvalConfig)
    sweep = EvalConfig(
        cells=(Cell(name="copy", baseline="copy"),), sets=(SetConfig(name="x", path="x"),)
    )
    message = "^--config makes the kind EvalConfig, not Config: run kontext_jax.evaluate with it.$"
    with pytest.raises(cli.UserError, match=message):
        cli.check_config(sweep, Config)
    with pytest.raises(cli.UserError, match="makes the kind int, not Config: give another file"):
        cli.check_config(3, Config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--workdir=x"], "train: give --config"),
        (["train", "--config=configs/no.py"], "train: there is no config file configs/no.py."),
        (["train", "--config=configs/quickstart.py:no"], "no variant 'no'"),
        (["train", "--config=configs/quickstart.py", "--workdir=x"], "There is no data set in"),
        (["sample", "--checkpoint=no", "--output=a.png"], "There are no weights at 'no'"),
        (["sample", "--checkpoint=no", "--output=a"], "no ending of an image format"),
        (["sample", "--checkpoint=no", "--output=a.png", "--context=b.png"], "no image b.png"),
        (["sample", "--checkpoint=no", "--output=a.png", "--strength=0.5"], "name it with --init."),
        (["sample", "--checkpoint=no", "--output=a.png", "--strength=2"], "at most 1"),
        (["evaluate", "--workdir=x"], "evaluate: give --config"),
        (
            ["evaluate", "--workdir=x", "--config=configs/quickstart.py"],
            "evaluate: --config makes the kind Config, not EvalConfig: run kontext_jax.train",
        ),
        (
            ["convert", "--input=no", "--output=x", "--format=bfl"],
            "convert: There are no weights at 'no'",
        ),
        (
            ["convert", "--input=no", "--output=README.md", "--format=bfl"],
            "convert: README.md exists; delete it or name another --output.",
        ),
        (["convert", "--input=no", "--output=x", "--format=nonsense"], "be one of <diffusers|bfl|"),
        (
            ["convert", "--input=no", "--output=x", "--format=bfl", "--network=unet"],
            "be one of <transformer|autoencoder|text_encoder|clip>",
        ),
    ],
)
def test_a_mistake_gets_one_sentence(arguments, sentence):
    assert sentence in refused(*arguments)
