"""What a picture says: its words read back, and how near they are to the ones asked for.

`Reader` is PP-OCRv4, which finds lines of text and reads Latin letters and Chinese, as the package
rapidocr-onnxruntime 1.4.4 has it (Apache-2.0), with its weights. Numbers of other readers do not
compare. It misreads some words that are drawn well: report the true pictures' mean next to a
model's.

The headline is `accuracy`, the normalised edit similarity: it is graded, and it counts both what is
missing and what was written besides. `contains` is stricter with the words and blind to all others;
it is for pictures that rightly show more text than the task tells.
"""

import unicodedata

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

MIN_SIDE = 256
"""Of the picture that is read, in pixels; letters of smaller ones are often mistaken."""

BORDER = 64
"""Pixels of white around it. Of 168 words that touch their picture's edge, 162 are read exactly
with it, and 154 without."""

LOOK_ALIKES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212\u3002", "''\"\"---.")
"""Curly quotes, dashes and the Chinese full stop, which the reader mixes with the plain signs."""


class Reader:
    """Reads the text of pictures, on the CPU: 0.1 to 1 s each."""

    def __init__(self):
        """Loads the networks.

        Raises:
          ImportError: the package is not installed.
        """
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"Reading text needs rapidocr-onnxruntime ({error}): pip install -e '.[ocr]'"
            ) from error
        self._read = RapidOCR()

    def read(self, image: UInt8[np.ndarray, "h w 3"]) -> str:
        """All text of a picture of RGB, line by line from the top, each from the left.

        Pictures whose shorter side is under `MIN_SIDE` are enlarged to it; all get a `BORDER`.

        Returns:
          Lines, which "\\n" parts; what stands apart on a line has a space between. Empty where no
          text is found.
        """
        found, _ = self._read(_prepared(image)[..., ::-1])  # it takes BGR
        if not found:
            return ""
        texts = [text for _, text, _ in found]
        lines = in_lines(np.array([corners for corners, *_ in found], np.float64))
        return "\n".join(" ".join(texts[i] for i in line) for line in lines)


def _prepared(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    height, width = image.shape[:2]
    scale = max(1, MIN_SIDE / min(height, width))
    size = (round(scale * width), round(scale * height))
    large = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    return np.pad(np.asarray(large), [(BORDER, BORDER)] * 2 + [(0, 0)], constant_values=255)


def in_lines(corners: Float[np.ndarray, "n 4 2"]) -> list[list[int]]:
    """The order to read boxes in: their indices, line by line.

    The box with the highest middle starts a line. Another is on it if the middle of either of the
    two lies within the height of the other.

    Args:
      corners: (x, y) of each box's corners, in pixels, y downwards.
    """
    top, bottom = corners[..., 1].min(axis=1), corners[..., 1].max(axis=1)
    left, middle = corners[..., 0].min(axis=1), (top + bottom) / 2
    lines: list[list[int]] = []

    def level(i: int, j: int) -> bool:
        return bool(middle[i] < bottom[j] or middle[j] > top[i])

    for i in np.argsort(middle, kind="stable").tolist():
        if lines and level(i, lines[-1][0]):
            lines[-1].append(i)
        else:
            lines.append([i])
    return [sorted(line, key=left.__getitem__) for line in lines]


def normalise(text: str) -> str:
    """Text as it is compared: without case, white space, or widths and shapes of the same sign.

    Readers lose spaces ("SALE50%"), take O for o, and write full-width signs. Punctuation stays:
    50 % is not 50.
    """
    plain = unicodedata.normalize("NFKC", text).translate(LOOK_ALIKES)
    return "".join(plain.casefold().split())


def accuracy(read: str, wanted: str) -> float:
    """One less the edit distance over the length of the longer text; 1 at best, 0 at worst.

    This is the 1-N.E.D. of ICDAR 2019's competitions (arXiv 1909.07145) and of AnyText
    (arXiv 2311.03054), of `normalise`d texts. The distance is Levenshtein's: the fewest characters
    to insert, drop or replace.

    Raises:
      ValueError: no words are wanted.
    """
    read, wanted = normalise(read), _some(wanted)
    return 1 - _edit_distance(read, wanted) / max(len(read), len(wanted))


def contains(read: str, wanted: str) -> bool:
    """Whether the wanted words are among those that were read, without an error; `normalise`d.

    Raises:
      ValueError: no words are wanted.
    """
    return _some(wanted) in normalise(read)


def _some(wanted: str) -> str:
    plain = normalise(wanted)
    if not plain:
        raise ValueError("There are no words that the picture should have: give some.")
    return plain


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))  # distances of the part of `a` seen so far to each start of `b`
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]
