"""Rows against a naive loop, and saving and restoring the loader's position."""

import dataclasses
import json
import shutil
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from kontext_jax.data import layout, packing, store
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import (
    DataConfig,
    Loader,
    RowAssembler,
    assemble,
    batches_of,
    check_readable,
    empty_prompts,
    plan_of,
    prepare,
)
from kontext_jax.data.sources import TripleSource
from kontext_jax.data.text import TextConfig, Tokenizer
from kontext_jax.geometry import GeometryConfig, position_ids
from kontext_jax.types import Example, Triple, unprompted

GEOMETRY = GeometryConfig(sizes=((16, 16), (32, 16)), pixels_per_token=8)
CONFIG = DataConfig(
    batch_size=4,
    caption_dropout=0.0,
    geometry=GEOMETRY,
    packing=PackingConfig(image_tokens=24, text_tokens=32, max_examples=3),
    text=TextConfig(max_tokens=10),
)
NUM = 30


def make(number: int) -> Triple:
    """A triple with up to two contexts; no image has a size of the geometry."""
    rng = np.random.default_rng(number)
    image = lambda: rng.integers(0, 256, (20, [18, 37][rng.integers(2)], 3), np.uint8)  # noqa: E731
    contexts = tuple(image() for _ in range(number % 3))
    category = "local" if contexts else "text_to_image"
    return Triple(f"triple/{number}", image(), contexts, f"make {number}", category)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data") / "set"
    store.write({"train": map(make, range(NUM))}, folder)
    return dataclasses.replace(CONFIG, path=str(folder))


def load(config, **kwargs) -> Loader:
    return Loader(config, **({"seed": 0} | kwargs))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def patches(batch) -> np.ndarray:
    """The pixels of all encoded tokens of a row, in the encoder's order."""
    patches = []
    for key in sorted(batch.images):
        for image in batch.images[key]:
            height, width = image.shape[:2]
            for r in range(0, height, 8):
                patches += [image[r : r + 8, c : c + 8] for c in range(0, width, 8)]
    return np.stack(patches)


def part(batch, segment: int) -> list[np.ndarray]:
    """A row's data of one example, wherever it is in the row."""
    image, text = batch.segments == segment, batch.text_segments == segment
    per_token = (batch.positions, batch.is_target, batch.offsets)
    return [
        patches(batch)[batch.source[image]],
        *(x[image] for x in per_token),
        batch.text_ids[text],
    ]


def row(config, number: int, **settings):
    config = dataclasses.replace(config, **settings)
    source = TripleSource(config.path, "train")
    return RowAssembler(source, plan_of(source, config, seed=0), config, seed=0)[number]


def test_a_row_is_laid_out_token_by_token():
    """Two examples around an unreadable one; every token is traced to its pixels."""
    rng = np.random.default_rng(0)
    image = lambda w, h: rng.integers(0, 256, (h, w, 3), np.uint8)  # noqa: E731
    first = Example("a", image(16, 16), (image(32, 16), image(16, 16)), np.array([5, 6, 1]))
    third = Example("c", image(32, 16), (), np.array([7, 1]))
    slots = {"16x16": 3, "16x32": 2}
    batch = assemble([first, None, third], [40, 41, 42], slots, CONFIG)

    assert batch.skipped == 1
    assert batch.example_ids.tolist() == [40, -1, 42]
    assert batch.text_ids.tolist() == [5, 6, 1, 7, 1] + [0] * 27
    assert batch.text_segments.tolist() == [1, 1, 1, 3, 3] + [0] * 27
    assert {key: x.shape for key, x in batch.images.items()} == {
        "16x16": (3, 16, 16, 3), "16x32": (2, 16, 32, 3)
    }  # fmt: skip
    assert batch.image_segments["16x16"].tolist() == [1, 1, 0]
    assert batch.image_segments["16x32"].tolist() == [1, 3]

    pixels = patches(batch)
    token = 0
    for segment, example in ((1, first), (3, third)):
        images = (example.target, *example.contexts)
        sizes = [(x.shape[1], x.shape[0]) for x in images]
        positions = iter(position_ids(sizes[0], sizes[1:], GEOMETRY))
        offset = 0
        for i, image in enumerate(images):
            for r in range(0, image.shape[0], 8):
                for c in range(0, image.shape[1], 8):
                    np.testing.assert_array_equal(
                        pixels[batch.source[token]], image[r : r + 8, c : c + 8]
                    )
                    assert batch.segments[token] == segment
                    assert batch.is_target[token] == (i == 0)
                    assert batch.offsets[token] == offset
                    assert batch.positions[token].tolist() == next(positions).tolist()
                    token, offset = token + 1, offset + 1
    assert token == 4 + 8 + 4 + 8 == CONFIG.packing.image_tokens


