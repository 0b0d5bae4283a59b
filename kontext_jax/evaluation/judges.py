"""Judges: metrics that score a model's images, one number per image or per set.

A judge is called with `Outputs`, the tasks of a set and a model's images for them. It returns None
where it has nothing to compare with (no target, no face, no words). Networks are read from local
files, and a metric is named after its network: ``fd_efflite0`` is not FID.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from kontext_jax.files import sha256_of
from kontext_jax.geometry import Size, resize, size_of
from kontext_jax.metrics import pixels
from kontext_jax.metrics.drift import colour_drift, drift
from kontext_jax.metrics.faces import AuraFace, DlibFaces, IdentityEncoder
from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.metrics.kernel import kernel_distance
from kontext_jax.metrics.ocr import Reader, accuracy, contains
from kontext_jax.metrics.similarity import SAME, clip_directional, cosine
from kontext_jax.models.autoencoder import to_pixels
from kontext_jax.models.dino import Dino, DinoConfig
from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.models.features import pooled_features
from kontext_jax.models.lpips import TRUNKS, Lpips
from kontext_jax.models.perceptual import FeatureDistance
from kontext_jax.settings import Settings, check_choices, to_dict
from kontext_jax.sharding import over_batches
from kontext_jax.toy_data import checker
from kontext_jax.types import RGBImage, Task
from kontext_jax.weights.clip_vision import Clip, load_clip
from kontext_jax.weights.efficientnet import load_lite0
from kontext_jax.weights.inception import is_fid, load_inception
from kontext_jax.weights.loading import load
from kontext_jax.weights.lpips import load_lpips
from kontext_jax.weights.reading import open_folder

Column = list[float | None]

VERSION = 1
"""Version of the metrics. Raise it when a change here or in ``metrics`` changes any score: all
images are then re-scored."""

FD_INPUT = 128
"""Side of EfficientNet-Lite0's input in pixels. It was trained at 224; images of 32 lose nothing at
128, at a third of the time. Distances at other sides are not comparable."""

MIN_TILES = 6
"""Tiles that must agree before a zoom is reported; two or three lie too close together."""

UNCHANGED = 8
"""Levels of 255 by which target and context may differ where an edit leaves the image alone."""

DLIB_PACKAGES = ("dlib-bin", "dlib", "face-recognition-models")
OCR_PACKAGES = ("rapidocr-onnxruntime",)
LPIPS_PACKAGES = ("lpips",)
"""Packages that ship code and weights; another version is another judge."""

WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".json", ".txt")
"""Suffixes of the files that networks read from a judge's folder."""

MAX_THREADS = 32
"""Each thread holds the memory for one image; more threads than this only wait for each other."""


@dataclass(kw_only=True, unsafe_hash=True)
class JudgesConfig(Settings):
    """Judges to use besides pixels, the toy world's checker and drift, which always run.

    Attributes:
      efflite0: EfficientNet-Lite0, from the extra ``eval``: a stand-in where nothing can be loaded.
      inception: file of FID's InceptionV3. Its distances are called ``fid`` and ``kid`` if this is
        the exact file of pytorch-fid, otherwise ``fd_inception`` and ``kid_inception``.
      dino: folder of DINOv2, for ``dinov2`` and ``fd_dinov2``.
      clip: folder of OpenAI's CLIP, for ``clip_i``, ``clip_t``, ``clip_dir`` and
        ``clip_i_context``.
      lpips: file of the trunk that ``lpips_net`` ("alex" or "vgg") names.
      lpips_heads: file of the heads; if empty, those of the installed package ``lpips``.
      auraface: folder of AuraFace-v1, for the identity of faces.
      dlib: whether to compare faces with dlib's bundled network.
      ocr: whether to read the words in the images.
    """

    efflite0: bool = True
    inception: str = ""
    dino: str = ""
    clip: str = ""
    lpips: str = ""
    lpips_net: str = "alex"
    lpips_heads: str = ""
    auraface: str = ""
    dlib: bool = False
    ocr: bool = False

    def __post_init__(self):
        check_choices(self, lpips_net=TRUNKS)


class Outputs:
    """The input of a judge: a model's images for the tasks of a set, with their references.

    Targets and contexts are resized to the size of the model's image.
    """

    def __init__(self, name: str, tasks: Sequence[Task], images: Sequence[RGBImage]):
        """``name`` is the set's: judges may cache features of its targets and contexts."""
        self.name, self.tasks, self.images = name, list(tasks), list(images)

    @functools.cached_property
    def sizes(self) -> list[Size]:
        return [size_of(image) for image in self.images]

    @functools.cached_property
    def targets(self) -> list[RGBImage | None]:
        return self._resized([task.truth for task in self.tasks])

    @functools.cached_property
    def contexts(self) -> list[RGBImage | None]:
        """The first stored context of each task; in a session, the context of its first turn."""
        return self._resized([task.contexts[0] if task.contexts else None for task in self.tasks])

    def _resized(self, images: Sequence[RGBImage | None]) -> list[RGBImage | None]:
        pairs = zip(images, self.sizes, strict=True)
        return [None if image is None else resize(image, size) for image, size in pairs]


