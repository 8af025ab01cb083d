"""The problem and the trajectory of a record, and the fingerprint of a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from pathlib import Path

from tw_jax import files
from tw_jax.data.records import Example, Problem, Record, Rollout
from tw_jax.forkjoin.calls import StopReason, Trajectory
from tw_jax.forkjoin.protocol import Protocol, Result
from tw_jax.forkjoin.replay import rebuild

KEPT_BYTES = 2**24
"""Hashes of smaller files are not kept, because hashing takes only about ten milliseconds."""
SETTLED_NS = 2 * 10**9
"""Largest step of the clock of a file system, in nanoseconds."""


def problem_of(record: Record) -> Problem:
    """Returns the problem of a record of any kind."""
    match record:
        case Problem():
            return record
        case Example():
            return record.problem
        case Rollout():
            return Problem(id=record.id, question=record.question, answer=record.answer, task="")


def trajectory_of(protocol: Protocol, rollout: Rollout) -> Trajectory:
    """Returns the trajectory of a stored rollout, rebuilt from its ids.

    Raises:
      RecordError: If the protocol could not have made these calls.
    """
    calls = [
        Result(call.sampled, call.logp, call.stop_reason is StopReason.ERROR)
        for call in rollout.calls
    ]
    return rebuild(protocol, rollout.prompt, calls)


def fingerprint(path: str | Path) -> str:
    """Returns the size of a file and a hash of all its bytes.

    The hash of a large file is kept in the user's cache folder (XDG_CACHE_HOME, ~/.cache). It is
    used as long as the device, inode, size and both times of the file are the same.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If the file was changed while it was being read.
    """
    path = os.path.realpath(path)
    hash_file = _hash_file(path)
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        digest = _kept_digest(hash_file, stat)
        if digest is None:
            began = time.time_ns()
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if _facts(os.fstat(file.fileno())) != _facts(stat):
                raise ValueError(
                    f"{path} was changed while it was being read. Start again once it is written."
                )
            # A file that was just written may be written again within one step of its clock. Its
            # times would not show the change, so its hash is not kept.
            is_settled = max(stat.st_mtime_ns, stat.st_ctime_ns) < began - SETTLED_NS
            if hash_file is not None and is_settled and stat.st_size >= KEPT_BYTES:
                _keep_digest(hash_file, stat, digest)
    return f"{stat.st_size} bytes, sha256 {digest[:16]}"


def _hash_file(path: str) -> Path | None:
    """Returns the file for the hash of a path on this host, or None without a cache folder."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    name = hashlib.sha256(platform.node().encode() + b":" + os.fsencode(path)).hexdigest()
    return caches / "tw_jax" / "fingerprints" / f"{name}.json"


def _facts(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _kept_digest(hash_file: Path | None, stat: os.stat_result) -> str | None:
    """Returns the kept hash of a file with these facts, or None."""
    try:
        row = json.loads(hash_file.read_text(encoding="utf-8")) if hash_file is not None else {}
        return row["sha256"] if row["facts"] == _facts(stat) and len(row["sha256"]) == 64 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the file is hashed again


def _keep_digest(hash_file: Path, stat: os.stat_result, digest: str) -> None:
    # Without space or permission nothing is kept, and the file is hashed again next time.
    with contextlib.suppress(OSError):
        hash_file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(hash_file, json.dumps({"facts": _facts(stat), "sha256": digest}) + "\n")
