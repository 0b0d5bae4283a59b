"""launch/seeds_table.py, run as a command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def every(value: float) -> dict:
    return {"category": {"all": [value, 0.0, 1.0], "local": [0, 0, 0]}}


EDITS = [
    {
        "metrics": {"edit_success": every(success), "preservation": every(0.9)},
        "whole": {"fd_efflite0": fd},
        "speed": {"seconds_per_image": 0.25},
    }
    for success, fd in ((0.5, 400.0), (0.75, 410.0))
]
RECONSTRUCTIONS = [
    {
        "metrics": {
            "psnr": every(psnr),
            "ssim": every(0.8125),
            "distance_efflite0": every(0.5),
            "edit_success": every(0.0),
        },
        "whole": {"fd_efflite0": 40.0},
    }
    for psnr in (26.0, 26.5)
]


@pytest.mark.parametrize(
    ("set_name", "cells", "row"),
    [
        ("edits", EDITS, "| a 4 | 62.5 (50.0–75.0) | 90.0 | 405 (400–410) | 0.2500 |"),
        ("held out", RECONSTRUCTIONS, "| a 4 | 26.25 (26.00–26.50) | 0.812 | 0.500 | 40 |"),
    ],
)
def test_entries_have_the_mean_and_the_range(tmp_path, set_name, cells, row):
    paths = [tmp_path / f"{number}.json" for number in range(len(cells))]
    for path, cell in zip(paths, cells, strict=True):
        path.write_text(json.dumps({"cells": {"a 4": {"sets": {set_name: cell}}}}))
    done = subprocess.run(
        [sys.executable, ROOT / "launch/seeds_table.py", *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == row
