"""Text files are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tw_jax import files


def test_a_text_that_cannot_be_written_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "summary.json"
    files.write_text(path, "old Ä\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new\n")
    assert path.read_bytes() == "old Ä\n".encode()
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_text_takes_its_name_only_after_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "summary.json"
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.exists()))
    files.write_text(path, "new\n")
    assert seen == [False]
    assert path.read_text() == "new\n"
