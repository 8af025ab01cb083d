"""Facts about the fingerprint of a file: it is of all its bytes, and they are not read twice."""

import hashlib
import os

import pytest

from tw_jax.data import stored
from tw_jax.data.stored import fingerprint


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """A settled file, a folder for hashes, and the number of times a file was hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(stored, "KEPT_BYTES", 100)
    monkeypatch.setattr(stored, "SETTLED_NS", -(10**12))  # every file was written long ago
    counts, digest = [0], hashlib.file_digest

    def count(*args):
        counts[0] += 1
        return digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", count)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a" * 1000)
    return path, counts


def test_a_changed_byte_in_the_middle_changes_the_fingerprint(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(bytes(3 * 2**20))
    stat, before = os.stat(path), fingerprint(path)
    with path.open("r+b") as file:
        file.seek(3 * 2**19)
        file.write(b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(path) != before
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(path) == f"{3 * 2**20} bytes, sha256 {whole[:16]}"


def test_a_large_file_is_hashed_once(hashed):
    path, counts = hashed
    assert fingerprint(path) == fingerprint(str(path))
    assert counts == [1]
    other = path.with_name("y.jsonl")
    other.write_bytes(b"b" * 1000)
    assert fingerprint(other) != fingerprint(path)


def test_a_kept_hash_is_not_used_for_a_file_of_the_same_size_and_time(hashed):
    path, counts = hashed
    before, stat = fingerprint(path), os.stat(path)
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(path) != before
    assert counts == [2]


def test_the_hash_of_a_file_that_was_just_written_is_not_kept(hashed, monkeypatch):
    path, counts = hashed
    monkeypatch.setattr(stored, "SETTLED_NS", 2 * 10**9)
    assert fingerprint(path) == fingerprint(path)
    assert counts == [2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"facts": 1, "sha256": "00"}', "\xff"])
def test_a_damaged_record_of_a_hash_is_not_used(hashed, text):
    path, counts = hashed
    before = fingerprint(path)
    (kept,) = (path.parent / "caches" / "tw_jax" / "fingerprints").iterdir()
    kept.write_text(text, encoding="latin-1")
    assert fingerprint(path) == before
    assert counts == [2]


def test_a_cache_folder_that_cannot_be_written_costs_time_only(hashed):
    path, counts = hashed
    (path.parent / "caches").write_text("a file where a folder should be")
    assert fingerprint(path) == fingerprint(path)
    assert counts == [2]
