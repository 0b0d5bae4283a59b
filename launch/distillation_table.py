"""The cells of several evaluations in one table: mean and, in brackets, least and most.

python launch/distillation_table.py runs/distillation/eval-{0,1,2}/summary.json
"""

import json
import statistics
import sys
from pathlib import Path

COLUMNS = {
    "edits carried out": lambda cell: 100 * cell["edit_success"]["all"],
    "the rest kept": lambda cell: 100 * cell["preservation"]["all"],
    "FD": lambda cell: cell["fd_efflite0"],
    "FD to reconstructions": lambda cell: cell["fd_efflite0_reconstructed"],
    "seconds an image": lambda cell: cell["seconds_per_image"],
}


def entry(values: list[float]) -> str:
    digits = max(0, 3 - len(f"{max(values):.0f}")) if max(values) >= 1 else 4
    mean, *ends = (f"{x:.{digits}f}" for x in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({ends[0]}–{ends[1]})" if len(values) > 1 else mean


def table(summaries: list[dict]) -> str:
    """Markdown; the cells are those of the first evaluation, in its order."""
    scores = [summary["cells"]["scores"] for summary in summaries]
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in scores[0]:
        cells = [column([of[name] for of in scores]) for column in map(_of_all, COLUMNS.values())]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _of_all(column):
    return lambda cells: entry([column(cell) for cell in cells])


if __name__ == "__main__":
    print(table([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