class Scores(NamedTuple):
    """The scores that a judge returns.

    Attributes:
      columns: metric -> one number per task.
      set_scores: metric -> one number for the whole set.
    """

    columns: Mapping[str, Column]
    set_scores: Mapping[str, float] = {}


Judge = Callable[[Outputs], Scores]
"""Scores outputs; all processes call it together."""


class JudgePanel(NamedTuple):
    """All judges of a sweep.

    Attributes:
      judges: the judges to run.
      left_out: name -> reason, for optional judges that are unavailable.
      record: JSON that identifies the judges: version and config, names left out, SHA-256 of the
        files they are read from, and versions of the packages that ship networks.
    """

    judges: list[Judge]
    left_out: dict[str, str]
    record: dict[str, Any]


def make_judges(config: JudgesConfig, mesh: Mesh) -> JudgePanel:
    """Loads the judges that ``config`` asks for. All processes call it.

    Raises:
      FileNotFoundError, ValueError: a configured path is missing, or holds another network.
      ImportError: a package is not installed.
    """
    judges: list[Judge] = [judge_pixels, judge_world, judge_drift]
    left_out: dict[str, str] = {}
    packages: list[str] = []
    if config.efflite0:
        try:
            network = load_lite0(mesh, EfficientNetConfig.lite0(input_size=FD_INPUT))
            judges.append(FeatureJudge("efflite0", _features(network, mesh), kid="kid_efflite0"))
        except FileNotFoundError as error:
            left_out["efflite0"] = str(error)
    if config.inception:
        path = Path(config.inception)
        network = load_inception(path, mesh)
        fd, kid = ("fid", "kid") if is_fid(path) else ("fd_inception", "kid_inception")
        judges.append(
            FeatureJudge("inception", _features(network, mesh), similarity="", fd=fd, kid=kid)
        )
    if config.dino:
        network = _load_dino(Path(config.dino), mesh)
        judges.append(FeatureJudge("dinov2", _features(network, mesh), kid="kid_dinov2"))
    if config.clip:
        judges.append(ClipJudge(load_clip(config.clip, mesh), mesh))
    if config.lpips:
        network = load_lpips(config.lpips, config.lpips_heads, config.lpips_net, mesh)
        judges.append(DistanceJudge(f"lpips_{config.lpips_net}", network, mesh))
        packages += [] if config.lpips_heads else LPIPS_PACKAGES
    if config.auraface:
        judges.append(FaceJudge(AuraFace(Path(config.auraface))))
    if config.dlib:
        judges.append(FaceJudge(DlibFaces()))
        packages += DLIB_PACKAGES
    if config.ocr:
        judges.append(OcrJudge(Reader()))
        packages += OCR_PACKAGES
    paths = (config.inception, config.dino, config.clip, config.lpips, config.lpips_heads)
    record = {
        "version": VERSION,
        "config": to_dict(config),
        "left_out": sorted(left_out),
        "files": _hashes(Path(path) for path in (*paths, config.auraface) if path),
        "packages": _versions(packages),
    }
    return JudgePanel(judges, left_out, record)


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, and of each file in a folder that a network may read."""
    files = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [file for file in inside if file == path or file.suffix in WEIGHT_SUFFIXES]
    return {str(file): sha256_of(file) for file in files}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the installed ones among ``packages``; dlib has two distribution names."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _load_dino(folder: Path, mesh: Mesh) -> Dino:
    reader = open_folder(folder)
    if not isinstance(reader.config, DinoConfig):
        raise ValueError(f"judges.dino: {folder} holds a network other than DINOv2.")
    return load(reader, dataclasses.replace(reader.config, dtype="float32"), mesh)


def run_judges(judges: Sequence[Judge], outputs: Outputs) -> Scores:
    """Merges the scores of all judges.

    Raises:
      ValueError: two judges return the same metric, or a column does not have one value per task.
    """
    columns: dict[str, Column] = {}
    set_scores: dict[str, float] = {}
    for judge in judges:
        scores = judge(outputs)
        clashing = columns.keys() & scores.columns.keys()
        clashing |= set_scores.keys() & scores.set_scores.keys()
        if clashing:
            raise ValueError(f"Two judges return {', '.join(sorted(clashing))}.")
        for name, column in scores.columns.items():
            if len(column) != len(outputs.tasks):
                raise ValueError(f"{name} has {len(column)} values for {len(outputs.tasks)} tasks.")
        columns |= scores.columns
        set_scores |= scores.set_scores
    return Scores(columns, set_scores)


def per_image(
    function: Callable[..., Mapping[str, float | None]],
    names: Sequence[str],
    *inputs: Sequence,
    threads: int | None = None,
) -> Scores:
    """Maps ``function`` over images with threads; each process handles its share.

    Args:
      function: returns scores by name; several threads call it at once.
      names: scores to keep.
      inputs: arguments of ``function``, one sequence each, with one entry per image.
      threads: by default one per core, up to `MAX_THREADS`; 1 if ``function`` is not thread-safe.
    """
    number = len(inputs[0])
    share = range(number)[jax.process_index() :: jax.process_count()]
    values = np.zeros((number, len(names)))
    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        results = pool.map(function, *([column[i] for i in share] for column in inputs))
        for i, scores in zip(share, results, strict=True):
            values[i] = [np.nan if scores.get(name) is None else scores[name] for name in names]
    # Gathered as uint32, because JAX would round float64.
    bits = multihost_utils.process_allgather(values.view(np.uint32))
    gathered = np.asarray(bits).reshape(-1, number, 2 * len(names)).view(np.float64)
    for process, theirs in enumerate(gathered):
        values[process :: len(gathered)] = theirs[process :: len(gathered)]
    return Scores({name: _column(column) for name, column in zip(names, values.T, strict=True)})


def _column(values: Float[np.ndarray, " n"]) -> Column:
    return [None if np.isnan(value) else float(value) for value in values]


def judge_pixels(outputs: Outputs) -> Scores:
    """L1, L2, PSNR and SSIM to the target; see `metrics.pixels`."""

    def score(image: RGBImage, target: RGBImage | None) -> dict[str, float | None]:
        if target is None:
            return {}
        # The PSNR of identical images is infinite; a cap of 100 dB keeps means finite.
        scores = {
            "l1": pixels.l1(image, target),
            "l2": pixels.l2(image, target),
            "psnr": min(pixels.psnr(image, target), 100.0),
        }
        if min(image.shape[:2]) >= pixels.WINDOW:
            scores["ssim"] = pixels.ssim(image, target)
        return scores

    names = ("l1", "l2", "psnr", "ssim")
    return per_image(score, names, outputs.images, outputs.targets)


def judge_world(outputs: Outputs) -> Scores:
    """Whether the toy world's checker finds the edit carried out and the rest preserved: 1 or 0.

    It reads only images of the target's size.
    """

    def score(image: RGBImage, task: Task) -> dict[str, float | None]:
        if task.truth is None or task.truth.shape != image.shape:
            return {}
        verdict = checker.check(image, task.details)
        values = {"edit_success": verdict.edited, "preservation": verdict.preserved}
        return {name: None if value is None else float(value) for name, value in values.items()}

    return per_image(score, ("edit_success", "preservation"), outputs.images, outputs.tasks)


def judge_drift(outputs: Outputs) -> Scores:
    """Shift, zoom and colour drift of the regions that the edit should leave unchanged.

    These are the pixels where target and context agree: all of them in an identity probe.
    """

    def score(
        image: RGBImage, target: RGBImage | None, context: RGBImage | None
    ) -> dict[str, float | None]:
        if target is None or context is None:
            return {}
        far = np.abs(target.astype(np.int16) - context) > UNCHANGED
        edited = far[..., 0] | far[..., 1] | far[..., 2]
        kept = ~edited if edited.any() else None
        scores: dict[str, float | None] = {}
        if not edited.all():
            scores["colour_drift"] = float(np.abs(colour_drift(image, target, kept)).mean())
        try:
            motion = drift(image, target, kept)
        except ValueError:  # too small or too flat to register
            return scores
        scores["shift"] = float(np.hypot(*motion.shift))
        if motion.tiles >= MIN_TILES:
            # The absolute value, so that zooming in and out do not cancel in a mean.
            scores["zoom"] = 100 * abs(motion.scale - 1)
        return scores

    names = ("shift", "zoom", "colour_drift")
    return per_image(score, names, outputs.images, outputs.targets, outputs.contexts)


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


def _features(network, mesh: Mesh) -> Callable[[Sequence[RGBImage]], np.ndarray]:
    return lambda images: pooled_features(network, images, mesh)


class FeatureJudge:
    """Compares a network's features: cosines per image, and distances between sets.

    Cosines are to the target and to the context. Distances are to the targets, and use the last
    image of each session.
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
        self._fd, self._kid = fd or f"fd_{name}", kid
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
            set_scores[self._fd] = frechet_distance(theirs, ours)
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
