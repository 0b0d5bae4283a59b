import sys

import numpy as np
import pytest
from PIL import Image

from kontext_jax.toy_data import photographs


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Stand-ins for the packages' files: noise of different sizes."""
    rng = np.random.default_rng(0)
    names = tuple(f"pictures/{i}.png" for i in range(3))
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(names):
        noise = rng.integers(0, 256, (80 + 4 * i, 60 + 8 * i, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(photographs.FILES, "train", names)


def test_crops_are_reproducible_and_of_the_size_asked_for(pictures):
    first, again = (list(photographs.triples(16, "train", 24)) for _ in range(2))
    assert [x.id for x in first] == [f"train-{i}" for i in range(16)]
    assert {x.target.shape for x in first} == {(24, 24, 3)}
    assert all(np.array_equal(a.target, b.target) for a, b in zip(first, again, strict=True))
    assert len({x.target.tobytes() for x in first}) == 16


def test_splits_share_no_photograph():
    train, validation = (set(photographs.FILES[x]) for x in ("train", "validation"))
    assert len(train) == 8 and len(validation) == 3 and not train & validation


def test_too_large_crops_are_refused(pictures):
    with pytest.raises(
        ValueError, match="pictures/0.png has no square of 60 pixels: lower --size to 36"
    ):
        list(photographs.triples(1, "train", 60))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'kontext-jax\[photographs\]'"):
        list(photographs.triples(1, "train"))
