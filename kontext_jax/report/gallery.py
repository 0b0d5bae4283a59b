"""The pictures of a report: sheets, the best and the worst, and any two cells side by side.

Every picture is in the page once, in a block of JSON, and a script puts it where it belongs.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kontext_jax.evaluation.cell_folder import load_picture
from kontext_jax.evaluation.scores import METRICS, spread
from kontext_jax.evaluation.summary import HEADLINE, goodness
from kontext_jax.evaluation.sweep import folder_name
from kontext_jax.types import RGBImage, Task

MAX_SIDE, MAX_EXACT = 256, 128
"""Larger pictures are made smaller; and those beyond the second lose a little as JPEG."""

EXTREMES = 6
"""How many of the best, of the middle and of the worst are shown."""

WORDS = {"edit_success": ("edited", "not edited"), "preservation": ("rest kept", "rest changed")}
"""What is said of a single picture instead of 100% or 0%."""

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
const data = JSON.parse(document.getElementById("picture-data").textContent);
const show = (image, number) => {
  image.onload = () => image.classList.toggle(
    "small", Math.max(image.naturalWidth, image.naturalHeight) < 100);
  image.src = data.pictures[number];
  return image;
};
for (const image of document.querySelectorAll("img[data-picture]"))
  show(image, image.dataset.picture);
const element = (kind, parent, css = "", text = "") => {
  const made = parent.appendChild(document.createElement(kind));
  made.className = css;
  made.textContent = text;
  return made;
};
const grid = document.getElementById("pair");
const [set, left, right] = ["set", "left", "right"].map(id => document.getElementById(id));
const compare = () => {
  const {tasks, cells} = data.sets[set.value];
  const sides = [left.value, right.value];
  const has = {
    context: tasks.some(task => task.contexts.length),
    truth: tasks.some(task => task.truth !== null),
  };
  grid.replaceChildren();
  const head = element("tr", grid);
  for (const name of [...(has.context ? ["context"] : []), "instruction",
                      ...(has.truth ? ["truth"] : []), ...sides]) element("th", head, "", name);
  for (const task of tasks) {
    const row = element("tr", grid);
    if (has.context) {
      const box = element("div", element("td", row), "contexts");
      for (const number of task.contexts) show(element("img", box), number);
    }
    element("td", row, "prompt", task.prompt);
    if (has.truth) {
      const place = element("td", row);
      if (task.truth !== null) show(element("img", place), task.truth);
    }
    for (const side of sides) {
      const place = element("td", row), found = cells[side] && cells[side][task.id];
      if (!found) continue;
      show(element("img", place), found.picture);
      for (const text of found.scores) element("div", place, "notes", text);
    }
  }
};
if (grid) {
  for (const choice of [set, left, right]) choice.onchange = compare;
  compare();
}
"""


