"""launch/benchmark_plan.py on a small index."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_benchmark_plans_and_finds_the_plan_again(tmp_path):
    """The same rows both times; of full size, see the script's docstring."""
    command = [sys.executable, "-W", "ignore", ROOT / "launch/benchmark_plan.py"]
    command += ["--examples=100000", f"--folder={tmp_path}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    fills = re.findall(r"fill (0\.\d+), text", done.stdout)
    first, later = re.findall(r"fingerprint .*", done.stdout)
    assert len(fills) == 2 and min(map(float, fills)) >= 0.97
    assert first == later
    assert not list(tmp_path.iterdir())
