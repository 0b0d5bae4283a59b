"""Judges of validation; tests/test_train.py tests its metrics."""

import pytest

from kontext_jax.config import Config, ValidationConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.evaluation import judge_panel, validation
from kontext_jax.evaluation.validation import make_validation
from kontext_jax.sharding import make_mesh


def test_the_error_of_a_missing_split_names_its_setting(world_folder):
    config = Config(
        data=DataConfig(path=str(world_folder)), validation=ValidationConfig(every=1, split="test")
    )
    message = "^validation.split 'test': .* has no split \"test\"; it has: train, validation"
    with pytest.raises(ValueError, match=message):
        make_validation(config, make_mesh(config.mesh))


def test_frechet_distances_are_those_of_the_networks_that_are_there(tmp_path, monkeypatch, capsys):
    """InceptionV3 only with its file, which gives FID its name."""
    mesh = make_mesh(Config().mesh)

    def missing(mesh, config):
        raise FileNotFoundError("its file is missing.")

    monkeypatch.setattr(judge_panel, "load_lite0", missing)
    assert validation._set_judges(ValidationConfig(), mesh) == []
    assert capsys.readouterr().out == "validation without fd_efflite0: its file is missing.\n"
    monkeypatch.setattr(judge_panel, "load_lite0", lambda mesh, config: None)
    monkeypatch.setattr(judge_panel, "load_inception", lambda path, mesh: None)
    file = tmp_path / "inception.pth"
    file.write_text("x")
    settings = ValidationConfig(inception=str(file))
    names = [judge.distance for judge in validation._set_judges(settings, mesh)]
    assert names == ["fd_efflite0", "fd_inception"]
