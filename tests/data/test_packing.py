"""The plan: rows are decided from sizes alone, identically on every host."""

import pickle
import threading
import time
from collections import Counter
from concurrent import futures

import numpy as np
import pytest

from kontext_jax.data.packing import PackingConfig, Plan, Shape, size_key
from kontext_jax.geometry import GeometryConfig
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


def test_every_epoch_has_each_example_once_within_row_capacities():
    shapes = mixed(300)
    plan = plan_for(shapes)
    most = Counter()
    for epoch in (0, 1, 7):
        rows = rows_of(plan, epoch)
        assert sorted(sum(rows, [])) == list(range(300))
        for row in rows:
            assert 1 <= len(row) <= PACKING.max_examples
            assert sum(shapes[i].image_tokens(GEOMETRY) for i in row) <= PACKING.image_tokens
            assert sum(shapes[i].text_tokens for i in row) <= PACKING.text_tokens
            images = [s for i in row for s in (shapes[i].target, *shapes[i].contexts)]
            most |= Counter(map(size_key, images))
    assert plan.slots == most and list(plan.slots) == sorted(plan.slots)
    used = sum(shape.image_tokens(GEOMETRY) for shape in shapes)
    assert plan.fill == used / (plan.num_rows * PACKING.image_tokens)


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


def test_threads_compute_an_epoch_once(monkeypatch):
    plan, num_threads = plan_for(mixed(50)), 16
    expected = [rows_of(plan_for(mixed(50)), epoch) for epoch in range(2)]
    computed, default_rng = [], np.random.default_rng

    def slow_rng(seed):
        computed.append(seed)
        time.sleep(0.02)  # lets other threads in
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", slow_rng)
    barrier = threading.Barrier(num_threads)

    def read(_):
        barrier.wait()
        return [rows_of(plan, epoch) for epoch in range(2)]

    with futures.ThreadPoolExecutor(num_threads) as pool:
        assert list(pool.map(read, range(num_threads))) == [expected] * num_threads
    assert computed == [(0, 0), (0, 1)]
    assert rows_of(pickle.loads(pickle.dumps(plan)), 1) == expected[1]


def test_rows_are_at_least_95_percent_full():
    plan = plan_for(mixed(1000))
    assert plan.fill >= 0.95


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
    assert plan.fill >= 0.95


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
