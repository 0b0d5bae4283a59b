"""The images of a report: sheets, best and worst results, and any two cells side by side.

The page contains each image once, in a block of JSON; a script sets the source of each ``<img>``.
"""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kontext_jax.evaluation.cell_folder import load_task_image
from kontext_jax.evaluation.scores import METRICS, spread
from kontext_jax.evaluation.sheets import ERROR_GAIN, enlarged_error
from kontext_jax.evaluation.summary import HEADLINE, RECONSTRUCTION, goodness
from kontext_jax.evaluation.sweep import folder_name
from kontext_jax.geometry import resize, size_of
from kontext_jax.types import RGBImage, Task

MAX_SIDE = 256
"""Larger images are scaled down to this longer side, in pixels."""

MAX_EXACT = 128
"""Images up to this longer side are stored as PNG, larger ones as JPEG."""

EXTREMES = 6
"""Number of best, median and worst images shown."""

ERROR = f"error × {ERROR_GAIN}"

VERDICTS = {
    "edit_success": ("edited", "not edited"),
    "preservation": ("rest preserved", "rest changed"),
}
"""Texts for a score of 1 and 0 of a single image."""

STYLE = """
img { display: block; object-fit: contain; object-position: left top; }
img.small { image-rendering: pixelated; }
.sheet td { vertical-align: top; text-align: left; border: 0; padding: 0 8px 10px 0; }
.sheet th { text-align: left; border: 0; padding: 0 8px 6px 0; overflow-wrap: anywhere; }
.sheet .prompt { min-width: 9em; max-width: 15em; white-space: normal; font-size: 13px; }
.clamp { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5;
  overflow: hidden; }
.notes { font-size: 11px; line-height: 1.35; color: #666; margin-top: 2px;
  white-space: normal; }
.bad { color: #b3261e; }
.contexts { display: flex; gap: 4px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 18px; }
.card .row { display: flex; gap: 6px; } .card p { font-size: 13px; margin: 4px 0 0; }
#pair img { width: 224px; height: 224px; } #pair .notes { max-width: 224px; }
.choice { display: inline-block; margin: 8px 16px 16px 0; }
select { font: inherit; padding: 2px 4px; max-width: 80vw; }
@media (max-width: 600px) {
  #pair img { width: 140px; height: 140px; } .sheet .prompt { min-width: 7em; }
}
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("image-data").textContent);
const show = (image, number) => {
  image.onload = () => image.classList.toggle(
    "small", Math.max(image.naturalWidth, image.naturalHeight) < 100);
  image.src = data.images[number];
  return image;
};
for (const image of document.querySelectorAll("img[data-image]"))
  show(image, image.dataset.image);
const element = (kind, parent, css = "", text = "") => {
  const child = parent.appendChild(document.createElement(kind));
  child.className = css;
  child.textContent = text;
  return child;
};
const grid = document.getElementById("pair");
const [set, left, right] = ["set", "left", "right"].map(id => document.getElementById(id));
const compare = () => {
  const {tasks, cells} = data.sets[set.value];
  const sides = [left.value, right.value];
  const has = {
    context: tasks.some(task => task.contexts.length),
    prompt: tasks.some(task => task.prompt),
    target: tasks.some(task => task.target !== null),
  };
  grid.replaceChildren();
  const head = element("tr", grid);
  for (const name of [...(has.context ? ["context"] : []),
                      ...(has.prompt ? ["instruction"] : []),
                      ...(has.target ? ["target"] : []), ...sides])
    element("th", head, "", name);
  for (const task of tasks) {
    const row = element("tr", grid);
    if (has.context) {
      const box = element("div", element("td", row), "contexts");
      for (const number of task.contexts) show(element("img", box), number);
    }
    if (has.prompt) element("td", row, "prompt", task.prompt);
    if (has.target) {
      const column = element("td", row);
      if (task.target !== null) show(element("img", column), task.target);
    }
    for (const side of sides) {
      const column = element("td", row), result = cells[side] && cells[side][task.id];
      if (!result) continue;
      show(element("img", column), result.image);
      for (const text of result.scores) element("div", column, "notes", text);
    }
  }
};
if (grid) {
  for (const choice of [set, left, right]) choice.onchange = compare;
  compare();
}
"""


