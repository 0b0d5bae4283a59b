"""Prints a table of the same cells in several evaluations: each mean and, in brackets, its range.

python launch/seeds_table.py runs/distillation/eval-{0,1,2}/summary.json
"""

import json
import statistics
import sys
from pathlib import Path

TABLES = {
    "edits": {
        "edit success, %": (lambda cell: 100 * _mean(cell, "edit_success"), 1),
        "rest preserved, %": (lambda cell: 100 * _mean(cell, "preservation"), 1),
        "FD": (lambda cell: cell["whole"]["fd_efflite0"], 0),
        "seconds per image": (lambda cell: cell["speed"].get("seconds_per_image", 0.0), 4),
    },
    "held out": {
        "PSNR, dB": (lambda cell: _mean(cell, "psnr"), 2),
        "SSIM": (lambda cell: _mean(cell, "ssim"), 3),
        "distance": (lambda cell: _mean(cell, "distance_efflite0"), 3),
        "FD": (lambda cell: cell["whole"]["fd_efflite0"], 0),
    },
}
"""The columns of each set: title -> (function from a cell's results to a value, decimal places)."""


def table(summaries: list[dict]) -> str:
    """Returns a Markdown table of the cells of the first evaluation, in its order."""
    first = next(iter(summaries[0]["cells"].values()))["sets"]
    set_name = next(name for name in TABLES if name in first)
    scores = [
        {name: cell["sets"][set_name] for name, cell in summary["cells"].items()}
        for summary in summaries
    ]
    columns = TABLES[set_name]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in scores[0]:
        entries = [
            _entry([value(score[name]) for score in scores], digits)
            for value, digits in columns.values()
        ]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _mean(cell: dict, metric: str) -> float:
    return cell["metrics"][metric]["category"]["all"][0]


def _entry(values: list[float], digits: int) -> str:
    mean, low, high = (
        f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low}–{high})"


if __name__ == "__main__":
    print(table([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
