"""The plan: rows are decided from sizes alone, identically on every host."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_jax.data import layout
from kontext_jax.data.layout import Cache
from kontext_jax.data.packing import PackingConfig, size_key
from kontext_jax.data.plan import Plan
from kontext_jax.data.shapes import Shape, Shapes
from kontext_jax.geometry import KONTEXT_SIZES, GeometryConfig
from kontext_jax.toy_data import emoji

SIZES = ((32, 32), (48, 32), (32, 64))
GEOMETRY = GeometryConfig(sizes=SIZES, pixels_per_token=8)
PACKING = PackingConfig(image_tokens=128, text_tokens=160, max_examples=6)


def mixed(number: int, seed: int = 0) -> list[Shape]:
    """Shapes of one to three images and of 5 to 39 text tokens."""
    rng = np.random.default_rng(seed)
    size = lambda: SIZES[rng.integers(len(SIZES))]  # noqa: E731
    return [
        Shape(size(), tuple(size() for _ in range(rng.integers(3))), int(rng.integers(5, 40)))
        for _ in range(number)
    ]


def plan_for(shapes, packing=PACKING, seed=0) -> Plan:
    return Plan(shapes, [f"example {i}" for i in range(len(shapes))], packing, GEOMETRY, seed)


def rows_of(plan: Plan, epoch: int) -> list[list[int]]:
    rows = [plan[epoch * plan.num_rows + k] for k in range(plan.num_rows)]
    assert {row_epoch for row_epoch, _ in rows} == {epoch}
    return [indices for _, indices in rows]


def most_images(shapes, rows, packing=PACKING) -> Counter:
    """Checks that rows hold each example once, and returns the most images of each size in any."""
    most = Counter()
    assert sorted(sum(rows, [])) == list(range(len(shapes)))
    for row in rows:
        assert 1 <= len(row) <= packing.max_examples
        assert sum(shapes[i].image_tokens(GEOMETRY) for i in row) <= packing.image_tokens
        assert sum(shapes[i].text_tokens for i in row) <= packing.text_tokens
        images = [s for i in row for s in (shapes[i].target, *shapes[i].contexts)]
        most |= Counter(map(size_key, images))
    return most


def test_every_epoch_has_each_example_once_within_row_capacities():
    shapes = mixed(300)
    plan = plan_for(shapes)
    most = Counter()
    for epoch in (0, 1, 7):
        most |= most_images(shapes, rows_of(plan, epoch))
    assert plan.slots == most and list(plan.slots) == sorted(plan.slots)
    used = sum(shape.image_tokens(GEOMETRY) for shape in shapes)
    assert plan.fill == used / (plan.num_rows * PACKING.image_tokens)


SIZE = st.sampled_from(SIZES)


@given(
    fields=st.lists(
        st.tuples(SIZE, st.lists(SIZE, max_size=3).map(tuple), st.integers(1, 40)),
        min_size=1,
        max_size=60,
    ),
    image_tokens=st.integers(128, 200),
    max_examples=st.integers(1, 6),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 10**6),
    max_classes=st.sampled_from([0, 4096]),
    run=st.sampled_from([7, 100]),
)
def test_any_examples_are_packed(fields, image_tokens, max_examples, seed, epoch, max_classes, run):
    """With few classes, and sorted in runs of few examples, too."""
    shapes = [Shape(*values) for values in fields]
    packing = PackingConfig(image_tokens=image_tokens, text_tokens=40, max_examples=max_examples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_CLASSES", max_classes)
        patch.setattr(layout, "RUN", run)
        plan = plan_for(shapes, packing, seed)
    rows = rows_of(plan, epoch)
    assert most_images(shapes, rows, packing) <= Counter(plan.slots)
    assert len(rows) == plan.num_rows and 0 < plan.fill <= 1 and 0 < plan.text_fill <= 1


def test_the_plan_is_a_function_of_seed_and_epoch():
    shapes = mixed(200)
    plan = plan_for(shapes)
    other = plan_for(shapes)
    for row in (5, 0, 3 * plan.num_rows + 1, 2, plan.num_rows):  # in any order
        assert plan[row] == other[row]
    assert rows_of(plan, 0) == rows_of(other, 0)
    assert rows_of(plan, 0) != rows_of(plan, 1)
    assert rows_of(plan, 0) != rows_of(plan_for(shapes, seed=1), 0)


def test_examples_share_rows_with_different_examples_in_each_epoch():
    """Of 200 equal examples, two per row, few pairs stay together."""
    plan = plan_for(
        [Shape((32, 32), (), 5)] * 200,
        PackingConfig(image_tokens=32, text_tokens=16, max_examples=2),
    )
    pairs = [{frozenset(row) for row in rows_of(plan, epoch)} for epoch in (0, 1)]
    assert plan.num_rows == 100 and len(pairs[0] & pairs[1]) < 10


def test_a_distant_row_is_read_directly():
    plan = plan_for(mixed(50))
    epoch, indices = plan[10**9]
    assert epoch == 10**9 // plan.num_rows
    rows = rows_of(plan_for(mixed(50)), epoch)
    assert rows[10**9 % plan.num_rows] == indices
    assert sorted(sum(rows, [])) == list(range(50))


def test_rows_are_at_least_97_percent_full():
    plan = plan_for(mixed(1000))
    assert plan.fill >= 0.97


def test_slots_stay_close_to_the_mean_number_of_images():
    """Without the limit, a row of eight images of 16 tokens would give all rows eight slots."""
    rng = np.random.default_rng(0)
    shapes = [Shape(SIZES[i], (), 5) for i in rng.integers(len(SIZES), size=1000)]
    packing = PackingConfig(image_tokens=128, text_tokens=64, max_examples=12)
    plan = plan_for(shapes, packing)
    tokens = sum(shape.image_tokens(GEOMETRY) for shape in shapes)
    for size in SIZES:
        mean = sum(shape.target == size for shape in shapes) * packing.image_tokens / tokens
        assert mean <= plan.slots[size_key(size)] <= np.ceil(1.25 * mean)
    assert plan.fill >= 0.97


def test_slots_suffice_for_an_example_with_many_equal_images():
    shapes = [Shape((32, 32), (), 5)] * 40 + [Shape((48, 32), ((48, 32),) * 4, 5)]
    assert plan_for(shapes).slots["32x48"] == 5


def test_rows_of_one_example():
    plan = plan_for(mixed(20), PackingConfig(image_tokens=128, text_tokens=64, max_examples=1))
    assert plan.num_rows == 20


def test_emoji_of_mixed_sizes_fill_their_rows(emoji_folder, monkeypatch):
    """Only sizes and prompts matter, so the images are left black."""
    icons = emoji.Emoji(emoji_folder)
    monkeypatch.setattr(
        icons.sets, "render", lambda set_, slug, size: np.zeros((size, size, 3), np.uint8)
    )
    sizes = (32, 40, 48)
    shapes = [
        Shape(
            triple.target.shape[:2],
            tuple(context.shape[:2] for context in triple.contexts),
            len(triple.prompt.encode()) + 1,
        )
        for triple in icons.triples(1500, split="train", sizes=sizes)
    ]
    assert {shape.target for shape in shapes} == {(size, size) for size in sizes}
    plan = Plan(
        shapes,
        [""] * len(shapes),
        PackingConfig(image_tokens=256, text_tokens=176, max_examples=16),
        GeometryConfig(sizes=tuple((size, size) for size in sizes), pixels_per_token=8),
        seed=0,
    )
    assert plan.fill >= 0.97


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            Shape((32, 64), ((32, 64), (32, 64), (32, 64), (32, 64)), 5),
            r"Example example 2 \(64x32 \+ .*\) needs 160 image tokens, but a row holds 128: raise "
            "packing.image_tokens",
        ),
        (
            Shape((32, 32), (), 161),
            "The prompt of example example 2 needs 161 text tokens, but a row holds 160: raise "
            "packing.text_tokens",
        ),
    ],
)
def test_an_example_larger_than_a_row_is_named(shape, message):
    with pytest.raises(ValueError, match=message):
        plan_for([*mixed(2), shape])


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="The data set is empty"):
        plan_for([])


def test_rounding_merges_lengths_but_not_equal_ones(monkeypatch):
    """Four examples that fill a row still do, whatever other lengths are rounded up."""
    monkeypatch.setattr(layout, "MAX_CLASSES", 0)
    quarter = Shape((32, 32), (), 16)  # of 64 image and 64 text tokens
    shapes = [quarter] * 400 + [Shape((32, 32), (), n) for n in range(1, 17)]
    packing = PackingConfig(image_tokens=64, text_tokens=64, max_examples=4)
    assert plan_for(shapes, packing).num_rows == 104


@pytest.fixture
def in_files(monkeypatch):
    """Even small plans are kept in files, sorted in runs of 64 examples."""
    monkeypatch.setattr(layout, "IN_MEMORY", 0)
    monkeypatch.setattr(layout, "RUN", 64)


def cached(shapes, *folders, **kwargs) -> Plan:
    names = [f"example {i}" for i in range(len(shapes))]
    cache = Cache(folders, "key")
    return Plan(shapes, names, PACKING, GEOMETRY, kwargs.get("seed", 0), cache)


def test_a_plan_in_files_equals_one_in_memory(in_files, tmp_path):
    shapes = mixed(300)
    plan, again = cached(shapes, tmp_path / "plans"), cached(shapes, tmp_path / "plans")
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["key"]
    expected = plan_for(shapes)
    for other in (plan, again, pickle.loads(pickle.dumps(plan))):
        assert rows_of(other, 3) == rows_of(expected, 3)
        assert other.fingerprint() == expected.fingerprint()
        assert (other.slots, other.fill) == (expected.slots, expected.fill)
    assert cached(shapes, tmp_path / "plans", seed=1).fingerprint() != plan.fingerprint()


def test_workers_get_the_path_of_a_plan_and_not_its_examples(in_files, tmp_path):
    sizes = [len(pickle.dumps(cached(mixed(50) * n, tmp_path / f"{n}"))) for n in (100, 1000)]
    assert sizes[1] < sizes[0] + 1000


def test_a_folder_that_cannot_be_written_to_is_passed_over(in_files, tmp_path):
    (tmp_path / "file").touch()
    plan = cached(mixed(100), tmp_path / "file", tmp_path / "cache")
    assert (tmp_path / "cache" / "key" / "order.npy").exists()
    assert rows_of(plan, 0) == rows_of(plan_for(mixed(100)), 0)
    with pytest.raises(OSError, match="none can be written .*/file.*: give one of the folders"):
        cached(mixed(100), tmp_path / "file")


def test_processes_may_plan_at_once(in_files, tmp_path, monkeypatch):
    """Another process completes its files while ours are written."""
    shapes, pack = mixed(100), layout.pack

    def slow_pack(*args):
        monkeypatch.setattr(layout, "pack", pack)
        cached(shapes, tmp_path)
        return pack(*args)

    monkeypatch.setattr(layout, "pack", slow_pack)
    plan = cached(shapes, tmp_path)
    assert rows_of(plan, 0) == rows_of(plan_for(shapes), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_an_interrupted_plan_leaves_nothing(in_files, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(layout, "pack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached(mixed(100), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["order.npy", "layout.npz"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""])
def test_damaged_files_are_named(in_files, tmp_path, name, damage):
    cached(mixed(100), tmp_path)
    file = tmp_path / "key" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"The plan in {tmp_path}/key is damaged .*: delete the"):
        cached(mixed(100), tmp_path)


def test_the_first_example_that_is_too_large_is_named_in_any_run(in_files, tmp_path):
    large = Shape((32, 64), ((32, 64),) * 4, 5)
    with pytest.raises(ValueError, match="Example example 150 .* needs 160 image tokens"):
        cached([*mixed(150), large, *mixed(20), large], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_million_examples_of_kontexts_sizes(tmp_path):
    """17 sizes, no to three contexts: all examples once per epoch, in full rows."""
    rng, total = np.random.default_rng(0), 2_000_000
    table = rng.integers(17, size=(5000, 4))
    counts = rng.choice(4, size=5000, p=(0.4, 0.45, 0.1, 0.05)) + 1
    lengths = np.minimum(100 * np.exp(rng.normal(0, 0.6, total)), 512).astype(np.uint32)
    shapes = Shapes(
        sizes=KONTEXT_SIZES,
        images=np.concatenate([row[:n] for row, n in zip(table, counts, strict=True)]),
        ends=np.cumsum(counts),
        entries=rng.integers(5000, size=total),
        lengths=lengths,
        text_tokens=lambda lengths: lengths + 1,
    )
    packing = PackingConfig(image_tokens=16640, text_tokens=1024, max_examples=4)
    geometry, cache = GeometryConfig(), Cache((tmp_path,), "key")
    plan = Plan(shapes, [""] * total, packing, geometry, 0, cache)
    assert plan.fill >= 0.97
    assert max(plan.slots.values()) <= 4
    # Permutations are bijective, so that each example is dealt once if there is a place for each.
    kept = layout.Layout.load(tmp_path / "key")
    np.testing.assert_array_equal(np.sort(kept.order), np.arange(total))
    places = np.zeros(len(kept.class_ends), int)
    repeats = np.repeat(kept.templates.repeats, np.diff(kept.templates.ends, prepend=0))
    np.add.at(places, kept.templates.classes, repeats)
    np.testing.assert_array_equal(places, kept.class_ends[:, -1])
    seen = []
    for k in range(0, plan.num_rows, 300):
        epoch, row = plan[5 * plan.num_rows + k]
        assert epoch == 5
        assert sum(shapes[i].image_tokens(geometry) for i in row) <= packing.image_tokens
        assert sum(shapes[i].text_tokens for i in row) <= packing.text_tokens
        assert len(row) <= packing.max_examples
        seen += row
    assert len(set(seen)) == len(seen)
