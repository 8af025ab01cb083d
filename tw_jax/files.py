"""Text files that appear whole: a reader sees the old text or the new one, never a part of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in one move, as UTF-8. Its folder must exist.

    The text goes to a temporary file beside it and is on the disk before it takes the name, so a
    crash at any moment leaves the old file or the new one.

    Args:
      path: the file to write or replace.
      text: its new content.

    Raises:
      OSError: the file could not be written. The old one, if any, is unchanged.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
