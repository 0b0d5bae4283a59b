"""Writes ``tests/golden/parity.npz``: what diffusers and transformers make of `draws`.

With the convert extra installed (``pip install -e '.[convert]'``), from the repository's root:

    python -m tests.parity.make_golden

``tests/test_parity_golden.py`` compares our networks with it where PyTorch is not installed. The
weights are not stored, but drawn again by name; so the file holds the names and shapes of the
tensors and the ``config.json`` that PyTorch's side saved, and its outputs.
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
    """The config and the tensors' shapes, as JSON, of the files that the network saves."""
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
    ids, real = draws.prompts("t5", (6, 149), size=150, vocab_size=200, end=1, pad=0)
    return saved(network) | {
        "ids": ids,
        "mask": real,
        "pads_read": theirs.read(network, ids, None),
        "pads_masked": theirs.read(network, ids, real)[real],
    }


def clip() -> dict[str, np.ndarray]:
    network = theirs.clip(eos_token_id=2)
    ids, _ = draws.prompts("clip", (1, 6, 76), size=77, vocab_size=100, end=99, pad=99)
    return saved(network) | {"ids": ids, "pooled": theirs.pooled(network, ids)}


def dino() -> dict[str, np.ndarray]:
    """With positions of 5 x 5 patches on 3 x 3."""
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
    """Everything the file holds."""
    parts = (dev, schnell, autoencoder, t5, clip, dino, schedule)
    return {f"{part.__name__}/{name}": x for part in parts for name, x in part().items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **make())
    print(f"wrote {GOLDEN}, {GOLDEN.stat().st_size} bytes")
