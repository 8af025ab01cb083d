"""Folders that appear whole: a reader sees the old folder or the new one, never a part of it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def building(part: Path) -> Iterator[Path]:
    """Makes a new empty folder, and deletes it after the block unless it was moved.

    Args:
      part: Its path. Remains of a crash are deleted first.
    """
    _remove(part)
    part.mkdir(parents=True)
    try:
        yield part
    finally:
        _remove(part)


@contextlib.contextmanager
def replacing(folder: str | Path, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """Builds new content beside a folder and moves it there when the block ends without error.

    If the block raises, or the process dies in it, the old folder is as it was. The move takes two
    renames; after a crash between them, the next call restores the old folder.

    Args:
      folder: The folder, which need not exist.
      is_stale: Whether to drop the entry of a name; all other entries of the old folder are copied.

    Yields:
      The new folder, with these copies in it.
    """
    folder = Path(os.path.realpath(folder))
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    with building(folder.with_name(f".{folder.name}.part")) as part:
        for entry in sorted(folder.iterdir()) if folder.exists() else ():
            if is_stale(entry.name):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, part / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, part / entry.name, follow_symlinks=False)
        yield part
        sync(part)
        _remove(old)
        if folder.exists():
            folder.rename(old)
        try:
            part.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _sync_one(folder.parent)
        _remove(old)


def is_local(folder: str | Path) -> bool:
    """Whether a folder is a path of the file system and not a URL such as gs://bucket/run."""
    return "://" not in str(folder)


def free_bytes(folder: str | Path) -> float:
    """The free space on the disk of a folder; infinite for a URL."""
    return shutil.disk_usage(folder).free if is_local(folder) else math.inf


def sync(folder: Path) -> None:
    """Waits until all files of a folder, and their names, are on the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync_one(Path(parent, name))
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
