"""One self-contained page: how well, how fast, what it looks like."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kontext_jax.sheets import SheetRow, draw_sheet
from kontext_jax.types import Triple

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1, h2 { font-weight: 600; line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .3em 1em; text-align: right; }
th { border-bottom: 2px solid #888; } .total tr:last-child td { border-top: 1px solid #bbb;
font-weight: 600; } td:first-child, th:first-child { text-align: left; }
.baseline { color: #777; } img, svg { max-width: 100%; height: auto; } p { max-width: 45em; }
"""

TITLES = {"model": "model", "copy": "copying the context", "untrained": "untrained model"}


def write_report(
    path: Path,
    summary: Mapping,
    examples: Sequence[tuple[Triple, np.ndarray, Mapping]],
    curves: Mapping[str, str],
    cell_rows: Sequence[SheetRow] = (),
) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      summary: what ``evaluate`` found.
      examples: (triple, result, its line of results) to show.
      curves: title -> workdir of the runs whose losses are drawn.
      cell_rows: examples with a result of each cell, where the summary has cells.
    """
    methods, number = summary["methods"], summary["num_examples"]
    metric = headline(methods)
    value = METRICS[metric][1](methods["model"][metric]["all"])
    if metric == "l1":
        title = f"{number} held-out examples, {value} from the truth"
        how = "No checker reads these pictures; the error is the mean over pixels, of 0 to 1."
        metrics = ["l1"]
    else:
        title = f"{value} of {number} held-out edits carried out"
        how = (
            "A checker reads every picture back and says whether the instruction was carried out, "
            "and whether the rest was kept."
        )
        metrics = ["edit_success", "preservation"]
    seconds = {k: v for k, v in summary["seconds"].items() if not k.startswith("of_it")}
    parts = [
        f"<h1>{title}</h1>",
        f"<p>Checkpoint <code>{html.escape(summary['checkpoint'])}</code>, "
        f"{summary['num_steps']} sampling steps. {how}</p>",
        *(part for metric in metrics for part in _table(methods, metric)),
        "<h2>Held-out examples</h2>",
        "<p>The first of each category in turn, not chosen by their results.</p>",
        _picture(_sheet(examples)),
        *(_cells(summary["cells"], cell_rows) if "cells" in summary else []),
        *(["<h2>Training</h2>"] if curves else []),
        *(_curve(title, Path(run)) for title, run in curves.items()),
        "<h2>Time</h2>",
        _times(seconds),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>kontext_jax report</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path.write_text(page)


def headline(methods: Mapping[str, Mapping]) -> str:
    """What says best how good a model is: edit success; the error where no checker judges."""
    return "l1" if methods["model"]["edit_success"]["all"] is None else "edit_success"


def _table(methods: Mapping[str, Mapping], metric: str) -> list[str]:
    title, show = METRICS[metric]
    head = "".join(f"<th>{TITLES.get(name, name)}</th>" for name in methods)
    rows = []
    for category, count in methods["model"]["count"].items():
        cells = []
        for name in methods:
            value = methods[name][metric][category]
            css = "" if name == "model" else " class=baseline"
            cells.append(f"<td{css}>{show(value)}</td>")
        label = category.replace("_", " ")
        rows.append(f"<tr><td>{label}</td>{''.join(cells)}<td>{count}</td></tr>")
    head = f"<tr><th></th>{head}<th>examples</th></tr>"
    return [f"<h2>{title}</h2>", f"<table class=total>{head}{''.join(rows)}</table>"]


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.1%}"


def _error(value: float) -> str:
    return f"{value:.3f}"


METRICS = {
    "edit_success": ("Edit success", _percent),
    "preservation": ("Preservation of the rest", _percent),
    "l1": ("Mean absolute error", _error),
}
"""The title of each, and how it is written."""


def cell_table(cells: Mapping) -> list[list[str]]:
    """What the cells come to over all categories, a row each, under a row of headings.

    Args:
      cells: the summary's part about them. Without a checker's verdicts, or without distances,
        there are no columns for these.
    """
    scores = cells["scores"]
    slowest = next(iter(scores.values()))
    columns = {
        "edited": lambda cell: _percent(cell["edit_success"]["all"]),
        "rest kept": lambda cell: _percent(cell["preservation"]["all"]),
        "l1": lambda cell: _error(cell["l1"]["all"]),
        "fd_efflite0": lambda cell: f"{cell['fd_efflite0']:.1f}",
        "to reconstructions": lambda cell: f"{cell['fd_efflite0_reconstructed']:.1f}",
        "seconds per image": lambda cell: f"{cell['seconds_per_image']:.3g}",
        "times faster": lambda cell: (
            f"{slowest['seconds_per_image'] / cell['seconds_per_image']:.1f}"
        ),
    }
    if slowest["edit_success"]["all"] is None:
        del columns["edited"], columns["rest kept"]
    if "left_out" in cells["fd_efflite0"]:
        del columns["fd_efflite0"], columns["to reconstructions"]
    rows = [[name, *(show(cell) for show in columns.values())] for name, cell in scores.items()]
    return [["", *columns], *rows]


def _cells(cells: Mapping, rows: Sequence[SheetRow]) -> list[str]:
    """The section on them: table, what its numbers are, and pictures side by side."""
    head, *body = [[html.escape(text) for text in row] for row in cell_table(cells)]
    lines = ["".join(f"<th>{text}</th>" for text in head)]
    lines += ["".join(f"<td>{text}</td>" for text in row) for row in body]
    fd = cells["fd_efflite0"]
    if "left_out" in fd:
        distance = f"Frechet distances are left out: {html.escape(fd['left_out'])}."
    else:
        distance = (
            "fd_efflite0 is the Frechet distance to the true targets, by EfficientNet-Lite0's "
            f"features of pictures brought to {fd['input_size']} pixels. Of only "
            f"{cells['num_examples']} pictures it comes out too large: compare these cells, not "
            "other numbers of pictures. The targets themselves, through the autoencoder and back, "
            f"are at {fd['reconstructed_targets']:.1f}; distances to these reconstructions leave "
            "out what the autoencoder is to blame for."
        )
    return [
        "<h2>Fewer steps</h2>",
        f"<p>The first {cells['num_examples']} of these edits, from the same initial noise.</p>",
        f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>",
        f"<p>{distance}</p>",
        f"<p>{html.escape(cells['timed'])}</p>",
        _picture(draw_sheet(rows, result_names=list(cells["scores"]), cell=96, text_width=200)),
    ]


def _times(seconds: Mapping[str, float]) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{value:.0f} s</td></tr>" for name, value in seconds.items()
    )
    total = sum(seconds.values())
    return (
        f"<table class=total><tr><th>stage</th><th></th></tr>{rows}"
        f"<tr><td>together</td><td>{total:.0f} s</td></tr></table>"
    )


def _sheet(examples: Sequence[tuple[Triple, np.ndarray, Mapping]]) -> np.ndarray:
    rows = [
        SheetRow(triple.contexts, triple.prompt, [image], triple.target, _verdict(result))
        for triple, image, result in examples
    ]
    half = -(-len(rows) // 2)
    columns = [draw_sheet(rows[:half], cell=96), draw_sheet(rows[half:], cell=96)]
    height = max(column.shape[0] for column in columns)
    padded = [
        np.pad(c, ((0, height - c.shape[0]), (0, 0), (0, 0)), constant_values=255) for c in columns
    ]
    return np.concatenate(padded, axis=1)


def _verdict(result: Mapping) -> str:
    words = []
    if result["edited"] is not None:
        words.append("edited" if result["edited"] else "NOT EDITED")
    if result["preserved"] is not None:
        words.append("rest kept" if result["preserved"] else "REST CHANGED")
    return ": ".join(filter(None, (result["category"].replace("_", " "), ", ".join(words))))


def _picture(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='held-out examples' src='data:image/png;base64,{data}'>"


def _curve(title: str, run: Path) -> str:
    """The loss by step, as inline SVG; on a log scale, for it falls by orders of magnitude."""
    # Imported here: it is slow, and only the report draws.
    from matplotlib.figure import Figure

    if not (run / "metrics.jsonl").exists():
        return f"<p>{title}: no log in {html.escape(str(run))}.</p>"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    name = next(name for name in lines[0] if name.endswith("/loss"))
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line[name] for line in lines], color="#2a5db0")
    axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
