"""The Frechet distance between two sets of feature vectors (Heusel et al., arXiv 1706.08500).

Each set is taken for a normal distribution of its mean ``m`` and covariance ``C``. The distance of
two of them, which is the squared 2-Wasserstein distance, is (Dowson and Landau 1982)

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

What it is called depends on the features: FID if they are those of the InceptionV3 that its authors
took, ``fd_efflite0`` if they are EfficientNet-Lite0's (`weights/efficientnet.py`). Distances of
different features do not compare, nor do those of different numbers of samples: the fewer they are,
the larger is the distance.
"""

import numpy as np
from jaxtyping import Float


def frechet_distance(first: Float[np.ndarray, "n D"], second: Float[np.ndarray, "m D"]) -> float:
    """The distance, in squares of the features' unit; computed in float64.

    Covariances are unbiased, as in the reference code of FID, and never written down. With the
    centred vectors, over the root of their number less one, as rows of ``X = Q R``, ``C`` is
    ``R^T R``; so the trace of the root is the sum of the singular values of ``R1 R2^T``. These are
    exact to the last digits of the largest. The eigenvalues of ``C1 C2`` lose half of the digits to
    the root, and may be negative or complex where there are fewer samples than features.

    Raises:
      ValueError: there are fewer than two samples of either, or features are not finite.
    """
    sets = [np.asarray(vectors, np.float64) for vectors in (first, second)]
    for vectors in sets:
        if len(vectors) < 2:
            raise ValueError(
                f"A Frechet distance needs two samples or more of either set, not {len(vectors)}."
            )
        if not np.isfinite(vectors).all():
            raise ValueError("A Frechet distance needs finite features, and some are not.")
    means = [vectors.mean(axis=0) for vectors in sets]
    roots = [
        np.linalg.qr((vectors - mean) / np.sqrt(len(vectors) - 1), mode="r")
        for vectors, mean in zip(sets, means, strict=True)
    ]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    apart = np.square(means[0] - means[1]).sum()
    distance = apart + sum(np.square(root).sum() for root in roots) - 2 * overlap
    return max(float(distance), 0.0)  # of equal sets it is zero but for rounding
