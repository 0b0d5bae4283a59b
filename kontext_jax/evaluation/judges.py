"""Who says what pictures are worth: each judge has numbers for every picture, or for all together.

A judge is called with a `Outputs`, tasks and the pictures that a model made of them, and says what
it can; where it has nothing to go by (no truth, no face, no words) it says None. Networks are read
from local files, and a number has the name of its network: ``fd_efflite0`` is no FID.
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
"""Of what numbers mean; another one has all pictures judged anew. To be raised with such a change,
in here or in ``metrics``."""

FD_INPUT = 128
"""Side to which EfficientNet-Lite0 gets its pictures, in pixels. It was trained with 224; pictures
of 32 hold nothing that 128 would lose, at a third of the time. Distances of other sides do not
compare with these."""

MIN_TILES = 6
"""Places that must agree before a picture is said to have grown; two or three lie too close."""

UNCHANGED = 8
"""Levels of 255 by which truth and context may differ where an edit leaves a picture alone."""

DLIB_PACKAGES = ("dlib-bin", "dlib", "face-recognition-models")
OCR_PACKAGES = ("rapidocr-onnxruntime",)
LPIPS_PACKAGES = ("lpips",)
"""What brings code and weights, so that other versions are other judges."""

READ = (".safetensors", ".onnx", ".json", ".txt")
"""Kinds of files in the folders that judges are read from."""

MAX_THREADS = 32
"""Each holds a picture's share of memory; beyond, they only wait for one another."""


@dataclass(kw_only=True, unsafe_hash=True)
class JudgesConfig(Settings):
    """Which judges there are beside pixels, the world's checker and drift, which are always there.

    Attributes:
      efflite0: EfficientNet-Lite0, of the extra ``eval``: a stand-in where nothing can be loaded.
      inception: file of FID's InceptionV3. Its distances are ``fid`` and ``kid`` if this is the
        very file of pytorch-fid, and ``fd_inception`` and ``kid_inception`` of any other.
      dino: folder of DINOv2, for ``dinov2`` and ``fd_dinov2``.
      clip: folder of OpenAI's CLIP, for ``clip_i``, ``clip_t``, ``clip_dir`` and their like.
      lpips: file of the trunk that ``lpips_net`` ("alex" or "vgg") names.
      lpips_heads: file of the heads; those of the installed package ``lpips`` if empty.
      auraface: folder of AuraFace-v1, for the identity of faces.
      dlib: whether the bundled network of dlib looks at faces.
      ocr: whether written words are read.
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
    """What is judged: the pictures made for a set's tasks, and what they are compared with.

    Truths and contexts are brought to the size of the picture that was made, as a model's own are.
    """

    def __init__(self, name: str, tasks: Sequence[Task], images: Sequence[RGBImage]):
        """``name`` is the set's: judges may remember what they know of its truths and contexts."""
        self.name, self.tasks, self.images = name, list(tasks), list(images)

    @functools.cached_property
    def sizes(self) -> list[Size]:
        return [size_of(image) for image in self.images]

    @functools.cached_property
    def truths(self) -> list[RGBImage | None]:
        return self._resized([task.truth for task in self.tasks])

    @functools.cached_property
    def contexts(self) -> list[RGBImage | None]:
        """The first context of each; in a session, that of its first turn."""
        return self._resized([task.contexts[0] if task.contexts else None for task in self.tasks])

    def _resized(self, images: Sequence[RGBImage | None]) -> list[RGBImage | None]:
        pairs = zip(images, self.sizes, strict=True)
        return [None if image is None else resize(image, size) for image, size in pairs]


class Scores(NamedTuple):
    """What a judge says.

    Attributes:
      columns: by metric, a number for each task.
      whole: by metric, a number for all tasks together.
    """

    columns: Mapping[str, Column]
    whole: Mapping[str, float] = {}


Judge = Callable[[Outputs], Scores]
"""Anything that can be called with a line-up, on all processes together."""


class JudgePanel(NamedTuple):
    """All judges of a sweep.

    Attributes:
      judges: who is asked.
      left_out: name -> why there is none that was not asked for by a path.
      record: what tells them from others, as JSON: their version and config, the names left out,
        SHA-256 of the files that they are read from, and versions of packages that bring networks
        along.
    """

    judges: list[Judge]
    left_out: dict[str, str]
    record: dict[str, Any]


