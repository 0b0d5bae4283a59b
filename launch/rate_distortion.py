"""Trains autoencoders with different latents and losses, and draws distortion against rate.

    pip install -e '.[photographs,eval]'
    python launch/rate_distortion.py --workdir=runs/rate_distortion

The autoencoders are those of configs/rate_distortion.py, each with two sets of losses: "sharp" with
a perceptual distance and a discriminator, "plain" without. They are trained on crops of photographs
(``data.build --source=photographs``) of 64 x 64 pixels, and judged by crops of 256 x 256 pixels of
other photographs, beside JPEG and WebP files of the same images. If interrupted, run it again to
resume. ``results.json`` has the numbers, ``curves.png`` draws PSNR and the perceptual distance
against bits per pixel, and ``strip.png`` shows images at about equal rates.

The rate of continuous latents is the KL divergence of their posterior from N(0, 1), the expected
length of a bits-back code (Townsend et al., arXiv 1901.04866); nothing is coded. The rate of
discrete latents is the entropy of their codes in the judged images, at most the logarithm of their
number. Files of JPEG and WebP count with their headers.
"""

import io
import json
import math
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from jax.sharding import Mesh
from PIL import Image

from kontext_jax import cli
from kontext_jax.evaluation.judges import Outputs, judge_pixels, run_judges
from kontext_jax.evaluation.latent_statistics import measure_codes
from kontext_jax.evaluation.network_judges import DistanceJudge
from kontext_jax.evaluation.tasks.triples import triples
from kontext_jax.loading.locations import open_networks
from kontext_jax.loading.models import load_distance
from kontext_jax.models.autoencoder import Autoencoder, kl_divergence, to_pixels
from kontext_jax.models.perceptual import PerceptualConfig
from kontext_jax.report.charts import STYLE
from kontext_jax.sampling.generator import over_images, reconstruct
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.types import RGBImage, Task
from kontext_jax.weights.loading import load

CONFIG = Path(__file__).parents[1] / "configs/rate_distortion.py"
RECIPE = runpy.run_path(str(CONFIG))
SIZE, NUM_IMAGES = 256, 24
LOSSES = {
    "sharp": [],
    "plain": ["--config.objective.perceptual.weight=0", "--config.objective.adversarial.weight=0"],
}
"""Overrides of the recipe."""

CODECS = {"JPEG": (5, 10, 20, 35, 55, 75), "WEBP": (1, 5, 15, 35, 60, 80)}
"""Qualities of each file format."""

METRICS = {"psnr": "PSNR, dB", "distance_efflite0": "distance_efflite0"}
LATENT_KINDS = ("kl", "fsq", "vq")
COLOURS = {"kl": "#1f77b4", "fsq": "#d62728", "vq": "#9467bd", "JPEG": "#888", "WEBP": "#333"}
STRIP_BITS = 0.3
"""Bits per pixel near which the strip's images are chosen."""


class Point(NamedTuple):
    """A point of the curves.

    Attributes:
      name: "LATENTS-LOSSES", or the format and its quality.
      bits: bits per pixel.
      scores: the means of `METRICS` over the judged images.
      images: the reconstructions.
    """

    name: str
    bits: float
    scores: dict[str, float]
    images: list[RGBImage]


def build(workdir: Path) -> Path:
    """The data to train on and to judge by, built if missing; returns the folder of the latter."""
    judged = workdir / f"photographs_{SIZE}"
    for path, flags_ in (
        (Path(RECIPE["DATA"]), ["--size=64", "--num_train=4000", "--num_validation=96"]),
        (judged, [f"--size={SIZE}", "--num_train=0", f"--num_validation={NUM_IMAGES}"]),
    ):
        if not path.exists():
            _run("data.build", "--source=photographs", f"--output={path}", *flags_)
    return judged


def runs() -> dict[str, tuple[str, str]]:
    """The latents and the losses of each run."""
    return {
        f"{latents}-{losses}": (latents, losses)
        for latents in RECIPE["VARIANTS"]
        for losses in LOSSES
    }


def _run(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"kontext_jax.{command}", *arguments], check=True)


def bits_per_pixel(autoencoder: Autoencoder, images: Sequence[RGBImage], mesh: Mesh) -> float:
    """The rate of an autoencoder, see the module's docstring."""
    config = autoencoder.config
    if config.is_discrete:
        nats = math.log(measure_codes(autoencoder, images, mesh)["perplexity"])
    else:
        nats = float(np.mean(over_images(lambda x: _nats(autoencoder, x), images, mesh)))
    return nats / math.log(2) / config.downsample**2


@jax.jit
def _nats(autoencoder, images):
    """The mean over cells of the sum of the channels' divergences; [B]."""
    divergence = kl_divergence(*autoencoder.moments(to_pixels(images)))
    return jnp.mean(jnp.sum(divergence, axis=-1), axis=(1, 2))