class Gallery:
    """The pictures and scores of a sweep's folder, and those that the page shows."""

    def __init__(self, workdir: Path, tasks: Mapping[str, Sequence[Task]]):
        """Of the sweep in ``workdir``, with the tasks of each set by its name."""
        self.tasks = {name: {task.id: task for task in each} for name, each in tasks.items()}
        self._folder = workdir / "cells"
        self._numbers: dict[str, int] = {}  # of pictures, by their data
        self._scores: dict[tuple[str, str], dict[str, dict]] = {}
        self._sets: dict[str, Any] = {}

    def scores(self, of_set: str, cell: str) -> dict[str, dict[str, Any]]:
        """The lines of scores by their tasks' ids."""
        if (of_set, cell) not in self._scores:
            file = self._path(of_set, cell) / "scores.jsonl"
            rows = map(json.loads, file.read_text().splitlines())
            self._scores[of_set, cell] = {row["id"]: row for row in rows}
        return self._scores[of_set, cell]

    def sheet(self, of_set: str, cells: Sequence[str], number: int) -> str:
        """Rows of context, instruction, truth, and the picture of each cell."""
        tasks = chosen(list(self.tasks[of_set].values()), number)
        has_contexts = any(task.contexts for task in tasks)
        has_truths = any(task.truth is not None for task in tasks)
        side = 128 if len(cells) < 6 else 96
        head = ["context"] * has_contexts + ["instruction"] + ["truth"] * has_truths + [*cells]
        rows = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
        for task in tasks:
            prompt = html.escape(task.prompt)
            note = f"<div class=notes>{html.escape(_kind(task))}</div>"
            row = [f"<td>{self._contexts(task, side)}</td>"] * has_contexts
            row += [f"<td class=prompt><div class=clamp title='{prompt}'>{prompt}</div>{note}</td>"]
            row += [f"<td>{self._truth(task, side)}</td>"] * has_truths
            row += [f"<td>{self._result(of_set, cell, task, side)}</td>" for cell in cells]
            rows.append("".join(row))
        lines = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<div class=wide><table class=sheet>{lines}</table></div>"

    def extremes(self, of_set: str, cell: str, metric: str) -> list[tuple[str, str]]:
        """(title, pictures) of the best, the middle and the worst by a metric, then by L1."""
        scores = self.scores(of_set, cell)
        ids = ranked(scores.values(), metric)
        number = min(EXTREMES, len(ids) // 3)
        middle = (len(ids) - number) // 2
        parts = {
            "Best": ids[:number],
            "Around the median": ids[middle : middle + number],
            "Worst": ids[len(ids) - number :],
        }
        return [
            (title, "".join(self._card(of_set, cell, self.tasks[of_set][task]) for task in part))
            for title, part in parts.items()
            if part
        ]

    def keep(self, of_set: str, cells: Sequence[str], number: int) -> None:
        """Puts a set's rows of a sheet into the data, with the pictures of all cells."""
        tasks = chosen(list(self.tasks[of_set].values()), number)
        self._sets[of_set] = {
            "tasks": [
                {
                    "id": task.id,
                    "prompt": task.prompt,
                    "contexts": [self._add(image) for image in task.contexts],
                    "truth": None if task.truth is None else self._add(task.truth),
                }
                for task in tasks
            ],
            "cells": {
                cell: {
                    task.id: {
                        "picture": self._add(self._load(of_set, cell, task)),
                        "scores": _numbers(self.scores(of_set, cell)[task.id]),
                    }
                    for task in tasks
                }
                for cell in cells
            },
        }

    def data(self) -> str:
        """The block of JSON and the script; both go to the end of the page."""
        text = json.dumps({"pictures": list(self._numbers), "sets": self._sets})
        text = text.replace("<", "\\u003c")  # nothing can end the block
        return (
            f"<script type='application/json' id=picture-data>{text}</script>"
            f"<script>{SCRIPT}</script>"
        )

    def _path(self, of_set: str, cell: str) -> Path:
        return self._folder / folder_name(of_set) / folder_name(cell)

    def _load(self, of_set: str, cell: str, task: Task) -> RGBImage:
        return load_picture(self._path(of_set, cell), task.id)

    def _add(self, image: RGBImage) -> int:
        """The number of a picture in the data."""
        return self._numbers.setdefault(data_uri(image), len(self._numbers))

    def _image(self, image: RGBImage, side: int, name: str) -> str:
        return (
            f"<img data-picture={self._add(image)} width={side} height={side} "
            f"alt='{html.escape(name)}'>"
        )

    def _contexts(self, task: Task, side: int) -> str:
        images = "".join(self._image(image, side, "context") for image in task.contexts)
        return f"<div class=contexts>{images}</div>"

    def _truth(self, task: Task, side: int) -> str:
        return "" if task.truth is None else self._image(task.truth, side, "truth")

    def _result(self, of_set: str, cell: str, task: Task, side: int) -> str:
        image = self._image(self._load(of_set, cell, task), side, cell)
        verdict = _verdict(self.scores(of_set, cell)[task.id])
        return f"<div style='width:{side}px'>{image}<div class=notes>{verdict}</div></div>"

    def _card(self, of_set: str, cell: str, task: Task) -> str:
        images = [self._contexts(task, 96)] if task.contexts else []
        images += [self._image(self._load(of_set, cell, task), 96, cell), self._truth(task, 96)]
        prompt, verdict = html.escape(task.prompt), _verdict(self.scores(of_set, cell)[task.id])
        return (
            f"<div class=card><div class=row>{''.join(images)}</div>"
            f"<p class=clamp title='{prompt}'>{prompt}</p>"
            f"<div class=notes>{html.escape(_kind(task))} · {verdict}</div></div>"
        )


def chosen(tasks: Sequence[Task], number: int) -> list[Task]:
    """About ``number`` tasks, the first of each category in turn; sessions with all their turns."""
    following = {task.follows: task for task in tasks if task.follows}
    turns = max(task.turn for task in tasks)
    starts = [task for task in tasks if not task.follows]
    rows = []
    for i in spread(starts, max(1, number // turns)):
        task: Task | None = starts[i]
        while task is not None:
            rows.append(task)
            task = following.get(task.id)
    return rows


def ranked(rows: Iterable[Mapping[str, Any]], metric: str) -> list[str]:
    """Ids of the tasks of lines of scores, best first; those of the same worth by their L1."""

    def worth(row: Mapping) -> tuple[float, float]:
        return -goodness(metric, row[metric]), row.get("l1") or 0.0

    judged = [row for row in rows if row.get(metric) is not None]
    return [row["id"] for row in sorted(judged, key=worth)]


def data_uri(image: RGBImage) -> str:
    """A picture as the source of an ``<img>``, no larger than the page has use for."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    kind = "jpeg" if max(picture.size) > MAX_EXACT else "png"
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    if kind == "jpeg":
        picture.save(buffer, "JPEG", quality=90)
    else:
        picture.save(buffer, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _kind(task: Task) -> str:
    category = task.category.replace("_", " ")
    return f"{category}, turn {task.turn}" if task.turn > 1 else category


def _verdict(row: Mapping[str, Any]) -> str:
    """What was found of one picture, in few words."""
    said = []
    for metric, (good, bad) in WORDS.items():
        if row.get(metric) is not None:
            said.append(good if row[metric] >= 0.5 else f"<span class=bad>{bad}</span>")
    others = [metric for metric in HEADLINE if metric not in WORDS and row.get(metric) is not None]
    for other in others[:1]:
        short = METRICS[other].title.removesuffix(" to the truth")
        said.append(f"{html.escape(short)}&nbsp;{METRICS[other].show(row[other])}")
    return ", ".join(said)


def _numbers(row: Mapping[str, Any]) -> list[str]:
    """All that was found of one picture, one number a line."""
    return [
        f"{metric.title}: {metric.show(row[name])}"
        for name, metric in METRICS.items()
        if row.get(name) is not None
    ]
