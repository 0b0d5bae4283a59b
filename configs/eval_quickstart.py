"""Scores the quickstart's model on held-out combinations, and writes the report.

python -m kontext_jax.evaluate --config=configs/eval_quickstart.py --workdir=runs/quickstart
"""

from kontext_jax.evaluate import EvalConfig
from kontext_jax.sampler import SamplerConfig


def get_config() -> EvalConfig:
    return EvalConfig(
        checkpoint="runs/quickstart/flow",
        num_examples=384,
        sampler=SamplerConfig(num_steps=12, cfg_scale=3.0),
        curves=(
            ("autoencoder", "runs/quickstart/autoencoder"),
            ("flow matching", "runs/quickstart/flow"),
        ),
    )
