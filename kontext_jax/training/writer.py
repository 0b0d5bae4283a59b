"""Logs of a run: console, ``metrics.jsonl`` and ``validation.jsonl``, TensorBoard, images."""

import datetime
import json
import time
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kontext_jax.files import write_text

LOGS = ("metrics", "validation")
"""The logs of a run, one JSON-lines file each: of training and of held-out examples."""

SHORT = {
    "learning_rate": "lr",
    "examples_per_second_per_chip": "samples/s/chip",
    "model_tflop_per_second_per_chip": "TFLOP/s/chip",
}
"""Names on the console, where they differ from the last part of a metric's name."""

SHARES = {"mfu": "MFU", "data_wait": "data wait"}
"""Metrics that the console shows in percent, and their names there."""


class Writer:
    """Writes the logs of a run into its workdir. Only the first process writes."""

    def __init__(self, workdir: Path, num_steps: int, start_step: int = 0):
        """Opens the logs, and drops lines that an earlier attempt wrote after ``start_step``."""
        self._active = jax.process_index() == 0
        self._num_steps = num_steps
        self._folder = Path(workdir)
        self._since = time.monotonic(), start_step
        self._warm = False
        if not self._active:
            return
        # Imported here since it takes a second, which other commands need not spend.
        from tensorboardX import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        for log in LOGS:
            _drop_after(self._folder / f"{log}.jsonl", start_step)
        self._board = SummaryWriter(
            str(self._folder / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def metrics(self, step: int, values: dict[str, float | int], log: str = "metrics") -> None:
        """Writes metrics to all logs; ``log`` is one of `LOGS`.

        In TensorBoard, names of validation metrics are prefixed with the log's name.
        """
        if not self._active:
            return
        with (self._folder / f"{log}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        prefix, title = ("", []) if log == "metrics" else (f"{log}/", [log])
        for name, value in values.items():
            self._board.add_scalar(f"{prefix}{name}", value, step)
        progress = f"step {step}/{self._num_steps}"
        eta = [f"ETA {self._eta(step)}"] if log == "metrics" else []
        print(progress, *title, *_shown(values), *eta, sep="  ", flush=True)

    def warn(self, step: int, sentence: str) -> None:
        """Prints a warning."""
        if self._active:
            print(f"warning, step {step}: {sentence}", flush=True)

    def image(self, name: str, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes ``name-step.png``, and the image to TensorBoard."""
        if not self._active:
            return
        path = self._folder / f"{name}-{step:07d}.png"
        Image.fromarray(image).save(path)
        self._board.add_image(name, image, step, dataformats="HWC")
        print(f"wrote {path}", flush=True)

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._board.close()

    def _eta(self, step: int) -> str:
        """Time to the last step, at the rate since the first line, which excludes compilation."""
        now, (began, first) = time.monotonic(), self._since
        if not self._warm and step > first:
            self._since, self._warm = (now, step), True
        left = (now - began) / max(step - first, 1) * (self._num_steps - step)
        return str(datetime.timedelta(seconds=round(left)))


def _shown(values: dict[str, float | int]) -> list[str]:
    """The console's metrics: losses first, counts of skipped things only if above 0.

    A player's name is shown only where two metrics would have the same name without it.
    """
    names = [name for name, value in values.items() if value or not name.startswith("skipped")]
    names.sort(key=lambda name: not name.endswith("loss"))
    ends = [name.split("/")[-1] for name in names]
    labels = [
        name if ends.count(end) > 1 else SHORT.get(end, end)
        for name, end in zip(names, ends, strict=True)
    ]
    return [_text(label, values[name]) for label, name in zip(labels, names, strict=True)]


def _text(name: str, value: float | int) -> str:
    """A metric as the console shows it."""
    return f"{SHARES[name]} {value:.1%}" if name in SHARES else f"{name} {value:.4g}"


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of steps that will be repeated."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line, step + 1) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str, default: int) -> int:
    """The step of a line, or ``default`` for a line truncated by a kill."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return default
