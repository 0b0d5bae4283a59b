"""Compares T5's encoder and CLIP's text model with transformers."""

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
    """With 150 tokens, which exceeds the distance of the last bucket."""
    network = theirs.t5()
    model = ours.load(theirs.save(network, tmp_path), "text_encoder")
    ids, mask = draws.prompts("t5", (0, 6, 149), size=150, vocab_size=200, end=1, pad=0)
    read = mask if masked else np.ones_like(mask)
    out = np.asarray(call(model, jnp.asarray(ids), jnp.asarray(read, jnp.int32)))
    expected = theirs.read(network, ids, mask if masked else None)
    assert expected[read].std() > 0.5
    np.testing.assert_allclose(out[read], expected[read], atol=2e-5)


@pytest.mark.parametrize("eos_token_id", [2, 99, 60], ids=["legacy", "last", "another"])
def test_clip(tmp_path, eos_token_id):
    """Old configs have the end id 2, which stands for the largest id; padding has the end id."""
    network = theirs.clip(eos_token_id)
    model = ours.load(theirs.save(network, tmp_path), "clip")
    end = 99 if eos_token_id == 2 else eos_token_id
    assert model.config.eos_id == end
    ids, _ = draws.prompts("clip", (1, 6, 76), size=77, vocab_size=100, end=end, pad=end)
    out = np.asarray(call(model, jnp.asarray(ids)))
    expected = theirs.pooled(network, ids)
    assert expected.std() > 0.5
    np.testing.assert_allclose(out, expected, atol=2e-5)
