import numpy as np

from kontext_jax.evaluation.latent_statistics import code_usage


def test_usage_of_equally_frequent_codes_is_their_number():
    usage = code_usage(np.array([3, 1, 1, 3, 0, 0]), 12)
    assert usage["number"] == 12 and usage["used"] == 0.25
    np.testing.assert_allclose(usage["perplexity"], 3)


def test_rare_codes_count_less():
    usage = code_usage(np.array([0] * 3 + [1]), 2)
    np.testing.assert_allclose(
        usage["perplexity"], np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    )
    assert usage["used"] == 1
