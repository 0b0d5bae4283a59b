"""MagicBrush: both layouts give the same tasks and sessions, and errors name their cause."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kontext_jax.evaluation.tasks.magic_brush import magic_brush
from tests.evaluation.tasks.miniature import (
    MAGIC_BRUSH,
    magic_brush_image,
    magic_brush_rows,
    write_miniature_magic_brush,
)


@pytest.fixture
def files(tmp_path):
    write_miniature_magic_brush(tmp_path / "brush")
    return tmp_path / "brush"


def write_table(folder, rows: list[dict], name: str = "dev-00000-of-00001-ab12.parquet") -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / name)


@pytest.fixture
def tables(tmp_path):
    """Two tables with a session that spans both."""
    folder, rows = tmp_path / "tables", magic_brush_rows()
    write_table(folder, rows[:2], "dev-00000-of-00002-ab12.parquet")
    write_table(folder, rows[2:], "dev-00001-of-00002-cd34.parquet")
    return folder


def assert_shows(image, session: str, turn: int) -> None:
    np.testing.assert_array_equal(image, np.asarray(magic_brush_image(session, turn)))


@pytest.mark.parametrize("layout", ["files", "tables"])
@pytest.mark.parametrize("sessions", [False, True])
def test_both_layouts_give_the_same_tasks(files, tables, layout, sessions):
    folder, split = (files, "test") if layout == "files" else (tables, "dev")
    tasks = {task.id: task for task in magic_brush(folder, split, sessions)}
    assert tasks.keys() == {"139/1", "139/2", "139/3", "30/1"}
    for name, task in tasks.items():
        session, number = name.split("/")[0], int(name.split("/")[1])
        assert (task.prompt, task.group) == (MAGIC_BRUSH[session][number - 1], session)
        assert (task.category, task.size, task.words) == ("local", (32, 24), "")
        assert_shows(task.truth, session, number)
        start = 0 if sessions else number - 1
        assert len(task.contexts) == 1
        assert_shows(task.contexts[0], session, start)
        assert task.turn == (number if sessions else 1)
        assert task.follows == (f"{session}/{number - 1}" if sessions and number > 1 else "")
        if layout == "files":
            source = f"{session}-output{start}.png" if start else f"{session}-input.png"
            assert task.source_caption == f"what {source} shows"
            assert task.target_caption == f"what {session}-output{number}.png shows"
        else:
            assert task.source_caption == task.target_caption == ""
    assert [name for name in tasks if name.startswith("139")] == ["139/1", "139/2", "139/3"]


@pytest.mark.parametrize("layout", ["files", "tables"])
def test_images_are_shared_between_tasks(files, tables, layout):
    folder, split = (files, "test") if layout == "files" else (tables, "dev")
    tasks = {task.id: task for task in magic_brush(folder, split)}
    assert tasks["139/2"].contexts[0] is tasks["139/1"].truth
    chained = {task.id: task for task in magic_brush(folder, split, sessions=True)}
    assert chained["139/3"].contexts[0] is chained["139/1"].contexts[0]


def test_captions_are_optional(files):
    (files / "global_descriptions.json").write_text('{"139": {"139-output1.png": "a cat"}}')
    tasks = magic_brush(files)
    assert [task.target_caption for task in tasks] == ["a cat", "", "", ""]
    assert [task.source_caption for task in tasks] == ["", "a cat", "", ""]
    (files / "global_descriptions.json").unlink()
    assert {task.target_caption for task in magic_brush(files)} == {""}


def test_splits_are_found_in_the_root_or_their_own_folder(tmp_path, files, tables):
    (tmp_path / "both").mkdir()
    files = files.rename(tmp_path / "both" / "test")
    tables = (tables / "data").rename(tmp_path / "both" / "data")
    assert magic_brush(tmp_path / "both", "test")[0].target_caption
    assert not magic_brush(tmp_path / "both", "dev")[0].target_caption
    assert len(magic_brush(files, "test")) == 4
    with pytest.raises(FileNotFoundError, match="both/test does not contain the dev split of Mag"):
        magic_brush(files, "dev")
    with pytest.raises(ValueError, match='are dev and test, not "train"'):
        magic_brush(files, "train")


def edit_sessions(folder, change) -> None:
    path = folder / "edit_sessions.json"
    sessions = json.loads(path.read_text())
    path.write_text(json.dumps(change(sessions) or sessions))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [1], "edit_sessions.json: this is not an object of sessions"),
        (lambda s: s.update({"30": {}}), 'session "30": this is not a list'),
        (lambda s: s.update({"30": ["x"]}), 'session "30", edit 1: this is not an object'),
        (lambda s: s["139"][1].pop("output") and None, 'session "139", edit 2: .* "output" is mi'),
        (lambda s: s["139"][1].update(input=1), 'session "139", edit 2: "input" must be a str'),
        (
            lambda s: s["139"].pop(1) and None,
            "Session 139 of MagicBrush has turns 1, 3, which",
        ),
        (
            lambda s: s["139"].pop(0) and None,
            "Session 139 of MagicBrush has turns 2, 3, which",
        ),
        (lambda s: {"30": []}, "The test split of MagicBrush in .* has no edits"),
    ],
)
def test_an_error_names_the_session(files, change, message):
    edit_sessions(files, change)
    with pytest.raises(ValueError, match=message):
        magic_brush(files)


def test_an_error_names_the_file(files):
    (files / "images/139/139-output2.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="139-output2.png cannot be decoded"):
        magic_brush(files)
    (files / "images/139/139-output2.png").unlink()
    with pytest.raises(FileNotFoundError, match="There is no image .*139-output2.png"):
        magic_brush(files)
    for bad in ('{"30": {"30-input.png": 3}}', '{"30": ["a"]}'):
        (files / "global_descriptions.json").write_text(bad)
        with pytest.raises(ValueError, match='session "30": this is not an object of captions'):
            magic_brush(files)
    (files / "global_descriptions.json").unlink()
    (files / "edit_sessions.json").write_text("{")
    with pytest.raises(ValueError, match="edit_sessions.json: this is not JSON"):
        magic_brush(files)


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (1, {"turn_index": 4}, "Session 139 of MagicBrush has turns 1, 2, 4, which must"),
        (1, {"turn_index": 2}, "Session 139 of MagicBrush has turns 1, 2, 2, which must"),
        (0, {"instruction": None}, 'row 1: "instruction" must be a str'),
        (0, {"target_img": None}, 'row 1: "target_img" must be a dict'),
        (2, {"source_img": {"bytes": None, "path": "x.png"}}, "row 3: an image has no bytes"),
        (2, {"source_img": {"bytes": b"x", "path": None}}, "row 3: an image cannot be decoded"),
    ],
)
def test_an_error_names_the_row(tmp_path, row, change, message):
    rows = magic_brush_rows()
    rows[row] |= change
    write_table(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        magic_brush(tmp_path, "dev")


def test_transparent_images_in_tables_become_white(tmp_path):
    rows, buffer = magic_brush_rows(), io.BytesIO()
    Image.new("RGBA", (32, 24), (0, 0, 0, 0)).save(buffer, "PNG")
    rows[0]["source_img"]["bytes"] = buffer.getvalue()
    write_table(tmp_path, rows)
    name = f"{rows[0]['img_id']}/{rows[0]['turn_index']}"
    [task] = (task for task in magic_brush(tmp_path, "dev") if task.id == name)
    assert (task.contexts[0] == 255).all()


def test_an_error_names_an_image_that_is_too_large(tmp_path, monkeypatch):
    write_table(tmp_path, magic_brush_rows())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="row 1: an image cannot be decoded: .*768 pixels"):
        magic_brush(tmp_path, "dev")


def test_an_error_names_the_table(tmp_path, tables):
    for row in (rows := magic_brush_rows()):
        del row["img_id"], row["target_img"]
    write_table(tmp_path, rows)
    with pytest.raises(ValueError, match="parquet lacks the columns img_id, target_img"):
        magic_brush(tmp_path, "dev")
    first, second = sorted((tables / "data").iterdir())
    second.unlink()
    with pytest.raises(FileNotFoundError, match="of 2 files, but there are 1: "):
        magic_brush(tables, "dev")
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=f"{second.name} cannot be read"):
        magic_brush(tables, "dev")


def test_an_empty_table_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    table = pa.Table.from_pylist(magic_brush_rows()).slice(0, 0)
    pq.write_table(table, tmp_path / "data" / "dev-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="The dev split of MagicBrush in .* has no edits"):
        magic_brush(tmp_path, "dev")
