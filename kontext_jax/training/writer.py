"""What a run tells: lines on the console, ``metrics.jsonl`` and the like, TensorBoard, pictures."""

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
"""What is told step by step: of training, and of held-out examples. Each has a file."""

SHORT = {
    "learning_rate": "lr",
    "examples_per_second_per_chip": "samples/s/chip",
    "model_tflop_per_second_per_chip": "TFLOP/s/chip",
}
"""What the console calls a number, where that is not the last part of its name."""

SHARES = {"mfu": "MFU", "data_wait": "data wait"}
"""What it shows in percent, and how it calls that."""


class Writer:
    """Logs a run in its workdir. Only the first process writes; on the others all is silent."""

    def __init__(self, workdir: Path, num_steps: int, start_step: int = 0):
        """Opens the logs, and drops what an earlier try wrote after ``start_step``."""
        self._active = jax.process_index() == 0
        self._num_steps = num_steps
        self._folder = Path(workdir)
        self._since = time.monotonic(), start_step
        self._warm = False
        if not self._active:
            return
        # Imported here: it takes a second, and readers of the package need not pay for it.
        from tensorboardX import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        for log in LOGS:
            _drop_after(self._folder / f"{log}.jsonl", start_step)
        self._board = SummaryWriter(
            str(self._folder / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def metrics(self, step: int, values: dict[str, float | int], log: str = "metrics") -> None:
        """Writes numbers to the files, and the main ones to the console; ``log`` is one of `LOGS`.

        Those of training itself go by their names, others by that of their log too.
        """
        if not self._active:
            return
        with (self._folder / f"{log}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        prefix, whose = ("", []) if log == "metrics" else (f"{log}/", [log])
        for name, value in values.items():
            self._board.add_scalar(f"{prefix}{name}", value, step)
        progress = f"step {step}/{self._num_steps}"
        left = [f"ETA {self._eta(step)}"] if log == "metrics" else []
        print(progress, *whose, *_shown(values), *left, sep="  ", flush=True)

    def image(self, name: str, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes ``name-step.png`` and the same to TensorBoard."""
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
        """By the pace since the first line: compiling, before it, does not come again."""
        now, (began, first) = time.monotonic(), self._since
        if not self._warm and step > first:
            self._since, self._warm = (now, step), True
        left = (now - began) / max(step - first, 1) * (self._num_steps - step)
        return str(datetime.timedelta(seconds=round(left)))


def _shown(values: dict[str, float | int]) -> list[str]:
    """Losses first; what was skipped only if anything was; players' names where it takes them."""
    names = [name for name, value in values.items() if value or not name.startswith("skipped")]
    names.sort(key=lambda name: not name.endswith("loss"))
    last = [name.split("/")[-1] for name in names]
    short = [
        name if last.count(end) > 1 else SHORT.get(end, end)
        for name, end in zip(names, last, strict=True)
    ]
    return [_text(text, values[name]) for text, name in zip(short, names, strict=True)]


def _text(name: str, value: float | int) -> str:
    """A number as the console shows it."""
    return f"{SHARES[name]} {value:.1%}" if name in SHARES else f"{name} {value:.4g}"


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of steps that will be run again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line, step + 1) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str, otherwise: int) -> int:
    """The step of a line; a line that a kill cut short counts as ``otherwise``."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return otherwise
