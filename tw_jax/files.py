"""Files that appear whole: a reader sees the old content or the new one, never a part of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces a file when the block ends without error.

    The new content is on the disk before the file is renamed, so a crash at any time leaves either
    the old file or the new one.

    Args:
      path: The file to write or replace. Its folder must exist.

    Yields:
      The file to write; it is gone after the block.

    Raises:
      OSError: If the file could not be written. An old file is unchanged then.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically; see `replacing`."""
    with replacing(Path(path)) as part:
        part.write_text(text, encoding="utf-8", newline="")


def require_own(file: Path, *folders: Path) -> None:
    """Refuses a link that leads out of the folders that a file may be in, and what is no file.

    Raises:
      ValueError: names the file, and where the link leads.
    """
    real = file.resolve()
    if not any(real.is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(
            f"{file} is a link to {real}, outside of its folder, and is not read. Replace the "
            "link by the file that you mean."
        )
    if not real.is_file():
        raise ValueError(f"{file} is not a regular file. Replace it by the file that you mean.")