def coded(image: RGBImage, codec: str, quality: int) -> tuple[int, RGBImage]:
    """The size of an image's file in bytes, and what it decodes to."""
    file = io.BytesIO()
    options = {"optimize": True} if codec == "JPEG" else {"method": 6}
    Image.fromarray(image).save(file, codec, quality=quality, **options)
    return file.tell(), np.asarray(Image.open(file).convert("RGB"))


def measure(workdir: Path, tasks: Sequence[Task], mesh: Mesh) -> list[Point]:
    """All points: of the autoencoders that are trained, and of the formats."""
    distance = DistanceJudge(
        "distance_efflite0", load_distance(PerceptualConfig(weight=1.0), mesh), mesh
    )
    originals = [task.truth for task in tasks]

    def point(name: str, bits: float, images: list[RGBImage]) -> Point:
        columns = run_judges([judge_pixels, distance], Outputs("", tasks, images)).columns
        scores = {metric: float(np.mean(columns[metric])) for metric in METRICS}
        print(f"{name:>16} {bits:8.3f}", *(f"{x:8.3f}" for x in scores.values()), flush=True)
        return Point(name, bits, scores, images)

    points = []
    for name in runs():
        reader = open_networks(workdir / name)["autoencoder"]
        autoencoder = load(reader, reader.config, mesh, dtype=None)
        bits = bits_per_pixel(autoencoder, originals, mesh)
        points.append(point(name, bits, reconstruct(autoencoder, originals, mesh)))
    for codec, qualities in CODECS.items():
        for quality in qualities:
            sizes, images = zip(*(coded(x, codec, quality) for x in originals), strict=True)
            bits = 8 * float(np.mean(sizes)) / SIZE**2
            points.append(point(f"{codec}-{quality}", bits, list(images)))
    return points


def draw_curves(points: Sequence[Point], path: Path) -> None:
    """PSNR and distance against bits per pixel."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(METRICS), figsize=(9, 3.6), layout="constrained")
        for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
            for (kind, group), members in _curves(points).items():
                members = sorted(members, key=lambda p: p.bits)
                axis.plot(
                    [p.bits for p in members],
                    [p.scores[metric] for p in members],
                    color=COLOURS[kind],
                    linestyle="--" if group == "plain" else "-",
                    marker="o" if kind in LATENT_KINDS else None,
                    markerfacecolor="white" if group == "plain" else COLOURS[kind],
                    label=f"{kind} {group}".strip(),
                )
            axis.set(xscale="log", xlabel="bits per pixel", title=label)
            axis.set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2], [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        axes[-1].legend(frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _curves(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """The points by curve: kind of latents and losses, or format."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        head, _, tail = point.name.rpartition("-")
        kind = head.partition("_")[0]
        curves.setdefault((kind, tail if tail in LOSSES else ""), []).append(point)
    return curves


def draw_strip(points: Sequence[Point], tasks: Sequence[Task], path: Path, rows: int = 3) -> None:
    """An image of each photograph: the original, and each curve's point nearest to `STRIP_BITS`."""
    nearest = [
        min(members, key=lambda p: abs(math.log(p.bits / STRIP_BITS)))
        for members in _curves(points).values()
    ]
    columns = {"original": [task.truth for task in tasks]}
    columns |= {f"{p.name}\n{p.bits:.2f} bpp": p.images for p in nearest}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            len(columns),
            figsize=(1.6 * len(columns), 1.68 * rows + 0.3),
            layout="constrained",
        )
        for axis_column, (name, images) in zip(axes.T, columns.items(), strict=True):
            axis_column[0].set_title(name, fontsize=8)
            for axis, image in zip(axis_column, images[:rows], strict=True):
                axis.imshow(image)
                axis.axis("off")
        figure.savefig(path, dpi=160)
        plt.close(figure)


def main() -> None:
    workdir = Path(flags.FLAGS.workdir)
    judged = build(workdir)
    for name, (latents, losses) in runs().items():
        config = f"--config={CONFIG}:{latents}"
        _run("train", config, f"--workdir={workdir / name}", *LOSSES[losses])
    tasks = list(triples(judged, "validation", NUM_IMAGES))
    points = measure(workdir, tasks, make_mesh(MeshConfig()))
    results = {p.name: {"bits_per_pixel": p.bits} | p.scores for p in points}
    (workdir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_curves(points, workdir / "curves.png")
    draw_strip(points, tasks, workdir / "strip.png")
    print(f"{workdir}: results.json, curves.png, strip.png")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/rate_distortion", "folder of the results")
    cli.run("rate_distortion", main)
