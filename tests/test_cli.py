"""The commands as a user types them: the full path, error messages and exit codes."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_jax import __main__ as kontext
from kontext_jax import cli
from kontext_jax.config import Config
from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.sweep import Cell
from kontext_jax.evaluation.tasks.sets import SetConfig
from kontext_jax.sampling.provenance import read_provenance

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def compilation_cache(tmp_path_factory):
    """Commands that compile the same program share it, as on a user's machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )


def output_of(module: str, *arguments: str) -> str:
    """What a command prints; it must succeed."""
    process = python("-m", f"kontext_jax.{module}", *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


def error_of(module: str, *arguments: str) -> str:
    """The last line of a command's error, which must not be a traceback."""
    process = python("-m", f"kontext_jax.{module}", *arguments)
    assert process.returncode == 1
    lines = process.stderr.strip().splitlines()
    assert lines and "Traceback" not in process.stderr
    return lines[-1]


@pytest.mark.slow
def test_full_path_from_data_to_report(tmp_path):
    data, autoencoder, flow = (str(tmp_path / name) for name in ("world", "autoencoder", "flow"))
    sizes = ["--num_train=48", "--num_validation=12"]
    output_of("data.build", "--source=world", f"--output={data}", *sizes)
    common = [f"--config.data.path={data}", "--config.num_steps=2", "--config.log_every=1"]
    output_of(
        "train",
        "--config=configs/quickstart.py:autoencoder",
        f"--workdir={autoencoder}",
        *common,
    )
    output_of(
        "train",
        "--config=configs/quickstart.py",
        f"--workdir={flow}",
        f"--config.objective.init_from.autoencoder={autoencoder}",
        "--config.objective.transformer.depth=1",
        "--config.objective.transformer.depth_single=1",
        "--config.objective.text_encoder.num_layers=1",
        "--config.sheets.sampler.num_steps=2",
        "--config.validation.sampler.num_steps=2",
        *common,
    )
    image = tmp_path / "out.png"
    context = tmp_path / "context.png"
    Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(context)
    settings = ["--prompt=make it night, 夜", f"--context={context}", "--num_steps=2"]
    output_of("sample", f"--checkpoint={flow}", *settings, f"--output={image}")
    with Image.open(image) as sample:
        assert sample.size == (32, 32)
    record = read_provenance(image)
    assert record["prompt"] == "make it night, 夜"
    fingerprint = record["model"]["transformer"][0]
    assert len(fingerprint) == 16 and record["num_steps"] == 2
    assert tmp_path.name not in image.read_bytes().decode("latin-1")

    exported, second_image = tmp_path / "exported", tmp_path / "second.png"
    output = output_of("convert", f"--input={flow}", f"--output={exported}", "--format=diffusers")
    assert f"transformer: fingerprint {fingerprint}" in output
    output_of("sample", f"--checkpoint={exported}", *settings, f"--output={second_image}")
    assert image.read_bytes() == second_image.read_bytes()  # pixels and record

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
    table = output_of(
        "evaluate", f"--config={config}", f"--workdir={out}", "--seconds=data=1,flow=2"
    )
    assert "edits: 12 tasks" in table and "edit success" in table
    summary = json.loads((out / "summary.json").read_text())
    results = {name: cell["sets"]["edits"] for name, cell in summary["cells"].items()}
    assert list(results) == ["model", "exported", "copy", "new"]
    assert results["copy"]["metrics"]["edit_success"]["category"]["all"][0] == 0
    assert results["copy"]["metrics"]["preservation"]["category"]["all"][0] == 1
    scores = [(out / f"cells/edits/{name}/scores.jsonl").read_text() for name in results]
    assert scores[0] == scores[1] != scores[3]  # the same images, bit by bit
    assert [len(text.splitlines()) for text in scores] == [12] * 4
    means = [losses["mean"] for losses in summary["losses"]["edits"].values()]
    assert len(means) == 2 and means[0] == means[1]
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page and "<svg" in page
    assert not re.search(r"(src|href)=['\"]?(http|//)", page)  # loads nothing from elsewhere
    assert "Field nonsense" in error_of(
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
        ("train", "train: stopped; the same command resumes it."),
        ("evaluate", "evaluate: stopped; the same command resumes it."),
        ("encode", "encode: stopped; the same command resumes it."),
        ("sample", "sample: stopped."),
    ],
)
def test_interrupted_command_says_whether_it_can_be_resumed(name, sentence):
    process = python("-c", INTERRUPTED, name)
    assert (process.returncode, process.stderr, process.stdout) == (130, f"{sentence}\n", "")