def make_judges(config: JudgesConfig, mesh: Mesh) -> JudgePanel:
    """The judges that ``config`` asks for. All processes call it.

    Raises:
      FileNotFoundError, ValueError: what was asked for by a path is not there, or something else.
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
        judges.append(LpipsJudge(f"lpips_{config.lpips_net}", network, mesh))
        packages += [] if config.lpips_heads else LPIPS_PACKAGES
    if config.auraface:
        judges.append(FaceJudge(AuraFace(Path(config.auraface))))
    if config.dlib:
        judges.append(FaceJudge(DlibFaces()))
        packages += DLIB_PACKAGES
    if config.ocr:
        judges.append(OcrJudge(Reader()))
        packages += OCR_PACKAGES
    places = (config.inception, config.dino, config.clip, config.lpips, config.lpips_heads)
    record = {
        "version": VERSION,
        "config": to_dict(config),
        "left_out": sorted(left_out),
        "files": _hashes(Path(place) for place in (*places, config.auraface) if place),
        "packages": _versions(packages),
    }
    return JudgePanel(judges, left_out, record)


def _hashes(places: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by path: of files, and of those in a folder that networks may be read from."""
    files = []
    for place in places:
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
        files += [file for file in inside if file == place or file.suffix in READ]
    return {str(file): sha256_of(file) for file in files}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed: dlib is there by one of two names."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _load_dino(folder: Path, mesh: Mesh) -> Dino:
    reader = open_folder(folder)
    if not isinstance(reader.config, DinoConfig):
        raise ValueError(f"judges.dino: {folder} holds another network than DINOv2.")
    return load(reader, dataclasses.replace(reader.config, dtype="float32"), mesh)


def judge(judges: Sequence[Judge], outputs: Outputs) -> Scores:
    """What all judges say.

    Raises:
      ValueError: two of them have a number of the same name, or not one for each task.
    """
    columns: dict[str, Column] = {}
    whole: dict[str, float] = {}
    for each in judges:
        said = each(outputs)
        twice = (columns.keys() & said.columns.keys()) | (whole.keys() & said.whole.keys())
        if twice:
            raise ValueError(f"Two judges say {', '.join(sorted(twice))}.")
        for name, column in said.columns.items():
            if len(column) != len(outputs.tasks):
                raise ValueError(f"{name} has {len(column)} values for {len(outputs.tasks)} tasks.")
        columns |= said.columns
        whole |= said.whole
    return Scores(columns, whole)


def by_picture(
    function: Callable[..., Mapping[str, float | None]],
    names: Sequence[str],
    *given: Sequence,
    threads: int | None = None,
) -> Scores:
    """``function`` of each picture and what goes with it; every process does its share of them.

    Args:
      function: gives numbers by name; it is called by several threads at once.
      names: of the numbers that count.
      given: of each picture.
      threads: one a core, up to `MAX_THREADS`, if left out; 1 for functions that only one may call
        at a time.
    """
    number = len(given[0])
    mine = range(number)[jax.process_index() :: jax.process_count()]
    values = np.zeros((number, len(names)))
    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        said = pool.map(function, *([each[i] for i in mine] for each in given))
        for i, found in zip(mine, said, strict=True):
            values[i] = [np.nan if found.get(name) is None else found[name] for name in names]
    # As bits, for JAX would round float64.
    bits = multihost_utils.process_allgather(values.view(np.uint32))
    shares = np.asarray(bits).reshape(-1, number, 2 * len(names)).view(np.float64)
    for process, share in enumerate(shares):
        values[process :: len(shares)] = share[process :: len(shares)]
    return Scores({name: _column(column) for name, column in zip(names, values.T, strict=True)})


def _column(values: Float[np.ndarray, " n"]) -> Column:
    return [None if np.isnan(value) else float(value) for value in values]


def judge_pixels(outputs: Outputs) -> Scores:
    """Errors, PSNR and SSIM to the truth; `metrics.pixels`."""

    def look(image: RGBImage, truth: RGBImage | None) -> dict[str, float | None]:
        if truth is None:
            return {}
        # A picture that is right to the last bit has no finite PSNR; 100 dB are beyond 8 bits.
        found = {
            "l1": pixels.l1(image, truth),
            "l2": pixels.l2(image, truth),
            "psnr": min(pixels.psnr(image, truth), 100.0),
        }
        if min(image.shape[:2]) >= pixels.WINDOW:
            found["ssim"] = pixels.ssim(image, truth)
        return found

    names = ("l1", "l2", "psnr", "ssim")
    return by_picture(look, names, outputs.images, outputs.truths)


