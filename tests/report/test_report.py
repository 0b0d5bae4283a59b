"""The report of hand-made sweeps: it shows what was measured, and needs no other file."""

import base64
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from kontext_jax.evaluation.held_out_loss import MLPERF
from kontext_jax.evaluation.scores import ALL, METRICS, summarise
from kontext_jax.evaluation.sweep import folder_name
from kontext_jax.report import gallery
from kontext_jax.report.gallery import ranked_ids
from kontext_jax.report.page import COLOURS, GREYS, colours_of, distinct_colours
from kontext_jax.report.report import table, write_report
from kontext_jax.types import Task

UNESCAPED = "edits </script><b>&'\"$x$"
SESSIONS = "sessions"
COPY = "copy <i>&'\""
CATEGORIES = ("local", "text", "text_to_image")
VOID_ELEMENTS = {"meta", "img"}


def solid(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def single_tasks() -> list[Task]:
    tasks = []
    for i in range(9):
        category = CATEGORIES[i % 3]
        contexts = () if category == "text_to_image" else (solid(i),)
        prompt = f"<b>prompt</b> & '{i}' \"</script>"
        tasks.append(Task(f"a/{i}", contexts, prompt, category, (16, 16), solid(100 + i)))
    return tasks


def session_tasks() -> list[Task]:
    context = solid(50)
    return [
        Task(
            f"s{k}.{turn}",
            (context,),
            f"step {turn}",
            "local",
            (16, 16),
            solid(60 + turn),
            group=f"s{k}",
            turn=turn,
            follows=f"s{k}.{turn - 1}" if turn > 1 else "",
        )
        for turn in (1, 2)
        for k in range(3)
    ]


class Sweep:
    """The folder and summary of a sweep; `add` adds a cell."""

    def __init__(self, workdir: Path, tasks: dict[str, list[Task]]):
        self.workdir, self.tasks = workdir, tasks
        self.images: dict[tuple[str, str, str], np.ndarray] = {}
        self.summary: dict[str, Any] = {
            "sets": {
                name: {"num_tasks": len(of_set), "held_out": name != SESSIONS}
                for name, of_set in tasks.items()
            },
            "left_out": {},
            "timed": "Wall time.",
            "cells": {},
            "losses": {},
            "latents": {},
            "seconds": {},
        }

    def add(
        self,
        name: str,
        *,
        scores,
        whole=(),
        step=None,
        num_steps=4,
        baseline="",
        speed=0.0,
        takes_guidance=True,
        autoencoder=None,
    ):
        """``scores`` is a function of a task and its index."""
        results = {}
        for set_name, tasks in self.tasks.items():
            folder = self.workdir / "cells" / folder_name(set_name) / folder_name(name)
            (folder / "images").mkdir(parents=True)
            rows = []
            for i, task in enumerate(tasks):
                image = solid((17 * len(self.summary["cells"]) + i + len(tasks)) % 256)
                self.images[set_name, name, task.id] = image
                file = folder / "images" / f"{quote(task.id, safe='')}.png"
                Image.fromarray(image).save(file)
                row = {"id": task.id, "category": task.category, "turn": task.turn}
                rows.append(row | {"group": task.group or task.id} | scores(task, i))
            (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            categories = sorted({task.category for task in tasks})
            count = {key: sum(task.category == key for task in tasks) for key in categories}
            results[set_name] = {
                "count": count | {ALL: len(tasks)},
                "metrics": json.loads(json.dumps(summarise(rows))),
                "whole": dict(whole),
                "speed": {
                    "seconds_per_image": speed,
                    "images_per_second_per_chip": 1 / speed,
                    "compile_seconds": 12.34,
                    "device": "cpu",
                    "chips": 2.0,
                }
                if speed
                else {},
            }
        self.summary["cells"][name] = {
            "name": name,
            "checkpoint": "" if baseline == "copy" else "runs/<flow>",
            "params": "ema",
            "shift": "none",
            "takes_guidance": takes_guidance,
            "baseline": baseline,
            "sampler": {
                "num_steps": num_steps,
                "method": "euler",
                "guidance": 2.5,
                "cfg_scale": 1.0,
                "strength": 1.0,
            },
            "step": step,
            "autoencoder": autoencoder or {},
            "weights": {} if baseline == "copy" else {"transformer": ["0123456789abcdef"]},
            "sets": results,
        }

    def write(self, **settings) -> str:
        write_report(self.workdir, self.summary, self.tasks, **settings)
        return (self.workdir / "report.html").read_text(encoding="utf-8")


def scores_of(quality: float):
    def scores(task: Task, i: int) -> dict[str, float | None]:
        l1 = (i % 5 + 1) / 100 / quality
        preserved = None if task.category == "text_to_image" else float(i % 3 < 2)
        edited = float(i % 10 >= 10 * (1 - quality))
        return {
            "edit_success": edited,
            "preservation": preserved,
            "l1": l1,
            "efflite0_context": 1 - quality,
        }

    return scores


def losses(mean: float) -> dict[str, Any]:
    levels = [{"level": i, "t": i / 2, "mean": mean * (2 - i), "count": 3} for i in range(2)]
    part = {"mean": mean, "count": 6, "levels": levels}
    return part | {"kinds": {"edit": part, "text_to_image": part | {"mean": 2 * mean}}}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Sweep, str]:
    workdir = tmp_path_factory.mktemp("full")
    sweep = Sweep(workdir, {UNESCAPED: single_tasks(), SESSIONS: session_tasks()})
    sweep.add("late", scores=scores_of(0.9), step=200, speed=0.4, whole={"fid": 20.25})
    sweep.add("early", scores=scores_of(0.4), step=100, speed=0.3, whole={"fid": 30.5})
    sweep.add(COPY, scores=scores_of(1.0), baseline="copy", whole={"fid": 1.0})
    sweep.add("fast", scores=scores_of(0.6), step=200, speed=0.1, num_steps=1, takes_guidance=False)
    sweep.summary["losses"] = {
        UNESCAPED: {"runs/<flow>@200 ema": losses(0.1234), "runs/<flow>@100 ema": losses(0.4321)}
    }
    sweep.summary["seconds"] = {"data <1>": 6.0, "evaluate": 30.0}
    sweep.summary["left_out"] = {"efflite0": "no <package> of that name."}
    run = workdir / "run"
    run.mkdir()
    lines = [{"step": i, "flow/loss": 1.0 / i, "other": 1} for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = sweep.write(sheet_rows=6, curves={"teacher & co": str(run), "gone": "no/where"})
    return sweep, page


def column(page: str, title: str) -> list[tuple[str, bool]]:
    """Returns (text, whether it is bold) of a column, in the first table that has it."""
    table = re.search(rf"<table><tr>(?:(?!</table>).)*{re.escape(title)}.*?</table>", page, re.S)[0]
    head, *rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    [index] = [i for i, name in enumerate(head) if name.startswith(title)]
    texts = [row[index] for row in rows]
    return [(re.sub("(<[^>]*>)+", "|", text).strip("|"), "<b>" in text) for text in texts]


def no_scores(task: Task, i: int) -> dict[str, None]:
    return {"l1": None}


class Reader(HTMLParser):
    """Checks that elements are nested properly, and collects attributes, texts and tables."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        assert self.open == ["html", "body"] or not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and "table" in self.open and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += f"{data}|"


def data_of(page: str) -> dict[str, Any]:
    block = re.search(r"<script type='application/json' id=image-data>(.*?)</script>", page)
    assert block is not None
    return json.loads(block[1])


def decoded(uri: str) -> np.ndarray:
    kind, text = uri.removeprefix("data:image/").split(";base64,")
    assert kind in ("png", "jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def titles(page: str) -> list[str]:
    return re.findall(r"<h2 id=\S+>(.*?)</h2>", page)


SECTIONS = ["Results", "By category", "Turn by turn", "Quality and speed", "Checkpoints"]
SECTIONS += ["Held-out loss", "Images", "Side by side", "Training", "Run time"]


def test_a_full_report_has_all_sections_in_order(full):
    assert titles(full[1]) == SECTIONS
    links = re.findall(r"<a href='#(\S+?)'>(.*?)</a>", full[1])
    assert [title for _, title in links] == SECTIONS
    assert all(f"<h2 id={anchor}>{title}</h2>" in full[1] for anchor, title in links)


def test_empty_sections_are_omitted(tmp_path):
    tasks = [Task("1", (solid(1),), "do", "local", (16, 16)), Task("2", (), "", "local", (16, 16))]
    sweep = Sweep(tmp_path, {"bench": tasks})
    sweep.add("copy", scores=no_scores, baseline="copy")
    page = sweep.write()
    assert titles(page) == ["Results", "Images"]
    assert "<h1>2 held-out edits, not scored by any judge</h1>" in page
    assert "target</th>" not in page and "<svg" not in page and "id=pair" not in page
    assert "seconds" not in page
    assert table(sweep.summary).splitlines() == [
        "bench: 2 tasks",
        "      seconds per image",
        "copy                  –",
    ]


def test_autoencoders_have_originals_reconstructions_and_errors(tmp_path):
    """Instructions, contexts and metrics of edits are left out."""
    sweep = Sweep(tmp_path, {"a": single_tasks()})
    facts = {"downsample": 8, "channels": 3, "codes": 64_000}
    for name, psnr in (("x", 21.0), ("y", 22.0)):
        scores = {"edit_success": 1.0, "l1": 0.1, "psnr": psnr, "efflite0": 0.5}
        whole = {"fd_efflite0": 30.0, "code_usage": 0.5}
        sweep.add(name, scores=lambda task, i, x=scores: x, whole=whole, autoencoder=facts)
    page = sweep.write(sheet_rows=3)
    assert "<h1>PSNR, dB: 21.00 on 9 held-out images</h1>" in page
    assert "one of 64,000 codes per 8 × 8 pixels" in page
    heads = [head.removesuffix("|") for head in Reader(page).tables[1][0]]
    assert [head.split("\u00a0")[0] for head in heads] == [
        *("cell", "PSNR, dB", "FD (EfficientNet-Lite0)", "codes used")
    ]
    sheet = section(page, "Images")
    assert re.findall("<th>(.*?)</th>", sheet) == ["original", "x", "error × 4", "y", "error × 4"]
    assert "PSNR&nbsp;21.00" in sheet and "prompt &" not in sheet and "edited" not in sheet
    images = [decoded(uri) for uri in data_of(page)["images"]]
    task = sweep.tasks["a"][0]
    error = 128 + 4 * (sweep.images["a", "x", task.id].astype(int) - task.truth)
    assert any((image == np.clip(error, 0, 255)).all() for image in images)
    pair = data_of(page)["sets"]["a"]
    assert {task["prompt"] for task in pair["tasks"]} == {""}
    assert pair["cells"]["x"][task.id]["scores"] == ["PSNR, dB: 21.00"]
    assert table(sweep.summary).splitlines()[1].split()[:2] == ["PSNR,", "dB"]


def test_a_single_cell_has_no_side_by_side_no_step_charts_and_no_bold(tmp_path):
    sweep = Sweep(tmp_path, {"a": single_tasks()})
    sweep.add("one", scores=scores_of(0.9), speed=1.0)
    page = sweep.write(sheet_rows=3)
    assert titles(page) == ["Results", "By category", "Images"]
    assert "<b>" not in page.split("<h2 id=by-category>")[0].split("<h2 id=results>")[1]


@pytest.mark.parametrize(
    ("scores", "headline"),
    [
        (
            {"edit_success": 1.0, "l1": 0.5},
            "100.0% of 2 held-out edits carried out",
        ),
        (
            {"edit_success": None, "clip_dir": 0.25, "l1": 0.5},
            "CLIP direction: 0.250 on 2 held-out edits",
        ),
        ({"l1": 0.5}, f"{METRICS['l1'].title}: 0.5000 on 2 held-out edits"),
        (
            {"shift": -0.5},
            f"{METRICS['shift'].title.capitalize()}: -0.500 on 2 held-out edits",
        ),
    ],
)
def test_the_headline_has_the_most_telling_metric_that_is_known(tmp_path, scores, headline):
    tasks = [Task(str(i), (solid(i),), "do", "local", (16, 16)) for i in range(2)]
    sweep = Sweep(tmp_path, {"a": tasks})
    sweep.add("one", scores=lambda task, i: scores, whole={"fid": 3.0})
    assert f"<h1>{headline}</h1>" in sweep.write()


def test_possible_training_data_is_not_called_held_out(tmp_path):
    sweep = Sweep(tmp_path, {SESSIONS: session_tasks()})
    sweep.add("one", scores=scores_of(0.9))
    assert "% of 6 edits carried out</h1>" in sweep.write()


def test_guidance_is_shown_only_for_networks_that_take_it(full):
    cells = Reader(full[1]).tables[0][1:]
    sampled = {row[0].strip("|"): row[2].strip("|") for row in cells}
    assert sampled["late"] == "4 steps, euler, guidance 2.5, cfg 1, shift none"
    assert sampled["fast"] == "1 step, euler, cfg 1, shift none"


def test_similarity_to_the_context_is_shown_but_does_not_rank(tmp_path):
    """For example on a benchmark without targets, which has no other metric."""
    sweep = Sweep(tmp_path, {"a": single_tasks()})
    sweep.add("x", scores=lambda task, i: {"efflite0_context": 0.5})
    page = sweep.write(sheet_rows=3)
    assert titles(page) == ["Results", "By category", "Images"]
    assert "Best" not in page and "Worst" not in page
    assert table(sweep.summary).splitlines()[2].split()[:2] == ["x", "0.500"]


def test_a_truncated_last_line_of_a_training_log_is_ignored(tmp_path):
    sweep = Sweep(tmp_path / "sweep", {"a": single_tasks()})
    sweep.add("one", scores=scores_of(0.9))
    lines = [json.dumps({"step": i, "flow/loss": 1.0 / i}) for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines)[:-5])
    assert "flow: loss</text>" in sweep.write(curves={"flow": str(tmp_path)})


def test_a_headline_with_a_metric_of_the_whole_set_has_no_interval(tmp_path):
    sweep = Sweep(tmp_path, {"a": single_tasks()})
    sweep.add("one", scores=no_scores, whole={"fid": 3.0})
    page = sweep.write()
    assert "<h1>FID: 3.00 on 9 held-out tasks</h1>" in page
    assert titles(page) == ["Results", "Images"]


def test_tables_show_the_values_of_the_summary(full):
    sweep, page = full
    tables = {name: rows for name, rows in zip(sweep.tasks, Reader(page).tables[1:3], strict=True)}
    metrics = ["edit_success", "preservation", "l1", "efflite0_context", "fid"]
    for set_name, rows in tables.items():
        heads = [text.removesuffix("|") for text in rows[0]]
        arrows = ("\u00a0↑", "\u00a0↑", "\u00a0↓", "", "\u00a0↓")
        titles = [METRICS[metric].title for metric in metrics]
        assert heads[1:6] == [f"{a}{b}" for a, b in zip(titles, arrows, strict=True)]
        assert [row[0] for row in rows[1:]] == [f"{name}|" for name in sweep.summary["cells"]]
        for row, cell in zip(rows[1:], sweep.summary["cells"].values(), strict=True):
            results = cell["sets"][set_name]
            for text, metric in zip(row[1:5], metrics, strict=False):
                mean, low, high, *_ = results["metrics"][metric]["category"][ALL]
                show = METRICS[metric].show
                assert low is None or set_name != SESSIONS  # three sessions are too few
                ends = "" if low is None else f"{show(low).removesuffix('%')} – {show(high)}|"
                assert text == f"{show(mean)}|{ends}"
            fid = results["whole"].get("fid")
            assert row[5] == ("–|" if fid is None else f"{fid:.2f}|")
            speed = results["speed"]
            assert row[6] == (f"{speed['seconds_per_image']:.3g}|" if speed else "–|")
            assert row[8] == ("12.3|" if speed else "–|")


def test_the_best_of_a_column_is_bold_but_never_a_baseline(full):
    rows = re.search(r"<h3>sessions</h3>.*?<table>(.*?)</table>", full[1], re.S)[1].split("<tr")[2:]
    bold = [re.findall(r"<b>(.*?)</b>", row) for row in rows]
    results = full[0].summary["cells"]["late"]["sets"][SESSIONS]
    assert bold[0][0] == METRICS["edit_success"].show(
        results["metrics"]["edit_success"]["category"][ALL][0]
    )
    assert bold[0][-1] == "20.25" and bold[2] == []
    assert rows[2].startswith(" class=baseline>") and not rows[0].startswith(" class")
    # Similarity to the context is neither good nor bad.
    similarities = {"0.100", "0.400", "0.600"}
    assert any(text in row for row in rows for text in similarities)
    assert not similarities & {text for row in bold for text in row}


def test_the_category_table_has_columns_for_baselines(full):
    sweep, page = full
    rows = next(t for t in Reader(page).tables if t[0] == ["", "", *t[0][2:]])
    assert [row[0] for row in rows[2:]] == ["local|", "text|", "text to image|", "all|"]
    assert rows[1][2:] == ["late|", f"{COPY}|"] * 3
    metrics = sweep.summary["cells"]["late"]["sets"][UNESCAPED]["metrics"]
    for row, category in zip(rows[2:], [*CATEGORIES, ALL], strict=True):
        assert row[6].startswith(METRICS["l1"].show(metrics["l1"]["category"][category][0]))
    assert rows[4][4] == "–|"  # preservation has no meaning without a context


def test_the_table_of_losses_has_a_column_per_kind(full):
    rows = next(t for t in Reader(full[1]).tables if t[0][0] == "checkpoint|")
    assert rows[0][2:] == ["mean|", "edit|", "text to image|"]
    assert rows[1] == ["runs/<flow>@200 ema|", "6|", "0.1234|", "0.1234|", "0.2468|"]
    assert rows[2][2] == "0.4321|"


def test_notes_name_missing_judges_and_the_timed_device(full):
    assert "Not available: efflite0. no &lt;package&gt; of that name." in full[1]
    assert "Timed on 2 × cpu. Wall time." in full[1]
    assert "<td>data &lt;1&gt;</td><td>6 s</td>" in full[1]
    assert "<td>total</td><td>36 s</td>" in full[1]
    assert "gone: no losses in no/where/metrics.jsonl." in full[1]
    assert "<h3>teacher &amp; co</h3>" in full[1] and "flow: loss</text>" in full[1]


def test_the_page_needs_no_network(full):
    for tag, name, value in Reader(full[1]).attributes:
        if name in ("src", "href", "xlink:href", "data", "action", "poster"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    styles = re.findall(r"url\((.*?)\)", full[1])
    assert all(target.startswith("#") for target in styles)
    assert "@import" not in full[1] and "fetch(" not in full[1]


def test_names_and_prompts_are_escaped(full):
    reader = Reader(full[1])
    texts = set(reader.texts)
    assert {UNESCAPED, COPY} <= texts and {name for name, _, _ in reader.attributes}.isdisjoint(
        {"b", "i"}
    )
    assert full[1].count("</script>") == 2  # the ends of the data and of the script
    assert "<i>" not in full[1] and "<b>prompt" not in full[1] and "<flow>" not in full[1]
    assert html.escape(single_tasks()[0].prompt) in full[1]


def test_the_data_has_each_image_once_and_unchanged(full):
    sweep, page = full
    data = data_of(page)
    images = data["images"]
    assert len(set(images)) == len(images)
    numbers = [int(n) for n in re.findall(r"<img data-image=(\d+) ", page)]
    assert numbers and max(numbers) < len(images)
    assert set(data["sets"]) == {UNESCAPED, SESSIONS}
    for set_name, of_set in data["sets"].items():
        tasks = {task.id: task for task in sweep.tasks[set_name]}
        assert len(of_set["tasks"]) == 6 and set(of_set["cells"]) == set(sweep.summary["cells"])
        for row in of_set["tasks"]:
            task = tasks[row["id"]]
            assert row["prompt"] == task.prompt
            np.testing.assert_array_equal(decoded(images[row["target"]]), task.truth)
            for number, context in zip(row["contexts"], task.contexts, strict=True):
                np.testing.assert_array_equal(decoded(images[number]), context)
            for cell, results in of_set["cells"].items():
                result = results[task.id]
                expected = sweep.images[set_name, cell, task.id]
                np.testing.assert_array_equal(decoded(images[result["image"]]), expected)
                assert result["scores"][0].startswith(f"{METRICS['edit_success'].title}: ")


def test_the_ids_that_the_script_uses_exist_once(full):
    used = re.findall(r'getElementById\("(\S+?)"\)', gallery.SCRIPT)
    used += ["set", "left", "right"]
    ids = [value for tag, name, value in Reader(full[1]).attributes if name == "id"]
    assert {"image-data", "pair"} < set(used)
    assert all(ids.count(name) == 1 for name in used)


def test_best_and_worst_images_are_of_the_headline_cell(full):
    parts = re.findall(r"<h3>([\w ]+): sessions, late</h3>(.*?)(?=<h3>|<h2)", full[1], re.S)
    assert [title for title, _ in parts] == ["Best", "Around the median", "Worst"]
    scores = full[0].workdir / "cells" / "sessions" / "late" / "scores.jsonl"
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    order = ranked_ids(rows, "edit_success")
    tasks = {task.id: task for task in session_tasks()}
    for (_, cards), ids in zip(parts, (order[:2], order[2:4], order[4:]), strict=True):
        prompts = re.findall(r"<p class=clamp title='step \d'>(step \d)</p>", cards)
        assert prompts == [tasks[i].prompt for i in ids]


def test_each_cell_has_its_own_colour_and_baselines_are_grey():
    cells = {name: {"baseline": base} for name, base in (("a", ""), ("b", "copy"), ("c", ""))}
    colours = colours_of(cells)
    assert len(set(colours.values())) == 3
    red, green, blue = (colours["b"][i : i + 2] for i in (1, 3, 5))
    assert red == green == blue and colours["a"][1:3] != colours["a"][3:5]


def test_the_text_tables_are_aligned(full):
    text = table(full[0].summary)
    first, second = text.split("\n\n")
    head, *rows = first.splitlines()[1:]
    assert first.startswith(f"{UNESCAPED}: 9 tasks\n")
    assert second.startswith("sessions: 6 tasks\n")
    assert {len(row) for row in rows} == {len(head)}
    assert head.split()[-3:] == ["seconds", "per", "image"] and rows[0].endswith(" 0.4")
    assert [row[: len(COPY)].strip() for row in rows] == list(full[0].summary["cells"])
    l1 = full[0].summary["cells"]["late"]["sets"][UNESCAPED]["metrics"]["l1"]["category"][ALL][0]
    assert METRICS["l1"].show(l1) in rows[0] and "20.25" in rows[0]


def test_a_report_is_reproducible(tmp_path):
    pages = []
    for name in "ab":
        sweep = Sweep(tmp_path / name, {"a": single_tasks()})
        sweep.add("one", scores=scores_of(0.9), speed=1.0)
        pages.append(sweep.write(sheet_rows=3))
    assert pages[0] == pages[1]


def test_colours_within_a_chart_are_distinct():
    different = {"a": COLOURS[3], "b": COLOURS[1], "copy": GREYS[0], "truth": GREYS[0]}
    assert distinct_colours(different) == different
    equal = distinct_colours({"a": COLOURS[3], "copy": GREYS[1], "b": COLOURS[3]})
    assert equal["a"] != equal["b"] and equal["copy"] == GREYS[1]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Sweep, str]:
    """36 cells in order of increasing quality, except that the last is the worst; 2 baselines."""
    sweep = Sweep(tmp_path_factory.mktemp("many"), {"a": single_tasks(), "b": session_tasks()})
    for run in range(3):
        for step in (100, 200, 300):
            for num_steps in (1, 2, 4, 8):
                number = len(sweep.summary["cells"])
                quality = 0.01 if number == 35 else 0.2 + number / 50

                def scores(task, i, quality=quality):
                    return {"l1": (i + 1) / 100 / quality}

                name = f"r{run}@{step} {num_steps}"
                sweep.add(name, scores=scores, step=step, num_steps=num_steps, speed=number + 1.0)
                sweep.summary["cells"][name]["checkpoint"] = f"runs/{run}"
    for name, kind in (("copy", "copy"), ("truth", "reconstruction")):
        sweep.add(name, scores=lambda task, i: {"l1": 1e-3}, baseline=kind)
    levels = {f"runs/{r}@{s} ema": losses(1 / (r + s)) for r in range(3) for s in (100, 200, 300)}
    sweep.summary["losses"] = {"a": levels}
    return sweep, sweep.write(sheet_rows=3)


FIRST, LAST_BUT_ONE, WORST = "r0@300 1", "r2@300 4", "r2@300 8"


def section(page: str, title: str) -> str:
    return re.search(rf"<h2 id=\S+>{title}</h2>(.*?)(?=<h2 |<script)", page, re.S)[1]


def test_many_cells_are_all_in_a_folded_table(many):
    sweep, page = many
    tables = Reader(section(page, "Results")).tables
    assert len(tables) == 4
    for top, everything in (tables[:2], tables[2:]):
        names = [row[0].removesuffix("|") for row in top[1:]]
        assert [row[0].removesuffix("|") for row in everything[1:]] == list(sweep.summary["cells"])
        assert {FIRST, LAST_BUT_ONE, "copy", "truth"} <= set(names) and WORST not in names
        assert len(names) == 18 and set(map(tuple, top)) <= set(map(tuple, everything))
    assert page.count("<details><summary>All 38 cells</summary>") == 2
    title = METRICS["l1"].title
    assert f"Shown of 36 cells: the headline cell and the best by “{title}”," in page


def test_of_many_cells_the_headline_cell_and_the_best_are_drawn(many):
    page = many[1]
    for title, number in {"By category": 6, "Turn by turn": 8}.items():
        legend = re.search(r"<div class=legend>(.*?)</div>", section(page, title))[1]
        names = re.findall(r"</span>(.*?)</span>", legend)
        assert FIRST in names and names[-1] == LAST_BUT_ONE and len(names) == number
        assert len(set(re.findall(r"background:(#\w+)", legend))) == number
    heads = Reader(section(page, "Images")).tables[0][0]
    families = [*(f"r1@{step} 8" for step in (100, 200, 300)), "r2@100 8", "r2@200 8"]
    expected = ("target", "r0@200 8", FIRST, *families, LAST_BUT_ONE)
    assert heads[2:] == [f"{name}|" for name in expected]


def test_the_images_of_many_cells_are_limited(many):
    sweep, page = many
    data = data_of(page)
    for of_set in data["sets"].values():
        cells = of_set["cells"]
        assert len(cells) == 16 and FIRST in cells and LAST_BUT_ONE in cells
    options = re.findall(r"<option[^>]*>(.*?)</option>", section(page, "Side by side"))
    assert options[:2] == ["a", "b"] and set(options[2:]) == set(data["sets"]["a"]["cells"])


def test_legends_of_many_lines_name_the_settings_that_differ(many):
    page = many[1]
    steps, training = section(page, "Quality and speed"), section(page, "Checkpoints")
    names = re.findall(r"</span>([^<]*)</span>", steps)[:8]
    assert names[0] == "runs/0, step 200" and names[-1] == "runs/2, step 300"
    assert "</text>" in steps and FIRST not in steps and LAST_BUT_ONE not in steps
    title = METRICS["l1"].title
    note = f"Shown of 9 lines: the one of the headline cell and the best by “{title}”."
    assert note in steps
    assert "Shown of 12 lines: " in training
    names = re.findall(r"</span>([^<]*)</span>", training)
    runs = [f"runs/{run}, averaged parameters" for run in range(3)]
    assert names[8:11] == runs and len(names) == 8 * 2 + 3  # losses do not depend on sampling
    assert names[0] == "runs/0, 1 step" and "runs/2, 4 steps" in names


def test_the_table_of_losses_has_all_of_many_checkpoints(many):
    rows = Reader(section(many[1], "Held-out loss")).tables[0]
    assert len(rows) == 1 + 9
    colours = re.findall(r"background:(\S+?)'", section(many[1], "Held-out loss"))
    assert colours.count("none") == 1 and len(set(colours)) == 9


@pytest.mark.parametrize("partial_shift", [0.1, 0.4])
def test_no_cell_is_best_if_the_best_mean_is_of_fewer_tasks(tmp_path, partial_shift):
    """A mean over fewer tasks may be better only because it excludes the others."""

    def drift(shift: float, number: int):
        return lambda task, i: {"l1": shift, "shift": shift if i < number else None}

    sweep = Sweep(tmp_path, {"a": single_tasks()})
    cells = (("x", partial_shift, 1), ("y", 0.4, 8), ("z", 0.3, 8), ("none", 0.2, 0))
    for name, shift, number in cells:
        sweep.add(name, scores=drift(shift, number))
    sweep.add("copy", scores=drift(0.0, 9), baseline="copy")
    page = sweep.write(sheet_rows=3)
    assert column(section(page, "Results"), METRICS["shift"].title) == [
        (f"{partial_shift:.3f}|1 of 9", False),  # and no interval
        ("0.400|8 of 9", False),
        ("0.300|8 of 9", partial_shift > 0.3),
        ("–", False),
        ("0.000|9 of 9", False),
    ]
    best = [is_best for _, is_best in column(sweep.write(), METRICS["l1"].title)]
    assert best == [partial_shift == 0.1, False, False, partial_shift > 0.1, False]


@pytest.mark.parametrize(("number", "note"), [(9, ""), (5, ""), (4, "|4 of 9")])
def test_a_value_of_few_tasks_shows_their_number(tmp_path, number, note):
    sweep = Sweep(tmp_path, {"a": single_tasks()})
    for name in "xy":
        sweep.add(name, scores=lambda task, i: {"ocr_contains": 0.5 if i < number else None})
    sweep.add("unread", scores=no_scores)  # a count of 0 does not count as a different one
    page = sweep.write(sheet_rows=3)
    values = column(section(page, "Results"), METRICS["ocr_contains"].title)
    assert [text for text, _ in values] == [f"50.0%{note}"] * 2 + ["–"]
    rows = next(t for t in Reader(section(page, "By category")).tables)[2:]
    texts = [f"50.0%|{note.strip('|')}{'|' if note else ''}"]
    assert [row[2] for row in rows if row[0] == "all|"] == texts
    if number == 4:  # two, one and one of the three tasks of each category
        assert [row[2] for row in rows[1:3]] == ["50.0%|1 of 3|"] * 2 and "of" not in rows[0][2]


def mlperf_sweep(workdir: Path, means: dict[str, dict[int, float | None]]) -> Sweep:
    """Returns a sweep with losses of all checkpoints, raw and averaged, and without images."""
    sweep = Sweep(workdir, {})
    sweep.summary["losses"]["COCO"] = {}
    for params, by_step in means.items():
        for step, mean in by_step.items():
            name = f"run {params} @{step}"
            sweep.add(name, scores=no_scores, step=step)
            sweep.summary["cells"][name]["params"] = params
            loss = {"mean": mean, "count": 8, "levels": [{"t": 0.5, "mean": mean, "count": 8}]}
            sweep.summary["losses"]["COCO"][f"runs/<flow>@{step} {params}"] = loss
    sweep.summary["config"] = {"loss": dataclasses.asdict(MLPERF)}
    return sweep


def test_a_sweep_with_losses_only_shows_them_by_training_step(tmp_path):
    means = {"params": {100: 0.9, 200: 0.7, 300: 0.65}, "ema": {100: 0.8, 200: 0.58, 300: 0.55}}
    sweep = mlperf_sweep(tmp_path, means)
    page = sweep.write()
    assert titles(page) == ["Checkpoints", "Held-out loss"]
    assert "<h1>Held-out loss on COCO: 0.6500 (mean of 8 losses)</h1>" in page
    networks = "runs/&lt;flow&gt;, step 300, raw parameters"
    verdict = "MLPerf's target (0.586 or below) is not reached"
    assert f"<p><b>run params @300</b>: {networks}; {html.escape(verdict)}.</p>" in page
    training = section(page, "Checkpoints")
    names = ["runs/&lt;flow&gt;, raw parameters", "runs/&lt;flow&gt;, averaged parameters"]
    assert re.findall(r"</span>(.*?)</span>", training) == names
    assert training.count("stroke-dasharray") == 1
    verdicts = f"{names[0]}: not reached; {names[1]}: first reached at step 200.</p>"
    assert f"target (dashed) is 0.586 or below. {verdicts}" in training
    # The target holds only for losses that are measured with MLPerf's settings.
    sweep.summary["config"]["loss"]["seed"] = 1
    page = sweep.write()
    assert "MLPerf" not in page and "stroke-dasharray" not in page
    assert titles(page) == ["Checkpoints", "Held-out loss"]


def test_a_sweep_without_images_and_losses_has_a_report(tmp_path):
    sweep = Sweep(tmp_path, {})
    sweep.add("student", scores=no_scores)
    assert "<h1>No images and no held-out losses</h1>" in sweep.write()


@pytest.mark.parametrize("nan", [None, float("nan")])
def test_losses_that_are_not_finite_are_omitted(tmp_path, nan):
    means = {"params": {100: nan, 200: 0.58, 300: nan}, "ema": {100: nan, 200: nan}}
    page = mlperf_sweep(tmp_path, means).write()
    assert "<h1>Held-out loss on COCO: not finite (mean of 8 losses)</h1>" in page
    assert "raw parameters: first reached at step 200.</p>" in page
    rows = Reader(section(page, "Held-out loss")).tables[0]
    assert [row[2] for row in rows[1:]] == ["–|", "0.5800|", "–|", "–|", "–|"]
    assert "nan" not in page.lower()


@pytest.mark.parametrize("nan", [None, float("nan")])
def test_a_sweep_without_any_finite_value_has_a_report(tmp_path, nan):
    sweep = Sweep(tmp_path, {"a": single_tasks(), SESSIONS: session_tasks()})
    for step, num_steps in ((1, 1), (1, 2), (2, 1)):
        name = f"{step} {num_steps}"
        sweep.add(name, scores=scores_of(0.9), whole={"fid": nan}, step=step, num_steps=num_steps)
        for results in sweep.summary["cells"][name]["sets"].values():
            for estimates in results["metrics"].values():
                for by in estimates.values():
                    by |= {key: [nan, nan, nan, old[3]] for key, old in by.items()}
            results["speed"] = dict.fromkeys(("seconds_per_image", "compile_seconds"), nan)
            results["speed"] |= {"chips": 1.0, "device": "cpu"}
    losses = {"mean": nan, "count": 1, "levels": [{"t": 0.5, "mean": nan, "count": 1}]}
    both = losses | {"kinds": {"edit": losses, "text_to_image": losses}}
    sweep.summary["losses"] = {"a": {f"runs/<flow>@{step} ema": both for step in (1, 2)}}
    sweep.summary["seconds"] = {"data": nan, "evaluate": 2.0}
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics", "validation"):
        lines = [{"step": i, "flow/loss": nan, "loss": nan, "l1": nan} for i in (1, 2)]
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = sweep.write(sheet_rows=3, curves={"flow": str(run)})
    assert "<h1>9 held-out tasks, not scored by any judge</h1>" in page
    assert {"Results", "Held-out loss", "Training", "Run time"} <= set(titles(page))
    assert "nan" not in re.sub("<script.*", "", page, flags=re.S).lower()
    assert "nan" not in table(sweep.summary)
    # The headline shows a metric that is finite.
    sweep.summary["cells"]["2 1"]["sets"]["a"]["metrics"]["l1"]["category"][ALL][0] = 0.5
    headline = f"<h1>{METRICS['l1'].title}: 0.5000 on 9 held-out tasks</h1>"
    assert headline in sweep.write(sheet_rows=3)
