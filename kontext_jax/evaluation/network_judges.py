"""Judges with networks, which also compare images by what they show.

A metric is named after its network: ``fd_efflite0`` is not FID.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from kontext_jax.evaluation.judges import Column, Outputs, Scores, per_image
from kontext_jax.evaluation.latent_statistics import measure_codes
from kontext_jax.geometry import whole_cells
from kontext_jax.metrics.faces import IdentityEncoder
from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.metrics.kernel import kernel_distance
from kontext_jax.metrics.ocr import Reader, accuracy, contains
from kontext_jax.metrics.similarity import SAME, clip_directional, cosine
from kontext_jax.models.autoencoder import Autoencoder, to_pixels
from kontext_jax.models.lpips import TRUNKS, Lpips
from kontext_jax.models.perceptual import FeatureDistance
from kontext_jax.sharding import over_batches
from kontext_jax.types import RGBImage, Task
from kontext_jax.weights.clip_vision import Clip


class ReferenceFeatures:
    """Cached features of the targets and contexts that many cells are compared with."""

    def __init__(self, features: Callable[[Sequence[RGBImage]], np.ndarray]):
        self._features = features
        self._cache: dict[tuple, np.ndarray] = {}

    def __call__(self, outputs: Outputs, role: str) -> tuple[list[int], np.ndarray]:
        """(indices of the tasks that have the image, its features); "targets" or "contexts"."""
        images = getattr(outputs, role)
        indices = [i for i, image in enumerate(images) if image is not None]
        key = (outputs.name, role, tuple(outputs.sizes), len(indices))
        if indices and key not in self._cache:
            self._cache[key] = self._features([images[i] for i in indices])
        return indices, self._cache.get(key, np.zeros((0, 1), np.float32))


class FeatureJudge:
    """Compares a network's features: cosines per image, and distances between sets.

    Cosines are to the target and to the context. Distances are to the targets, and use the last
    image of each session.

    Attributes:
      distance: name of the Fréchet distance.
    """

    def __init__(
        self,
        name: str,
        features: Callable[[Sequence[RGBImage]], np.ndarray],
        *,
        similarity: str | None = None,
        fd: str = "",
        kid: str,
    ):
        """Names the metrics.

        Args:
          name: name of the network.
          features: images -> features, one row per image.
          similarity: name of the cosine; by default ``name``, and "" for no cosines.
          fd: name of the Fréchet distance; by default ``fd_NAME``.
          kid: name of the kernel distance.
        """
        self._similarity = name if similarity is None else similarity
        self.distance, self._kid = fd or f"fd_{name}", kid
        self._features, self._references = features, ReferenceFeatures(features)

    def __call__(self, outputs: Outputs) -> Scores:
        indices, targets = self._references(outputs, "targets")
        if not self._similarity and not indices:
            return Scores({})
        features = self._features(outputs.images)
        columns = {}
        if self._similarity:
            columns[self._similarity] = _cosines(features, indices, targets)
            columns[f"{self._similarity}_context"] = _cosines(
                features, *self._references(outputs, "contexts")
            )
        # The images of one session are not independent, so only its last one counts.
        followed = {task.follows for task in outputs.tasks}
        last = [k for k, i in enumerate(indices) if outputs.tasks[i].id not in followed]
        set_scores = {}
        if len(last) > 1:
            ours, theirs = features[[indices[k] for k in last]], targets[last]
            set_scores[self.distance] = frechet_distance(theirs, ours)
            set_scores[self._kid] = kernel_distance(theirs, ours)[0]
        return Scores(columns, set_scores)


def _cosines(features: np.ndarray, indices: Sequence[int], references: np.ndarray) -> Column:
    """The cosine of each reference and the features at its index; None at all other indices."""
    column: Column = [None] * len(features)
    if indices:
        for i, value in zip(indices, cosine(features[indices], references), strict=True):
            column[i] = float(value)
    return column


class ClipJudge:
    """Compares images with targets, contexts and captions in CLIP's space."""

    def __init__(self, clip: Clip, mesh: Mesh):
        self._clip, self._mesh = clip, mesh
        self._references = ReferenceFeatures(lambda images: clip.image(images, mesh))

    def __call__(self, outputs: Outputs) -> Scores:
        features = self._clip.image(outputs.images, self._mesh)
        targets = self._references(outputs, "targets")
        with_context, contexts = self._references(outputs, "contexts")
        # Without contexts the prompt is a caption; with them it is an instruction.
        captions = [
            task.target_caption or ("" if task.contexts else task.prompt) for task in outputs.tasks
        ]
        with_caption = [i for i, text in enumerate(captions) if text]
        columns = {
            "clip_i": _cosines(features, *targets),
            "clip_i_context": _cosines(features, with_context, contexts),
            "clip_t": [None] * len(features),
            "clip_dir": [None] * len(features),
        }
        if not with_caption:
            return Scores(columns)
        texts = self._clip.text([captions[i] for i in with_caption], self._mesh)
        columns["clip_t"] = _cosines(features, with_caption, texts)
        context_of = dict(zip(with_context, contexts, strict=True))
        after_of = dict(zip(with_caption, texts, strict=True))
        with_both = [i for i in with_caption if i in context_of and outputs.tasks[i].source_caption]
        if not with_both:
            return Scores(columns)
        texts = self._clip.text([outputs.tasks[i].source_caption for i in with_both], self._mesh)
        before_of = dict(zip(with_both, texts, strict=True))
        # The direction is undefined between captions that CLIP cannot tell apart.
        gaps = 1 - cosine(texts, np.stack([after_of[i] for i in with_both]))
        changed = [i for i, gap in zip(with_both, gaps, strict=True) if gap > SAME]
        if changed:
            values = clip_directional(
                features[changed],
                *(np.stack([of[i] for i in changed]) for of in (context_of, after_of, before_of)),
            )
            for i, value in zip(changed, values, strict=True):
                columns["clip_dir"][i] = float(value)
        return Scores(columns)


