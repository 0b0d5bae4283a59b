"""The benchmark's command, on a model that is as small as can be."""

import subprocess
import sys
from pathlib import Path

import pytest

REASON = "needs the convert extra: pip install -e '.[convert]'"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "launch/benchmark.py"
TINY = ("--width=64", "--heads=2", "--depth=1,1", "--sides=ours,eager", "--rounds=1", "--steps=2")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", SCRIPT, *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("preset", [["--preset=cpu"], ["--preset=gpu_8704", "--device=cpu"]])
def test_it_compares_and_profiles(preset):
    done = run(*preset, "--tokens=16,16,8", "--profile")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["ours"][-1] == "1.00"
    assert float(rows["eager"][-1]) > 0
    assert "attention.py:" in done.stdout and "(backward)" in done.stdout


def test_mistakes_are_named():
    done = run("--tokens=15,0,8")
    assert done.returncode == 1
    assert "images are square" in done.stderr