def test_padding_is_marked_everywhere():
    example = Example("a", np.ones((16, 16, 3), np.uint8), (), np.array([5, 1]))
    batch = assemble([example], [3], {"16x16": 2}, CONFIG)
    assert not batch.segments[4:].any() and not batch.is_target[4:].any()
    assert not batch.source[4:].any() and not batch.text_segments[2:].any()
    assert batch.image_segments["16x16"].tolist() == [1, 0] and not batch.images["16x16"][1].any()
    assert batch.example_ids.tolist() == [3, -1, -1]


def test_clip_ids_are_in_the_place_of_their_example():
    config = dataclasses.replace(
        CONFIG, text=TextConfig(clip_tokenizer="some/folder", clip_max_tokens=4)
    )
    image, ids = np.zeros((16, 16, 3), np.uint8), [np.array([8, i, 9, 9]) for i in range(3)]
    examples = [Example("a", image, (), np.array([1]), ids[i]) for i in range(3)]
    batch = assemble([examples[1], None, examples[2]], range(3), {"16x16": 3}, config)
    assert batch.clip_ids.tolist() == [[8, 1, 9, 9], [0] * 4, [8, 2, 9, 9]]
    assert batch.clip_ids.dtype == np.int32
    with pytest.raises(ValueError, match="shape"):  # the examples were made without CLIP
        assemble([examples[0]._replace(clip_ids=np.zeros(0, np.int32))], [0], {"16x16": 3}, config)


def test_empty_prompts_are_laid_out_like_prompts():
    """Independent of the examples' prompts, and without a prompt for an unreadable example."""
    image = np.zeros((16, 16, 3), np.uint8)
    examples = [Example("a", image, (), np.full(n, 7)) for n in (5, 2, 9)]
    empty = {"text_ids": np.array([4, 1]), "clip_ids": np.zeros(0, np.int32)}
    prompted = assemble([examples[0], None, examples[2]], [5, 6, 7], {"16x16": 3}, CONFIG)
    blank = examples[0]._replace(**empty)
    expected = assemble([blank, None, blank], [5, 6, 7], {"16x16": 3}, CONFIG)
    row = prompted.replace(negative=empty_prompts(prompted, **empty))
    assert_same(unprompted(row), expected.replace(images=row.images))


def test_batches_carry_empty_prompts_if_requested(config):
    batch = row(config, 2, negatives=True, caption_dropout=0.5)
    assert_same(unprompted(batch), row(config, 2, caption_dropout=1.0))
    assert row(config, 2).negative is None


@pytest.mark.parametrize("change", ["image", "text", "number"])
def test_examples_that_do_not_fit_are_refused(change):
    number = 4 if change == "number" else 1
    size = (16, 32 if change == "image" else 16)
    contexts = (np.zeros((*size, 3), np.uint8),) * (3 if change == "image" else 0)
    ids = np.ones(33 if change == "text" else 2, np.int64)
    examples = [Example("big", np.zeros((*size, 3), np.uint8), contexts, ids)] * number
    with pytest.raises(ValueError, match="Example big does not fit into the rest of its row"):
        assemble(examples, range(number), {"16x16": 4, "16x32": 4}, CONFIG)


