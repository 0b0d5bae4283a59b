import os
import signal
import subprocess
import sys

import pytest

from kontext_jax import files
from kontext_jax.files import atomic_path, check_local, locked, sha256_of, short_digest, write_text

HOLD = """
import sys, time
from pathlib import Path
from kontext_jax.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_by_name_until_the_first_is_gone(holder, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        BlockingIOError, match=rf"run is in use by process {holder.pid} on .*20\d\d-"
    ):
        with locked(run):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (run / ".lock").exists()  # left behind, and free
    with locked(run):
        (run / "file").touch()
    assert [path.name for path in run.iterdir()] == ["file"]


@pytest.mark.parametrize("inside", ["", "run"])
def test_the_lock_of_a_file_is_refused_by_name(tmp_path, inside):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file, but --workdir must be a folder"):
        with locked(tmp_path / "notes" / inside):
            pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_lock_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ValueError):
        with locked(tmp_path / "run"):
            raise ValueError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", [True, False])
def test_a_path_is_complete_or_untouched(tmp_path, shared):
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path, shared) as temporary:
        temporary.write_text("first")
        assert temporary.suffix == ".txt" and not path.exists()
    with pytest.raises(KeyError):
        with atomic_path(path, shared) as temporary:
            temporary.write_text("sec")
            raise KeyError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_folders_are_atomic_too(tmp_path):
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]
    with pytest.raises(KeyError):
        with atomic_path(tmp_path / "other") as temporary:
            temporary.mkdir()
            (temporary / "file").touch()
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_one_writer_overwrites_what_a_killed_one_left(tmp_path):
    (tmp_path / ".incomplete-file").write_text("left by a killed process, and longer")
    write_text(tmp_path / "file", "text")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "text"}


def test_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, lambda *_, name=name: calls.append(name))
    write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace"]


def test_urls_are_no_local_paths():
    for path in ("", "a/b", "/a", "C:/a", "runs/flow@3", "see gs://bucket"):
        check_local("--workdir", path)
    for path in ("gs://bucket/run", "s3://b", "http://host/x", "file:///a"):
        with pytest.raises(ValueError, match=f"^--workdir={path}: only local paths are supported"):
            check_local("--workdir", path)


def test_digests(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "file") == digest
    assert short_digest("abc") == short_digest(b"abc") == digest[:16]
