"""Text in images: OCR, and scores of the recognised text against the expected text.

`Reader` is PP-OCRv4, which detects lines of text and reads Latin letters and Chinese, from the
package rapidocr-onnxruntime 1.4.4 (Apache-2.0) with its weights. Scores from other readers are not
comparable. It misreads some well-drawn words, so report the reference images' mean next to a
model's.

The main score is `accuracy`, the normalised edit similarity: it is graded, and penalises both
missing and additional text. `contains` is stricter about the expected words and ignores all others;
it is for images that may correctly show more text than the task mentions.
"""

import unicodedata

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

MIN_SIDE = 256
"""Least shorter side in pixels: smaller images, whose letters are often misread, are enlarged."""

BORDER = 64
"""White pixels added on each side. Of 168 words that touch the edge of their image, 162 are read
exactly with the border and 154 without."""

LOOK_ALIKES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212\u3002", "''\"\"---.")
"""Curly quotes, dashes and the Chinese full stop, which the reader confuses with ASCII ones."""


class Reader:
    """Reads the text in images, on CPU: 0.1 to 1 s per image."""

    def __init__(self):
        """Loads the networks.

        Raises:
          ImportError: rapidocr-onnxruntime is not installed.
        """
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"Reading text needs rapidocr-onnxruntime ({error}): pip install -e '.[ocr]'"
            ) from error
        self._read = RapidOCR()

    def read(self, image: UInt8[np.ndarray, "h w 3"]) -> str:
        """Returns all text of an RGB image, from top to bottom and left to right.

        Images whose shorter side is below `MIN_SIDE` are enlarged to it; all get a `BORDER`.

        Returns:
          The lines, joined by "\\n"; separate boxes on a line are joined by a space. Empty if no
          text is found.
        """
        boxes, _ = self._read(_prepare(image)[..., ::-1])  # RapidOCR expects BGR
        if not boxes:
            return ""
        texts = [text for _, text, _ in boxes]
        lines = reading_order(np.array([corners for corners, *_ in boxes], np.float64))
        return "\n".join(" ".join(texts[i] for i in line) for line in lines)


def _prepare(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    height, width = image.shape[:2]
    scale = max(1, MIN_SIDE / min(height, width))
    size = (round(scale * width), round(scale * height))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    return np.pad(np.asarray(resized), [(BORDER, BORDER)] * 2 + [(0, 0)], constant_values=255)


def reading_order(corners: Float[np.ndarray, "n 4 2"]) -> list[list[int]]:
    """Groups boxes into lines and returns their indices, top to bottom and left to right.

    The topmost remaining box, by its middle, starts a line. Another box belongs to the line if the
    middle of either of the two lies within the height of the other.

    Args:
      corners: (x, y) of each box's corners in pixels; y points down.
    """
    top, bottom = corners[..., 1].min(axis=1), corners[..., 1].max(axis=1)
    left, middle = corners[..., 0].min(axis=1), (top + bottom) / 2
    lines: list[list[int]] = []

    def on_one_line(i: int, j: int) -> bool:
        return bool(middle[i] < bottom[j] or middle[j] > top[i])

    for i in np.argsort(middle, kind="stable").tolist():
        if lines and on_one_line(i, lines[-1][0]):
            lines[-1].append(i)
        else:
            lines.append([i])
    return [sorted(line, key=left.__getitem__) for line in lines]


def normalise(text: str) -> str:
    """Normalises text for comparison: case, white space, and width and shape variants of signs.

    Readers drop spaces ("SALE50%"), confuse O and o, and return full-width signs. Punctuation is
    kept: 50 % is not 50.
    """
    plain = unicodedata.normalize("NFKC", text).translate(LOOK_ALIKES)
    return "".join(plain.casefold().split())


def accuracy(read: str, expected: str) -> float:
    """Returns 1 minus the edit distance over the length of the longer text; 1 is best, 0 worst.

    This is the 1-N.E.D. of ICDAR 2019's competitions (arXiv 1909.07145) and of AnyText
    (arXiv 2311.03054), for `normalise`d texts. The distance is Levenshtein's: the minimum number of
    characters to insert, delete or replace.

    Raises:
      ValueError: the expected text is empty.
    """
    read, expected = normalise(read), _normalise_expected(expected)
    return 1 - _edit_distance(read, expected) / max(len(read), len(expected))


def contains(read: str, expected: str) -> bool:
    """Returns whether the text that was read contains the expected text, both `normalise`d.

    Raises:
      ValueError: the expected text is empty.
    """
    return _normalise_expected(expected) in normalise(read)


def _normalise_expected(expected: str) -> str:
    plain = normalise(expected)
    if not plain:
        raise ValueError("The expected text is empty: give the words that the image should show.")
    return plain


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))  # distances from a prefix of `a` to every prefix of `b`
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]
