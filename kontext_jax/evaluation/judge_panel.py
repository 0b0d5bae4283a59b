"""The judges of a sweep: their settings, and their networks from local files."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from kontext_jax.evaluation.judges import Judge, judge_drift, judge_pixels, judge_world
from kontext_jax.evaluation.network_judges import (
    ClipJudge,
    DistanceJudge,
    FaceJudge,
    FeatureJudge,
    OcrJudge,
)
from kontext_jax.files import sha256_of
from kontext_jax.loading.models import load_distance
from kontext_jax.metrics.faces import AuraFace, DlibFaces
from kontext_jax.metrics.ocr import Reader
from kontext_jax.models.dino import Dino, DinoConfig
from kontext_jax.models.efficientnet import EfficientNetConfig
from kontext_jax.models.features import pooled_features
from kontext_jax.models.lpips import TRUNKS
from kontext_jax.models.perceptual import PerceptualConfig
from kontext_jax.settings import Settings, check_choices, to_dict
from kontext_jax.types import RGBImage
from kontext_jax.weights.clip_vision import load_clip
from kontext_jax.weights.efficientnet import load_lite0
from kontext_jax.weights.inception import is_fid, load_inception
from kontext_jax.weights.loading import load
from kontext_jax.weights.lpips import load_lpips
from kontext_jax.weights.reading import open_folder

VERSION = 1
"""Version of the metrics. Raise it when a change here or in ``metrics`` changes any score: all
images are then re-scored."""

FD_INPUT = 128
"""Side of EfficientNet-Lite0's input in pixels. It was trained at 224; images of 32 lose nothing at
128, at a third of the time. Distances at other sides are not comparable."""

DLIB_PACKAGES = ("dlib-bin", "dlib", "face-recognition-models")
OCR_PACKAGES = ("rapidocr-onnxruntime",)
LPIPS_PACKAGES = ("lpips",)
"""Packages that ship code and weights; another version is another judge."""

WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".json", ".txt")
"""Suffixes of the files that networks read from a judge's folder."""


@dataclass(kw_only=True, unsafe_hash=True)
class JudgesConfig(Settings):
    """Judges to use besides pixels, the toy world's checker and drift, which always run.

    Attributes:
      efflite0: EfficientNet-Lite0, from the extra ``eval``: a stand-in where nothing can be loaded.
      distance: whether EfficientNet-Lite0 also stands in for LPIPS, as ``distance_efflite0``, see
        `models.perceptual`. It takes as long as two more passes through the network.
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
    distance: bool = False
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
        if self.distance and not self.efflite0:
            raise ValueError("judges.distance needs EfficientNet-Lite0: set judges.efflite0=True.")


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
            judges.append(lite0_judge(mesh, similarity="efflite0"))
            if config.distance:
                distance = PerceptualConfig(input_size=FD_INPUT)
                judges.append(DistanceJudge(distance.metric, load_distance(distance, mesh), mesh))
        except FileNotFoundError as error:
            left_out["efflite0"] = str(error)
    if config.inception:
        judges.append(inception_judge(Path(config.inception), mesh))
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


def lite0_judge(mesh: Mesh, similarity: str = "") -> FeatureJudge:
    """EfficientNet-Lite0's distances and, if ``similarity`` names them, cosines.

    Raises:
      FileNotFoundError: its package is not installed.
    """
    network = load_lite0(mesh, EfficientNetConfig.lite0(input_size=FD_INPUT))
    features = _features(network, mesh)
    return FeatureJudge("efflite0", features, similarity=similarity, kid="kid_efflite0")


def inception_judge(path: Path, mesh: Mesh) -> FeatureJudge:
    """InceptionV3's distances, called FID and KID only if the file is that of pytorch-fid.

    Raises:
      FileNotFoundError, ValueError: the file is missing, or holds another network.
    """
    features = _features(load_inception(path, mesh), mesh)
    fd, kid = ("fid", "kid") if is_fid(path) else ("fd_inception", "kid_inception")
    return FeatureJudge("inception", features, similarity="", fd=fd, kid=kid)


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


def _features(network, mesh: Mesh) -> Callable[[Sequence[RGBImage]], np.ndarray]:
    return lambda images: pooled_features(network, images, mesh)