def test_images_are_resized_to_their_nearest_size():
    tokenizer = Tokenizer(CONFIG.text)
    example = prepare(make(5), tokenizer, GEOMETRY)
    for image, raw in zip(
        (example.target, *example.contexts), (make(5).target, *make(5).contexts), strict=True
    ):
        assert image.shape == (16, {18: 16, 37: 32}[raw.shape[1]], 3)
    np.testing.assert_array_equal(example.text_ids, tokenizer("make 5"))
    assert example.clip_ids.shape == (0,)


def test_every_epoch_has_all_examples_under_new_ids(config):
    loader = load(dataclasses.replace(config, batch_size=1))
    rows = loader.plan.num_rows
    ids = [
        sorted(i for _ in range(rows) for i in next(loader).example_ids[0].tolist() if i >= 0)
        for _ in range(2)
    ]
    assert ids == [list(range(NUM)), list(range(NUM, 2 * NUM))]
    loader.close()


def test_batches_stack_the_rows_of_the_plan_in_order(config):
    loader = load(config)
    for step in range(3):
        expected = [row(config, 4 * step + r) for r in range(4)]
        assert_same(next(loader), jax.tree.map(lambda *x: np.stack(x), *expected))
    loader.close()


def test_a_loader_resumes_where_another_stopped(config):
    loader = load(config)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    expected = [next(loader) for _ in range(5)]
    assert max(batch.example_ids.max() for batch in expected) >= NUM  # into the next epoch
    other = load(config)
    next(other)
    other.restore(state)
    for batch in expected:
        assert_same(next(other), batch)
    assert other.state() == loader.state()
    loader.close(), other.close()


def test_the_data_set_may_move_and_prefetch_may_change(config, tmp_path):
    loader = load(config)
    next(loader)
    folder = shutil.copytree(config.path, tmp_path / "moved")
    moved = load(dataclasses.replace(config, path=str(folder), prefetch=1))
    moved.restore(loader.state())
    assert_same(next(moved), next(loader))
    loader.close(), moved.close()


def test_two_hosts_read_the_same_as_one(config):
    one = load(config)
    two = [load(config, process_index=i, process_count=2) for i in range(2)]
    for _ in range(3):
        halves = [next(loader) for loader in two]
        both = next(one)
        ids = lambda *batches: sorted(  # noqa: E731
            tuple(r) for b in batches for r in b.example_ids.tolist()
        )
        assert all(len(half.example_ids) == 2 for half in halves)
        assert ids(*halves) == ids(both)
    assert two[0].state() == two[1].state() == one.state()
    state = two[0].state()
    expected = next(one)
    alone = load(config)  # resumes the two hosts' run on one
    alone.restore(state)
    assert_same(next(alone), expected)
    for loader in (one, alone, *two):
        loader.close()


class RowNumbers(Sequence):
    """A plan's rows, each as (row, examples)."""

    def __init__(self, plan):
        self._plan = plan

    def __len__(self):
        return 2**40

    def __getitem__(self, row):
        examples = np.full(4, -1)
        _, numbers = self._plan[row]
        examples[: len(numbers)] = numbers
        return np.array([row, *examples])


@pytest.mark.parametrize("readers", [1, 8, 64])
def test_any_number_of_readers_reads_the_plan_in_order(config, readers):
    """From the start, and from step 1,000,000 as soon."""
    config = dataclasses.replace(config, batch_size=64, prefetch=1)
    source = TripleSource(config.path, "train")
    rows = RowNumbers(plan_of(source, config, seed=0))
    for step in (0, 10**6):
        read = []
        for reader in range(readers):
            batches = iter(batches_of(rows, config, reader, readers))
            batches.set_state({"global_next_index": 64 * step})
            read += next(batches).tolist()
            batches.close()
        expected = [rows[row].tolist() for row in range(64 * step, 64 * (step + 1))]
        assert sorted(read) == expected


