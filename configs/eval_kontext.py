"""Compares a fine-tuned Kontext with the released one on real edits.

python -m kontext_jax.evaluate --config=configs/eval_kontext.py --workdir=runs/kontext/evaluation \\
    [--distributed]

This needs local copies of the following. Under `models/`: FLUX.1-Kontext-dev, facebook/dinov2-base
and openai/clip-vit-base-patch32 (as safetensors, which transformers' `save_pretrained` writes),
FID's Inception (pytorch-fid's release), AlexNet (torchvision's), and fal's AuraFace-v1. Under
`data/`: black-forest-labs/kontext-bench and MagicBrush's test set. `pip install -e '.[ocr,faces]'`
installs the OCR and face judges, `pip install --no-deps lpips==0.1.4` the LPIPS heads.

Sampling a one-megapixel image in 28 steps takes 4.6 PFLOP, or 20 s on a v5p chip at half of its
peak: about 7 hours on 8 chips for the 10,000 images of the three models. The judges run on the
hosts; each process takes a few seconds per image of that size.
"""

from kontext_jax.evaluate import EvalConfig
from kontext_jax.evaluation.judge_panel import JudgesConfig
from kontext_jax.evaluation.sweep import Cell, grid
from kontext_jax.evaluation.tasks.sets import SetConfig
from kontext_jax.sampler import SamplerConfig

RELEASED, OURS = "models/FLUX.1-Kontext-dev", "runs/kontext"


def get_config() -> EvalConfig:
    bench = SetConfig(name="KontextBench", kind="kontext_bench", path="data/kontext-bench")
    brush = dict(kind="magic_brush", path="data/MagicBrush", split="test")
    return EvalConfig(
        cells=(
            Cell(name="released", checkpoint=RELEASED, sampler=SamplerConfig(num_steps=28)),
            *grid(OURS, params=("ema", "params"), num_steps=(28,)),
            Cell(name="copy", baseline="copy"),
        ),
        sets=(
            bench,
            SetConfig(
                name="no change",
                kind="kontext_bench",
                path=bench.path,
                probe="keep the image exactly as it is",
                turns=4,
            ),
            SetConfig(name="MagicBrush", **brush),
            SetConfig(name="MagicBrush sessions", turns=3, **brush),
        ),
        loss_sets=(SetConfig(name="MagicBrush", **brush),),
        batch_size=8,  # one row per chip
        judges=JudgesConfig(
            efflite0=False,
            inception="models/pt_inception-2015-12-05-6726825d.pth",
            dino="models/dinov2-base",
            clip="models/clip-vit-base-patch32",
            lpips="models/alexnet-owt-7be5be79.pth",
            auraface="models/AuraFace-v1",
            ocr=True,
        ),
    )
