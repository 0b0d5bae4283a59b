"""Means and intervals against a bootstrap in plain loops, and the effect of groups."""

import numpy as np
import pytest

from kontext_jax.evaluation import scores
from kontext_jax.evaluation.scores import ALL, METRICS, Estimate, estimate, spread, summarise
from kontext_jax.types import Task


def names(numbers) -> list[str]:
    return [f"g{number}" for number in numbers]


def estimate_in_loops(values, groups, draws: int, seed: int) -> Estimate:
    """A bootstrap in loops: draws whole groups and takes quantiles of the means of their values."""
    members = [
        [value for value, group in zip(values, groups, strict=True) if group == name]
        for name in sorted(set(groups))
    ]
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = [members[i] for i in rng.integers(len(members), size=len(members))]
        means.append(np.mean([value for group in drawn for value in group]))
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(np.mean(values), low, high, len(values))


def test_intervals_match_a_bootstrap_in_loops():
    rng = np.random.default_rng(3)
    values, groups = rng.standard_normal(40), names(rng.integers(0, 11, 40))
    result = estimate(values, groups, draws=300, seed=5)
    np.testing.assert_allclose(result, estimate_in_loops(values, groups, 300, 5), rtol=1e-12)
    assert result.low < result.mean < result.high
    assert estimate(values, groups, draws=300, seed=6)[1:3] != result[1:3]
    other = estimate_in_loops(values, groups, 4000, 99)  # other draws: close, but not equal
    width = other.high - other.low
    np.testing.assert_allclose(estimate(values, groups)[1:3], other[1:3], atol=0.15 * width)


def test_few_groups_or_equal_groups_have_no_interval():
    assert estimate(np.array([3.0]), ["a"]) == (3.0, None, None, 1)
    assert estimate(np.array([1.0, 2.0]), ["a", "a"]) == (1.5, None, None, 2)
    values = np.arange(8.0)
    assert estimate(values[:7], names(range(7))) == (3.0, None, None, 7)
    assert estimate(values, names([*range(7), 6])) == (3.5, None, None, 8)  # seven groups
    assert None not in estimate(values, names(range(8)))
    assert estimate(np.full(50, 0.25), names(range(50))) == (0.25, None, None, 50)
    assert estimate(np.tile([0.0, 0.5], 9), names(np.repeat(range(9), 2))) == (0.25, None, None, 18)


def test_repeating_values_within_groups_changes_no_interval():
    values = np.random.default_rng(0).standard_normal(20)
    once = estimate(values, names(range(20)))
    copies = estimate(np.repeat(values, 10), names(np.repeat(range(20), 10)))
    np.testing.assert_allclose(copies[:3], once[:3], rtol=1e-12)
    assert (once.count, copies.count) == (20, 200)
    alone = estimate(np.repeat(values, 10), names(range(200)))
    assert copies.high - copies.low > 2.5 * (alone.high - alone.low)  # sqrt(10), up to chance


@pytest.mark.parametrize("at_once", [1, 12, 80, 1000])
def test_the_limit_on_groups_drawn_at_once_changes_no_interval(monkeypatch, at_once):
    values = np.random.default_rng(1).standard_normal(23)
    groups = names(np.arange(23) // 2)  # 12 groups
    expected = estimate(values, groups, draws=101)
    drawn = []
    rng_of = np.random.default_rng
    monkeypatch.setattr(scores, "MAX_DRAWN", at_once)

    class Counting:
        def __init__(self, seed):
            self._rng = rng_of(seed)

        def integers(self, high, size):
            drawn.append(size)
            return self._rng.integers(high, size=size)

    monkeypatch.setattr(scores.np.random, "default_rng", Counting)
    assert estimate(values, groups, draws=101) == expected
    assert sum(size[0] for size in drawn) == 101
    assert max(size[0] for size in drawn) == min(101, max(1, at_once // 12))


def test_the_interval_covers_the_true_mean_as_often_as_it_should():
    """300 samples of 40 groups: pairs of normal values that share half of their variance."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(300):
        values = np.repeat(rng.standard_normal(40), 2) + rng.standard_normal(80)
        result = estimate(values + 2.0, names(np.repeat(range(40), 2)), draws=400, seed=seed)
        covered += result.low <= 2.0 <= result.high
    assert 0.90 <= covered / 300 <= 0.99


def row(category="local", group="g", turn=1, **metrics) -> dict:
    return {"id": "x", "category": category, "group": group, "turn": turn} | metrics


def test_estimates_by_category_and_by_turn():
    rows = [
        row("local", "a", 1, l1=1.0, ssim=None, psnr=None),
        row("local", "a", 2, l1=2.0, ssim=0.5, psnr=None),
        row("local", "b", 1, l1=6.0, ssim=None, psnr=None),
        row("global", "b", 10, l1=8.0, ssim=0.25, psnr=None),
        row("text", "c", 2, ssim=None),
    ]
    estimates = summarise(rows)
    assert list(estimates) == ["l1", "ssim"]  # in the order of METRICS; no row has a PSNR
    assert list(METRICS).index("l1") < list(METRICS).index("ssim")
    l1 = estimates["l1"]
    means = {by: {name: x.mean for name, x in parts.items()} for by, parts in l1.items()}
    assert means == {
        "category": {"global": 8.0, "local": 3.0, ALL: 4.25},  # not 5.5, the mean of the two
        "turn": {"1": 6.0, "10": 8.0},  # only group b: a has no tenth turn
    }
    assert {name: x.count for name, x in l1["category"].items()} == {
        "global": 1,
        "local": 3,
        ALL: 4,
    }
    assert l1["category"][ALL] == estimate(np.array([1.0, 2.0, 6.0, 8.0]), ["a", "a", "b", "b"])
    assert l1["category"]["local"] == estimate(np.array([1.0, 2.0, 6.0]), ["a", "a", "b"])
    ssim = estimates["ssim"]["category"]
    assert {name: x.mean for name, x in ssim.items()} == {"global": 0.25, "local": 0.5, ALL: 0.375}


def test_booleans_are_averaged_as_0_and_1():
    rows = [
        row(group=f"{i}", edit_success=value) for i, value in enumerate([True, False, 1.0, 0.0])
    ]
    assert summarise(rows)["edit_success"]["category"][ALL].mean == 0.5
    assert summarise([]) == summarise([row()]) == {}


def test_metrics_format_values_and_have_unique_titles():
    assert METRICS["edit_success"].show(0.5) == "50.0%"
    assert METRICS["psnr"].show(20.126) == "20.13" and METRICS["fd_dinov2"].show(7) == "7.0"
    assert {metric.better for metric in METRICS.values()} == {-1, 0, 1}
    assert [METRICS[name].better for name in ("l1", "ssim", "zoom", "clip_i_context")] == [
        -1,
        1,
        -1,
        0,
    ]
    titles = [metric.title for metric in METRICS.values()]
    assert len(set(titles)) == len(titles)


def test_spread_takes_categories_in_turn():
    tasks = [Task(f"{i}", (), "x", name, (8, 8)) for i, name in enumerate("aabcaab")]
    assert spread(tasks, 99) == [0, 2, 3, 1, 6, 4, 5]
    assert spread(tasks, 4) == [0, 2, 3, 1]
    assert spread(tasks[::-1], 3) == [0, 1, 3]
