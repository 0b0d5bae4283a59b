import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax.models.vq import DECAY, EPSILON, Codebook


@pytest.fixture
def codebook():
    codebook = Codebook(6, 3, rngs=nnx.Rngs(0))
    shares = jnp.array([0.4, 0.1, 0.3, 0.2, 0.0, 1e-9])
    codebook.shares[...] = shares
    codebook.sums[...] = shares[:, None] * jax.random.normal(jax.random.key(1), (6, 3))
    return codebook


@pytest.fixture
def cells():
    return jax.random.normal(jax.random.key(2), (3, 4, 5, 3))


def vectors_of(codebook):
    shares = np.maximum(np.asarray(codebook.shares[...], np.float64), EPSILON / 6)
    return np.asarray(codebook.sums[...], np.float64) / shares[:, None]


def test_cells_become_their_nearest_vectors(codebook, cells):
    vectors = vectors_of(codebook)
    distances = np.linalg.norm(np.asarray(cells)[..., None, :] - vectors, axis=-1)
    codes = np.argmin(distances, axis=-1)
    assert np.array_equal(codebook.codes(cells), codes) and len(np.unique(codes)) > 2
    np.testing.assert_allclose(codebook(cells), vectors[codes], atol=1e-6)


def test_gradient_passes_to_the_cells_alone(codebook, cells):
    loss = lambda codebook, cells: jnp.sum(jnp.sin(codebook(cells)))  # noqa: E731
    by_codebook, by_cells = jax.grad(loss, argnums=(0, 1))(codebook, cells)
    np.testing.assert_allclose(by_cells, jnp.cos(codebook(cells)), rtol=1e-6)
    assert not any(np.any(x) for x in jax.tree.leaves(by_codebook))


def test_vectors_become_the_means_of_their_cells(codebook, cells):
    """One step in float64 NumPy; an empty slot counts nothing, and images have equal weight."""
    used = jnp.array([1.0, 0.0, 1.0])
    codes = np.asarray(codebook.codes(cells))[[0, 2]].ravel()
    flat = np.asarray(cells, np.float64)[[0, 2]].reshape(-1, 3)
    member = np.eye(6)[codes] / len(flat)
    expected = [
        DECAY * np.asarray(codebook.shares[...]) + (1 - DECAY) * member.sum(axis=0),
        DECAY * np.asarray(codebook.sums[...]) + (1 - DECAY) * member.T @ flat,
    ]
    value, gradient = jax.value_and_grad(lambda book: book.follow(cells, used))(codebook)
    assert value == 0
    for average, by, after in (
        (codebook.shares, gradient.shares, expected[0]),
        (codebook.sums, gradient.sums, expected[1]),
    ):
        np.testing.assert_allclose(average[...] - by[...] / 2, after, atol=1e-6)


def test_perplexity_is_the_number_of_codes_in_use(codebook):
    assert Codebook(6, 3, rngs=nnx.Rngs(0)).perplexity() == pytest.approx(6)
    p = np.array([0.4, 0.1, 0.3, 0.2])
    assert codebook.perplexity() == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)


def test_unused_codes_go_to_the_middle(codebook):
    """A vector that no cell is near does not stay there for ever."""
    assert np.linalg.norm(codebook.vectors()[5]) < 1e-2