def judge_world(outputs: Outputs) -> Scores:
    """Whether the world's checker reads what was asked for, and all else kept; 1 is yes.

    It reads pictures of the truth's size alone.
    """

    def look(image: RGBImage, task: Task) -> dict[str, float | None]:
        if task.truth is None or task.truth.shape != image.shape:
            return {}
        verdict = checker.check(image, task.details)
        said = {"edit_success": verdict.edited, "preservation": verdict.preserved}
        return {name: None if value is None else float(value) for name, value in said.items()}

    return by_picture(look, ("edit_success", "preservation"), outputs.images, outputs.tasks)


def judge_drift(outputs: Outputs) -> Scores:
    """How far pictures have moved, grown and changed colour where they were to stay as they were.

    That is where truth and context are the same: everywhere, in a probe.
    """

    def look(
        image: RGBImage, truth: RGBImage | None, context: RGBImage | None
    ) -> dict[str, float | None]:
        if truth is None or context is None:
            return {}
        far = np.abs(truth.astype(np.int16) - context) > UNCHANGED
        apart = far[..., 0] | far[..., 1] | far[..., 2]
        kept = None if not apart.any() else ~apart
        found: dict[str, float | None] = {}
        if not apart.all():
            found["colour_drift"] = float(np.abs(colour_drift(image, truth, kept)).mean())
        try:
            moved = drift(image, truth, kept)
        except ValueError:  # nothing to hold on to
            return found
        found["shift"] = float(np.hypot(*moved.shift))
        if moved.tiles >= MIN_TILES:
            found["zoom"] = 100 * abs(moved.scale - 1)  # outwards and inwards must not cancel out
        return found

    names = ("shift", "zoom", "colour_drift")
    return by_picture(look, names, outputs.images, outputs.truths, outputs.contexts)


class Remembered:
    """Vectors of images that many cells of a set are compared with."""

    def __init__(self, features: Callable[[Sequence[RGBImage]], np.ndarray]):
        self._features = features
        self._known: dict[tuple, np.ndarray] = {}

    def __call__(self, outputs: Outputs, role: str) -> tuple[list[int], np.ndarray]:
        """(places of the tasks that have such an image, their vectors), of truths or contexts."""
        images = getattr(outputs, role)
        places = [i for i, image in enumerate(images) if image is not None]
        key = (outputs.name, role, tuple(outputs.sizes), len(places))
        if places and key not in self._known:
            self._known[key] = self._features([images[i] for i in places])
        return places, self._known.get(key, np.zeros((0, 1), np.float32))


def _features(network, mesh: Mesh) -> Callable[[Sequence[RGBImage]], np.ndarray]:
    return lambda images: pooled_features(network, images, mesh)


