"""Images in all of Pillow's modes are converted to RGB, or refused if their range is unknown."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from kontext_jax.data import folder
from kontext_jax.data.folder import decode_image, load_image, to_rgb

RAMP = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)


@pytest.mark.parametrize(("ending", "mode"), [("png", "I;16"), ("tiff", "I;16"), ("tiff", "I;16B")])
def test_16_bit_grey_keeps_its_brightness(tmp_path, ending, mode):
    path = tmp_path / f"ramp.{ending}"
    pixels = RAMP.astype(">u2" if mode == "I;16B" else "<u2")
    Image.frombytes(mode, (64, 64), pixels.tobytes()).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    image = load_image(path)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    for channel in np.moveaxis(image, -1, 0):
        np.testing.assert_array_equal(channel, RAMP // 256)
    np.testing.assert_array_equal(decode_image(io.BytesIO(path.read_bytes()), "it"), image)


def test_8_bits_scaled_to_16_round_trip():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(to_rgb(Image.fromarray(levels * 257))[..., 0], levels)


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 255), ("P", 0), ("CMYK", (0,) * 4)])
def test_other_modes_keep_their_colours(mode, colour):
    image = Image.new(mode, (3, 2), colour)
    if mode == "P":
        image.putpalette([255, 255, 255])
    assert (to_rgb(image) == 255).all() and to_rgb(image).shape == (2, 3, 3)


def test_transparency_is_composited_on_white():
    half = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 127)))
    assert (half == 128).all()
    assert (to_rgb(Image.new("LA", (1, 1), (0, 0))) == 255).all()


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").shape == (4, 2, 3)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    path = tmp_path / "a.tiff"
    Image.new(mode, (4, 4), 300).save(path)
    with pytest.raises(ValueError, match=f"a.tiff cannot be decoded: .* mode {mode}; save it with"):
        load_image(path)


def test_an_image_that_exhausts_memory_is_named(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.new("L", (20, 20)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"the image .*huge.png cannot be decoded: .*400 pixels"):
        load_image(path)
    (tmp_path / "triples.jsonl").write_text(json.dumps({"target": "huge.png", "prompt": "x"}))
    with pytest.raises(ValueError, match="line 1: the image .*huge.png cannot be decoded"):
        next(folder.triples(folder.read(tmp_path)["train"]))
