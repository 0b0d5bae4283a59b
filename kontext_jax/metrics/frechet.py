"""The Frechet distance between two sets of feature vectors (Heusel et al., arXiv 1706.08500).

Each set is modelled as a normal distribution with its mean ``m`` and covariance ``C``. The distance
between two of them, which is the squared 2-Wasserstein distance, is (Dowson and Landau 1982)

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

The features determine its name: FID for those of its authors' InceptionV3, ``fd_efflite0`` for
EfficientNet-Lite0's (`weights/efficientnet.py`). Distances from different features are not
comparable, nor are distances from different numbers of samples: fewer samples give a larger
distance.
"""

import numpy as np
from jaxtyping import Float


def frechet_distance(first: Float[np.ndarray, "n D"], second: Float[np.ndarray, "m D"]) -> float:
    """Returns the distance, in squared units of the features; computed in float64.

    Covariances are unbiased, as in FID's reference code, and never formed. With the centred
    vectors, divided by the square root of their number minus one, as rows of ``X = Q R``, ``C`` is
    ``R^T R``, so the trace of the matrix square root is the sum of the singular values of
    ``R1 R2^T``. Their rounding errors are relative to the largest. Eigenvalues of ``C1 C2`` would
    lose half of the digits in the square root, and can be negative or complex if there are fewer
    samples than features.

    Raises:
      ValueError: a set has fewer than two samples, or features are not finite.
    """
    sets = [np.asarray(vectors, np.float64) for vectors in (first, second)]
    for vectors in sets:
        if len(vectors) < 2:
            raise ValueError(
                f"A Frechet distance needs at least two samples per set, not {len(vectors)}."
            )
        if not np.isfinite(vectors).all():
            raise ValueError("A Frechet distance needs finite features, and some are not.")
    means = [vectors.mean(axis=0) for vectors in sets]
    roots = [
        np.linalg.qr((vectors - mean) / np.sqrt(len(vectors) - 1), mode="r")
        for vectors, mean in zip(sets, means, strict=True)
    ]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    separation = np.square(means[0] - means[1]).sum()
    distance = separation + sum(np.square(root).sum() for root in roots) - 2 * overlap
    return max(float(distance), 0.0)  # rounding can make it negative for equal sets
