"""Cosine similarities between feature vectors of images and texts: CLIP-I, CLIP-T, DINO, CLIPdir.

Each is a cosine in [-1, 1], one row per image. Tables report the mean over a set, sometimes times
100. The usual names say which vectors are compared:

    CLIP-I    the sample and the reference image           CLIP's image encoder
    CLIP-T    the sample and its target caption            CLIP's image and text encoders
              (MagicBrush, arXiv 2306.10012; Emu Edit,
              arXiv 2311.10089, calls it CLIPout)
    DINO      the sample and the reference image           class tokens of a DINO
    CLIPdir   the change of the image and the change of    CLIP's image and text encoders
              its caption

Emu Edit has no reference images and computes CLIP-I and DINO against the image before the edit.
MagicBrush uses ViT-B/32 for CLIP, and the first DINO's ViT-S/16 for DINO. Scores from other
networks are not comparable with these and should be reported with the network's name.
"""

import numpy as np
from jaxtyping import Float

SAME = 1e-5
"""Distance between unit vectors below which they differ by rounding only."""

Vectors = Float[np.ndarray, "_ _"]


def cosine(a: Vectors, b: Vectors) -> Float[np.ndarray, " _"]:
    """Returns the cosine between each row of ``a`` and the same row of ``b``, in float64.

    Raises:
      ValueError: shapes differ, or a row is zero or not finite.
    """
    _check_shapes(a, b)
    return _dot(_unit(a), _unit(b))


def clip_directional(
    image_after: Vectors, image_before: Vectors, text_after: Vectors, text_before: Vectors
) -> Float[np.ndarray, " _"]:
    """Returns the cosine between the change of each image and the change of its caption.

    A change is a difference of unit vectors (StyleGAN-NADA, arXiv 2108.00946; InstructPix2Pix,
    arXiv 2211.09800). An unchanged image scores 0. Computed in float64.

    Args:
      image_after, image_before: CLIP's image vectors of any length, one row per edit.
      text_after, text_before: CLIP's text vectors of the captions.

    Raises:
      ValueError: shapes differ, a row is zero or not finite, or a caption is the same before and
        after, so that the text has no direction.
    """
    _check_shapes(image_after, image_before, text_after, text_before)
    image = _unit(image_after) - _unit(image_before)
    text = _unit(text_after) - _unit(text_before)
    same = np.flatnonzero(np.linalg.norm(text, axis=1) < SAME).tolist()
    if same:
        raise ValueError(
            f"The captions of rows {same} are the same before and after and have no direction: "
            "leave these rows out."
        )
    length = np.linalg.norm(image, axis=1)
    direction = image / np.maximum(length, SAME)[:, None]
    return np.where(length < SAME, 0.0, _dot(direction, _unit(text)))


def _dot(a: Vectors, b: Vectors) -> Float[np.ndarray, " _"]:
    return np.clip((a * b).sum(axis=1), -1.0, 1.0)


def _unit(vectors: Vectors) -> Vectors:
    """Normalises each row, in float64."""
    x = vectors.astype(np.float64)
    length = np.linalg.norm(x, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(length) & (length > 0))).tolist()
    if wrong:
        raise ValueError(f"Rows {wrong} are zero or not finite and have no cosine.")
    return x / length[:, None]


def _check_shapes(first: Vectors, *others: Vectors) -> None:
    wrong = [x.shape for x in others if x.shape != first.shape]
    if wrong:
        raise ValueError(f"Vectors must have the same shape, not {first.shape} and {wrong[0]}.")
