"""A store of latents, and rows that are read from it instead of pixels."""

import dataclasses
import json
import pickle
import threading
import time
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
import pytest

from kontext_jax.data import latents, store
from kontext_jax.data.latents import (
    DTYPE,
    EncodedExample,
    LatentsConfig,
    LatentStore,
    StoreSettings,
    check_networks,
)
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, Loader, plan_of
from kontext_jax.data.sources import CorruptRecordError, TripleSource
from kontext_jax.data.text import TextConfig
from kontext_jax.geometry import GeometryConfig, fit, num_tokens, size_of
from kontext_jax.types import Latents, Triple, unprompted

GEOMETRY = GeometryConfig(sizes=((16, 16), (32, 16)), pixels_per_token=8)
NUM, CHANNELS = 30, 4
NETWORKS = {"autoencoder": ["ab12", 1.5, 0.25], "teacher": ["cd34"]}
USAGE = {"autoencoder.dtype": "float32", "teacher.dtype": "bfloat16", "pooled": "clip"}
UNREADABLE = 11


def make(number: int) -> Triple:
    """A triple with up to two contexts, in two sizes."""
    rng = np.random.default_rng(number)
    image = lambda: rng.integers(0, 256, (20, [18, 37][rng.integers(2)], 3), np.uint8)  # noqa: E731
    contexts = tuple(image() for _ in range(number % 3))
    category = "local" if contexts else "text_to_image"
    return Triple(f"triple/{number}", image(), contexts, f"make {number}", category)


def encoded(image: np.ndarray, sample: bool = False) -> Latents:
    """Tokens that encode their image, their index in it, and whether they are a sample."""
    fitted = fit(image, GEOMETRY.sizes)
    count = num_tokens(size_of(fitted), GEOMETRY.pixels_per_token)
    values = np.empty((count, CHANNELS), np.float32)
    values[:, 0], values[:, 1] = image.mean(), np.arange(count)
    values[:, 2], values[:, 3] = image.std(), sample
    return Latents(size_of(fitted), values.astype(DTYPE))


def stored(number: int, sample: bool) -> EncodedExample:
    triple = make(number)
    target = encoded(triple.target, sample=True) if sample else None
    contexts = tuple(map(encoded, triple.contexts))
    return EncodedExample(triple.id, encoded(triple.target), contexts, target)


def fill(folder: Path, config: DataConfig, sample: bool = False, **changes) -> DataConfig:
    """Writes a store of the data set in three files, with one unreadable example."""
    folder.mkdir(parents=True)
    source = TripleSource(config.path, config.split)
    settings = StoreSettings(
        **{
            "data": source.fingerprint,
            "split": config.split,
            "geometry": latents.as_json(config.geometry),
            "networks": NETWORKS,
            "usage": USAGE,
            "sampling": LatentsConfig().sampling() | {"text": config.text.lengths()}
            if sample
            else None,
        }
        | changes
    )
    numbers = np.random.default_rng(0).permutation(NUM)
    for chunk, part in enumerate(np.split(numbers, [7, 19])):
        examples = [None if i == UNREADABLE else stored(i, sample) for i in part]
        latents.write_chunk(latents.chunk_path(folder, config.split, chunk, 3), iter(examples))
    latents.finish(folder, settings, CHANNELS, 3)
    return reading(config, folder)


def reading(config: DataConfig, folder: Path, **changes) -> DataConfig:
    return dataclasses.replace(config, latents=LatentsConfig(path=str(folder), **changes))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data") / "set"
    store.write({"train": map(make, range(NUM))}, folder)
    return DataConfig(
        path=str(folder),
        batch_size=4,
        caption_dropout=0.3,
        context_dropout=0.4,
        geometry=GEOMETRY,
        packing=PackingConfig(image_tokens=24, text_tokens=32, max_examples=3),
        text=TextConfig(max_tokens=10),
    )


@pytest.fixture(scope="module")
def undropped(pixels) -> DataConfig:
    """No dropout, as samples require."""
    return dataclasses.replace(pixels, caption_dropout=0.0, context_dropout=0.0)


@pytest.fixture(scope="module")
def plain(pixels, tmp_path_factory) -> DataConfig:
    return fill(tmp_path_factory.mktemp("plain") / "a" / "b", pixels)


@pytest.fixture(scope="module")
def sampled(undropped, tmp_path_factory) -> DataConfig:
    return fill(tmp_path_factory.mktemp("sampled") / "store", undropped, sample=True)


