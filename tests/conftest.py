"""Every test runs strictly: eight CPU devices, no silent promotion of dtypes or ranks."""

import os
from pathlib import Path

import jax
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
