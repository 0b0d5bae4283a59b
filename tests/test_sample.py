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
from kontext_jax.loading.models import Model
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import networks_of
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.sampler import SamplerConfig
from kontext_jax.sampling.provenance import read_provenance

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
    """The command with flags as given, on tiny networks."""
    model = Model(recipe.objective.config, DATA, networks, IDENTITY)
    monkeypatch.setattr(sample, "load_model", lambda *_: model)

    def call(**options):
        given = SimpleNamespace(**OPTIONS | options)
        monkeypatch.setattr(sample.flags, "FLAGS", given)
        sample.main()

    return call


def test_an_image_of_damaged_weights_is_refused(command, networks, tmp_path):
    networks["transformer"] = jax.tree.map(lambda x: x * jnp.nan, networks["transformer"])
    with pytest.raises(ValueError, match="what the/run samples is not finite: its weights are dam"):
        command(output=str(tmp_path / "a.png"))
    assert not list(tmp_path.iterdir())


def test_an_image_tells_all_about_its_making_but_no_names(command, tmp_path):
    for name, picture in (("secret-a.png", image(40, 21)), ("secret-b.png", image(20, 41, 1))):
        Image.fromarray(picture).save(tmp_path / name)
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
    told = json.dumps(read_provenance(output))
    assert not any(name in told for name in ("secret", "the/run", tmp_path.name, str(tmp_path)))


def test_a_student_is_sampled_in_its_few_steps_unless_one_says_otherwise(
    command, tmp_path, monkeypatch
):
    """The command reads the run's config for this, and nothing else of it."""
    monkeypatch.setattr(sample, "is_run", lambda place: place == "the/run")
    of = {"ladd": LaddConfig(guidance=2.5), "autoencoder": AutoencoderObjectiveConfig()}
    for kind, wanted in {"ladd": (4, "consistency"), "autoencoder": (28, "euler")}.items():
        monkeypatch.setattr(sample, "load_config", lambda _, k=kind: Config(objective=of[k]))
        found = sample.default_sampler("the/run")
        assert (found.num_steps, found.method) == wanted
    student = dataclasses.replace(of["ladd"], guidance=3.5)
    config = Config(objective=student, sheets=SheetConfig(sampler=student.sampler))
    monkeypatch.setattr(sample, "load_config", lambda _: config)
    output = tmp_path / "a.png"
    for given, wanted in ((None, 3.5), (0.0, 0.0)):
        command(num_steps=1, guidance=given, output=str(output))
        record = read_provenance(output)
        made = record["num_steps"], record["method"], record["guidance"]
        assert made == (1, "consistency", wanted)


def test_a_record_can_be_left_out(command, tmp_path):
    command(provenance=False, output=str(tmp_path / "a.png"))
    assert read_provenance(tmp_path / "a.png") is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strength": 0.5}, "below 1 starts from an image: name it with --init"),
        ({"init": "b.png"}, "At --strength=1 all 2 steps run and nothing is left of --init"),
        ({"init": "b.png", "strength": 0.4}, "strength 0.4 leaves none of 2 steps"),
        ({"init": "b.png", "strength": 0.5, "size": "20x16"}, "20x16 is not a multiple of 8"),
        ({"init": "none.png", "strength": 0.5}, "There is no image none.png"),
        ({"output": "a"}, "The output a has no ending of an image format"),
    ],
)
def test_what_does_not_go_together_is_refused(command, tmp_path, options, sentence):
    Image.fromarray(image(16, 16)).save(tmp_path / "b.png")
    with contextlib.chdir(tmp_path), pytest.raises((ValueError, OSError), match=sentence):
        command(**{"output": "a.png"} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_the_default_size_is_that_of_init_then_of_the_context_then_of_training():
    def size(contexts, init):
        return sample._example("", contexts, init, None, DATA).target.shape[1::-1]

    wide, high = image(64, 32), image(30, 61)
    assert size([wide], high) == (16, 32)
    assert size([wide, high], None) == (32, 16)
    assert size([], None) == (16, 16)


def test_the_target_is_init_at_the_size_asked_for():
    init = image(30, 61)
    made = sample._example("", [], init, (32, 16), DATA)
    np.testing.assert_array_equal(made.target, resize(init, (32, 16)))
    assert not sample._example("", [image(9, 9)], None, (32, 16), DATA).target.any()


def test_sampling_with_strength_is_refused_in_code_too():
    with pytest.raises(ValueError, match="name it with --init"):
        sample.generate("no", "", [], SamplerConfig(strength=0.5))


def test_sizes_are_width_by_height():
    assert sample.parse_size("64x32") == (64, 32)
    with pytest.raises(ValueError, match="must look like 1024x768, not '64'"):
        sample.parse_size("64")
