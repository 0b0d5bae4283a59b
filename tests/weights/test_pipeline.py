"""Tests of the parts of a pipeline's folder beside its networks."""

import json

import pytest

from kontext_jax.flow import TimeConfig
from kontext_jax.weights.files import WeightsError
from kontext_jax.weights.pipeline import (
    read_scheduler,
    write_index,
    write_scheduler,
    write_tokenizer,
)


@pytest.mark.parametrize(
    "time",
    [
        TimeConfig(),
        TimeConfig(shift="none"),
        TimeConfig(base_tokens=64, max_tokens=1024, base_shift=0.25, max_shift=2.0),
    ],
)
def test_a_scheduler_round_trips(tmp_path, time):
    write_scheduler(tmp_path, time)
    assert read_scheduler(tmp_path) == time


@pytest.mark.parametrize(
    ("time", "shift", "dynamic"),
    [
        (TimeConfig(), 3.0, True),  # [dev] and Kontext
        (TimeConfig(shift="none"), 1.0, False),  # [schnell]
    ],
)
def test_schedulers_equal_the_released_ones(tmp_path, time, shift, dynamic):
    write_scheduler(tmp_path, time)
    values = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    del values["_diffusers_version"]
    assert values == {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": shift,
        "use_dynamic_shifting": dynamic,
    }


def save_scheduler(folder, text: str):
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_a_pipeline_without_a_scheduler_has_flux_s_schedule(tmp_path):
    assert read_scheduler(tmp_path) == TimeConfig()


def test_missing_settings_of_a_scheduler_take_diffusers_defaults(tmp_path):
    save_scheduler(tmp_path, '{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    assert read_scheduler(tmp_path) == TimeConfig(shift="none")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            "is a FlowMatchEulerDiscreteScheduler with a fixed shift of 3.0; supported is ",
        ),
        ({"_class_name": "DDIMScheduler"}, "is a DDIMScheduler with a fixed shift of 1.0; suppo"),
        ({}, "is a None with"),
    ],
)
def test_other_schedulers_are_refused(tmp_path, values, sentence):
    path = save_scheduler(tmp_path, json.dumps(values))
    with pytest.raises(WeightsError) as error:
        read_scheduler(tmp_path)
    assert str(error.value).startswith(f"{path} {sentence}")


def test_a_scheduler_with_invalid_json_is_refused(tmp_path):
    path = save_scheduler(tmp_path, "{")
    with pytest.raises(WeightsError, match=f"^{path} is not valid JSON "):
        read_scheduler(tmp_path)


def test_a_tokenizer_is_copied_file_by_file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "vocab.json").write_bytes(b"\x00\xff")
    write_tokenizer(str(tmp_path / "in"), tmp_path / "out" / "tokenizer")
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_bytes() == b"\x00\xff"


def test_a_missing_tokenizer_is_refused(tmp_path):
    source = str(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=f"^The tokenizer folder '{source}' does not exist"):
        write_tokenizer(source, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def test_the_index_lists_the_networks_and_null_for_absent_ones(tmp_path):
    (tmp_path / "tokenizer_2").mkdir()
    config = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "T5TokenizerFast"}')
    write_index(tmp_path, ["transformer", "text_encoder"])
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FluxKontextPipeline"
    assert {name: entry for name, entry in index.items() if not name.startswith("_")} == {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": [None, None],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
