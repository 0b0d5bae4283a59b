"""Every test runs strictly: eight CPU devices, no silent promotion of dtypes or ranks."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

# Networks here are so small that compiling them is what takes time; unoptimised it takes half.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
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
def random_network():
    """A function from a maker of networks to one without zeros and ones, which hide mistakes.

    Its numbers are NumPy's: XLA takes half a minute to compile what draws an autoencoder's.
    """

    def make(make_network, seed: int = 0):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            x, name = rng.standard_normal(leaf.shape, np.float32), jax.tree_util.keystr(path)
            if "kernel" in name:
                fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]
                return jnp.asarray(x * fan_in**-0.5, jnp.float32)
            if "embedding" in name:
                return jnp.asarray(x)
            return jnp.asarray(("scale" in name) + 0.2 * x, jnp.float32)

        return jax.tree.map_with_path(draw, jax.eval_shape(make_network))

    return make


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A data set of 40 edits of 32 pixels to train on and 6 to validate."""
    from kontext_jax.data import store, world

    folder = tmp_path_factory.mktemp("data") / "world"
    splits = {"train": world.triples(40, split="train")}
    store.write(splits | {"validation": world.triples(6, split="validation")}, folder)
    return folder