FAILING = """
import pkgutil, sys
from kontext_jax.cli import run

def body():
    raise pkgutil.resolve_name(error)("the reason and the fix.")

error = sys.argv.pop(1)
run("train", body)
"""


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        ("kontext_jax.training.preemption:Preempted", 75),
        ("kontext_jax.cli:UserError", 1),
        ("builtins:ValueError", 1),
    ],
)
def test_error_has_its_exit_code_and_one_sentence(error, exit_code):
    process = python("-c", FAILING, error)
    expected = (exit_code, "train: the reason and the fix.\n", "")
    assert (process.returncode, process.stderr, process.stdout) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=configs/no.py:x"],
        ["--workdir=x", "--config", "configs/no.py"],
        ["-config", "configs/no.py", "--workdir=x"],
    ],
)
def test_missing_config_file_is_named(arguments):
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
def test_existing_config_file_is_accepted(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli.check_config_file(["train", *arguments])


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run"),
        (["--workdir", "gs://bucket/run"], "--workdir=gs://bucket/run"),
        (["--config.data.path=s3://bucket/data"], "--config.data.path=s3://bucket/data"),
        (["--prompt=make it red", "--output=gs://bucket/a.png"], "--output=gs://bucket/a.png"),
    ],
)
def test_url_is_refused_as_a_path(arguments, flag):
    message = f"^{re.escape(flag)}: only local paths are supported; mount the bucket"
    with pytest.raises(ValueError, match=message):
        cli.check_local_flags(["train", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt=gs://bucket/run as a neon sign"],
        ["--prompt", "https://example.org on a poster"],
        ["--workdir=/mnt/bucket/run", "--checkpoint", "runs/flow@5000"],
        ["--config=configs/quickstart.py:flow", "--config.data.path=data:/world"],
        [],
    ],
)
def test_local_path_is_accepted(arguments):
    cli.check_local_flags(["train", *arguments])


def test_url_stops_a_command_before_it_starts():
    command = "from kontext_jax.cli import run; run('train', lambda: print('started'))"
    process = python("-c", command, "--workdir=gs://bucket/run")
    assert (process.returncode, process.stdout) == (1, "")
    [line] = process.stderr.splitlines()
    assert line.startswith("train: --workdir=gs://bucket/run: only local paths are supported;")


def test_config_of_another_command_is_refused_with_its_command():
    cli.check_config(Config(), Config)
    message = "^--config returns Config, not EvalConfig: run kontext_jax.train with it.$"
    with pytest.raises(cli.UserError, match=message):
        cli.check_config(Config(), EvalConfig)
    sweep = EvalConfig(
        cells=(Cell(name="copy", baseline="copy"),), sets=(SetConfig(name="x", path="x"),)
    )
    message = "^--config returns EvalConfig, not Config: run kontext_jax.evaluate with it.$"
    with pytest.raises(cli.UserError, match=message):
        cli.check_config(sweep, Config)
    with pytest.raises(cli.UserError, match="returns int, not Config: give another file"):
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
        (["sample", "--checkpoint=no", "--output=a"], "needs the suffix of an image format"),
        (["sample", "--checkpoint=no", "--output=a.png", "--context=b.png"], "no image b.png"),
        (["sample", "--checkpoint=no", "--output=a.png", "--strength=0.5"], "name it with --init."),
        (["sample", "--checkpoint=no", "--output=a.png", "--strength=2"], "at most 1"),
        (["evaluate", "--workdir=x"], "evaluate: give --config"),
        (
            ["evaluate", "--workdir=x", "--config=configs/quickstart.py"],
            "evaluate: --config returns Config, not EvalConfig: run kontext_jax.train",
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
def test_mistake_is_explained_in_one_sentence(arguments, sentence):
    assert sentence in error_of(*arguments)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_usage_lists_every_verb(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kontext", *arguments])
    kontext.main()
    lines = capsys.readouterr().out.splitlines()
    summaries = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert summaries == [[verb, summary] for verb, (_, summary) in kontext.COMMANDS.items()]


@pytest.mark.parametrize("verb", kontext.COMMANDS)
def test_every_verb_has_a_module(verb):
    module, _ = kontext.COMMANDS[verb]
    assert importlib.util.find_spec(module)


def test_unknown_verb_is_refused():
    process = python("-m", "kontext_jax", "tarin", "--workdir=x")
    assert (process.returncode, process.stdout) == (1, "")
    verbs = "build, train, encode, sample, evaluate, compile, convert"
    assert process.stderr == f"kontext: there is no verb 'tarin'; the verbs are {verbs}.\n"


@pytest.mark.slow
def test_verb_runs_its_module():
    arguments = ["--checkpoint=no", "--output=a"]
    verb, module = (
        python("-m", *command, *arguments)
        for command in (["kontext_jax", "sample"], ["kontext_jax.sample"])
    )
    assert (verb.returncode, verb.stderr) == (module.returncode, module.stderr)
    assert verb.returncode == 1 and "suffix of an image format" in verb.stderr
