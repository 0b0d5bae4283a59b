"""What a summary is asked for."""

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


def about(**different) -> dict:
    cell = {"checkpoint": "runs/a", "step": 1, "params": "ema", "shift": "none", "baseline": ""}
    return cell | {"sampler": {"num_steps": 4, "guidance": 2.5}} | different


def test_metrics_come_in_the_order_asked_for():
    found = [{"metrics": {"l1": {}}, "whole": {"fid": 1.0}}, {"metrics": {"psnr": {}}, "whole": {}}]
    assert metrics_of(found, METRICS) == ["l1", "psnr", "fid"]
    assert metrics_of(found, ("fid", "ssim", "l1", "fid")) == ["fid", "l1"]
    assert set(HEADLINE) == set(METRICS)


def test_lists_name_known_metrics_once():
    for names in (MAIN, OVER_TURNS, DISTANCES):
        assert len(set(names)) == len(names) and set(names) <= set(METRICS)
    assert DISTANCES.index("fd_inception") == DISTANCES.index("fid") + 1
    assert MAIN.index("fd_inception") == MAIN.index("fid") + 1


def test_goodness_is_more_where_a_metric_is_better():
    assert goodness("zoom", 0.1) > goodness("zoom", 0.2)
    assert goodness("ssim", 0.2) > goodness("ssim", 0.1)
    assert goodness("clip_i_context", 0.2) > goodness("clip_i_context", 0.1)


def test_numbers_are_of_all_of_a_category_or_of_a_turn():
    found = {
        "metrics": {
            "edit_success": {
                "category": {"all": [0.5, 0.25, 0.75, 8], "text": [0.25, 0.0, 0.5, 4]},
                "turn": {"1": [1.0, 1.0, 1.0, 4]},
            }
        },
        "whole": {"fid": 20.0},
    }
    assert estimate_of(found, "edit_success") == (0.5, 0.25, 0.75)
    assert estimate_of(found, "edit_success", key="text") == (0.25, 0.0, 0.5)
    assert estimate_of(found, "fid") == (20.0, None, None)
    assert estimate_of(found, "fid", key="text") is None and estimate_of(found, "l1") is None
    assert interval_of(found, "edit_success") == "25.0 – 75.0%"
    assert interval_of(found, "fid") == interval_of(found, "l1") == ""
    assert count_of(found, "edit_success") == 8 and count_of(found, "edit_success", "text") == 4
    assert count_of(found, "fid") == count_of(found, "edit_success", "global") == 0
    assert points_of(found, "edit_success", "turn", [1, 2]) == {1: (1.0, 1.0, 1.0)}


def test_alike_are_those_that_differ_in_one_setting():
    cells = {
        "a": about(),
        "b": about(sampler={"num_steps": 8, "guidance": 2.5}),
        "c": about(sampler={"num_steps": 8, "guidance": 1.0}),
        "d": about(step=2),
        "copy": about(baseline="copy"),
    }
    assert groups_varying(cells, "num_steps") == [["a", "b"], ["c"], ["d"]]
    assert groups_varying(cells, "step") == [["a", "d"], ["b"], ["c"]]


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_what_is_not_finite_is_not_known(nothing):
    estimates = {"all": [nothing, nothing, nothing, 3], "text": [0.5, nothing, nothing, 2]}
    found = {"metrics": {"l1": {"category": estimates}}, "whole": {"fid": nothing}}
    assert estimate_of(found, "l1") is None and estimate_of(found, "fid") is None
    assert estimate_of(found, "l1", key="text") == (0.5, None, None)
    assert interval_of(found, "l1") == interval_of(found, "l1", "text") == ""
    assert points_of(found, "l1", "category", ["all", "text"]) == {"text": (0.5, None, None)}


def test_the_headline_is_about_the_last_step_of_the_first_run():
    other = about(checkpoint="runs/b", step=9)
    raw = about(params="params", step=7)
    steps = {f"{step}": about(step=step) for step in (5, 10, 2)}
    copy = {"copy": about(baseline="copy", step=None)}
    assert pick_headline_cell(steps | {"other": other, "raw": raw}) == "10"
    assert pick_headline_cell({"other": other} | steps) == "other"
    assert pick_headline_cell({"raw": raw} | steps) == "raw"
    assert pick_headline_cell(copy | steps) == "copy"
    few = about(sampler={"num_steps": 1, "guidance": 2.5})
    assert pick_headline_cell({"few": few} | steps) == "few"
    assert pick_headline_cell({"pipeline": about(step=None)} | copy) == "pipeline"


def test_the_target_is_of_losses_in_the_way_of_mlperf():
    def summary(config: LossConfig) -> dict:
        return {"config": {"loss": dataclasses.asdict(config)}}

    assert target_of(summary(MLPERF)) == MLPERF_TARGET
    assert target_of(summary(dataclasses.replace(MLPERF, seed=1))) is None
    assert target_of(summary(LossConfig())) is target_of({}) is target_of({"config": {}}) is None
