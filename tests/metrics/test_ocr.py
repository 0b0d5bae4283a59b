"""The scores against counts by hand; the reader on words that Pillow draws."""

import re
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from kontext_jax.metrics.ocr import Reader, accuracy, contains, in_lines, normalise


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
def test_text_is_compared_without_case_space_and_width(text, plain):
    assert normalise(text) == plain


def test_signs_count():
    assert accuracy("50", "50%") == pytest.approx(2 / 3) and not contains("50 off", "50% off")


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
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
def test_accuracy_is_one_less_edits_over_the_longer_text(read, wanted, expected):
    assert accuracy(read, wanted) == pytest.approx(expected, abs=1e-15)
    if read:
        assert accuracy(wanted, read) == pytest.approx(expected, abs=1e-15)


def test_edits_are_the_fewest():
    """Against all ways to align two texts: each is a common subsequence, and the rest is edited."""

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


def test_contained_words_are_whole_and_may_stand_among_others():
    assert contains("GRAND\nOPENING today", "Grand opening")
    assert not contains("GRAND\nOPENINC today", "Grand opening")
    assert not contains("", "Grand opening")


@pytest.mark.parametrize("score", [accuracy, contains])
def test_no_words_cannot_be_scored(score):
    with pytest.raises(ValueError, match="There are no words that the picture should have"):
        score("hello", " \n")


def box(left: float, top: float, width: float = 30, height: float = 10) -> list[list[float]]:
    right, bottom = left + width, top + height
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def order(*boxes) -> list[list[int]]:
    return in_lines(np.array(boxes, np.float64))


def test_boxes_are_read_line_by_line_though_they_are_not_level():
    boxes = [box(50, 34), box(0, 31), box(80, 2), box(40, -2), box(0, 0), box(0, 60)]
    assert order(*boxes) == [[4, 3, 2], [1, 0], [5]]
    assert order(*boxes[::-1]) == [[1, 2, 3], [4, 5], [0]]


def test_small_text_beside_large_is_on_its_line():
    assert order(box(100, 0, 20, 8), box(0, 0, 90, 60), box(100, 80, 20, 8)) == [[1, 0], [2]]


def test_a_slanted_box_reaches_over_all_its_corners():
    slanted = [[0, 0], [100, 20], [98, 30], [-2, 10]]  # its middle is at 15
    assert order(box(110, 22), slanted) == [[1, 0]]
    assert order(box(110, 26), slanted) == [[1], [0]]


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    message = re.escape("pip install -e '.[ocr]'")
    with pytest.raises(ImportError, match=f"needs rapidocr-onnxruntime .*{message}"):
        Reader()


class Listener:
    """In place of the package: keeps what it is given, and says nothing or `found`."""

    found = None

    def __call__(self, image):
        self.image = image
        return self.found, None


@pytest.fixture
def listener(monkeypatch):
    module = type(sys)("rapidocr_onnxruntime")
    module.RapidOCR = Listener
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
    return Reader()


@pytest.mark.parametrize(
    ("size", "larger"), [((64, 96), (256, 384)), ((300, 64), (1200, 256)), ((256, 300), (256, 300))]
)
def test_small_pictures_are_enlarged_and_all_get_a_border(listener, size, larger):
    image = np.full((*size, 3), (10, 20, 200), np.uint8)
    assert listener.read(image) == ""
    given = listener._read.image
    height, width = larger
    assert given.shape == (height + 128, width + 128, 3) and given.dtype == np.uint8
    assert (given[64:-64, 64:-64] == (200, 20, 10)).all()  # BGR
    assert given.astype(int).sum() == height * width * 230 + (given.size - height * width * 3) * 255


def test_what_is_found_is_joined_in_reading_order(listener):
    texts = [("c", box(0, 50)), ("b", box(40, 2)), ("a", box(0, 0))]
    listener._read.found = [[corners, text, 0.9] for text, corners in texts]
    assert listener.read(np.zeros((8, 8, 3), np.uint8)) == "a b\nc"


def drawn(text: str, size: int, colours=("white", "black")) -> np.ndarray:
    image = Image.new("RGB", (size, size), colours[0])
    font = ImageFont.load_default(size // (4 if len(text) < 8 else 6))
    place = (size / 2, size / 2)
    ImageDraw.Draw(image).multiline_text(place, text, colours[1], font, anchor="mm")
    return np.asarray(image)


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr_onnxruntime", reason="needs rapidocr-onnxruntime==1.4.4")
    return Reader()


@pytest.mark.parametrize("text", ["HELLO", "Choose joy", "SALE 50%", "FREE\nWIFI", "OPEN 24/7"])
def test_the_reader_reads_drawn_words_exactly(reader, text):
    seen = reader.read(drawn(text, 256))
    assert accuracy(seen, text) == 1.0 and contains(seen, text)
    assert seen.count("\n") == text.count("\n")


def test_the_reader_reads_small_and_coloured_pictures_and_edges(reader):
    assert accuracy(reader.read(drawn("COOL", 64)), "COOL") == 1.0
    assert accuracy(reader.read(drawn("COOL", 256, ("navy", "yellow"))), "COOL") == 1.0
    assert reader.read(np.full((256, 256, 3), 90, np.uint8)) == ""
    columns = np.flatnonzero((drawn("STREET", 256).min(axis=2) < 128).any(axis=0))
    tight = drawn("STREET", 256)[:, columns[0] : columns[-1] + 1]
    assert accuracy(reader.read(tight), "STREET") == 1.0


def test_the_reader_sees_a_wrong_letter(reader):
    seen = reader.read(drawn("HALLO", 256))
    assert accuracy(seen, "HELLO") == pytest.approx(0.8) and not contains(seen, "HELLO")
