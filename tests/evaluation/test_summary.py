"""Reading numbers from a summary, and choosing cells and metrics."""

import dataclasses
import math

import pytest

from kontext_jax.config import LossConfig
from kontext_jax.evaluation.held_out_loss import MLPERF, MLPERF_TARGET
from kontext_jax.evaluation.scores import METRICS
from kontext_jax.evaluation.summary import (
    DISTANCES,
    HEADLINE,
    MAIN,
    OVER_TURNS,
    count_of,
    estimate_of,
    goodness,
    groups_varying,
    interval_of,
    metrics_of,
    pick_headline_cell,
    points_of,
    target_of,
)


def describe_cell(**overrides) -> dict:
    cell = {"checkpoint": "runs/a", "step": 1, "params": "ema", "shift": "none", "baseline": ""}
    return cell | {"sampler": {"num_steps": 4, "guidance": 2.5}} | overrides


def test_metrics_keep_the_requested_order():
    first = {"metrics": {"l1": {}}, "whole": {"fid": 1.0}}
    second = {"metrics": {"psnr": {}}, "whole": {}}
    assert metrics_of([first, second], METRICS) == ["l1", "psnr", "fid"]
    assert metrics_of([first, second], ("fid", "ssim", "l1", "fid")) == ["fid", "l1"]
    assert set(HEADLINE) == set(METRICS)


def test_preference_lists_have_known_unique_metrics():
    for names in (MAIN, OVER_TURNS, DISTANCES):
        assert len(set(names)) == len(names) and set(names) <= set(METRICS)
    assert DISTANCES.index("fd_inception") == DISTANCES.index("fid") + 1
    assert MAIN.index("fd_inception") == MAIN.index("fid") + 1


def test_goodness_is_larger_for_better_values():
    assert goodness("zoom", 0.1) > goodness("zoom", 0.2)
    assert goodness("ssim", 0.2) > goodness("ssim", 0.1)
    assert goodness("clip_i_context", 0.2) > goodness("clip_i_context", 0.1)


def test_estimates_by_set_category_or_turn():
    results = {
        "metrics": {
            "edit_success": {
                "category": {"all": [0.5, 0.25, 0.75, 8], "text": [0.25, 0.0, 0.5, 4]},
                "turn": {"1": [1.0, 1.0, 1.0, 4]},
            }
        },
        "whole": {"fid": 20.0},
    }
    assert estimate_of(results, "edit_success") == (0.5, 0.25, 0.75)
    assert estimate_of(results, "edit_success", key="text") == (0.25, 0.0, 0.5)
    assert estimate_of(results, "fid") == (20.0, None, None)
    assert estimate_of(results, "fid", key="text") is None and estimate_of(results, "l1") is None
    assert interval_of(results, "edit_success") == "25.0 – 75.0%"
    assert interval_of(results, "fid") == interval_of(results, "l1") == ""
    assert count_of(results, "edit_success") == 8 and count_of(results, "edit_success", "text") == 4
    assert count_of(results, "fid") == count_of(results, "edit_success", "global") == 0
    assert points_of(results, "edit_success", "turn", [1, 2]) == {1: (1.0, 1.0, 1.0)}


def test_groups_varying_differ_only_in_one_setting():
    cells = {
        "a": describe_cell(),
        "b": describe_cell(sampler={"num_steps": 8, "guidance": 2.5}),
        "c": describe_cell(sampler={"num_steps": 8, "guidance": 1.0}),
        "d": describe_cell(step=2),
        "copy": describe_cell(baseline="copy"),
    }
    assert groups_varying(cells, "num_steps") == [["a", "b"], ["c"], ["d"]]
    assert groups_varying(cells, "step") == [["a", "d"], ["b"], ["c"]]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_values_that_are_not_finite_are_missing(missing):
    estimates = {"all": [missing, missing, missing, 3], "text": [0.5, missing, missing, 2]}
    results = {"metrics": {"l1": {"category": estimates}}, "whole": {"fid": missing}}
    assert estimate_of(results, "l1") is None and estimate_of(results, "fid") is None
    assert estimate_of(results, "l1", key="text") == (0.5, None, None)
    assert interval_of(results, "l1") == interval_of(results, "l1", "text") == ""
    assert points_of(results, "l1", "category", ["all", "text"]) == {"text": (0.5, None, None)}


def test_the_headline_is_of_the_last_step_of_the_first_run():
    other = describe_cell(checkpoint="runs/b", step=9)
    raw = describe_cell(params="params", step=7)
    steps = {f"{step}": describe_cell(step=step) for step in (5, 10, 2)}
    copy = {"copy": describe_cell(baseline="copy", step=None)}
    assert pick_headline_cell(steps | {"other": other, "raw": raw}) == "10"
    assert pick_headline_cell({"other": other} | steps) == "other"
    assert pick_headline_cell({"raw": raw} | steps) == "raw"
    assert pick_headline_cell(copy | steps) == "copy"
    few = describe_cell(sampler={"num_steps": 1, "guidance": 2.5})
    assert pick_headline_cell({"few": few} | steps) == "few"
    assert pick_headline_cell({"pipeline": describe_cell(step=None)} | copy) == "pipeline"


def test_only_losses_of_mlperf_s_protocol_have_a_target():
    def summary(config: LossConfig) -> dict:
        return {"config": {"loss": dataclasses.asdict(config)}}

    assert target_of(summary(MLPERF)) == MLPERF_TARGET
    assert target_of(summary(dataclasses.replace(MLPERF, seed=1))) is None
    assert target_of(summary(LossConfig())) is target_of({}) is target_of({"config": {}}) is None