def batches(config: DataConfig, number: int) -> list:
    loader = Loader(config, seed=0)
    result = [next(loader) for _ in range(number)]
    loader.close()
    return result


def assert_same_example(a: EncodedExample, b: EncodedExample):
    assert (a.id, a.sample is None) == (b.id, b.sample is None)
    ours, theirs = ([x for x in (e.target, *e.contexts, e.sample) if x is not None] for e in (a, b))
    assert [x.size for x in ours] == [x.size for x in theirs]
    for x, y in zip(ours, theirs, strict=True):
        assert x.tokens.dtype == y.tokens.dtype == DTYPE
        np.testing.assert_array_equal(x.tokens, y.tokens)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("sample", [False, True])
def test_a_record_round_trips(number, sample):
    example = stored(number, sample)
    assert_same_example(latents.from_bytes(latents.to_bytes(example), CHANNELS), example)


def test_a_record_is_a_line_of_json_and_numbers():
    line, _, numbers = latents.to_bytes(stored(1, sample=True)).partition(b"\n")
    example = stored(1, sample=True)
    images = (example.target, *example.contexts)
    assert json.loads(line) == {
        "id": "triple/1",
        "sizes": [list(image.size) for image in images],
        "tokens": [len(image.tokens) for image in images],
        "sample": True,
    }
    expected = np.concatenate([image.tokens for image in (*images, example.sample)])
    np.testing.assert_array_equal(
        np.frombuffer(numbers, "<u2").reshape(-1, CHANNELS), expected.view("<u2")
    )


def test_records_are_read_by_id(plain, sampled):
    for config, sample in ((plain, False), (sampled, True)):
        opened = LatentStore(config.latents.path, "train")
        assert len(opened) == NUM - 1 and opened.meta.unreadable == 1
        unpickled = pickle.loads(pickle.dumps(opened))
        for number in {*range(NUM)} - {UNREADABLE}:
            assert_same_example(opened[f"triple/{number}"], stored(number, sample))
            assert_same_example(unpickled[f"triple/{number}"], stored(number, sample))
        assert len(pickle.dumps(opened)) < 5000  # without its index
        for absent in (f"triple/{UNREADABLE}", "", "zzz"):
            with pytest.raises(CorruptRecordError, match=f'"{absent}" .* could not be encoded'):
                opened[absent]


def test_threads_read_the_index_once(plain, monkeypatch):
    opened, num_threads = LatentStore(plain.latents.path, "train"), 16
    computed, barrier = [], threading.Barrier(num_threads)

    def slowly(name, function):
        def compute(*args):
            computed.append(name)
            time.sleep(0.05)  # lets other threads in
            return function(*args)

        return compute

    monkeypatch.setattr(latents.StoreIndex, "digest", slowly("index", latents.StoreIndex.digest))
    order = vars(LatentStore)["_order"]
    monkeypatch.setattr(order, "func", slowly("order", order.func))

    def read(number):
        barrier.wait()
        return opened[f"triple/{number % 3}"]

    with futures.ThreadPoolExecutor(num_threads) as pool:
        for number, example in enumerate(pool.map(read, range(num_threads))):
            assert_same_example(example, stored(number % 3, sample=False))
    assert sorted(computed) == ["index", "order"]


def test_rows_from_latents_equal_rows_from_pixels_except_the_images(pixels, plain):
    """Through two epochs, including dropped prompts and contexts."""
    pixels = dataclasses.replace(pixels, negatives=True)
    plain = dataclasses.replace(plain, negatives=True)
    compared_ids = set()
    for theirs, ours in zip(batches(pixels, 12), batches(plain, 12), strict=True):
        assert ours.images == {} == ours.image_segments and not ours.source.any()
        assert theirs.latents is None and ours.latents.dtype == DTYPE
        lost = theirs.example_ids % NUM == UNREADABLE
        lost &= theirs.example_ids >= 0
        np.testing.assert_array_equal(ours.example_ids, np.where(lost, -1, theirs.example_ids))
        np.testing.assert_array_equal(ours.skipped, lost.sum(axis=1))
        for row in np.flatnonzero(~lost.any(axis=1)):
            fields = ("positions", "segments", "is_target", "offsets", "text_ids")
            for name in (*fields, "text_segments", "clip_ids", "example_ids"):
                np.testing.assert_array_equal(getattr(ours, name)[row], getattr(theirs, name)[row])
            jax.tree.map(
                lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[row]),
                ours.negative,
                theirs.negative,
            )
            compared_ids |= {*ours.example_ids[row].tolist()}
    assert max(compared_ids) >= NUM


