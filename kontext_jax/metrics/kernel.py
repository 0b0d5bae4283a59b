"""The kernel distance between two sets of feature vectors (Binkowski et al., arXiv 1801.01401).

It is the squared maximum mean discrepancy under the polynomial kernel, for vectors of D numbers,

    k(x, y) = (x . y / D + 1)^3,

estimated from m samples x and m samples y without bias (Gretton et al. 2012, equation 3), so that
its expectation does not depend on m, and it can be negative:

    sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / m^2.

As with `frechet`, the features determine its name: KID for those of FID's InceptionV3.
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
    """Returns the mean and standard deviation of the estimate over random subsets, in float64.

    A seed draws the same subsets as in torch-fidelity.

    Args:
      first, second: features, one row per sample.
      num_subsets: subsets drawn from each set; they may overlap.
      subset_size: samples per subset, drawn without replacement; at most the size of the smaller
        set. If one subset holds all of both sets, it is the only one and the deviation is 0.
      seed: seed of the subsets.

    Raises:
      ValueError: a set or a subset has fewer than two samples, ``num_subsets`` is below 1, or
        features are not finite.
    """
    sets = [np.asarray(vectors, np.float64) for vectors in (first, second)]
    for vectors in sets:
        if len(vectors) < 2:
            raise ValueError(
                f"A kernel distance needs at least two samples per set, not {len(vectors)}."
            )
        if not np.isfinite(vectors).all():
            raise ValueError("A kernel distance needs finite features, and some are not.")
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            "A kernel distance needs at least one subset of at least two samples, not "
            f"num_subsets {num_subsets} and subset_size {subset_size}."
        )
    size = min(subset_size, *map(len, sets))
    if all(len(vectors) == size for vectors in sets):
        return _estimate(*sets), 0.0
    rng = np.random.RandomState(seed)  # as in torch-fidelity; stable across NumPy versions
    estimates = [
        _estimate(*(vectors[rng.choice(len(vectors), size, replace=False)] for vectors in sets))
        for _ in range(num_subsets)
    ]
    return float(np.mean(estimates)), float(np.std(estimates))


def _estimate(x: Float[np.ndarray, "m D"], y: Float[np.ndarray, "m D"]) -> float:
    """Returns the unbiased estimate in the module's docstring."""
    size, width = x.shape
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (size * (size - 1)) - 2 * xy.mean())
