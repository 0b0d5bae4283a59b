"""How alike vectors are of pictures and of texts; what papers of editing call CLIP-I and the like.

All are cosines of a feature network's vectors, in [-1, 1], a row a picture; their mean over a set
is what tables show, sometimes times 100. Names say whose vectors, and of what:

    CLIP-I    the made picture, and the true one           CLIP's image encoder
    CLIP-T    the made picture, and the caption it should  CLIP's image and text encoders
              have (MagicBrush, arXiv 2306.10012; Emu
              Edit, arXiv 2311.10089, calls it CLIPout)
    DINO      the made picture, and the true one           class tokens of a DINO
    CLIPdir   how the picture has changed, and how its     CLIP's image and text encoders
              caption

Emu Edit has no true pictures, and so takes CLIP-I and DINO against the picture before the edit.
MagicBrush takes ViT-B/32 for CLIP, and the first DINO's ViT-S/16 for DINO. Scores of other networks
do not compare with these, and are to be reported with the network's name.
"""

import numpy as np
from jaxtyping import Float

SAME = 1e-5
"""Between unit vectors; those that lie closer differ by rounding alone."""

Vectors = Float[np.ndarray, "_ _"]


def cosine(a: Vectors, b: Vectors) -> Float[np.ndarray, " _"]:
    """The cosine of the angle between each row of ``a`` and the same row of ``b``, in float64.

    Raises:
      ValueError: shapes differ, or a row is zero or not finite.
    """
    _check_shapes(a, b)
    return _dot(_unit(a), _unit(b))


def clip_directional(
    image_after: Vectors, image_before: Vectors, text_after: Vectors, text_before: Vectors
) -> Float[np.ndarray, " _"]:
    """Whether pictures have changed as their captions have: the cosine of both changes, in float64.

    A change is the difference of unit vectors (StyleGAN-NADA, arXiv 2108.00946; InstructPix2Pix,
    arXiv 2211.09800). A picture that has not changed at all has gone nowhere, and gets 0.

    Args:
      image_after, image_before: CLIP's vectors of pictures, a row an edit; of any length.
      text_after, text_before: of their captions.

    Raises:
      ValueError: shapes differ, a row is zero or not finite, or a caption is the same before and
        after, which asks for no direction.
    """
    _check_shapes(image_after, image_before, text_after, text_before)
    image = _unit(image_after) - _unit(image_before)
    text = _unit(text_after) - _unit(text_before)
    same = np.flatnonzero(np.linalg.norm(text, axis=1) < SAME).tolist()
    if same:
        raise ValueError(
            f"The captions of rows {same} are the same before and after, and give no direction: "
            "leave these rows out."
        )
    length = np.linalg.norm(image, axis=1)
    direction = image / np.maximum(length, SAME)[:, None]
    return np.where(length < SAME, 0.0, _dot(direction, _unit(text)))


def _dot(a: Vectors, b: Vectors) -> Float[np.ndarray, " _"]:
    return np.clip((a * b).sum(axis=1), -1.0, 1.0)


def _unit(vectors: Vectors) -> Vectors:
    """Each row over its length, in float64."""
    x = vectors.astype(np.float64)
    length = np.linalg.norm(x, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(length) & (length > 0))).tolist()
    if wrong:
        raise ValueError(f"Vectors without a direction have no cosine: rows {wrong} are 0 or nan.")
    return x / length[:, None]


def _check_shapes(first: Vectors, *others: Vectors) -> None:
    wrong = [x.shape for x in others if x.shape != first.shape]
    if wrong:
        raise ValueError(f"Vectors of {first.shape} and {wrong[0]} do not go row by row.")