def test_each_token_comes_from_its_image(plain):
    config = dataclasses.replace(plain, context_dropout=0.0)
    for batch in batches(config, 8):
        assert not batch.latents[batch.segments == 0].any()
        for row, place in np.argwhere(batch.example_ids >= 0):
            example = stored(batch.example_ids[row, place] % NUM, sample=False)
            in_example = batch.segments[row] == place + 1
            parts = [example.target.tokens, *(context.tokens for context in example.contexts)]
            np.testing.assert_array_equal(batch.latents[row, in_example], np.concatenate(parts))
            assert batch.is_target[row, in_example].sum() == len(parts[0])


def test_dropping_contexts_drops_their_tokens(plain):
    for batch in batches(dataclasses.replace(plain, context_dropout=1.0), 8):
        assert (batch.is_target == (batch.segments > 0)).all()
        for row, place in np.argwhere(batch.example_ids >= 0):
            target = stored(batch.example_ids[row, place] % NUM, sample=False).target
            in_example = batch.segments[row] == place + 1
            np.testing.assert_array_equal(batch.latents[row, in_example], target.tokens)


def synthetic_targets(config: DataConfig, number: int) -> dict[int, bool]:
    """Whether each example's target is a sample, by example id; contexts never are."""
    synthetic = {}
    for batch in batches(config, number):
        is_sample = batch.latents[..., 3] == 1
        assert not is_sample[~batch.is_target].any()
        for row, place in np.argwhere(batch.example_ids >= 0):
            target = (batch.segments[row] == place + 1) & batch.is_target[row]
            assert is_sample[row, target].all() == is_sample[row, target].any()
            synthetic[int(batch.example_ids[row, place])] = bool(is_sample[row, target].all())
    return synthetic


def test_samples_replace_the_requested_share_of_targets(sampled):
    folder = Path(sampled.latents.path)
    shares = {}
    for share in (0.0, 0.3, 1.0):
        config = reading(sampled, folder, samples=share)
        shares[share] = synthetic_targets(config, 80)
        deviation = 0.5 / len(shares[share]) ** 0.5
        assert abs(np.mean([*shares[share].values()]) - share) < 3 * deviation
        assert len(shares[share]) > 500
    by_example = [{shares[0.3].get(i + k * NUM) for k in range(15)} for i in range(12, NUM)]
    assert all({True, False} <= drawn for drawn in by_example)  # drawn again in every epoch
    assert synthetic_targets(reading(sampled, folder, samples=0.3), 80) == shares[0.3]
    assert not any(shares[0.0].values()) and all(shares[1.0].values())


def test_samples_change_only_the_latents(sampled):
    mixed = batches(reading(sampled, Path(sampled.latents.path), samples=0.5), 12)
    for ours, theirs in zip(mixed, batches(sampled, 12), strict=True):
        same = jax.tree.map(np.array_equal, ours, theirs)
        assert not same.latents
        assert all(jax.tree.leaves(same.replace(latents=True)))


def test_empty_prompts_are_in_the_places_of_the_examples(plain):
    config = dataclasses.replace(plain, negatives=True, caption_dropout=0.0)
    for batch in batches(config, 4):
        negative = unprompted(batch)
        assert negative.negative is None and negative.latents is batch.latents
        for row, exists in enumerate(batch.example_ids >= 0):
            ids, segments = negative.text_ids[row], negative.text_segments[row]
            segments = segments[segments > 0].tolist()
            assert segments == (1 + np.flatnonzero(exists)).tolist()
            assert ids.tolist() == [1] * len(segments) + [0] * (len(ids) - len(segments))
    with pytest.raises(ValueError, match="carries no empty prompts: set data.negatives=true"):
        unprompted(batches(plain, 1)[0])


def test_empty_prompts_are_also_empty_for_clip(plain, flux_tokenizers):
    text = TextConfig(clip_tokenizer=str(flux_tokenizers / "tokenizer"), clip_max_tokens=4)
    config = dataclasses.replace(plain, text=text, negatives=True, caption_dropout=0.0)
    packing = dataclasses.replace(config.packing, text_tokens=64)
    [batch] = batches(dataclasses.replace(config, packing=packing), 1)
    exists = batch.example_ids >= 0
    assert batch.clip_ids[exists, 1].min() < 518
    assert (batch.negative.clip_ids[exists] == [518, 519, 519, 519]).all()
    assert not batch.negative.clip_ids[~exists].any()


