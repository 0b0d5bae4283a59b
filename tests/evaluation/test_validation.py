"""What validation needs is there, or the message names the setting. See test_train for numbers."""

import pytest

from kontext_jax.config import Config, ValidationConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.evaluation.validation import make_validation
from kontext_jax.sharding import make_mesh


def test_a_split_that_is_missing_is_named_with_its_setting(world_folder):
    config = Config(
        data=DataConfig(path=str(world_folder)), validation=ValidationConfig(every=1, split="test")
    )
    message = "^validation.split 'test': .* has no split \"test\"; it has: train, validation"
    with pytest.raises(ValueError, match=message):
        make_validation(config, make_mesh(config.mesh))