def test_the_order_of_a_large_data_set_is_kept_beside_it(config, tmp_path, monkeypatch):
    small = load(config)
    monkeypatch.setattr(layout, "IN_MEMORY", NUM - 1)
    folder = shutil.copytree(config.path, tmp_path / "set")
    large = load(dataclasses.replace(config, path=str(folder)))
    large.restore(small.state())
    for _ in range(2):
        assert_same(next(large), next(small))
    [kept] = (folder / "plans").iterdir()
    again = load(dataclasses.replace(config, path=str(folder), caption_dropout=0.5))
    assert [*(folder / "plans").iterdir()] == [kept]
    text = TextConfig(max_tokens=9)
    other = load(dataclasses.replace(config, path=str(folder), text=text))
    assert len([*(folder / "plans").iterdir()]) == 2
    for loader in (small, large, again, other):
        loader.close()


def test_the_order_is_kept_in_the_users_cache_if_the_data_set_is_read_only(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(layout, "IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(config.path, tmp_path / "set")
    (folder / "plans").touch()  # no folder can be made here
    load(dataclasses.replace(config, path=str(folder))).close()
    [kept] = (tmp_path / "cache" / "kontext_jax" / "plans").iterdir()
    assert (kept / "order.npy").exists()


def test_dropped_prompts_are_also_dropped_for_clip(config, flux_tokenizers):
    text = TextConfig(clip_tokenizer=str(flux_tokenizers / "tokenizer"), clip_max_tokens=9)
    for dropout in (0.0, 1.0):
        batch = row(config, 0, text=text, caption_dropout=dropout)
        exists = batch.example_ids >= 0
        assert exists.any() and (batch.clip_ids[exists, 0] == 518).all()
        assert (batch.clip_ids[exists, 1] == 519).all() == bool(dropout)


@pytest.mark.slow
def test_a_worker_process_reads_the_same(config):
    threads = load(config)
    worker = load(dataclasses.replace(config, num_workers=1))
    for _ in range(3):
        assert_same(next(worker), next(threads))
    threads.close(), worker.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"caption_dropout": 0.3}, "caption_dropout"),
        ({"geometry": dataclasses.replace(GEOMETRY, position_scheme="index")}, "geometry"),
        ({"packing": dataclasses.replace(CONFIG.packing, image_tokens=32)}, "plan and packing"),
        ({"text": TextConfig(max_tokens=9), "context_dropout": 0.1}, "context_dropout and text"),
    ],
)
def test_a_position_from_other_settings_is_refused(config, change, named):
    loader = load(config)
    other = load(dataclasses.replace(config, **change))
    with pytest.raises(ValueError, match=f"saved with a different {named}, so"):
        other.restore(loader.state())
    loader.close(), other.close()


def test_another_seed_gives_another_order_and_is_refused(config):
    loader, other = load(config), load(config, seed=1)
    assert next(loader).example_ids.tolist() != next(other).example_ids.tolist()
    with pytest.raises(ValueError, match="saved with a different seed"):
        other.restore(loader.state())
    loader.close(), other.close()


def test_other_data_is_refused(config, tmp_path):
    """One image differs; all sizes and prompts are the same."""
    altered = [make(number) for number in range(NUM)]
    altered[4] = altered[4]._replace(target=255 - altered[4].target)
    store.write({"train": altered}, tmp_path / "set")
    loader, other = load(config), load(dataclasses.replace(config, path=str(tmp_path / "set")))
    with pytest.raises(ValueError, match="saved with a different data, so"):
        other.restore(loader.state())
    loader.close(), other.close()


def test_a_position_from_another_plan_is_refused(config, monkeypatch):
    loader = load(config)
    monkeypatch.setattr(packing, "STEPS", 1)
    other = load(config)
    with pytest.raises(ValueError, match="saved with a different plan, so"):
        other.restore(loader.state())
    loader.close(), other.close()


