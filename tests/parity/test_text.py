"""T5's encoder and CLIP's text model against transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import draws, ours

REASON = "needs the convert extra: pip install -e '.[convert]'"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from tests.parity import theirs  # noqa: E402

pytestmark = pytest.mark.slow


@jax.jit
def call(model, *args):
    return model(*args)


@pytest.mark.parametrize("masked", [False, True], ids=["pads read", "pads masked"])
def test_t5(tmp_path, masked):
    """150 tokens: more than the distance from which on all share a bucket."""
    network = theirs.t5()
    model = ours.load(theirs.save(network, tmp_path), "text_encoder")
    ids, real = draws.prompts("t5", (0, 6, 149), size=150, vocab_size=200, end=1, pad=0)
    segments = jnp.asarray(real if masked else np.ones_like(real), jnp.int32)
    out = np.asarray(call(model, jnp.asarray(ids), segments))
    wanted = theirs.read(network, ids, real if masked else None)
    read = real if masked else np.ones_like(real)
    assert wanted[read].std() > 0.5
    np.testing.assert_allclose(out[read], wanted[read], atol=2e-5)


@pytest.mark.parametrize("eos_token_id", [2, 99, 60], ids=["legacy", "last", "another"])
def test_clip(tmp_path, eos_token_id):
    """Old configs say 2, whatever the end is, and mean the largest id; then pads are ends too."""
    network = theirs.clip(eos_token_id)
    model = ours.load(theirs.save(network, tmp_path), "clip")
    end = 99 if eos_token_id == 2 else eos_token_id
    assert model.config.eos_id == end
    ids, _ = draws.prompts("clip", (1, 6, 76), size=77, vocab_size=100, end=end, pad=end)
    out = np.asarray(call(model, jnp.asarray(ids)))
    wanted = theirs.pooled(network, ids)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(out, wanted, atol=2e-5)
