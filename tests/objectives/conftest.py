"""LADD with networks as small as can be."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from kontext_jax.encoders import encode_images, to_tokens
from kontext_jax.models.discriminator import HeadsConfig
from kontext_jax.objectives.ladd import Ladd, LaddConfig
from kontext_jax.types import Tokens


class LaddRecipe(NamedTuple):
    """An objective with networks for it; ``tokens``: rows of 1, 2 and no examples."""

    objective: Ladd
    params: dict
    frozen: dict
    batch: Any
    tokens: Tokens


@pytest.fixture(scope="session")
def make_ladd(recipe, random_network):
    """A function from settings of LADD to a recipe, on `recipe`'s encoders and batches."""
    config = recipe.objective.config
    common = {
        name: getattr(config, name)
        for name in ("transformer", "text_encoder", "pooled", "guidance")
    }
    frozen = recipe.frozen | {
        "text_encoder": recipe.params["model"]["text_encoder"],
        "teacher": recipe.params["model"]["transformer"],
    }
    batch = recipe.rows([1, 2, 0])

    @jax.jit
    def encode(frozen, batch):
        latents = encode_images(frozen["autoencoder"], batch)
        return to_tokens(batch, latents, *config.encode_text(frozen, batch))

    tokens = encode(frozen, batch)

    def make(**settings) -> LaddRecipe:
        heads = HeadsConfig(width=8, dtype="float32")
        objective = Ladd(LaddConfig(**(common | {"heads": heads} | settings)))
        params = random_network(lambda: objective.init(jax.random.key(0)), seed=1)
        return LaddRecipe(objective, params, frozen, batch, tokens)

    return make


@pytest.fixture(scope="session")
def ladd(make_ladd) -> LaddRecipe:
    return make_ladd()


@pytest.fixture(scope="session")
def target(ladd) -> np.ndarray:
    """Which tokens are targets'."""
    return np.asarray(ladd.tokens.is_target)
