"""Computes MLPerf Training's text-to-image metric, a held-out loss, for `configs/flow_256.py`.

python -m kontext_jax.evaluate --config=configs/eval_mlperf.py --workdir=runs/flow_256/evaluation

`data/coco` holds COCO 2014's 29,696 validation pairs in the order of their annotation ids, each
image resized (not cropped) to 256 x 256, built from a folder with `data.build --source=folder`. A
run has converged when the mean of all losses is 0.586 or below. The evaluation covers every kept
checkpoint, with raw and with averaged parameters.
"""

from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.held_out_loss import MLPERF
from kontext_jax.evaluation.sweep import grid
from kontext_jax.evaluation.tasks.sets import SetConfig


def get_config() -> EvalConfig:
    return EvalConfig(
        cells=grid("runs/flow_256@all", params=("params", "ema")),
        loss_sets=(SetConfig(name="COCO 2014", path="data/coco"),),
        loss=MLPERF,
    )