class FeatureJudge:
    """A network's vectors: their cosines with truths' and contexts', and distances of the sets.

    Distances are of the last picture of each session.
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
        """``similarity``, ``fd`` and ``kid`` are what its numbers are called; "" for no cosines."""
        self._similarity = name if similarity is None else similarity
        self._fd, self._kid = fd or f"fd_{name}", kid
        self._features, self._remembered = features, Remembered(features)

    def __call__(self, outputs: Outputs) -> Scores:
        places, truths = self._remembered(outputs, "truths")
        if not self._similarity and not places:
            return Scores({})
        made = self._features(outputs.images)
        columns = {}
        if self._similarity:
            columns[self._similarity] = _cosines(made, places, truths)
            columns[f"{self._similarity}_context"] = _cosines(
                made, *self._remembered(outputs, "contexts")
            )
        # Pictures of one session are not independent.
        followed = {task.follows for task in outputs.tasks}
        kept = [i for i, place in enumerate(places) if outputs.tasks[place].id not in followed]
        whole = {}
        if len(kept) > 1:
            ends = made[[places[i] for i in kept]]
            whole[self._fd] = frechet_distance(truths[kept], ends)
            whole[self._kid] = kernel_distance(truths[kept], ends)[0]
        return Scores(columns, whole)


def _cosines(made: np.ndarray, places: Sequence[int], others: np.ndarray) -> Column:
    column: Column = [None] * len(made)
    if places:
        for place, value in zip(places, cosine(made[places], others), strict=True):
            column[place] = float(value)
    return column


class ClipJudge:
    """CLIP: pictures against truths, contexts and words."""

    def __init__(self, clip: Clip, mesh: Mesh):
        self._clip, self._mesh = clip, mesh
        self._remembered = Remembered(lambda images: clip.image(images, mesh))

    def __call__(self, outputs: Outputs) -> Scores:
        made = self._clip.image(outputs.images, self._mesh)
        truths = self._remembered(outputs, "truths")
        places, contexts = self._remembered(outputs, "contexts")
        wanted = [
            task.target_caption or ("" if task.contexts else task.prompt) for task in outputs.tasks
        ]
        described = [i for i, text in enumerate(wanted) if text]
        columns = {
            "clip_i": _cosines(made, *truths),
            "clip_i_context": _cosines(made, places, contexts),
            "clip_t": [None] * len(made),
            "clip_dir": [None] * len(made),
        }
        if not described:
            return Scores(columns)
        texts = self._clip.text([wanted[i] for i in described], self._mesh)
        columns["clip_t"] = _cosines(made, described, texts)
        text_of = dict(zip(described, texts, strict=True))
        context_of = dict(zip(places, contexts, strict=True))
        captioned = [i for i in described if i in context_of and outputs.tasks[i].source_caption]
        if not captioned:
            return Scores(columns)
        texts = self._clip.text([outputs.tasks[i].source_caption for i in captioned], self._mesh)
        before_of = dict(zip(captioned, texts, strict=True))
        # Captions that CLIP cannot tell apart ask for no direction.
        apart = 1 - cosine(texts, np.stack([text_of[i] for i in captioned]))
        changed = [i for i, gap in zip(captioned, apart, strict=True) if gap > SAME]
        if changed:
            values = clip_directional(
                made[changed],
                *(np.stack([of[i] for i in changed]) for of in (context_of, text_of, before_of)),
            )
            for i, value in zip(changed, values, strict=True):
                columns["clip_dir"][i] = float(value)
        return Scores(columns)


class LpipsJudge:
    """LPIPS to the truth."""

    def __init__(self, name: str, network: Lpips, mesh: Mesh):
        self._name, self._network, self._mesh = name, network, mesh
        self._smallest = TRUNKS[network.config.net].smallest

    def __call__(self, outputs: Outputs) -> Scores:
        column: Column = [None] * len(outputs.tasks)
        places = [
            i
            for i, truth in enumerate(outputs.truths)
            if truth is not None and min(outputs.sizes[i]) >= self._smallest
        ]
        pairs = [np.stack([outputs.images[i], outputs.truths[i]]) for i in places]
        sizes = [outputs.sizes[i] for i in places]
        at_once = {size: min(sizes.count(size), 16) for size in set(sizes)}
        found = over_batches(
            lambda _, batch: _lpips(self._network, batch), pairs, sizes, at_once, self._mesh
        )
        for place, value in zip(places, found, strict=True):
            column[place] = float(value)
        return Scores({self._name: column})


@jax.jit
def _lpips(network: Lpips, pairs: UInt8[Array, "B 2 h w 3"]) -> Float[Array, " B"]:
    with jax.default_matmul_precision("highest"):
        return network(to_pixels(pairs[:, 0]), to_pixels(pairs[:, 1]))


class FaceJudge:
    """Whether the largest face is still there, and the same one's.

    One thread asks: dlib's networks hold what they compute, and onnxruntime takes all cores itself.
    """

    def __init__(self, encoder: IdentityEncoder):
        self._encoder, self._metric = encoder, encoder.metric
        self._known: dict[int, tuple[RGBImage, np.ndarray | None]] = {}

    def __call__(self, outputs: Outputs) -> Scores:
        def look(image: RGBImage, task: Task) -> dict[str, float | None]:
            before = self._of_context(task.contexts[0]) if task.contexts else None
            if before is None:
                return {}
            after = self._encoder.embed(image)
            if after is None:
                return {f"{self._metric}_found": 0.0}
            similarity = self._encoder.similarity(before, after)
            return {self._metric: similarity, f"{self._metric}_found": 1.0}

        names = (self._metric, f"{self._metric}_found")
        return by_picture(look, names, outputs.images, outputs.tasks, threads=1)

    def _of_context(self, image: RGBImage) -> np.ndarray | None:
        """Tasks share images. The image is kept too: what is gone might lend its id to another."""
        if id(image) not in self._known:
            self._known[id(image)] = image, self._encoder.embed(image)
        return self._known[id(image)][1]


class OcrJudge:
    """Whether the words that a picture should show can be read, among others or alone.

    One thread asks: the reader keeps state, and onnxruntime takes all cores itself.
    """

    def __init__(self, reader: Reader):
        self._reader = reader

    def __call__(self, outputs: Outputs) -> Scores:
        def look(image: RGBImage, task: Task) -> dict[str, float | None]:
            if not task.words:
                return {}
            read = self._reader.read(image)
            return {
                "ocr_contains": float(contains(read, task.words)),
                "ocr_accuracy": accuracy(read, task.words),
            }

        names = ("ocr_contains", "ocr_accuracy")
        return by_picture(look, names, outputs.images, outputs.tasks, threads=1)
