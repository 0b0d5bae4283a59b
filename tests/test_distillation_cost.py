"""launch/distillation_cost.py on small images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_ladd_and_add_are_compared():
    done = subprocess.run(
        [sys.executable, ROOT / "launch/distillation_cost.py", "--size=32", "--rows=1"]
        + ["--rounds=1", "--depth=1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    ladd, add, ratio = done.stdout.splitlines()
    assert ladd.startswith("LADD ") and add.startswith("ADD ")
    assert float(ratio.removeprefix("ADD / LADD: ").split()[0]) > 0
