"""Compares kernel and Frechet distances with torch-fidelity's on the same features."""

import numpy as np
import pytest

from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.metrics.kernel import kernel_distance
from tests.parity import draws

REASON = "needs torch, torchvision and torch-fidelity"
torch = pytest.importorskip("torch", reason=REASON)
metric_fid = pytest.importorskip("torch_fidelity.metric_fid", reason=REASON)
metric_kid = pytest.importorskip("torch_fidelity.metric_kid", reason=REASON)

WIDTH = 64


def features(name: str, number: int) -> np.ndarray:
    """Returns features like pooled ones: nonnegative, correlated, of different scales; float64."""
    mix = draws.normal("mix", WIDTH, WIDTH) * np.geomspace(1, 0.01, WIDTH)[:, None]
    centre = 0.5 + 0.1 * draws.normal(f"{name}/centre", WIDTH)
    return np.maximum(draws.normal(name, number, WIDTH) @ mix * WIDTH**-0.5 + centre, 0)


def torch_fidelity_kid(first: np.ndarray, second: np.ndarray, **settings) -> tuple[float, float]:
    metrics = metric_kid.kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), verbose=False, **settings
    )
    return (
        metrics[metric_kid.KEY_METRIC_KID_MEAN],
        metrics[metric_kid.KEY_METRIC_KID_STD],
    )


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the KID of all samples in float64, for sets of equal size."""
    m = len(x)
    xx, yy, xy = ((a @ b.T / WIDTH + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off_diagonal = ~np.eye(m, dtype=bool)
    return (xx[off_diagonal].sum() + yy[off_diagonal].sum()) / (m * (m - 1)) - 2 * xy.sum() / m**2


@pytest.mark.parametrize("number", [20, 300], ids="{} samples".format)
def test_kernel_distance_of_full_sets(number):
    """The tolerance of 1e-12 is absolute, because kernels of order 1 are rounded."""
    first, second = features("first", number), features("second", number)
    mean, std = kernel_distance(first, second, num_subsets=3, subset_size=number)
    theirs, spread = torch_fidelity_kid(first, second, kid_subsets=3, kid_subset_size=number)
    assert abs(mean) > 1e-4 and std == 0 and spread < 1e-12
    assert mean == pytest.approx(theirs, abs=1e-12)
    assert mean == pytest.approx(kid(first, second), abs=1e-12)


def test_kernel_distance_of_subsets():
    """The same seed draws the same subsets from sets of different sizes."""
    first, second = features("first", 120), features("second", 90)
    ours = kernel_distance(first, second, num_subsets=7, subset_size=50, seed=5)
    theirs = torch_fidelity_kid(first, second, kid_subsets=7, kid_subset_size=50, rng_seed=5)
    assert ours[1] > 1e-3
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "m", "tolerance"),
    [(300, 300, 1e-9), (400, 100, 1e-9), (20, 40, 1e-5)],
    ids=["equal sizes", "different sizes", "fewer samples than features"],
)
def test_frechet_distance(n, m, tolerance):
    """Tolerances are relative; theirs loses half of the digits if covariances are singular."""
    first, second = features("first", n), features("second", m)
    statistics = [
        metric_fid.fid_features_to_statistics(torch.from_numpy(vectors))
        for vectors in (first, second)
    ]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    expected = theirs[metric_fid.KEY_METRIC_FID]
    assert expected > 0.1
    assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance)
