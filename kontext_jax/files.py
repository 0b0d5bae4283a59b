"""Files that are complete or absent, and digests of what they hold."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_digest(text: str | bytes) -> str:
    """The first 16 hex digits of a text's SHA-256."""
    data = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:16]
