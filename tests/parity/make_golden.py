"""Writes ``tests/golden/parity.npz``, the outputs of diffusers and transformers on `draws`.

Run it from the repository's root with the extra ``convert`` (``pip install -e '.[convert]'``):

    python -m tests.parity.make_golden

``tests/test_parity_golden.py`` compares our networks with the file and does not need PyTorch. The
file does not store weights, which are drawn again by name: it holds the names and shapes of the
tensors, the ``config.json`` that PyTorch's network saved, and its outputs.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from kontext_jax import geometry
from kontext_jax.weights import flux
from tests.parity import draws, theirs

GOLDEN = Path(__file__).parents[1] / "golden" / "parity.npz"

IMAGE_SIZE = (20, 12)
NUM_STEPS = (1, 4, 28)


def saved(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the saved config and the shapes of the saved tensors, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        (file,) = theirs.save(network, Path(folder)).glob("*.safetensors")
        with safe_open(file, framework="np") as opened:
            names = opened.keys()
            shapes = {name: opened.get_slice(name).get_shape() for name in names}
        config = (Path(folder) / "config.json").read_text()
    return {"config": np.array(config), "shapes": np.array(json.dumps(shapes))}


def dev() -> dict[str, np.ndarray]:
    network = theirs.transformer()
    examples = draws.examples("packed", flux.from_json(network.config))
    grads = theirs.grads(network, examples)
    return saved(network) | {
        "velocity": theirs.velocity(network, examples),
        "names": np.array(json.dumps(list(grads))),
        "checksums": np.stack([draws.checksum(name, grad) for name, grad in grads.items()]),
    }


def schnell() -> dict[str, np.ndarray]:
    network = theirs.transformer(guidance_embeds=False)
    examples = draws.examples("text_to_image", flux.from_json(network.config))
    return saved(network) | {"velocity": theirs.velocity(network, examples)}


def autoencoder() -> dict[str, np.ndarray]:
    network = theirs.autoencoder((1, 3), layers=1, groups=16)
    images = draws.pixels("images", 2, *IMAGE_SIZE, 3)
    mean, logvar = theirs.encode(network, images)
    decoded = theirs.decode(network, draws.normal("latents", *mean.shape))
    return saved(network) | {"mean": mean, "logvar": logvar, "decoded": decoded}


def t5() -> dict[str, np.ndarray]:
    network = theirs.t5()
    ids, mask = draws.prompts("t5", (6, 149), size=150, vocab_size=200, end=1, pad=0)
    return saved(network) | {
        "ids": ids,
        "mask": mask,
        "pads_read": theirs.read(network, ids, None),
        "pads_masked": theirs.read(network, ids, mask)[mask],
    }


def clip() -> dict[str, np.ndarray]:
    network = theirs.clip(eos_token_id=2)
    ids, _ = draws.prompts("clip", (1, 6, 76), size=77, vocab_size=100, end=99, pad=99)
    return saved(network) | {"ids": ids, "pooled": theirs.pooled(network, ids)}


def dino() -> dict[str, np.ndarray]:
    """Interpolates positions of 5 x 5 patches to 3 x 3."""
    network = theirs.dino()
    images = torch.from_numpy(draws.pixels("dino", 2, 42, 42, 3))
    with torch.no_grad():
        (first, last), pooled = theirs.features(network, images, (0, 3))
    return saved(network) | {
        "first": first.numpy(),
        "last": last.numpy(),
        "pooled": pooled.numpy(),
    }


def schedule() -> dict[str, np.ndarray]:
    tokens = sorted({geometry.num_tokens(size, 16) for size in geometry.KONTEXT_SIZES})
    times = {f"dev/{n}": [theirs.times(n, number) for number in tokens] for n in NUM_STEPS}
    times |= {f"schnell/{n}": [theirs.times(n, None)] for n in NUM_STEPS}
    return {"tokens": np.array(tokens)} | {name: np.stack(x, 1) for name, x in times.items()}


def make() -> dict[str, np.ndarray]:
    """Returns the contents of the file."""
    parts = (dev, schnell, autoencoder, t5, clip, dino, schedule)
    return {f"{part.__name__}/{name}": x for part in parts for name, x in part().items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **make())
    print(f"wrote {GOLDEN}, {GOLDEN.stat().st_size} bytes")