class Gallery:
    """The images and scores of a sweep, and the images that the page contains."""

    def __init__(
        self, workdir: Path, tasks: Mapping[str, Sequence[Task]], reconstructed: Sequence[str] = ()
    ):
        """Opens a sweep.

        Args:
          workdir: its folder.
          tasks: tasks of each set.
          reconstructed: sets of which all images are reconstructions of the targets.
        """
        self._reconstructed = reconstructed
        self.tasks = {name: {task.id: task for task in of_set} for name, of_set in tasks.items()}
        self._folder = workdir / "cells"
        self._numbers: dict[str, int] = {}  # index of each image in the page's data, by its URI
        self._scores: dict[tuple[str, str], dict[str, dict]] = {}
        self._sets: dict[str, Any] = {}

    def scores(self, set_name: str, cell: str) -> dict[str, dict[str, Any]]:
        """Returns a cell's scores on a set, by task id."""
        if (set_name, cell) not in self._scores:
            file = self._path(set_name, cell) / "scores.jsonl"
            rows = map(json.loads, file.read_text().splitlines())
            self._scores[set_name, cell] = {row["id"]: row for row in rows}
        return self._scores[set_name, cell]

    def sheet(self, set_name: str, cells: Sequence[str], number: int) -> str:
        """Returns a table with a task per row: context, instruction, target, each cell's image.

        Rows of reconstructions are: original, then each cell's image and its error.
        """
        tasks = pick_tasks(list(self.tasks[set_name].values()), number)
        if set_name in self._reconstructed:
            return self._reconstruction_sheet(set_name, cells, tasks)
        has_contexts = any(task.contexts for task in tasks)
        has_targets = any(task.truth is not None for task in tasks)
        side = 128 if len(cells) < 6 else 96
        head = ["context"] * has_contexts + ["instruction"] + ["target"] * has_targets
        rows = ["".join(f"<th>{html.escape(name)}</th>" for name in [*head, *cells])]
        for task in tasks:
            prompt = html.escape(task.prompt)
            note = f"<div class=notes>{html.escape(_kind(task))}</div>"
            row = [f"<td>{self._contexts(task, side)}</td>"] * has_contexts
            row += [f"<td class=prompt><div class=clamp title='{prompt}'>{prompt}</div>{note}</td>"]
            row += [f"<td>{self._target(task, side)}</td>"] * has_targets
            row += [f"<td>{self._result(set_name, cell, task, side)}</td>" for cell in cells]
            rows.append("".join(row))
        return _sheet(rows)

    def _reconstruction_sheet(
        self, set_name: str, cells: Sequence[str], tasks: Sequence[Task]
    ) -> str:
        side = 128 if len(cells) < 4 else 96
        head = ["original", *(name for cell in cells for name in (cell, ERROR))]
        rows = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
        for task in tasks:
            note = f"<div class=notes>{html.escape(_kind(task))}</div>"
            row = [f"<td>{self._target(task, side)}{note}</td>"]
            for cell in cells:
                row.append(f"<td>{self._result(set_name, cell, task, side)}</td>")
                row.append(f"<td>{self._error(set_name, cell, task, side)}</td>")
            rows.append("".join(row))
        return _sheet(rows)

    def extremes(self, set_name: str, cell: str, metric: str) -> list[tuple[str, str]]:
        """Returns (title, cards) of the best, median and worst images, as `ranked_ids` orders."""
        scores = self.scores(set_name, cell)
        ids = ranked_ids(scores.values(), metric)
        number = min(EXTREMES, len(ids) // 3)
        middle = (len(ids) - number) // 2
        parts = {
            "Best": ids[:number],
            "Around the median": ids[middle : middle + number],
            "Worst": ids[len(ids) - number :],
        }
        return [
            (
                title,
                "".join(self._card(set_name, cell, self.tasks[set_name][task]) for task in part),
            )
            for title, part in parts.items()
            if part
        ]

    def add_set(self, set_name: str, cells: Sequence[str], number: int) -> None:
        """Adds a set's tasks to the page's data, with the images and scores of ``cells``."""
        tasks = pick_tasks(list(self.tasks[set_name].values()), number)
        edits = set_name not in self._reconstructed
        metrics = METRICS if edits else RECONSTRUCTION
        self._sets[set_name] = {
            "tasks": [
                {
                    "id": task.id,
                    "prompt": task.prompt if edits else "",
                    "contexts": [self._add(image) for image in task.contexts] if edits else [],
                    "target": None if task.truth is None else self._add(task.truth),
                }
                for task in tasks
            ],
            "cells": {
                cell: {
                    task.id: {
                        "image": self._add(self._load(set_name, cell, task)),
                        "scores": _score_lines(self.scores(set_name, cell)[task.id], metrics),
                    }
                    for task in tasks
                }
                for cell in cells
            },
        }

    def scripts(self) -> str:
        """Returns the JSON data and the script, for the end of the page."""
        text = json.dumps({"images": list(self._numbers), "sets": self._sets})
        text = text.replace("<", "\\u003c")  # so that no text can close the script element
        return (
            f"<script type='application/json' id=image-data>{text}</script>"
            f"<script>{SCRIPT}</script>"
        )

    def _path(self, set_name: str, cell: str) -> Path:
        return self._folder / folder_name(set_name) / folder_name(cell)

    def _load(self, set_name: str, cell: str, task: Task) -> RGBImage:
        return load_task_image(self._path(set_name, cell), task.id)

    def _add(self, image: RGBImage) -> int:
        """Adds an image to the page's data and returns its index."""
        return self._numbers.setdefault(data_uri(image), len(self._numbers))

    def _image(self, image: RGBImage, side: int, name: str) -> str:
        return (
            f"<img data-image={self._add(image)} width={side} height={side} "
            f"alt='{html.escape(name)}'>"
        )

    def _contexts(self, task: Task, side: int) -> str:
        images = "".join(self._image(image, side, "context") for image in task.contexts)
        return f"<div class=contexts>{images}</div>"

    def _target(self, task: Task, side: int) -> str:
        return "" if task.truth is None else self._image(task.truth, side, "target")

    def _result(self, set_name: str, cell: str, task: Task, side: int) -> str:
        image = self._image(self._load(set_name, cell, task), side, cell)
        verdict = self._verdict(set_name, cell, task)
        return f"<div style='width:{side}px'>{image}<div class=notes>{verdict}</div></div>"

    def _error(self, set_name: str, cell: str, task: Task, side: int) -> str:
        """Returns the enlarged error of a reconstruction."""
        image = resize(self._load(set_name, cell, task), size_of(task.truth))
        return self._image(enlarged_error(image, task.truth), side, ERROR)

    def _verdict(self, set_name: str, cell: str, task: Task) -> str:
        """Returns an image's verdicts and its most telling other score, as HTML."""
        row = self.scores(set_name, cell)[task.id]
        if set_name in self._reconstructed:
            return _first_score(row, RECONSTRUCTION)
        parts = []
        for metric, (good, bad) in VERDICTS.items():
            if row.get(metric) is not None:
                parts.append(good if row[metric] >= 0.5 else f"<span class=bad>{bad}</span>")
        other = _first_score(row, [name for name in HEADLINE if name not in VERDICTS])
        return ", ".join([*parts, other] if other else parts)

    def _card(self, set_name: str, cell: str, task: Task) -> str:
        result = self._image(self._load(set_name, cell, task), 96, cell)
        if set_name in self._reconstructed:
            images = [self._target(task, 96), result, self._error(set_name, cell, task, 96)]
            prompt = ""
        else:
            images = [self._contexts(task, 96)] if task.contexts else []
            images += [result, self._target(task, 96)]
            prompt = html.escape(task.prompt)
        verdict = self._verdict(set_name, cell, task)
        return (
            f"<div class=card><div class=row>{''.join(images)}</div>"
            f"<p class=clamp title='{prompt}'>{prompt}</p>"
            f"<div class=notes>{html.escape(_kind(task))} · {verdict}</div></div>"
        )


def pick_tasks(tasks: Sequence[Task], number: int) -> list[Task]:
    """Returns about ``number`` tasks, balanced over categories; sessions with all their turns."""
    next_turn = {task.follows: task for task in tasks if task.follows}
    turns = max(task.turn for task in tasks)
    first_turns = [task for task in tasks if not task.follows]
    picked = []
    for i in spread(first_turns, max(1, number // turns)):
        task: Task | None = first_turns[i]
        while task is not None:
            picked.append(task)
            task = next_turn.get(task.id)
    return picked


def ranked_ids(rows: Iterable[Mapping[str, Any]], metric: str) -> list[str]:
    """Returns the task ids of rows of scores, best first; ties are ordered by L1."""

    def rank(row: Mapping) -> tuple[float, float]:
        return -goodness(metric, row[metric]), row.get("l1") or 0.0

    scored = [row for row in rows if row.get(metric) is not None]
    return [row["id"] for row in sorted(scored, key=rank)]


def data_uri(image: RGBImage) -> str:
    """Returns an image as a data URI, scaled down to ``MAX_SIDE``."""
    scaled, buffer = Image.fromarray(image), io.BytesIO()
    kind = "jpeg" if max(scaled.size) > MAX_EXACT else "png"
    scaled.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    if kind == "jpeg":
        scaled.save(buffer, "JPEG", quality=90)
    else:
        scaled.save(buffer, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _kind(task: Task) -> str:
    category = task.category.replace("_", " ")
    return f"{category}, turn {task.turn}" if task.turn > 1 else category


def _first_score(row: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Returns the first of the metrics that an image has, as HTML; empty if it has none."""
    name = next((name for name in metrics if row.get(name) is not None), None)
    if name is None:
        return ""
    short = re.split(" to the |, ", METRICS[name].title)[0]
    return f"{html.escape(short)}&nbsp;{METRICS[name].show(row[name])}"


def _sheet(rows: Sequence[str]) -> str:
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table class=sheet>{lines}</table></div>"


def _score_lines(row: Mapping[str, Any], metrics: Iterable[str]) -> list[str]:
    """Returns those of the metrics that an image has, one per line."""
    return [
        f"{METRICS[name].title}: {METRICS[name].show(row[name])}"
        for name in metrics
        if row.get(name) is not None
    ]
