import errno
import json
import os

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from kontext_jax.sampling.provenance import KEY, format_of, read_provenance, write_image

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
RECORD = {
    "prompt": 'मेघ, 夜 und "Größe"\n\0',
    "contexts": [{"size": "4x6"}],
    "seed": 2**40,
    "b": None,
}


def test_a_png_stores_its_record_and_the_exact_pixels(tmp_path):
    path = tmp_path / "new" / "folder" / "a.PNG"
    write_image(IMAGE, path, RECORD)
    assert read_provenance(path) == RECORD
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), IMAGE)
        assert image.text[KEY] == json.dumps(RECORD, sort_keys=True, ensure_ascii=False)
    assert "夜".encode() in path.read_bytes()  # readable in the file, not escaped


def test_only_a_png_written_with_a_record_has_one(tmp_path):
    for name in ("a.jpg", "a.webp", "a.bmp"):
        write_image(IMAGE, tmp_path / name, RECORD)
        assert read_provenance(tmp_path / name) is None
    write_image(IMAGE, tmp_path / "a.png")
    assert read_provenance(tmp_path / "a.png") is None


def test_a_record_after_the_pixels_is_read_and_invalid_records_are_refused(tmp_path):
    path = tmp_path / "a.png"
    write_image(IMAGE, path)
    plain, end = path.read_bytes()[:-12], path.read_bytes()[-12:]
    for text, record in (('{"a": 1}', {"a": 1}), ("[1]", None), ("{", None)):
        with path.open("wb") as file:
            file.write(plain)
            PngImagePlugin.putchunk(file, b"tEXt", f"{KEY}\0{text}".encode())
            file.write(end)
        if record is not None:
            assert read_provenance(path) == record
        else:
            with pytest.raises(ValueError, match="'kontext_jax' in .*a.png is not a JSON object"):
                read_provenance(path)


def test_files_that_are_not_images_are_refused(tmp_path):
    (tmp_path / "a.png").write_text("no")
    for name in ("a.png", "missing.png"):
        with pytest.raises(OSError, match=name):
            read_provenance(tmp_path / name)


def test_the_suffix_decides_the_format(tmp_path):
    assert [format_of(tmp_path / f"a.{e}") for e in ("png", "JPG", "webp")] == [
        "PNG",
        "JPEG",
        "WEBP",
    ]
    for name in ("a", "a.txt", ".png"):
        with pytest.raises(ValueError, match=f"{name} needs the suffix of an image format"):
            write_image(IMAGE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, file, *args, **kwargs):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="image .*a.png cannot be written: .*No space left"):
        write_image(IMAGE, path, RECORD)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"old"


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(IMAGE, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "a.png").mkdir()
    for path in (tmp_path / "file" / "b.png", tmp_path / "a.png"):
        with pytest.raises(OSError, match=f"{path.name} cannot be written"):
            write_image(IMAGE, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_image(IMAGE, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "usual").stat().st_mode
