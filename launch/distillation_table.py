"""The cells of several evaluations in one table: means and, in brackets, the least and the most.

python launch/distillation_table.py runs/distillation/eval-{0,1,2}/summary.json
"""

import json
import statistics
import sys
from pathlib import Path

COLUMNS = {
    "carried out, %": (lambda cell: 100 * cell["metrics"]["edit_success"]["category"]["all"][0], 1),
    "the rest kept, %": (
        lambda cell: 100 * cell["metrics"]["preservation"]["category"]["all"][0],
        1,
    ),
    "FD": (lambda cell: cell["whole"]["fd_efflite0"], 0),
    "seconds an image": (lambda cell: cell["speed"].get("seconds_per_image", 0.0), 4),
}
"""The value of a cell on the set "edits", and its digits behind the point."""


def table(summaries: list[dict]) -> str:
    """Markdown; the cells are those of the first evaluation, in its order."""
    scores = [
        {name: cell["sets"]["edits"] for name, cell in summary["cells"].items()}
        for summary in summaries
    ]
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in scores[0]:
        entries = [
            _entry([value(of[name]) for of in scores], digits) for value, digits in COLUMNS.values()
        ]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _entry(values: list[float], digits: int) -> str:
    mean, least, most = (
        f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if least == most else f"{mean} ({least}–{most})"


if __name__ == "__main__":
    print(table([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
