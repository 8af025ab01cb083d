"""What a stored record stands for: the problem that it asks, the trajectory that was drawn.

`data/records.py` knows files; this file knows what their rows mean to the programs that sample,
grade and train, and to the processes of a job, of which one reads and writes them for all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tw_jax import hosts
from tw_jax.data import records
from tw_jax.data.records import Example, Problem, Record, Rollout
from tw_jax.forkjoin.calls import Hit, Trajectory
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.threadweaver import ThreadWeaver

_END_BYTES = 2**20


def problem_of(record: Record) -> Problem:
    """The problem of a record of any kind."""
    match record:
        case Problem():
            return record
        case Example():
            return record.problem
        case Rollout():
            return Problem(id=record.id, question=record.question, answer=record.answer, task="")


def trajectory_of(protocol: ThreadWeaver, rollout: Rollout) -> Trajectory:
    """The trajectory of a stored rollout, rebuilt from its ids.

    Raises:
      RecordError: the protocol could not have made these calls.
    """
    calls = [Result(call.sampled, call.logp, call.hit is Hit.ERROR) for call in rollout.calls]
    return rebuild(protocol, rollout.prompt, calls)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[tuple[dict[str, Record], Callable[[Record], None]]]:
    """What an interrupted program had finished, and what adds to it; see `records.append`.

    Process 0 of a job reads and writes the file and tells the others, for a disk that hosts share
    may show them what it held a while ago.

    Yields:
      (the records by their ids, add), `add` being told of the same records in every process.
    """
    if not hosts.is_first():
        rows = hosts.gather(None)[0]
        had = [
            records.from_json(row, where=f"{path}:{n + 1}", task="", index=n)
            for n, row in enumerate(rows)
        ]
        yield {record.id: record for record in had}, lambda record: None
        return
    with records.append(path) as add:
        had = list(records.read(path))
        hosts.gather([records.to_json(record) for record in had])
        yield {record.id: record for record in had}, add


def fingerprint(path: str | Path) -> str:
    """What tells a file from another one of any size: its bytes, and a hash of its two ends."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(size - _END_BYTES, 0))
        digest.update(file.read(_END_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:12]}"
