"""Reads the logs of a run."""

import json
from pathlib import Path


def read_log(workdir: Path, log: str = "metrics") -> list[dict]:
    """The lines of a log; ``log`` is "metrics" or "validation"."""
    return [json.loads(line) for line in (workdir / f"{log}.jsonl").read_text().splitlines()]


def without_timings(line: dict) -> dict:
    """The entries of a line that do not depend on the machine's speed."""
    return {k: v for k, v in line.items() if "per_second" not in k and k != "data_wait"}
