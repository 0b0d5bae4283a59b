import contextlib
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kontext_jax import sample
from kontext_jax.config import Config, SheetConfig
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig
from kontext_jax.geometry import GeometryConfig, resize
from kontext_jax.loading import locations
from kontext_jax.loading.models import Model
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sampling.provenance import read_provenance
from kontext_jax.settings import to_dict

DATA = DataConfig(
    geometry=GeometryConfig(sizes=((16, 16), (32, 16), (16, 32)), pixels_per_token=8),
    packing=PackingConfig(image_tokens=24, text_tokens=24, max_examples=3),
)
OPTIONS = {
    "checkpoint": "the/run",
    "prompt": "make it night",
    "context": [],
    "init": None,
    "strength": 1.0,
    "num_steps": 2,
    "method": None,
    "guidance": None,
    "cfg_scale": 1.0,
    "size": None,
    "seed": 3,
    "params": "ema",
    "dtype": None,
    "lora": None,
    "provenance": True,
}
IDENTITY = {"transformer": "0123456789abcdef"}


def image(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def networks(recipe) -> dict:
    return networks_of(recipe.params["model"], recipe.frozen)


@pytest.fixture
def command(recipe, networks, monkeypatch):
    """A function that runs the command on tiny networks, with the given flags."""
    model = Model(recipe.objective.config, DATA, networks, IDENTITY)
    monkeypatch.setattr(sample, "load_model", lambda *_: model)

    def call(**options):
        flags = SimpleNamespace(**OPTIONS | options)
        monkeypatch.setattr(sample.flags, "FLAGS", flags)
        sample.main()

    return call


def test_samples_of_damaged_weights_are_refused(command, networks, tmp_path):
    networks["transformer"] = jax.tree.map(lambda x: x * jnp.nan, networks["transformer"])
    with pytest.raises(ValueError, match="samples of the/run are not finite: its weights are dam"):
        command(output=str(tmp_path / "a.png"))
    assert not list(tmp_path.iterdir())


def test_the_record_has_every_setting_but_no_file_names(command, tmp_path):
    Image.fromarray(image(40, 21)).save(tmp_path / "secret-a.png")
    Image.fromarray(image(20, 41, 1)).save(tmp_path / "secret-b.png")
    context, init = str(tmp_path / "secret-a.png"), str(tmp_path / "secret-b.png")
    output = tmp_path / "secret-c.png"
    command(context=[context], init=init, strength=0.5, output=str(output))
    record = read_provenance(output)
    hashes = [record["contexts"][0].pop("sha256"), record["init"].pop("sha256")]
    assert len(set(hashes)) == 2 and all(len(h) == 64 for h in hashes)
    assert record == {
        "software": f"kontext_jax {sample.kontext_jax.__version__}",
        "model": IDENTITY,
        "prompt": "make it night",
        "contexts": [{"size": "40x21"}],
        "init": {"size": "20x41"},
        "size": "16x32",
        "seed": 3,
        "params": "ema",
        "dtype": "float32",
        "num_steps": 2,
        "method": "euler",
        "guidance": 2.5,
        "cfg_scale": 1.0,
        "strength": 0.5,
    }
    text = json.dumps(read_provenance(output))
    assert not any(name in text for name in ("secret", "the/run", tmp_path.name, str(tmp_path)))


def test_a_student_is_sampled_with_its_own_settings_by_default(command, tmp_path, monkeypatch):
    """To choose the sampler, the command reads only the run's config."""
    monkeypatch.setattr(sample, "is_run", lambda location: location == "the/run")
    ladd = LaddConfig(guidance=2.5)
    for objective, expected in (
        (ladd, (4, "consistency")),
        (AutoencoderObjectiveConfig(), (28, "euler")),
    ):
        config = Config(objective=objective)
        monkeypatch.setattr(sample, "load_config", lambda _, config=config: config)
        sampler = sample.default_sampler("the/run")
        assert (sampler.num_steps, sampler.method) == expected
    student = dataclasses.replace(ladd, guidance=3.5)
    config = Config(objective=student, sheets=SheetConfig(sampler=student.sampler))
    monkeypatch.setattr(sample, "load_config", lambda _: config)
    output = tmp_path / "a.png"
    for guidance, expected in ((None, 3.5), (0.0, 0.0)):
        command(num_steps=1, guidance=guidance, output=str(output))
        record = read_provenance(output)
        settings = record["num_steps"], record["method"], record["guidance"]
        assert settings == (1, "consistency", expected)


def test_the_config_of_a_checkpoint_is_frozen(monkeypatch):
    monkeypatch.setattr(locations, "load_meta", lambda _: {"config": to_dict(Config())})
    config = locations.load_config("the/run")
    assert config == Config()
    with pytest.raises(AttributeError, match="FluxConfig.dtype is frozen"):
        config.objective.transformer.dtype = "float32"
    monkeypatch.setattr(locations, "load_meta", lambda _: {"networks": {}})
    with pytest.raises(ValueError, match="the/run holds converted weights, not a run"):
        locations.load_config("the/run")


def test_the_record_is_optional(command, tmp_path):
    command(provenance=False, output=str(tmp_path / "a.png"))
    assert read_provenance(tmp_path / "a.png") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "below 1 starts from an image: name it with --init"),
        ({"init": "b.png"}, "At --strength=1 all 2 steps run and nothing is left of --init"),
        ({"init": "b.png", "strength": 0.4}, "strength 0.4 leaves none of 2 steps"),
        ({"init": "b.png", "strength": 0.5, "size": "20x16"}, "20x16 is not a multiple of 8"),
        ({"init": "none.png", "strength": 0.5}, "There is no image none.png"),
        ({"output": "a"}, "The output a needs the suffix of an image format"),
    ],
)
def test_contradictory_options_are_refused(command, tmp_path, options, message):
    Image.fromarray(image(16, 16)).save(tmp_path / "b.png")
    with contextlib.chdir(tmp_path), pytest.raises((ValueError, OSError), match=message):
        command(**{"output": "a.png"} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_the_default_size_comes_from_init_then_the_context_then_training():
    def size(contexts, init):
        return sample._example("", contexts, init, None, DATA).target.shape[1::-1]

    wide, tall = image(64, 32), image(30, 61)
    assert size([wide], tall) == (16, 32)
    assert size([wide, tall], None) == (32, 16)
    assert size([], None) == (16, 16)


def test_the_target_is_init_at_the_requested_size():
    init = image(30, 61)
    example = sample._example("", [], init, (32, 16), DATA)
    np.testing.assert_array_equal(example.target, resize(init, (32, 16)))
    assert not sample._example("", [image(9, 9)], None, (32, 16), DATA).target.any()


def test_generate_refuses_strength_without_init():
    with pytest.raises(ValueError, match="name it with --init"):
        sample.generate("no", "", [], SamplerConfig(strength=0.5))


def test_sizes_are_width_by_height():
    assert sample.parse_size("64x32") == (64, 32)
    with pytest.raises(ValueError, match="must look like 1024x768, not '64'"):
        sample.parse_size("64")
