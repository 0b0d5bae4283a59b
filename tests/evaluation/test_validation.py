"""Errors of validation's settings; tests/test_train.py tests its metrics."""

import pytest

from kontext_jax.config import Config, ValidationConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.evaluation.validation import make_validation
from kontext_jax.sharding import make_mesh


def test_the_error_of_a_missing_split_names_its_setting(world_folder):
    config = Config(
        data=DataConfig(path=str(world_folder)), validation=ValidationConfig(every=1, split="test")
    )
    message = "^validation.split 'test': .* has no split \"test\"; it has: train, validation"
    with pytest.raises(ValueError, match=message):
        make_validation(config, make_mesh(config.mesh))