def test_a_missing_data_set_is_named(config):
    with pytest.raises(FileNotFoundError, match=r"no data set in /nowhere/set: build one"):
        load(dataclasses.replace(config, path="/nowhere/set"))


def test_a_corrupt_record_is_skipped_and_counted(config, tmp_path, monkeypatch, caplog):
    good = store.encode_png
    broken = make(7).target
    monkeypatch.setattr(
        store,
        "encode_png",
        lambda image: good(image)[: 60 if np.array_equal(image, broken) else None],
    )
    store.write({"train": map(make, range(NUM))}, tmp_path / "set")
    corrupt = dataclasses.replace(config, path=str(tmp_path / "set"))
    plan = plan_of(TripleSource(config.path, "train"), config, seed=0)
    [number] = [k for k in range(plan.num_rows) if 7 in plan[k][1]]
    complete, partial = row(config, number), row(corrupt, number)
    assert 'Skipped a record. Record 7 ("triple/7")' in caplog.text
    assert complete.skipped == 0 and partial.skipped == 1
    missing = complete.example_ids == 7
    assert partial.example_ids.tolist() == np.where(missing, -1, complete.example_ids).tolist()
    assert np.sum(complete.example_ids >= 0) >= 2  # others share its row
    for segment, is_missing in enumerate(missing, start=1):
        if is_missing:
            assert segment not in {*partial.segments, *partial.text_segments}
            assert segment not in np.concatenate(list(partial.image_segments.values()))
        else:
            assert_same(part(partial, segment), part(complete, segment))


def test_a_run_stops_only_if_too_many_records_are_unreadable():
    check_readable(10, 50, CONFIG)  # one percent of at least a thousand
    check_readable(30, 3000, CONFIG)
    with pytest.raises(
        ValueError, match="31 of 3000 records could not be read, more than data.max"
    ):
        check_readable(31, 3000, CONFIG)


def after_dropout(config, epochs: int, **dropout):
    """(id, has its prompt, has its contexts) of every example with contexts, in order of ids."""
    config = dataclasses.replace(config, **dropout)
    source = TripleSource(config.path, "train")
    plan = plan_of(source, config, seed=0)
    rows = RowAssembler(source, plan, config, seed=0)
    examples = []
    for number in range(epochs * plan.num_rows):
        batch = rows[number]
        for segment, example in enumerate(batch.example_ids, start=1):
            if example >= 0 and example % NUM % 3:  # has contexts
                in_example = batch.segments == segment
                prompt = np.sum(batch.text_segments == segment) > 1
                has_contexts = not batch.is_target[in_example].all()
                examples.append((int(example), bool(prompt), has_contexts))
    return sorted(examples)


def test_prompts_and_contexts_are_dropped_independently(config):
    examples = after_dropout(config, 15, caption_dropout=0.4, context_dropout=0.6)
    assert len(examples) == 15 * NUM * 2 // 3
    prompts, contexts = np.array(examples)[:, 1], np.array(examples)[:, 2]
    deviation = 0.5 / len(examples) ** 0.5
    assert abs(np.mean(prompts) - 0.6) < 3 * deviation
    assert abs(np.mean(contexts) - 0.4) < 3 * deviation
    assert abs(np.mean(prompts * contexts) - 0.24) < 3 * deviation
    # Drawn independently in every epoch, but reproducibly.
    assert len({(example % NUM, prompt) for example, prompt, _ in examples}) == 2 * NUM * 2 // 3
    epoch = [example for example in examples if example[0] < NUM]
    assert epoch == after_dropout(config, 1, caption_dropout=0.4, context_dropout=0.6)


def test_nothing_is_dropped_unless_asked_for(config):
    assert all(prompt and context for _, prompt, context in after_dropout(config, 1))
