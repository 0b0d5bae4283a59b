"""The command: every source builds, and errors are one sentence and write nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from kontext_jax.data import build
from kontext_jax.data.sources import TripleSource


def run(*arguments: str) -> str:
    values = flags.FlagValues()
    build.define_flags(values)
    values(["build", *map(str, arguments)])
    return build.run(values)


@pytest.fixture
def folder(tmp_path):
    """A user's folder: images that need conversion, and a table with two splits."""
    folder = tmp_path / "input"
    folder.mkdir()
    Image.new("RGB", (6, 4), (10, 20, 30)).save(folder / "plain.png")
    Image.new("L", (5, 5), 99).save(folder / "grey.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(folder / "clear.png")
    sideways = Image.Exif()
    sideways[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (32, 16), (255, 0, 0)).save(folder / "turned.jpg", exif=sideways)
    write_table(
        folder,
        {"target": "plain.png", "contexts": ["grey.png", "turned.jpg"], "prompt": "größer"},
        {"target": "clear.png", "prompt": "nothing", "id": "c", "details": {"by": "me"}},
        {"target": "grey.png", "contexts": ["plain.png"], "prompt": "grey", "category": "style"},
        {"target": "plain.png", "prompt": "a wall", "id": "held out", "split": "validation"},
    )
    return folder


def write_table(folder, *rows) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "triples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_world_is_built(tmp_path):
    summary = run("--source=world", "--num_train=6", "--num_validation=2", f"--output={tmp_path}/w")
    assert summary.startswith(f"{tmp_path}/w: 6 train, 2 validation triples, ")
    assert TripleSource(tmp_path / "w", "train")[5].target.shape == (32, 32, 3)
    assert len(TripleSource(tmp_path / "w", "validation")) == 2


def test_an_empty_split_is_left_out(tmp_path):
    run("--source=world", "--num_train=2", "--num_validation=0", f"--output={tmp_path}/w")
    with pytest.raises(ValueError, match="it has: train"):
        TripleSource(tmp_path / "w", "validation")


def test_a_folder_is_built(tmp_path, folder):
    run("--source=folder", f"--input={folder}", f"--output={tmp_path}/out")
    plain, clear, grey = TripleSource(tmp_path / "out", "train")
    assert (plain.id, plain.prompt, plain.category) == ("plain.png", "größer", "local")
    assert plain.target.shape == (4, 6, 3) and (plain.target == (10, 20, 30)).all()
    assert [context.shape for context in plain.contexts] == [(5, 5, 3), (32, 16, 3)]
    assert (plain.contexts[0] == 99).all()
    assert (clear.id, clear.category, clear.details) == ("c", "text_to_image", '{"by": "me"}')
    assert (clear.target == 255).all(), "transparent pixels must become white"
    assert grey.category == "style"
    [held_out] = TripleSource(tmp_path / "out", "validation")
    assert held_out.id == "held out" and np.array_equal(held_out.target, plain.target)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'target': 1}", "line 2: this is not JSON"),
        ('["plain.png"]', "line 2: this is not an object"),
        ({"target": "plain.png"}, 'line 2: the key "prompt" is missing'),
        ({"target": "a.png", "prompt": "x", "tagret": "b"}, 'line 2: unknown key "tagret"; the'),
        ({"target": "gone.png", "prompt": "x"}, "line 2: there is no image .*gone.png"),
        ({"target": "bad.png", "prompt": "x"}, "line 2: the image .*bad.png cannot be decoded"),
        ({"target": "cut.png", "prompt": "x"}, "line 2: the image .*cut.png cannot be decoded"),
        ({"target": "grey.png", "contexts": "x.png", "prompt": "x"}, '"contexts" must be a list'),
        ({"target": "grey.png", "contexts": [1], "prompt": "x"}, '"contexts" must be a list'),
        ({"target": "grey.png", "prompt": "x", "category": "odd"}, 'category "odd" is not one of'),
        ({"target": "plain.png", "prompt": "x"}, 'line 2: the id "plain.png" is taken by line 1'),
    ],
)
def test_an_invalid_line_is_named(tmp_path, folder, row, message):
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "cut.png").write_bytes((folder / "plain.png").read_bytes()[:50])
    write_table(folder, {"target": "plain.png", "prompt": "x"}, row)
    with pytest.raises(ValueError, match=message):
        run("--source=folder", f"--input={folder}", f"--output={tmp_path}/out")
    assert [path.name for path in tmp_path.iterdir()] == ["input"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=folder"], "--source=folder needs --input"),
        (["--source=folder", "--input=gone"], "There is no triples.jsonl in gone"),
        (["--source=emoji", "--input=gone"], "no emoji folder gone"),
        (["--source=emoji", "--input=gone", "--sizes=32,x"], "--sizes is 32,x; give positive"),
        (["--source=emoji", "--input=gone", "--sizes=0"], "--sizes is 0; give positive"),
        (["--source=world", "--size=8"], "size is 8"),
        (["--source=world", "--input=gone"], "--source=world does not use --input"),
        (["--source=world", "--num_train=0", "--num_validation=0"], "There is no split to write"),
    ],
)
def test_an_invalid_flag_is_named(tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(*arguments, f"--output={tmp_path}/out")
    assert not list(tmp_path.iterdir())


def test_an_empty_table_is_refused(tmp_path, folder):
    write_table(folder, "", "  ")
    with pytest.raises(ValueError, match="triples.jsonl is empty"):
        run("--source=folder", f"--input={folder}", f"--output={tmp_path}/out")


def test_progress_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "REPORT_EVERY", 0.0)
    run("--source=world", "--num_train=3", "--num_validation=0", f"--output={tmp_path}/w")
    assert "train: 2 of 3, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=folder", "--input=gone"], "build: There is no triples.jsonl in gone"),
        (["--source=world", "more"], "build: unexpected argument 'more'"),
    ],
)
def test_errors_are_one_sentence(tmp_path, arguments, message):
    command = [sys.executable, "-m", "kontext_jax.data.build", f"--output={tmp_path}/out"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not done.stdout and not list(tmp_path.iterdir())
