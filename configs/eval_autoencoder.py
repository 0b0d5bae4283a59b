"""Compares autoencoders by their reconstructions of held-out images.

    python -m kontext_jax.evaluate --workdir=runs/autoencoders \\
        --config=configs/eval_autoencoder.py:runs/quickstart/autoencoder,runs/plain

After the colon come the checkpoints, separated by commas: runs (`runs/plain@600` for one step,
`runs/plain@all` for each), or the folder or file of an autoencoder alone, such as
`models/FLUX.1-dev/vae`. Other images, and LPIPS and FID where their weights are available:

    --config.sets[0].path=data/images_256
    --config.judges.lpips=models/alexnet-owt-7be5be79.pth
    --config.judges.inception=models/pt_inception-2015-12-05-6726825d.pth

Each image is reconstructed at its own size, from the mean of its latents.
"""

from pathlib import Path

from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.judge_panel import JudgesConfig
from kontext_jax.evaluation.sweep import ALL_STEPS, Cell
from kontext_jax.evaluation.tasks.sets import SetConfig
from kontext_jax.loading.locations import split_step

DATA = "runs/quickstart/world"


def get_config(checkpoints: str = "runs/quickstart/autoencoder,runs/plain") -> EvalConfig:
    locations = checkpoints.split(",")
    runs = dict.fromkeys(str(split_step(x.removesuffix(ALL_STEPS))[0]) for x in locations)
    return EvalConfig(
        cells=tuple(Cell(name=x.removesuffix(ALL_STEPS), checkpoint=x) for x in locations),
        sets=(SetConfig(name="held out", path=DATA, num_examples=256),),
        judges=JudgesConfig(distance=True),
        curves=tuple((run, run) for run in runs if Path(run, "metrics.jsonl").is_file()),
    )
