"""What pictures are worth: the checker's verdict on each, rates of many, features of all."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from kontext_jax.evaluator import Image
from kontext_jax.metrics import world
from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.models.features import pooled_features
from kontext_jax.types import Triple
from kontext_jax.weights.efficientnet import load_lite0

ALL = "all"

FD_INPUT = 128
"""Side to which EfficientNet-Lite0 gets its pictures, in pixels. It was trained with 224; pictures
of 32 hold nothing that 128 would lose, at a third of the time. Distances of other sides do not
compare with these."""


def score(triples: Sequence[Triple], images: Sequence[Image]) -> list[dict]:
    """One result a picture: the checker's verdict, and the mean absolute error to the truth.

    The error is a share of the range of pixels, 0 to 1. Data without a checker (all but the world)
    have no verdict: ``edited`` and ``preserved`` are None.
    """
    rows = []
    for triple, image in zip(triples, images, strict=True):
        verdict = world.check(image, triple.details)
        error = np.abs(image.astype(np.float64) - triple.target).mean() / 255
        rows.append(
            {
                "id": triple.id,
                "category": triple.category,
                "edited": verdict.edited,
                "preserved": verdict.preserved,
                "l1": round(float(error), 5),
            }
        )
    return rows


def summarise(rows: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """Rates by category and over all: success, preservation, error; None if nothing is judged."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
        groups[ALL].append(row)

    def mean(values):
        return round(float(np.mean(values)), 4) if values else None

    names = sorted(groups, key=lambda name: (name == ALL, name))
    return {
        metric: {name: mean(_values(groups[name], key)) for name in names}
        for metric, key in (("edit_success", "edited"), ("preservation", "preserved"), ("l1", "l1"))
    } | {"count": {name: len(groups[name]) for name in names}}


def _values(rows: Sequence[dict], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row[key] is not None]


def spread(triples: Sequence[Triple], number: int) -> list[int]:
    """The first examples of each category in turn, chosen before any result is known."""
    queues: dict[str, list[int]] = defaultdict(list)
    for i, triple in enumerate(triples):
        queues[triple.category].append(i)
    turns = max(map(len, queues.values()))
    order = [queue[k] for k in range(turns) for queue in queues.values() if k < len(queue)]
    return order[:number]


def efflite0_features(
    sets: Sequence[Sequence[Image]], mesh: Mesh
) -> list[Float32[np.ndarray, "_ D"]]:
    """What Frechet distances called ``fd_efflite0`` are computed of: a vector for each picture.

    They are EfficientNet-Lite0's pooled features, of pictures brought to ``FD_INPUT``.

    Raises:
      FileNotFoundError: the network's weights are not installed.
      ValueError: the weights are others, or a set is empty.
    """
    network = load_lite0(mesh, EfficientNetConfig.lite0(input_size=FD_INPUT))
    return [pooled_features(network, images, mesh) for images in sets]
