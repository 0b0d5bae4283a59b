"""Local paths, files that are complete or absent, locks, and digests."""

import datetime
import fcntl
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def check_local(name: str, path: str) -> None:
    """Refuses a path such as gs://bucket/run, which would become a local folder of that name.

    Raises:
      ValueError: it is a URL; the message has its name.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", path):
        raise ValueError(
            f"{name}={path}: only local paths are supported; mount the bucket (with Cloud Storage "
            "FUSE, for example) and use the path of the mount."
        )


def check_folder(workdir: Path) -> None:
    """Refuses a workdir that is a file, or that would lie in one.

    Raises:
      ValueError: it is; the message names the file.
    """
    nearest = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file, but --workdir must be a folder: choose another.")


@contextmanager
def atomic_path(path: Path, shared: bool = True) -> Iterator[Path]:
    """A sibling of ``path`` to write a file or a folder to, renamed to ``path`` on success.

    On failure it is removed, so that ``path`` is complete or untouched. A file's bytes are on disk
    before it is renamed; otherwise a crash of the machine could leave an empty file.

    Args:
      path: the result; its parent folder is made if need be. A folder must not exist yet.
      shared: whether several processes may write ``path`` at once. If not, the sibling has a fixed
        name, and the next writer overwrites what a killed one left there.
    """
    # The sibling keeps the suffix: writers go by it. Not tempfile's, which only its owner may read.
    unique = f"{uuid.uuid4().hex}-" if shared else ""
    temporary = path.with_name(f".incomplete-{unique}{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; one process at a time may write it."""
    with atomic_path(path, shared=False) as temporary:
        temporary.write_text(text)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder that one process may write, such as a run's workdir.

    The operating system releases the lock of a process that dies, so that it never goes stale.

    Raises:
      BlockingIOError: another process holds it; the message names its host, process and start.
      ValueError: it is no folder.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / ".lock") as file:
        start = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {start}")
        file.flush()
        try:
            yield
        finally:
            (folder / ".lock").unlink()
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def _lock(path: Path) -> IO[str]:
    """The file, open and locked."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read() or "another process"
            file.close()
            raise BlockingIOError(
                f"{path.parent} is in use by {owner}: wait until it has ended, or use another "
                "--workdir."
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its previous owner deleted it in the meantime


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_digest(text: str | bytes) -> str:
    """The first 16 hex digits of a text's SHA-256."""
    data = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:16]
