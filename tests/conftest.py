"""Every test runs strictly: eight CPU devices, no silent promotion of dtypes or ranks."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for flags


@pytest.fixture(scope="session")
def emoji_folder() -> Path:
    """The folder of `@iconify-json/*` tarballs: KONTEXT_EMOJI_DIR, or ../shared/data/emoji."""
    default = Path(__file__).parents[2] / "shared" / "data" / "emoji"
    folder = Path(os.environ.get("KONTEXT_EMOJI_DIR", default))
    if not list(folder.glob("*.tgz")):
        pytest.skip(f"no emoji tarballs in {folder}; set KONTEXT_EMOJI_DIR (see the README)")
    return folder


@pytest.fixture(scope="session")
def randomised():
    """A function that moves every parameter off its initial value: zeros would hide mistakes."""

    def randomise(tree, seed: int = 0, std: float = 0.1):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: x + std * rng.standard_normal(x.shape, np.float32), tree)

    return randomise


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A data set of 40 edits of 32 pixels to train on and 6 to validate."""
    from kontext_jax.data import store, world

    folder = tmp_path_factory.mktemp("data") / "world"
    splits = {"train": world.triples(40, split="train")}
    store.write(splits | {"validation": world.triples(6, split="validation")}, folder)
    return folder
