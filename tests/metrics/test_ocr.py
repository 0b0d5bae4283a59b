"""OCR scores against edits counted by hand; the reader on words drawn by Pillow."""

import re
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from kontext_jax.metrics.ocr import Reader, accuracy, contains, normalise, reading_order


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Choose joy", "choosejoy"),
        (" SALE\n50%\t", "sale50%"),
        ("５０％，ＯＫ", "50%,ok"),
        ("“don’t” – a…", '"don\'t"-a...'),
        ("STRASSE", normalise("straße")),
        ("e\u0301", "é"),
    ],
)
def test_normalise_removes_case_spaces_and_width_variants(text, plain):
    assert normalise(text) == plain


def test_punctuation_counts():
    assert accuracy("50", "50%") == pytest.approx(2 / 3) and not contains("50 off", "50% off")


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("hello", "HELLO", 1),
        ("", "HELLO", 0),
        ("xyz", "HELLO", 0),  # all replaced, two inserted
        ("hell", "hello", 4 / 5),  # inserted
        ("hello world", "hello", 1 / 2),  # five dropped of ten
        ("hallo", "hello", 4 / 5),  # replaced
        ("kitten", "sitting", 1 - 3 / 7),
        ("sunday", "saturday", 1 - 3 / 8),
        ("ehllo", "hello", 3 / 5),  # a swap is two edits
    ],
)
def test_accuracy_is_one_minus_edits_over_the_longer_length(read, target, expected):
    assert accuracy(read, target) == pytest.approx(expected, abs=1e-15)
    if read:
        assert accuracy(target, read) == pytest.approx(expected, abs=1e-15)


def test_the_edit_distance_is_minimal():
    """Compared with a search over all alignments of two texts."""

    def fewest(a, b):
        if not a or not b:
            return len(a) + len(b)
        options = fewest(a[1:], b) + 1, fewest(a, b[1:]) + 1, fewest(a[1:], b[1:]) + (a[0] != b[0])
        return min(options)

    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(1, 6))) for _ in range(2))
        expected = 1 - fewest(a, b) / max(len(a), len(b))
        assert accuracy(a, b) == pytest.approx(expected, abs=1e-15), (a, b)


def test_contains_ignores_surrounding_words_but_no_error():
    assert contains("GRAND\nOPENING today", "Grand opening")
    assert not contains("GRAND\nOPENINC today", "Grand opening")
    assert not contains("", "Grand opening")


@pytest.mark.parametrize("score", [accuracy, contains])
def test_empty_expected_text_is_rejected(score):
    with pytest.raises(ValueError, match="The expected text is empty: give the words"):
        score("hello", " \n")


def box(left: float, top: float, width: float = 30, height: float = 10) -> list[list[float]]:
    right, bottom = left + width, top + height
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def order(*boxes) -> list[list[int]]:
    return reading_order(np.array(boxes, np.float64))


def test_slightly_offset_boxes_share_a_line():
    boxes = [box(50, 34), box(0, 31), box(80, 2), box(40, -2), box(0, 0), box(0, 60)]
    assert order(*boxes) == [[4, 3, 2], [1, 0], [5]]
    assert order(*boxes[::-1]) == [[1, 2, 3], [4, 5], [0]]


def test_small_text_next_to_large_text_shares_its_line():
    assert order(box(100, 0, 20, 8), box(0, 0, 90, 60), box(100, 80, 20, 8)) == [[1, 0], [2]]


def test_a_slanted_box_extends_over_all_its_corners():
    slanted = [[0, 0], [100, 20], [98, 30], [-2, 10]]  # its middle is at 15
    assert order(box(110, 22), slanted) == [[1, 0]]
    assert order(box(110, 26), slanted) == [[1], [0]]


def test_a_missing_package_is_reported_with_its_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    message = re.escape("pip install -e '.[ocr]'")
    with pytest.raises(ImportError, match=f"needs rapidocr-onnxruntime .*{message}"):
        Reader()


class FakeOcr:
    """Stands in for RapidOCR: records its input and returns `boxes`."""

    boxes = None

    def __call__(self, image):
        self.image = image
        return self.boxes, None


@pytest.fixture
def fake_reader(monkeypatch):
    module = type(sys)("rapidocr_onnxruntime")
    module.RapidOCR = FakeOcr
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
    return Reader()


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((64, 96), (256, 384)), ((300, 64), (1200, 256)), ((256, 300), (256, 300))],
)
def test_small_images_are_enlarged_and_all_get_a_border(fake_reader, size, enlarged):
    image = np.full((*size, 3), (10, 20, 200), np.uint8)
    assert fake_reader.read(image) == ""
    fed = fake_reader._read.image
    height, width = enlarged
    assert fed.shape == (height + 128, width + 128, 3) and fed.dtype == np.uint8
    assert (fed[64:-64, 64:-64] == (200, 20, 10)).all()  # BGR
    assert fed.astype(int).sum() == height * width * 230 + (fed.size - height * width * 3) * 255


def test_boxes_are_joined_in_reading_order(fake_reader):
    texts = [("c", box(0, 50)), ("b", box(40, 2)), ("a", box(0, 0))]
    fake_reader._read.boxes = [[corners, text, 0.9] for text, corners in texts]
    assert fake_reader.read(np.zeros((8, 8, 3), np.uint8)) == "a b\nc"


def drawn(text: str, size: int, colours=("white", "black")) -> np.ndarray:
    image = Image.new("RGB", (size, size), colours[0])
    font = ImageFont.load_default(size // (4 if len(text) < 8 else 6))
    centre = (size / 2, size / 2)
    ImageDraw.Draw(image).multiline_text(centre, text, colours[1], font, anchor="mm")
    return np.asarray(image)


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr_onnxruntime", reason="needs rapidocr-onnxruntime==1.4.4")
    return Reader()


@pytest.mark.parametrize("text", ["HELLO", "Choose joy", "SALE 50%", "FREE\nWIFI", "OPEN 24/7"])
def test_the_reader_reads_drawn_words_exactly(reader, text):
    read = reader.read(drawn(text, 256))
    assert accuracy(read, text) == 1.0 and contains(read, text)
    assert read.count("\n") == text.count("\n")


def test_the_reader_handles_small_coloured_and_tightly_cropped_images(reader):
    assert accuracy(reader.read(drawn("COOL", 64)), "COOL") == 1.0
    assert accuracy(reader.read(drawn("COOL", 256, ("navy", "yellow"))), "COOL") == 1.0
    assert reader.read(np.full((256, 256, 3), 90, np.uint8)) == ""
    columns = np.flatnonzero((drawn("STREET", 256).min(axis=2) < 128).any(axis=0))
    tight = drawn("STREET", 256)[:, columns[0] : columns[-1] + 1]
    assert accuracy(reader.read(tight), "STREET") == 1.0


def test_the_reader_detects_a_wrong_letter(reader):
    read = reader.read(drawn("HALLO", 256))
    assert accuracy(read, "HELLO") == pytest.approx(0.8) and not contains(read, "HELLO")