@pytest.mark.slow
def test_a_worker_process_reads_the_same(sampled):
    config = reading(sampled, Path(sampled.latents.path), samples=0.5)
    config = dataclasses.replace(config, negatives=True)
    worker = dataclasses.replace(config, num_workers=1)
    for ours, theirs in zip(batches(worker, 3), batches(config, 3), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_plan_does_not_depend_on_latents(pixels, plain):
    source = TripleSource(pixels.path, "train")
    ours, theirs = (plan_of(source, config, seed=0) for config in (plain, pixels))
    assert ours.fingerprint() == theirs.fingerprint()


@pytest.mark.parametrize("change", ["pixels", "share", "store"])
def test_a_position_from_other_latents_is_refused(undropped, sampled, tmp_path, change):
    loader = Loader(sampled, seed=0)
    state = json.loads(json.dumps(loader.state()))
    resumed = Loader(sampled, seed=0)
    resumed.restore(state)
    other = {
        "pixels": undropped,
        "share": reading(sampled, Path(sampled.latents.path), samples=0.5),
        "store": fill(tmp_path / "other", undropped, networks={"autoencoder": ["other"]}),
    }[change]
    other = Loader(other, seed=0)
    with pytest.raises(ValueError, match="saved with a different latents, so"):
        other.restore(state)
    for opened in (loader, resumed, other):
        opened.close()


def test_positions_saved_before_latents_existed_are_accepted(pixels):
    loader = Loader(pixels, seed=0)
    state = loader.state()
    del state["identity"]["latents"]
    loader.restore(state)
    loader.close()


def refusal(config: DataConfig, **changes) -> str:
    config = reading(config, Path(config.latents.path), **changes)
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        Loader(config, seed=0)
    return str(caught.value)


def test_a_missing_or_incomplete_store_is_refused(pixels, tmp_path):
    config = fill(tmp_path / "store", pixels)
    folder = tmp_path / "store"
    (folder / "latents-train-00001-of-00003.array_record").rename(tmp_path / "away")
    message = refusal(config)
    assert "lack the file latents-train-00001-of-00003.array_record: delete latents-" in message
    latents.meta_path(folder, "train").unlink()
    assert 'There are no latents of "train"' in refusal(config)
    latents.job_path(folder, "train").write_text("{}")
    message = refusal(config)
    assert "are incomplete: run `python -m kontext_jax.encode --config=...` again" in message
    message = refusal(reading(config, tmp_path / "nowhere"))
    assert "create them with `python -m kontext_jax.encode --config=...`." in message


def test_latents_of_other_data_are_refused(pixels, plain, tmp_path):
    altered = [make(number) for number in range(NUM)]
    altered[4] = altered[4]._replace(target=255 - altered[4].target)
    store.write({"train": altered, "validation": map(make, range(90, 93))}, tmp_path / "set")
    other = dataclasses.replace(plain, path=str(tmp_path / "set"))
    assert 'were made from another version of "train" of' in refusal(other)
    assert 'no latents of "validation"' in refusal(dataclasses.replace(other, split="validation"))


def test_other_settings_are_refused(plain, undropped, sampled):
    other = dataclasses.replace(GEOMETRY, position_scheme="index")
    message = refusal(dataclasses.replace(plain, geometry=other))
    assert "were made with a different geometry: use the settings they were made with" in message
    without = reading(undropped, Path(plain.latents.path))
    assert "data.latents.samples is 0.5, but" in refusal(without, samples=0.5)
    message = refusal(sampled, samples=0.1, num_steps=7, seed=3)
    assert "were made with a different num_steps and seed: use" in message
    longer = dataclasses.replace(sampled, text=TextConfig(max_tokens=9))
    assert "were made with a different text: use" in refusal(longer, samples=0.1)
    for config in (sampled, longer):  # read no samples
        Loader(reading(config, Path(sampled.latents.path), num_steps=7), seed=0).close()


def test_other_networks_are_refused(sampled):
    meta = LatentStore(sampled.latents.path, "train").meta
    half = dataclasses.replace(sampled.latents, samples=0.5)
    check_networks(meta, half, NETWORKS | {"transformer": ["other"]}, USAGE | {"clip.dtype": "x"})
    check_networks(meta, half, {"autoencoder": ["ab12", 1.5, 0.25]}, {})
    other = {"teacher.dtype": "float32", "pooled": "mean"}
    check_networks(meta, sampled.latents, NETWORKS | {"teacher": ["other"]}, USAGE | other)
    with pytest.raises(ValueError, match="made with a different teacher than this run uses"):
        check_networks(meta, half, NETWORKS | {"teacher": ["other"]}, USAGE)
    with pytest.raises(ValueError, match="with a different teacher.dtype and pooled than this"):
        check_networks(meta, half, NETWORKS, USAGE | other)
    loader = Loader(sampled, seed=0)
    loader.check_networks(NETWORKS, USAGE)
    with pytest.raises(ValueError, match="with a different autoencoder than this run uses: use"):
        loader.check_networks({"autoencoder": ["ab12", 1.5, 0.2]}, USAGE)
    with pytest.raises(ValueError, match="with a different autoencoder.dtype than this run uses"):
        loader.check_networks(NETWORKS, {"autoencoder.dtype": "bfloat16"})
    loader.close()


def test_a_damaged_record_is_skipped_and_counted(pixels, tmp_path, caplog):
    config = fill(tmp_path / "store", pixels)
    opened = LatentStore(tmp_path / "store", "train")
    file = latents.chunk_path(tmp_path / "store", "train", 1, 3)
    data = bytearray(file.read_bytes())
    data[600] ^= 1  # in a record: the file is mostly its footer
    file.write_bytes(data)
    damaged = [i for i in range(NUM) if i != UNREADABLE and not is_readable(opened, i)]
    assert len(damaged) == 1
    ids = {i for batch in batches(config, 5) for i in batch.example_ids.ravel() if i >= 0}
    assert ids & {*range(NUM)} == {*range(NUM)} - {UNREADABLE, *damaged}
    assert f'Skipped a record. The latents of "triple/{damaged[0]}" in "train" of' in caplog.text

    file.write_bytes(data[:200])
    opened = LatentStore(tmp_path / "store", "train")
    assert sum(is_readable(opened, i) for i in range(NUM)) == NUM - 1 - 12
    with pytest.raises(ValueError, match="00001-of-00003.array_record is damaged .*: delete it"):
        latents.finish(tmp_path / "store", opened.meta.settings, CHANNELS, 3)


def is_readable(opened: LatentStore, number: int) -> bool:
    try:
        assert_same_example(opened[f"triple/{number}"], stored(number, sample=False))
    except CorruptRecordError:
        return False
    return True


def test_records_and_index_must_belong_together(pixels, plain, sampled, tmp_path):
    """A chunk or an index of another store is detected."""
    config = fill(tmp_path / "store", pixels)
    theirs = Path(sampled.latents.path)
    file = latents.chunk_path(tmp_path / "store", "train", 0, 3)
    file.write_bytes(latents.chunk_path(theirs, "train", 0, 3).read_bytes())
    opened = LatentStore(tmp_path / "store", "train")
    number = int(np.random.default_rng(0).permutation(NUM)[0])
    with pytest.raises(CorruptRecordError, match="its checksum is wrong"):
        opened[f"triple/{number}"]
    index = latents.index_path(tmp_path / "store", "train")
    index.write_bytes(latents.index_path(theirs, "train").read_bytes())
    with pytest.raises(ValueError, match="is not the index of this store: delete latents-train"):
        batches(config, 1)


def test_a_chunk_is_written_atomically(tmp_path):
    def interrupted():
        yield stored(0, sample=False)
        raise KeyboardInterrupt

    path = latents.chunk_path(tmp_path, "train", 0, 1)
    with pytest.raises(KeyboardInterrupt):
        latents.write_chunk(path, interrupted())
    assert [*tmp_path.iterdir()] == []
    latents.write_chunk(path, [stored(0, sample=False)])
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 1.5}, "latents.samples is 1.5; set a share from 0 to 1"),
        ({"path": ""}, "set latents.path"),
        ({"num_steps": 0}, "num_steps 0 must be 1 or more"),
    ],
)
def test_invalid_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        LatentsConfig(**({"path": "a", "samples": 0.5} | change))


@pytest.mark.parametrize("name", ["caption_dropout", "context_dropout"])
def test_samples_with_dropout_are_refused(undropped, sampled, name):
    latents = dataclasses.replace(sampled.latents, samples=0.5)
    dataclasses.replace(undropped, latents=latents)
    with pytest.raises(ValueError, match=f"data.{name} is 0.1, but .* set data.{name} or .* to 0"):
        dataclasses.replace(undropped, latents=latents, **{name: 0.1})
