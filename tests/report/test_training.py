"""Curves of all players, and the latents of autoencoders."""

import json
import re
from pathlib import Path

import pytest

from kontext_jax.report import training
from kontext_jax.report.gallery import Gallery
from kontext_jax.report.page import Sweep

TERMS = ("loss", "adversarial", "adaptive_weight", "latent_mean", "learning_rate")
LOGITS = ("loss", "real", "made", "accuracy_real", "accuracy_made", "r1")


def run_with(folder: Path, metrics: list[dict], validation: list[dict] = ()) -> Path:
    for name, lines in (("metrics", metrics), ("validation", validation)):
        text = "".join(json.dumps({"step": i + 1} | line) + "\n" for i, line in enumerate(lines))
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def titles_of(parts: list[str]) -> list[str]:
    """Titles of charts; ticks and labels have no colon."""
    svgs = re.findall(r"<svg.*?</svg>", parts[-1], re.S)
    return [re.findall(r">([^<>]*: [^<>]*)</text>", svg)[0] for svg in svgs]


def test_an_adversarial_run_has_curves_of_both_players(tmp_path):
    """The discriminator starts late; logits and accuracies of both kinds of images share charts."""
    first = {f"autoencoder/{name}": 1.0 for name in TERMS}
    second = first | {f"discriminator/{name}": 0.5 for name in LOGITS} | {"data_wait": 0.1}
    scores = {"psnr": 20.0, "fd_efflite0": 400.0, "edit_success": 0.5, "bits_per_pixel": 1.0}
    run = run_with(tmp_path, [first, second], [scores])
    assert titles_of(training.curves("sharp", run)) == [
        "autoencoder: loss",
        "discriminator: loss",
        "autoencoder: adversarial",
        "autoencoder: adaptive weight",
        "discriminator: logits",
        "discriminator: accuracy",
        "discriminator: R1",
        "held out: PSNR, dB",
        "held out: FD (EfficientNet-Lite0)",
    ]


def test_a_student_s_run_has_curves_of_both_players(tmp_path):
    metrics = {"student/loss": 1.0, "student/adversarial": 0.5, "discriminator/loss": 2.0}
    validation = {"edit_success": 0.5, "loss": 1.0, "efflite0": 0.5}
    run = run_with(tmp_path, [metrics], [validation])
    titles = titles_of(training.curves("student", run))
    assert titles[:3] == ["student: loss", "discriminator: loss", "student: adversarial"]
    assert titles[3:] == ["held out: loss", "held out: edit success"]


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([1.0, 2.0], False), ([1.0, 20.0], True), ([0.0, 1.0, 20.0], True), ([-1.0, 20.0], False)],
)
def test_axes_are_logarithmic_where_values_differ_by_a_factor(values, is_log):
    metrics = [{"step": i, "x/loss": value} for i, value in enumerate(values)]
    panel = training._curve("x: loss", {"": "x/loss"}, metrics)
    assert panel.log_y == is_log
    drawn = [point.mean for point in panel.lines[0].points.values()]
    assert drawn == [value for value in values if value or not is_log]


def test_long_curves_are_averaged():
    number = 2 * training.MAX_POINTS + 1
    metrics = [{"step": i, "x/loss": float(i)} for i in range(number)]
    [line] = training._curve("x: loss", {"": "x/loss"}, metrics).lines
    assert len(line.points) <= training.MAX_POINTS and max(line.points) == number - 1
    assert line.points[2].mean == 1.0  # of steps 0, 1 and 2


def latents(**more) -> dict:
    channels = {"mean": [0.5, -1.0], "std": [1.0, 2.0], "kurtosis": [3.0, 4.5], "kl": [2.0, 0.0]}
    return {"mean": 0.0, "square": 1.0, "channels": channels} | more


def sweep_with(statistics: dict, cells: dict | None = None) -> Sweep:
    summary = {"cells": cells or {}, "latents": statistics}
    return Sweep(summary, Gallery(Path(), {}), {}, 0)


def test_latents_are_drawn_by_channel():
    parts = training.latents(sweep_with({"a <b>": latents()}))
    assert parts[0] == "<h3>a &lt;b&gt;</h3>" and parts[2].count("<svg") == 3
    assert "stroke-dasharray" in parts[2]  # the kurtosis of a normal distribution
    assert training.latents(sweep_with({})) == []


def test_discrete_latents_have_codes_instead_of_a_posterior():
    codes = {"number": 64000, "used": 0.125, "perplexity": 1234.5}
    parts = training.latents(sweep_with({"a": latents(codes=codes)}))
    assert "12.5% of 64,000 codes are used; their perplexity is 1,234.5." in parts[1]
    assert parts[2].count("<svg") == 2 and "KL" not in parts[2]


def test_only_the_last_checkpoint_of_a_run_has_its_latents_drawn():
    common = {"baseline": "", "checkpoint": "run", "params": "ema", "shift": "", "sampler": {}}
    cells = {f"run @{step}": common | {"step": step} for step in (2, 30, 4)}
    parts = training.latents(sweep_with(dict.fromkeys(cells, latents()), cells))
    assert [part for part in parts if part.startswith("<h3>")] == ["<h3>run @30</h3>"]