class DistanceJudge:
    """The perceptual distance to the target."""

    def __init__(self, name: str, network: Lpips | FeatureDistance, mesh: Mesh):
        self._name, self._network, self._mesh = name, network, mesh
        is_lpips = isinstance(network, Lpips)
        self._smallest = TRUNKS[network.config.net].smallest if is_lpips else 1

    def __call__(self, outputs: Outputs) -> Scores:
        column: Column = [None] * len(outputs.tasks)
        indices = [
            i
            for i, target in enumerate(outputs.targets)
            if target is not None and min(outputs.sizes[i]) >= self._smallest
        ]
        pairs = [np.stack([outputs.images[i], outputs.targets[i]]) for i in indices]
        sizes = [outputs.sizes[i] for i in indices]
        batch_sizes = {size: min(sizes.count(size), 16) for size in set(sizes)}
        values = over_batches(
            lambda _, batch: _distance(self._network, batch), pairs, sizes, batch_sizes, self._mesh
        )
        for i, value in zip(indices, values, strict=True):
            column[i] = float(value)
        return Scores({self._name: column})


@jax.jit
def _distance(network, pairs: UInt8[Array, "B 2 h w 3"]) -> Float[Array, " B"]:
    with jax.default_matmul_precision("highest"):
        return network(to_pixels(pairs[:, 0]), to_pixels(pairs[:, 1]))


class CodeJudge:
    """How an autoencoder with discrete latents uses its codes for the targets.

    ``bits_per_pixel`` is that of codes of fixed length: log2 of their number, over the pixels of a
    latent cell.
    """

    def __init__(self, autoencoder: Autoencoder, mesh: Mesh):
        self._autoencoder, self._mesh = autoencoder, mesh

    def __call__(self, outputs: Outputs) -> Scores:
        side = self._autoencoder.config.downsample
        targets = [whole_cells(target, side) for target in outputs.targets if target is not None]
        if not targets:
            return Scores({})
        codes = measure_codes(self._autoencoder, targets, self._mesh)
        set_scores = {
            "bits_per_pixel": math.log2(codes["number"]) / side**2,
            "code_usage": codes["used"],
            "code_perplexity": codes["perplexity"],
        }
        return Scores({}, set_scores)


class FaceJudge:
    """Whether the context's largest face is still there, and whether it is the same person's.

    It uses one thread: dlib's networks hold their activations, and onnxruntime uses all cores.
    """

    def __init__(self, encoder: IdentityEncoder):
        self._encoder, self._metric = encoder, encoder.metric
        self._cache: dict[int, tuple[RGBImage, np.ndarray | None]] = {}

    def __call__(self, outputs: Outputs) -> Scores:
        def score(image: RGBImage, task: Task) -> dict[str, float | None]:
            before = self._embed_context(task.contexts[0]) if task.contexts else None
            if before is None:
                return {}
            after = self._encoder.embed(image)
            if after is None:
                return {f"{self._metric}_found": 0.0}
            similarity = self._encoder.similarity(before, after)
            return {self._metric: similarity, f"{self._metric}_found": 1.0}

        names = (self._metric, f"{self._metric}_found")
        return per_image(score, names, outputs.images, outputs.tasks, threads=1)

    def _embed_context(self, image: RGBImage) -> np.ndarray | None:
        """Embeds a context once, as tasks share images.

        The cache holds the image too: Python reuses the id of an object that is gone.
        """
        if id(image) not in self._cache:
            self._cache[id(image)] = image, self._encoder.embed(image)
        return self._cache[id(image)][1]


class OcrJudge:
    """Whether the words that an image should show can be read, among others or alone.

    It uses one thread: the reader keeps state, and onnxruntime uses all cores.
    """

    def __init__(self, reader: Reader):
        self._reader = reader

    def __call__(self, outputs: Outputs) -> Scores:
        def score(image: RGBImage, task: Task) -> dict[str, float | None]:
            if not task.words:
                return {}
            text = self._reader.read(image)
            return {
                "ocr_contains": float(contains(text, task.words)),
                "ocr_accuracy": accuracy(text, task.words),
            }

        names = ("ocr_contains", "ocr_accuracy")
        return per_image(score, names, outputs.images, outputs.tasks, threads=1)
