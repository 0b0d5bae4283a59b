"""launch/distillation_table.py, run as a command."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_entries_have_the_mean_and_the_range(tmp_path):
    paths = []
    for number, success in enumerate((0.5, 0.75)):
        cell = {
            "metrics": {
                "edit_success": {"category": {"all": [success, 0.1, 0.9], "local": [0, 0, 0]}},
                "preservation": {"category": {"all": [0.9, 0.8, 1.0]}},
            },
            "whole": {"fd_efflite0": 400.0 + 10 * number},
            "speed": {"seconds_per_image": 0.25},
        }
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({"cells": {"teacher 4": {"sets": {"edits": cell}}}}))
    done = subprocess.run(
        [sys.executable, ROOT / "launch/distillation_table.py", *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    row = "| teacher 4 | 62.5 (50.0–75.0) | 90.0 | 405 (400–410) | 0.2500 |"
    assert done.stdout.splitlines()[-1] == row
