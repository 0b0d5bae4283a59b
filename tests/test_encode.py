"""Encoding a data set: every example once, whatever the rows, the devices and interruptions."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kontext_jax import encode as encoding
from kontext_jax.config import Config, SheetConfig
from kontext_jax.data import latents, store
from kontext_jax.data.index import Index
from kontext_jax.data.latents import LatentsConfig, LatentStore
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, Loader
from kontext_jax.data.sources import TripleSource
from kontext_jax.data.text import TextConfig
from kontext_jax.encode import encode_with
from kontext_jax.encoders import encode_images
from kontext_jax.flow import TimeConfig
from kontext_jax.geometry import GeometryConfig, fit
from kontext_jax.models.autoencoder import AutoencoderConfig, pack_latents, to_pixels
from kontext_jax.models.flux import Flux
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.objectives.autoencoder import AutoencoderObjectiveConfig
from kontext_jax.objectives.flow_matching import FlowInit
from kontext_jax.objectives.ladd import LaddConfig
from kontext_jax.objectives.transformer import NetworksInit
from kontext_jax.sharding import MeshConfig, make_mesh, shardings_of
from kontext_jax.train import train
from kontext_jax.types import Triple

NUM = 31
DATA = DataConfig(
    batch_size=4,
    caption_dropout=0.5,
    context_dropout=0.5,
    max_skipped=0.5,
    geometry=GeometryConfig(sizes=((16, 16), (32, 16)), pixels_per_token=8),
    packing=PackingConfig(image_tokens=24, text_tokens=32, max_examples=3),
    text=TextConfig(max_tokens=10),
)
BFLOAT16 = 2.0**-8
"""Largest relative error of rounding to bfloat16."""


def make(number: int) -> Triple:
    """A triple with up to two contexts, in two sizes."""
    rng = np.random.default_rng(number)
    image = lambda: rng.integers(0, 256, (16, [16, 32][rng.integers(2)], 3), np.uint8)  # noqa: E731
    contexts = tuple(image() for _ in range(number % 3))
    category = "local" if contexts else "text_to_image"
    return Triple(f"triple/{number}", image(), contexts, f"make {number}", category)


@pytest.fixture(scope="module")
def networks(recipe, random_network) -> dict:
    objective = recipe.objective.config
    new = lambda model, config: lambda: model(config, rngs=nnx.Rngs(0))  # noqa: E731
    return recipe.frozen | {
        "teacher": random_network(new(Flux, objective.transformer), 1),
        "text_encoder": random_network(new(T5Encoder, objective.text_encoder), 2),
    }


@pytest.fixture(scope="module")
def config(recipe, tmp_path_factory) -> Config:
    """LADD, with a data set but no store yet."""
    folder = tmp_path_factory.mktemp("data") / "set"
    store.write({"train": map(make, range(NUM))}, folder)
    networks = recipe.objective.config
    objective = LaddConfig(
        transformer=networks.transformer, text_encoder=networks.text_encoder, pooled="mean"
    )
    return Config(objective=objective, data=dataclasses.replace(DATA, path=str(folder)))


def making(config: Config, folder: Path, data=None, **changes) -> Config:
    """A config with a store; by default with samples of two steps."""
    settings = {"samples": 1.0, "num_steps": 2, "path": str(folder)} | changes
    dropout = {"caption_dropout": 0.0, "context_dropout": 0.0} if settings["samples"] else {}
    data = dropout | {"latents": LatentsConfig(**settings)} | (data or {})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def run(networks: dict, config: Config, devices: int = 1) -> LatentStore:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    networks = jax.device_put(networks, shardings_of(networks, mesh))
    source = TripleSource(config.data.path, config.data.split)
    schedule = TimeConfig() if config.data.latents.samples else None
    encode_with(networks, schedule, source, config, mesh)
    return LatentStore(config.data.latents.path, config.data.split)


@pytest.fixture(autouse=True, scope="module")
def small_chunks_compiled_once(tmp_path_factory):
    """About eight examples per file; jobs with one config share compiled programs."""
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "CHUNK_EXAMPLES", 8)
        yield
    jax.config.update("jax_compilation_cache_dir", old)


@pytest.fixture(scope="module")
def made(networks, config, tmp_path_factory) -> LatentStore:
    return run(networks, making(config, tmp_path_factory.mktemp("stores") / "made"))


def files(opened: LatentStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(opened.path.iterdir())}


def assert_close(ours: LatentStore, theirs: LatentStore, atol: float = 0.02):
    """Asserts that the examples are equal up to rounding."""
    for number in range(NUM):
        a, b = (opened[f"triple/{number}"] for opened in (ours, theirs))
        assert len(a.contexts) == len(b.contexts)
        for x, y in zip(
            (a.target, *a.contexts, a.sample), (b.target, *b.contexts, b.sample), strict=True
        ):
            assert x.size == y.size
            np.testing.assert_allclose(
                x.tokens.astype(np.float32),
                y.tokens.astype(np.float32),
                atol=atol,
                rtol=0.02,
            )


def test_every_example_is_stored_once(made, config):
    """Even though the last batch and the last chunk are incomplete."""
    meta = made.meta
    assert len(meta.records) > 2 and sum(meta.records) == NUM and meta.unreadable == 0
    assert sorted(made.index.ids) == sorted(f"triple/{i}" for i in range(NUM))
    job = json.loads(latents.job_path(made.path, "train").read_text())
    num_rows = Loader(config.data, seed=0).plan.num_rows
    assert num_rows % job["chunk_rows"] and num_rows % DATA.batch_size
    assert not list(made.path.glob(".incomplete*"))
    assert meta.settings.sampling["num_steps"] == 2 and meta.channels == 24
    assert set(meta.settings.networks) == {"autoencoder", "teacher", "text_encoder"}


def test_latents_equal_those_of_each_image_encoded_alone(made, networks):
    encode = jax.jit(lambda image: pack_latents(networks["autoencoder"].encode(to_pixels(image))))
    for number in range(0, NUM, 5):
        triple, example = make(number), made[f"triple/{number}"]
        images = [triple.target, *triple.contexts]
        for image, stored in zip(images, (example.target, *example.contexts), strict=True):
            assert stored.size == (image.shape[1], image.shape[0])
            expected = encode(fit(image, DATA.geometry.sizes)[None])[0]
            np.testing.assert_allclose(
                stored.tokens.astype(np.float32), expected, rtol=1.01 * BFLOAT16, atol=1e-4
            )


@pytest.mark.slow
def test_samples_do_not_depend_on_rows_or_batches(made, networks, config, tmp_path):
    """Other rows, order and batches give the same samples; another seed gives different ones."""
    alone = dataclasses.replace(DATA.packing, max_examples=1)
    other = dataclasses.replace(config, seed=3)
    apart = run(networks, making(other, tmp_path / "alone", {"packing": alone, "batch_size": 8}))
    assert_close(made, apart)
    reseeded = run(networks, making(config, tmp_path / "seed", seed=1))
    for number in range(NUM):
        ours, theirs = (x[f"triple/{number}"].sample.tokens for x in (made, reseeded))
        assert np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max() > 0.5


@pytest.mark.slow
def test_eight_devices_make_the_same_store_as_one(made, networks, config, tmp_path):
    spread = run(networks, making(config, tmp_path / "spread", {"batch_size": 8}), devices=8)
    assert_close(made, spread)


@pytest.mark.slow
def test_classifier_free_guidance_changes_the_samples(made, networks, config, tmp_path):
    guided = run(networks, making(config, tmp_path / "guided", cfg_scale=3.0))
    for number in range(NUM):
        ours, theirs = (x[f"triple/{number}"] for x in (made, guided))
        np.testing.assert_array_equal(ours.target.tokens, theirs.target.tokens)
        difference = ours.sample.tokens.astype(np.float32) - theirs.sample.tokens.astype(np.float32)
        assert np.abs(difference).max() > 0.05


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["between chunks", "in a chunk", "at the end"])
def test_a_killed_job_resumes(made, networks, config, tmp_path, monkeypatch, capsys, moment):
    """On the same device all files are bit-identical."""
    killed = making(config, tmp_path / "killed")
    write, calls = latents.write_chunk, itertools.count()

    def interrupted(path, examples):
        if next(calls) < 1:
            return write(path, examples)
        if moment == "between chunks":
            raise Killed
        (path.parent / f".incomplete-{path.name}").write_bytes(b"left behind")
        write(path, (example for i, example in enumerate(examples) if i < 2 or kill()))

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(
            *(
                (latents, "finish", lambda *_: kill())
                if moment == "at the end"
                else (latents, "write_chunk", interrupted)
            )
        )
        with pytest.raises(Killed):
            run(networks, killed)
    with pytest.raises(FileNotFoundError, match="are incomplete: run"):
        LatentStore(tmp_path / "killed", "train")
    capsys.readouterr()
    resumed = run(networks, killed)
    chunks = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chunk")]
    assert len(chunks) == (0 if moment == "at the end" else len(made.meta.records) - 1)
    assert files(resumed) == files(made)


def test_a_job_resumes_with_another_batch_size_in_the_same_chunks(made, networks, config, tmp_path):
    first = making(config, tmp_path / "store")
    run(networks, first)
    latents.meta_path(first.data.latents.path, "train").unlink()
    latents.chunk_path(tmp_path / "store", "train", 1, len(made.meta.records)).unlink()
    second = making(config, tmp_path / "store", {"batch_size": 6})
    resumed = run(networks, second)
    assert resumed.meta.records == made.meta.records
    assert_close(made, resumed)


def test_a_complete_store_is_not_changed(networks, config, made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.path.iterdir()}
    other = {"batch_size": 8, "packing": dataclasses.replace(DATA.packing, max_examples=1)}
    run(networks, making(config, made.path, other))
    assert {path: path.stat().st_mtime_ns for path in made.path.iterdir()} == before
    assert "is complete: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("complete", [True, False])
def test_another_store_in_the_folder_is_refused(networks, config, tmp_path, complete):
    folder = tmp_path / "store"
    run(networks, making(config, folder, samples=0.0))
    if not complete:
        latents.meta_path(folder, "train").unlink()
    index = {"geometry": dataclasses.replace(DATA.geometry, position_scheme="index")}
    with pytest.raises(ValueError, match="with a different geometry: choose another data.latents"):
        run(networks, making(config, folder, index, samples=0.0))
    with pytest.raises(ValueError, match="different teacher and text_encoder and sampling: choose"):
        run(networks, making(config, folder))
    other = networks | {"autoencoder": jax.tree.map(lambda x: 2 * x, networks["autoencoder"])}
    with pytest.raises(ValueError, match="different autoencoder: choose another"):
        run(other, making(config, folder, samples=0.0))
    if not complete:
        packing = {"packing": dataclasses.replace(DATA.packing, max_examples=1)}
        with pytest.raises(ValueError, match="different plan of rows: choose"):
            run(networks, making(config, folder, packing, samples=0.0))
        latents.job_path(folder, "train").unlink()
        with pytest.raises(ValueError, match="no latents-train.job.json to say what"):
            run(networks, making(config, folder, samples=0.0))


def test_every_process_refuses_files_without_a_job_description(config, tmp_path, monkeypatch):
    """Otherwise one process would wait for the others."""
    stray = latents.chunk_path(tmp_path, "train", 0, 1)
    stray.write_bytes(b"")
    plan = Loader(config.data, seed=0).plan
    settings = latents.StoreSettings(data="", split="train", geometry={}, networks={})
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="has files latents-train-.* but no latents-train.job"):
        encoding.begin_job(tmp_path, settings, plan, batch_size=4)


@pytest.mark.parametrize("field", ["num_steps", "guidance", "cfg_scale", "seed"])
def test_other_samples_in_the_folder_are_refused(networks, config, made, field):
    change = {field: 3.0 if field in ("guidance", "cfg_scale") else 3}
    with pytest.raises(ValueError, match=f"different {field}: choose another data.latents.path"):
        run(networks, making(config, made.path, **change))


def test_samples_from_networks_used_differently_are_refused(networks, config, made):
    longer = {"text": dataclasses.replace(DATA.text, max_tokens=9)}
    with pytest.raises(ValueError, match="different text: choose"):
        run(networks, making(config, made.path, longer))
    objective = dataclasses.replace(config.objective, pooled="zeros")
    with pytest.raises(ValueError, match="different pooled: choose"):
        run(networks, making(dataclasses.replace(config, objective=objective), made.path))
    for name, setting in (
        ("autoencoder", "dtype"), ("text_encoder", "dtype"), ("teacher", "timestep_dtype"),
    ):  # fmt: skip
        other = jax.tree.map(lambda x: x, networks[name])
        changed = "bfloat16" if getattr(other.config, setting) == "float32" else "float32"
        other.config = dataclasses.replace(other.config, **{setting: changed})
        with pytest.raises(ValueError, match=f"different {name}.{setting}: choose"):
            run(networks | {name: other}, making(config, made.path))


def test_configs_that_cannot_make_a_store_are_refused(config, recipe):
    with pytest.raises(ValueError, match="data.latents.path is empty: set it to the folder"):
        encoding.encode(config)
    flow = dataclasses.replace(config, objective=recipe.objective.config)
    with pytest.raises(ValueError, match="flow_matching has no frozen teacher to make samples"):
        encoding.encode(making(flow, Path("nowhere")))
    pixels = dataclasses.replace(config, objective=AutoencoderObjectiveConfig())
    with pytest.raises(ValueError, match="objective autoencoder needs pixels: leave data"):
        making(pixels, Path("nowhere"), samples=0.0)


def broken_set(folder: Path, monkeypatch, number: int) -> str:
    """Writes the data set with one image that cannot be decoded."""
    good, broken = store.encode_png, make(number).target

    def encode_png(image):
        return good(image)[: 60 if np.array_equal(image, broken) else None]

    with monkeypatch.context() as patch:
        patch.setattr(store, "encode_png", encode_png)
        store.write({"train": map(make, range(NUM))}, folder)
    return str(folder)


def test_unreadable_examples_are_left_out_and_counted(networks, config, tmp_path, monkeypatch):
    """Rows lack the same examples as with pixels."""
    path = broken_set(tmp_path / "set", monkeypatch, 7)
    cached = making(config, tmp_path / "store", {"path": path}, samples=0.0)
    opened = run(networks, cached)
    assert opened.meta.unreadable == 1 and len(opened) == NUM - 1
    pixels = dataclasses.replace(cached.data, latents=LatentsConfig())
    loaders = [Loader(data, seed=0) for data in (pixels, cached.data)]
    for _ in range(6):
        ours, theirs = map(next, loaders)
        np.testing.assert_array_equal(ours.example_ids, theirs.example_ids)
        np.testing.assert_array_equal(ours.skipped, theirs.skipped)
    for loader in loaders:
        loader.close()


def test_too_many_unreadable_examples_stop_the_job(networks, config, tmp_path, monkeypatch):
    path = broken_set(tmp_path / "set", monkeypatch, 7)
    strict = making(config, tmp_path / "store", {"path": path, "max_skipped": 0.0}, samples=0.0)
    with pytest.raises(ValueError, match=r"1 of \d+ records could not be read, more than data.max"):
        run(networks, strict)
    assert not list((tmp_path / "store").glob(".incomplete*"))


def test_duplicate_ids_are_refused(networks, config, tmp_path, monkeypatch):
    rows = list(TripleSource(config.data.path, "train").index)
    twice = [row._replace(id=row.id.replace("/3", "/4")) for row in rows]
    monkeypatch.setattr(TripleSource, "index", Index.of(twice))
    with pytest.raises(ValueError, match="uses an id twice, but latents are stored by id"):
        run(networks, making(config, tmp_path / "store", samples=0.0))


def test_losses_equal_those_of_pixels_up_to_rounding(networks, config, recipe, tmp_path):
    """They equal those of latents rounded as in the store."""
    cached = making(config, tmp_path / "store", samples=0.0)
    run(networks, cached)
    frozen = {"autoencoder": networks["autoencoder"]}

    @jax.jit
    def loss(batch, key):
        inputs = recipe.objective.prepare(frozen, batch)
        step = jnp.zeros((), jnp.int32)
        return recipe.objective.loss("model", recipe.params, frozen, inputs, key, step)[0]

    @jax.jit
    def rounded(batch):
        latents = encode_images(networks["autoencoder"], batch).astype(jnp.bfloat16)
        return batch.replace(latents=latents)

    pixels = dataclasses.replace(cached.data, latents=LatentsConfig())
    loaders = [Loader(data, seed=0) for data in (pixels, cached.data)]
    for step in range(4):
        ours, theirs = map(next, loaders)
        key = jax.random.key(step)
        exact, expected, stored = (loss(b, key) for b in (ours, rounded(ours), theirs))
        np.testing.assert_allclose(stored, exact, rtol=1e-3)
        np.testing.assert_allclose(stored, expected, rtol=1e-6)
    for loader in loaders:
        loader.close()


@pytest.mark.slow
def test_distillation_from_data_to_student(world_folder, recipe, tmp_path):
    """Autoencoder, teacher, the teacher's samples, student: each through its command's function."""
    networks = recipe.objective.config
    data = DataConfig(
        path=str(world_folder),
        batch_size=8,
        geometry=GeometryConfig(sizes=((32, 32),), pixels_per_token=8),
        packing=PackingConfig(image_tokens=32, text_tokens=80, max_examples=2),
        text=TextConfig(max_tokens=40),
    )
    first = Config(
        objective=AutoencoderObjectiveConfig(autoencoder=AutoencoderConfig.tiny(channels=8)),
        data=data,
        sheets=SheetConfig(every=0),
        num_steps=1,
        log_every=1,
    )
    train(first, tmp_path / "autoencoder")
    locations = {"autoencoder": str(tmp_path / "autoencoder")}
    cached = dataclasses.replace(data, latents=LatentsConfig(path=str(tmp_path / "cache")))
    teacher = dataclasses.replace(
        first, objective=dataclasses.replace(networks, init_from=FlowInit(**locations)), data=cached
    )
    with pytest.raises(FileNotFoundError, match="create them with `python -m kontext_jax.encode"):
        train(teacher, tmp_path / "teacher")
    encoding.encode(teacher)
    train(teacher, tmp_path / "teacher")

    locations |= {name: str(tmp_path / "teacher") for name in ("transformer", "text_encoder")}
    objective = LaddConfig(
        transformer=networks.transformer,
        text_encoder=networks.text_encoder,
        pooled="mean",
        init_from=NetworksInit(**locations),
    )
    samples = LatentsConfig(path=str(tmp_path / "samples"), samples=1.0, num_steps=2, cfg_scale=2.0)
    synthetic = dataclasses.replace(data, caption_dropout=0.0, latents=samples)
    student = dataclasses.replace(first, objective=objective, data=synthetic)
    encoding.encode(student)
    assert LatentStore(tmp_path / "samples", "train").meta.settings.sampling["cfg_scale"] == 2.0
    train(student, tmp_path / "student")

    train(dataclasses.replace(teacher, num_steps=2), tmp_path / "teacher")
    with pytest.raises(ValueError, match="with a different teacher and text_encoder than this"):
        train(student, tmp_path / "other")
    train(dataclasses.replace(first, num_steps=2), tmp_path / "autoencoder")
    with pytest.raises(ValueError, match="with a different autoencoder than this run uses: use"):
        train(teacher, tmp_path / "other")
