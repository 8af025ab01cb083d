"""The problem and the trajectory of a record, and a hash that distinguishes the file it is in."""

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
"""Smaller files are hashed each time, which takes some ten milliseconds."""
SETTLED_NS = 2 * 10**9
"""Clocks of file systems tick at most this slowly."""


def problem_of(record: Record) -> Problem:
    """The problem of a record of any kind."""
    match record:
        case Problem():
            return record
        case Example():
            return record.problem
        case Rollout():
            return Problem(id=record.id, question=record.question, answer=record.answer, task="")


def trajectory_of(protocol: Protocol, rollout: Rollout) -> Trajectory:
    """The trajectory of a stored rollout, rebuilt from its ids.

    Raises:
      RecordError: the protocol could not have made these calls.
    """
    calls = [
        Result(call.sampled, call.logp, call.stop_reason is StopReason.ERROR)
        for call in rollout.calls
    ]
    return rebuild(protocol, rollout.prompt, calls)


def fingerprint(path: str | Path) -> str:
    """The size of a file and a hash of all its bytes.

    The hash of a large file is kept in the user's cache folder (XDG_CACHE_HOME, ~/.cache), and used
    as long as device, inode, size and both times of the file are the same.

    Raises:
      OSError: the file cannot be read.
      ValueError: it was changed while it was being read.
    """
    path = os.path.realpath(path)
    kept = _record_of(path)
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        digest = _kept_digest(kept, stat)
        if digest is None:
            began = time.time_ns()
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if _facts(os.fstat(file.fileno())) != _facts(stat):
                raise ValueError(
                    f"{path} was changed while it was being read. Start again once it is written."
                )
            # A file that was written a moment ago may be written again at the same time of its
            # clock, and nothing but its bytes would tell.
            is_settled = max(stat.st_mtime_ns, stat.st_ctime_ns) < began - SETTLED_NS
            if kept is not None and is_settled and stat.st_size >= KEPT_BYTES:
                _keep_digest(kept, stat, digest)
    return f"{stat.st_size} bytes, sha256 {digest[:16]}"


def _record_of(path: str) -> Path | None:
    """The file that holds the hash of a path on this host; None where there is no cache folder."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    name = hashlib.sha256(platform.node().encode() + b":" + os.fsencode(path)).hexdigest()
    return caches / "tw_jax" / "fingerprints" / f"{name}.json"


def _facts(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _kept_digest(kept: Path | None, stat: os.stat_result) -> str | None:
    """The hash that was kept of a file of these facts; None where there is none."""
    try:
        row = json.loads(kept.read_text(encoding="utf-8")) if kept is not None else {}
        return row["sha256"] if row["facts"] == _facts(stat) and len(row["sha256"]) == 64 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is only a hash that was not kept


def _keep_digest(kept: Path, stat: os.stat_result, digest: str) -> None:
    with contextlib.suppress(OSError):  # no room, no rights: the file is hashed again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(kept, json.dumps({"facts": _facts(stat), "sha256": digest}) + "\n")
