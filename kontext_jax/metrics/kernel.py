"""The kernel distance between two sets of feature vectors (Binkowski et al., arXiv 1801.01401).

It is the squared maximum mean discrepancy under the polynomial kernel, for vectors of D numbers,

    k(x, y) = (x . y / D + 1)^3,

estimated without a bias from m samples x and m samples y (Gretton et al. 2012, equation 3), so that
what is expected of it does not depend on m, and it may be below zero:

    sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / m^2.

As for `frechet`, the features give it its name: KID if they are those of FID's InceptionV3.
"""

import numpy as np
from jaxtyping import Float


def kernel_distance(
    first: Float[np.ndarray, "n D"],
    second: Float[np.ndarray, "m D"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation of the estimate over random subsets; computed in float64.

    The subsets of a seed are those that torch-fidelity draws.

    Args:
      first, second: features, a row a sample.
      num_subsets: of either set; they may overlap.
      subset_size: samples of a subset, each at most once. It is cut to the size of the smaller set.
        Where a subset is the whole of both sets there is but one, and the deviation is 0.
      seed: of the subsets.

    Raises:
      ValueError: there are fewer than two samples of either set or of a subset, no subset is asked
        for, or features are not finite.
    """
    sets = [np.asarray(vectors, np.float64) for vectors in (first, second)]
    for vectors in sets:
        if len(vectors) < 2:
            raise ValueError(
                f"A kernel distance needs two samples or more of either set, not {len(vectors)}."
            )
        if not np.isfinite(vectors).all():
            raise ValueError("A kernel distance needs finite features, and some are not.")
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            "A kernel distance needs a subset or more of two samples or more, not "
            f"num_subsets {num_subsets} and subset_size {subset_size}."
        )
    size = min(subset_size, *map(len, sets))
    if all(len(vectors) == size for vectors in sets):
        return _estimate(*sets), 0.0
    draws = np.random.RandomState(seed)  # as torch-fidelity; the same in every NumPy
    estimates = [
        _estimate(*(vectors[draws.choice(len(vectors), size, replace=False)] for vectors in sets))
        for _ in range(num_subsets)
    ]
    return float(np.mean(estimates)), float(np.std(estimates))


def _estimate(x: Float[np.ndarray, "m D"], y: Float[np.ndarray, "m D"]) -> float:
    """See the module's docstring."""
    size, width = x.shape
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (size * (size - 1)) - 2 * xy.mean())
