"""All products of matrices are exact here: accelerators round them off by default."""

import jax
import pytest


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield
