"""launch/benchmark.py on a minimal model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = ("--sides=ours,eager", "--rounds=1", "--steps=2")
TINY = ("--width=64", "--heads=2", "--depth=1,1")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", ROOT / "launch/benchmark.py", *SHORT, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [["--preset=cpu"], ["--preset=gpu_8704", "--device=cpu"]])
def test_the_benchmark_compares_and_profiles(preset):
    for module in ("torch", "diffusers"):
        pytest.importorskip(module, reason="needs the convert extra: pip install -e '.[convert]'")
    done = run(*preset, *TINY, "--tokens=16,16,8", "--profile")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["ours"][-1] == "1.00"
    assert float(rows["eager"][-1]) > 0
    assert "attention.py:" in done.stdout and "(backward)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", ["train", "encode", "decode"])
def test_the_autoencoder_is_compared_too(task):
    for module in ("torch", "diffusers"):
        pytest.importorskip(module, reason="needs the convert extra: pip install -e '.[convert]'")
    tiny = ("--size=16", "--channels=8", "--groups=4")
    done = run("--preset=autoencoder", f"--task={task}", *tiny)
    assert done.returncode == 0, done.stderr
    assert f"autoencoder, 8 channels: {task} at 16 pixels" in done.stdout
    assert "losses, eager" in done.stdout and "ratio" in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--tokens=15,0,8", "images are square, so their tokens must be square numbers."),
        ("--remat=offload", "remat 'offload' is not one of none, full, the modes that PyTorch"),
        ("--task=train", "--task is not a setting of --preset=cpu."),
    ],
)
def test_invalid_cases_are_refused(argument, message):
    done = run(argument)
    assert done.returncode == 1
    assert message in done.stderr
